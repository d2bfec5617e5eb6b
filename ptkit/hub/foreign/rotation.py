"""Keys of a prefix that stand at other positions than where they were made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.runtime.base_model import Base

#: Families whose rotary positions turn the first half of a head's values with the second.
_HALVES = ("llama", "mistral")
#: Kinds of scaling whose angles depend on the position alone, not on how long the text is.
_FIXED = ("default", "linear", "llama3", "yarn")


def turned(keys: Tensor, base: Base, positions: int) -> Tensor:
    """`keys` `[..., head_dim]` as they are to be where all that reads them stands `positions`
    further on (or, where it is negative, further back).

    Rotary attention depends on the distance of two positions alone (Su et al. 2021, section
    3.4.1), so turning a key by as many positions is exact. Raises AdapterError for a base whose
    positions are not known to be of this kind.
    """
    config: Any = base.model.config.get_text_config()
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in _HALVES or kind not in _FIXED:
        said = f"`{config.model_type}`" + ("" if kind == "default" else f" with `{kind}` scaling")
        raise AdapterError(
            f"keys cannot be moved to other positions on {said}: ptkit knows how they are turned "
            f"on {', '.join(_HALVES)}"
        )
    decoder: Any = base.model.base_model
    angles = (decoder.rotary_emb.inv_freq.double().cpu() * positions).repeat(2)
    first, second = keys.double().chunk(2, dim=-1)
    across = torch.cat([-second, first], dim=-1)
    return (keys.double() * angles.cos() + across * angles.sin()).to(keys.dtype)
