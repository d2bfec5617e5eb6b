"""Every method and every property on one model: what works, what is refused, what is wrong."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

from ptkit.errors import ModelError, UserError, did_you_mean
from ptkit.families.candidate import Candidate, PtkitCandidate
from ptkit.families.kinds import KINDS, ModelKind, kinds_of, used_as
from ptkit.families.model_under_test import ModelUnderTest, NotApplicable, real_model, small_model
from ptkit.families.oracle import Merged
from ptkit.families.properties import PROPERTIES
from ptkit.families.property_case import Mismatch, PropertyCase
from ptkit.families.shapes import FAMILIES, small
from ptkit.runtime.base_model import load_base
from ptkit.runtime.heads import Labels
from ptkit.runtime.named_models import source_of


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
class MatrixCell:
    """One property of one method on one model, used as `kind`. detail: the reason, where there is
    one."""

    model: str
    kind: str
    method: str
    property: str
    status: Status
    detail: str = ""


Make = Callable[[ModelUnderTest, str], Candidate]


def models_under_test(model: str, *, full: bool = False) -> list[ModelUnderTest]:
    """What to check for `model`, a family's name, a hub id or a folder: one for each kind it is of.

    full: the real weights instead of a small random model of the same shape, as what its
    checkpoint is for. Raises ModelError when it cannot be found.
    """
    if full:
        return [_real(model)]
    if model in FAMILIES:
        config = small(FAMILIES[model].config)
        return [small_model(model, config, kind) for kind in family_kinds(model)]
    config = small(_read_config(model))
    try:
        tested_models = [small_model(model, config, kind) for kind in kinds_of(config)]
        for tested in tested_models:
            (row,) = tested.rows((3, 2))
            Merged(tested.base().model).logits(row)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(
            f"`{config.model_type}` cannot be made small "
            f"({str(error).strip().splitlines()[0]}); check the real weights with --full"
        ) from error
    if not tested_models:
        raise ModelError(
            f"transformers has neither a language model nor a classifier of `{config.model_type}`, "
            "so there is nothing ptkit could train on it"
        )
    return tested_models


@functools.cache
def family_kinds(name: str) -> tuple[ModelKind, ...]:
    """The kinds that the family `name` is of."""
    return kinds_of(small(FAMILIES[name].config))


def model_under_test(model: str, kind: str | None = None) -> ModelUnderTest:
    """The one of `subjects_of` whose kind has the name `kind`; None: the first."""
    tested_models = models_under_test(model)
    return next(s for s in tested_models if kind in (None, s.kind.name))


def _real(model: str) -> ModelUnderTest:
    """The real weights of `model`, with the head its checkpoint has."""
    config: Any = _read_config(model)
    made = {*(config.architectures or ())}
    head = next((kind.head for kind in KINDS if kind.head is not None and type(config)
                 in (known := kind.loader._model_mapping) and known[type(config)].__name__ in made),
                None)  # fmt: skip
    labels = None
    if head is not None:
        labels = Labels(head, tuple(config.id2label[i] for i in sorted(config.id2label)))
    base = load_base(model, labels=labels)
    return real_model(base, used_as(base))


def _read_config(model: str) -> PretrainedConfig:
    source = source_of(model)
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
    tested: ModelUnderTest,
    methods: Iterable[str] | None = None,
    make: Make = PtkitCandidate.made,
    properties: Sequence[str] = tuple(PROPERTIES),
) -> Iterator[MatrixCell]:
    """Check `subject`, property by property. Raises UserError for an unknown method."""
    chosen = tested.kind.methods if methods is None else tuple(methods)
    for method in chosen:
        require_method(method, [tested])
    heard = logging.get_verbosity()
    logging.set_verbosity_error()  # every check makes its model anew, warnings and all
    try:
        for method in chosen:
            on = one_layer(tested) if method == "infix" else tested
            trial = PropertyCase(on, lambda s, method=method: make(s, method))  # type: ignore[misc]
            for name in properties:
                status, detail = _outcome(trial, name)
                yield MatrixCell(tested.name, tested.kind.name, method, name, status, detail)
    finally:
        logging.set_verbosity(heard)


def require_method(method: str, tested_models: Sequence[ModelUnderTest]) -> None:
    """Raise UserError when `method` is asked of none of `subjects`."""
    known = dict.fromkeys(name for s in tested_models for name in s.kind.methods)
    if method not in known:
        whom = f"{tested_models[0].name} ({', '.join(s.kind.name for s in tested_models)})"
        raise UserError(f"`{method}` is not asked of {whom}; {did_you_mean(method, known)}")


def _outcome(trial: PropertyCase, name: str) -> tuple[Status, str]:
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


def one_layer(tested: ModelUnderTest) -> ModelUnderTest:
    """`tested` with its last kind of layer only and no window. There an infix of real tokens is
    the base reading them. A real model is returned as it is."""
    config = copy.deepcopy(tested.config)
    if config is None:
        return tested
    settings: dict[str, object] = {"num_hidden_layers": 1}
    for pattern in ("layer_types", "no_rope_layers"):
        if getattr(config, pattern, None):
            settings[pattern] = list(getattr(config, pattern))[-1:]
    if getattr(config, "num_kv_shared_layers", None):
        settings["num_kv_shared_layers"] = 0
    if getattr(config, "sliding_window", None) and not hasattr(config, "layer_types"):
        settings["sliding_window"] = None
    return tested.changed(**settings)
