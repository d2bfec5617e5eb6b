"""Whether a base draws anything at random while it is trained through."""

from __future__ import annotations

from torch import nn

from ptkit.errors import UserError
from ptkit.runtime.base_model import Base


def dropout_of(model: nn.Module) -> dict[str, float]:
    """Name -> probability of every dropout of `model` that is above zero.

    Dropout is a module, or a number that a layer hands to attention, or skips itself with
    (`layerdrop`).
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            found[name] = float(module.p)
            continue
        for key, value in vars(module).items():
            if "drop" in key and isinstance(value, int | float) and not isinstance(value, bool):
                found[f"{name}.{key}".lstrip(".")] = float(value)
    return {name: value for name, value in found.items() if value > 0}


def require_no_dropout(base: Base) -> None:
    """Raise UserError where adapters of `base` that share batches would not end as they do alone.

    What dropout draws for a row depends on the other rows of its batch.
    """
    found = dropout_of(base.model)
    if found:
        name, value = next(iter(found.items()))
        raise UserError(
            f"`train.together`: {base.id} has dropout ({value:g} in `{name}`), with which seeds "
            "that share a batch do not end as they do alone; leave `together` out"
        )
