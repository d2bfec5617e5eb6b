"""PaddleNLP's prefixes: keys and values as a NumPy array, beside a pickle that is left alone."""

from __future__ import annotations

from typing import Final

import numpy as np
import torch

from ptkit.errors import AdapterError
from ptkit.hub.foreign import Foreign
from ptkit.hub.foreign.made import turned_prefix_files
from ptkit.hub.foreign.source import Source
from ptkit.runtime.base_model import Base

LIBRARY = "PaddleNLP"
NEEDS_BASE = True
FORMATS = [
    (
        "PaddleNLP, prefix (direct or MLP) of Llama",
        "`prefix_config.json`, `pre_caches.npy`",
        "prefix tuning",
        "keys turned by the number of virtual tokens; its pickle is not opened",
        "live, kept",
    ),
    (
        "PaddleNLP, prefix of another family",
        "`prefix_config.json`, `pre_caches.npy`",
        "refused",
        "each family there has a layout of its own",
        "not tried",
    ),
]
_SETTINGS: Final = "prefix_config.json"
_VALUES: Final = "pre_caches.npy"


def found(source: Source) -> str | None:
    """What `source` is, where PaddleNLP wrote it."""
    if any(name.endswith(".pdparams") for name in source.names) or (
        _VALUES in source.names and source.settings(_SETTINGS)
    ):
        return "a prefix of PaddleNLP"
    return None


def why_not(source: Source) -> str | None:
    """Why it is refused: without the array of its keys and values, there is only a pickle."""
    if _VALUES in source.names:
        return None
    return f"it lacks `{_VALUES}`, and the other file is a pickle of another framework"


def read(source: Source, base: Base | None) -> Foreign:
    """The array as prefix tuning. Raises AdapterError for another family than Llama, and where it
    is no such array."""
    assert base is not None
    path = source.path / _VALUES
    family = base.model.config.model_type
    if family != "llama":
        raise AdapterError(
            f"{source.path}: PaddleNLP has a layout for each family, and only that of Llama was "
            f"tried, not the one of `{family}`"
        )
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise AdapterError(f"{path} is not a NumPy array of numbers ({error})") from error
    if values.dtype.kind != "f" or values.ndim != 5 or values.shape[1] != 2 or not values.size:
        raise AdapterError(
            f"{path} holds {values.dtype} {list(values.shape)}; a prefix has floats `[layers, 2, "
            "heads, tokens, width]`"
        )
    layers, _, heads, tokens, width = values.shape
    shape = base.layout.widest
    if (layers, heads, width) != (len(base.layout), shape.kv_heads, shape.key_dim):
        raise AdapterError(
            f"{path} is for {layers} layers of {heads} heads of {width}; {base.id} has "
            f"{len(base.layout)} of {shape.kv_heads} of {shape.key_dim}"
        )
    # [layers, 2, heads, tokens, width] -> [tokens, layers, 2, heads, width]
    flat = torch.from_numpy(values.copy()).permute(3, 0, 1, 2, 4).reshape(tokens, -1)
    return Foreign(turned_prefix_files(flat, base, str(source.path)))
