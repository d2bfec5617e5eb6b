"""Which method, for how long: by the number of rows and the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ptkit.drafting.base_facts import BaseFacts
from ptkit.drafting.lengths import Lengths
from ptkit.errors import UserError, did_you_mean
from ptkit.methods.catalogue import method_sections
from ptkit.recipe.elsewhere import elsewhere
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.model_names import TINY_EN, WHEELS
from ptkit.training.autotune import finds_rate

#: Fewer training rows than this are fitted too soon by long prefixes (docs/quality.md).
FEW_ROWS = 200
#: Layers' parameters from which a soft prompt does as well as more (Lester et al. 2021).
LARGE = 10_000_000_000
#: Bases on which the default rate was measured.
_MEASURED = {TINY_EN, *WHEELS}
_LEAST_STEPS, _MOST_STEPS = 100, 1_000


@dataclass(frozen=True)
class Plan:
    """Methods and training of a draft. comments: by key; reasons: in lines."""

    methods: list[dict[str, Any]]
    train: dict[str, Any]
    comments: dict[str, str]
    reasons: tuple[str, ...]


def planned(
    base: BaseFacts,
    kind: str,
    rows: int,
    lengths: Lengths,
    wanted: str | None = None,
    settings: Mapping[str, Any] | None = None,
    held_out: int | None = None,
) -> Plan:
    """What to train for `rows` training rows of a task of this kind.

    wanted: the method's kind, where it was named
    settings: keys of the method and of `train`, in place of what fits
    held_out: validation rows; None: a tenth of the others

    Raises UserError for a method or a key that there is not.
    """
    method, why = _method(base, rows, kind)
    if wanted is not None:
        method, why = {**_settings_of(wanted, method), "kind": wanted}, "as was asked for"
    own, of_train = _told_apart(method["kind"], settings or {})
    method |= own
    if own:
        why += f"; the call gave {', '.join(f'`{key}`' for key in own)}"
    # A pair is read as two rows, the prompt with each of its answers.
    tokens = 2 * lengths.input if kind == "preference" else lengths.input + lengths.target
    train, steps_why = _training(rows, tokens, of_train)
    if method.get("learning_rate") == "auto" and "learning_rate" not in own:
        if finds_rate(TrainSection(**train), max(1, rows // 10) if held_out is None else held_out):
            why += "; a short test finds the learning rate"
        else:
            del method["learning_rate"]
            why += "; the learning rate is the default one, because the run is too short to test it"
    headed = kind in ("sequence_classification", "token_classification")
    untrained: list[dict[str, Any]] = [] if headed else [{"kind": "base"}]
    in_words = base.kind == "decoder" and not headed
    if in_words and kind not in ("chat", "preference") and _demonstrations_fit(base, lengths):
        untrained.append({"kind": "text_prompt", "examples": 3})
    untrained = [entry for entry in untrained if entry["kind"] != method["kind"]]
    others = "\n".join([
        "  # Others to compare it with (ptkit compare); `ptkit train` then needs --method:",
        *(f"  # - kind: {other}" for other in ("prompt_tuning", "prefix_tuning", "lora")
          if other != method["kind"]),
    ])  # fmt: skip
    comments = {
        "methods": "What is compared; untrained ones run once. `ptkit train` trains the last.",
        "methods.base": "The base as it is.",
        "methods.text_prompt": "Nothing is trained: demonstrations are written before the input.",
        f"methods.{method['kind']}": f"{why[:1].upper()}{why[1:]}.",
        "methods.": others,
        "train": f"{steps_why[:1].upper()}{steps_why[1:]}.",
    }
    return Plan([*untrained, method], train, comments, (why, steps_why))


def _settings_of(wanted: str, drafted: dict[str, Any]) -> dict[str, Any]:
    """What was drafted for another method and `wanted` can be told, too."""
    known = method_sections()
    if wanted not in known:
        raise UserError(f"no method `{wanted}`; {did_you_mean(wanted, known)}")
    auto = known[wanted].shares_batch  # others cannot find their rate themselves
    fields = known[wanted].model_fields
    return {k: v for k, v in drafted.items() if k in fields and (auto or v != "auto")}


def _told_apart(kind: str, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The method's own settings, and those of `train`."""
    of_method = {*method_sections()[kind].model_fields} - {"kind", "label"}
    of_train = {*TrainSection.model_fields}
    known = of_method | of_train
    for key in settings:
        if key not in known:
            raise UserError(
                f"`{kind}` and `train` have no setting `{key}`; "
                + (elsewhere(key, [*known]) or did_you_mean(key, known))
            )
    own = {key: value for key, value in settings.items() if key in of_method}
    rest = {key: value for key, value in settings.items() if key not in of_method}
    try:
        read = TrainSection.model_validate(rest).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "train"
        raise UserError(f"`{key}`: {first['msg'].removeprefix('Value error, ')}") from error
    return own, {key: read.get(key) for key in rest}


def _method(base: BaseFacts, rows: int, kind: str) -> tuple[dict[str, Any], str]:
    if base.parameters is not None and base.parameters >= LARGE:
        settings: dict[str, Any] = {"kind": "prompt_tuning", "num_virtual_tokens": 20}
        why = "on a base this large a soft prompt does as well as methods with more parameters"
    elif rows < FEW_ROWS:
        tokens = 5 if "classification" in kind else 10
        settings = {"kind": "prefix_tuning", "num_virtual_tokens": tokens}
        why = f"a prefix of {tokens} tokens, because {rows:,} rows are few and a longer one fits "
        why += "them too soon"
    else:
        settings = {"kind": "prefix_tuning", "num_virtual_tokens": 20}
        why = f"a prefix of 20 tokens: of the prompt methods it learns most from {rows:,} rows"
    if base.id not in _MEASURED and base.kind == "decoder" and kind != "token_classification":
        settings["learning_rate"] = "auto"
    return settings, why


def _training(rows: int, tokens: int, given: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """`train` of a recipe, and why it is so.

    tokens: the most of an example; given: its keys that were asked for
    """
    batch, accumulated = (16, 1) if tokens <= 256 else (8, 1) if tokens <= 1024 else (4, 2)
    batch = min(batch, max(1, rows // 2))
    if "batch_size" in given:
        batch, accumulated = given["batch_size"], 1
    accumulated = given.get("gradient_accumulation", accumulated)
    epochs = 20 if rows < FEW_ROWS else 5 if rows < 2_000 else 2
    wanted = -(-rows * epochs // (batch * accumulated))
    steps = given.get("steps", min(_MOST_STEPS, max(_LEAST_STEPS, wanted)))
    read = steps * batch * accumulated / rows
    train: dict[str, Any] = {"steps": steps, "batch_size": batch}
    if accumulated > 1:
        train["gradient_accumulation"] = accumulated
    train |= given
    why = f"{steps:,} steps of {batch * accumulated} rows read the data {read:.1f} times"
    return train, f"{why}, and the best step by validation loss is kept"


def _demonstrations_fit(base: BaseFacts, lengths: Lengths) -> bool:
    return base.positions is None or 4 * (lengths.input + lengths.target) <= base.positions
