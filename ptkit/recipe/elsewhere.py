"""Where a key of a recipe is that was written somewhere else, or by another program's name."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from ptkit.methods.catalogue import method_sections
from ptkit.recipe.schema import Recipe

_STEPS = "`train.steps`, which is rows x epochs / (batch_size x gradient_accumulation)"
#: Other programs' names -> the key here.
_NAMES = {
    "lr": "learning_rate", "epochs": _STEPS, "num_epochs": _STEPS, "num_train_epochs": _STEPS,
    "max_steps": "steps", "num_steps": "steps", "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size", "gradient_accumulation_steps": "gradient_accumulation",
    "lr_scheduler_type": "schedule", "early_stopping_patience": "patience",
    "max_length": "max_input_tokens", "max_seq_length": "max_input_tokens",
    "max_new_tokens": "max_target_tokens", "prefix_length": "num_virtual_tokens",
    "prompt_length": "num_virtual_tokens", "pre_seq_len": "num_virtual_tokens",
    "model_name_or_path": "`model.id`", "torch_dtype": "dtype", "load_in_4bit": "`model.quantize`",
}  # fmt: skip


def elsewhere(key: str, known: list[str]) -> str | None:
    """A clause that ends an error about `key`: where it belongs, or None where that is unknown.

    known: the keys there are where it was written
    """
    name = _NAMES.get(key, key)
    if name.startswith("`"):
        return f"write {name}"
    if name in known:
        return f"did you mean `{name}`?" if name != key else None
    places = [*dict.fromkeys(_places(name))]
    return f"write it as {' or '.join(places)}" if places else None


def _places(name: str) -> Iterator[str]:
    """Where recipes have a key of this name."""
    for section, field in Recipe.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and name in inner.model_fields:
            yield f"`{section}.{name}`"
    if name in ("max_input_tokens", "max_target_tokens"):
        yield f"`task.{name}`"
    if name != "label" and any(name in s.model_fields for s in method_sections().values()):
        yield f"`methods.N.{name}`"
