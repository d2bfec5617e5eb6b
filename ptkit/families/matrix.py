"""Every method and every property on one model: what works, what is refused, what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

from ptkit.errors import ModelError, UserError, did_you_mean
from ptkit.families.contender import Contender, Ours
from ptkit.families.oracle import Merged
from ptkit.families.properties import PROPERTIES, Mismatch, Trial
from ptkit.families.shapes import FAMILIES, small
from ptkit.families.subject import NotApplicable, Subject, real_subject, small_subject
from ptkit.recipe.schema import ModelSection
from ptkit.runtime.base_model import load_base


class Status(StrEnum):
    """What came of one check."""

    works = "works"
    wrong = "wrong"
    """It answered, and the oracle says otherwise."""
    refused = "refused"
    """It said beforehand why it does not."""
    raises = "raises"
    not_applicable = "n/a"


@dataclass(frozen=True)
class Cell:
    """One property of one method on one model. detail: the reason, where there is one."""

    model: str
    method: str
    property: str
    status: Status
    detail: str = ""


Make = Callable[[Subject, str], Contender]


def subject_of(model: str, *, full: bool = False) -> Subject:
    """What to check for `model`: a family's name, a hub id or a folder.

    full: the real weights instead of a small random model of the same shape. Raises ModelError
    when it cannot be found.
    """
    if full:
        return real_subject(load_base(ModelSection(id=model)))
    if model in FAMILIES:
        return small_subject(model, small(FAMILIES[model].config))
    subject = small_subject(model, small(_read_config(model)))
    _require_runs(subject)
    return subject


def _require_runs(subject: Subject) -> None:
    """Raise ModelError when the model, made small, does not run by itself."""
    assert subject.config is not None
    try:
        (row,) = subject.rows((3, 2))
        Merged(subject.base().model).logits(row)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(
            f"`{subject.config.model_type}` cannot be made small "
            f"({str(error).strip().splitlines()[0]}); check the real weights with --full"
        ) from error


def _read_config(model: str) -> PretrainedConfig:
    from ptkit.runtime.base_model import TINY_EN, TINY_EN_FOLDER

    source = str(TINY_EN_FOLDER) if model == TINY_EN else model
    if "/" not in source and not Path(source).is_dir():
        raise ModelError(
            f"`{model}` is neither a family nor a folder nor a hub id `user/name`; "
            f"{did_you_mean(model, FAMILIES)}"
        )
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot read the config of `{model}`: {str(error).strip().splitlines()[0]}"
        ) from error


def run_matrix(
    subject: Subject,
    methods: Iterable[str] | None = None,
    make: Make = Ours.made,
    properties: Sequence[str] = tuple(PROPERTIES),
) -> Iterator[Cell]:
    """Check `subject`, property by property. Raises UserError for an unknown method."""
    chosen = subject.kind.methods if methods is None else tuple(methods)
    for method in chosen:
        if method not in subject.kind.methods:
            raise UserError(
                f"no method `{method}` is asked of an {subject.kind.name}; "
                f"{did_you_mean(method, subject.kind.methods)}"
            )
    heard = logging.get_verbosity()
    logging.set_verbosity_error()  # every check makes its model anew, warnings and all
    try:
        for method in chosen:
            on = one_layer(subject) if method == "infix" else subject
            trial = Trial(on, lambda s, method=method: make(s, method))  # type: ignore[misc]
            for name in properties:
                status, detail = _outcome(trial, name)
                yield Cell(subject.name, method, name, status, detail)
    finally:
        logging.set_verbosity(heard)


def _outcome(trial: Trial, name: str) -> tuple[Status, str]:
    try:
        PROPERTIES[name](trial)
    except Mismatch as error:
        return Status.wrong, str(error)
    except UserError as error:
        return Status.refused, str(error)
    except NotApplicable as error:
        return Status.not_applicable, str(error)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return Status.raises, f"{type(error).__name__}: {lines[0]}"
    return Status.works, ""


def one_layer(subject: Subject) -> Subject:
    """`subject` with its last kind of layer only and no window, where an infix of real tokens is
    the base reading them; a real model as it is."""
    config = copy.deepcopy(subject.config)
    if config is None:
        return subject
    settings: dict[str, object] = {"num_hidden_layers": 1}
    for pattern in ("layer_types", "no_rope_layers"):
        if getattr(config, pattern, None):
            settings[pattern] = list(getattr(config, pattern))[-1:]
    if getattr(config, "sliding_window", None) and not hasattr(config, "layer_types"):
        settings["sliding_window"] = None
    return subject.changed(**settings)
