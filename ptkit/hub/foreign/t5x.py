"""Prompts of Google's prompt tuning on T5X (Lester et al. 2021): a NumPy array."""

from __future__ import annotations

import numpy as np
import torch

from ptkit.errors import AdapterError
from ptkit.hub.foreign import Foreign
from ptkit.hub.foreign.made import prompt_files
from ptkit.hub.foreign.source import Source
from ptkit.runtime.base_model import Base

LIBRARY = "Google's prompt tuning on T5X"
NEEDS_BASE = True
FORMATS = [
    (
        "Google's prompt tuning on T5X",
        "one `.npy` file `[tokens, hidden]`",
        "prompt tuning, or ptkit's encoder prompt",
        "the same embeddings before the text",
        "not tried",
    ),
]


def found(source: Source) -> str | None:
    """What `source` is, where it is one array."""
    arrays = [name for name in source.names if name.endswith(".npy")]
    return "a soft prompt as a NumPy array" if arrays and arrays == source.names else None


def why_not(source: Source) -> str | None:
    """None: names and settings do not tell."""
    return None


def read(source: Source, base: Base | None) -> Foreign:
    """The array as prompt tuning. Raises AdapterError where it is no matrix of numbers."""
    assert base is not None
    path = source.path / source.names[0] if source.path.is_dir() else source.path
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise AdapterError(f"{path} is not a NumPy array of numbers ({error})") from error
    if values.dtype.kind != "f":
        raise AdapterError(f"{path} holds {values.dtype} values, and a soft prompt has floats")
    note = "this format was not tried with the package that writes it"
    return Foreign(prompt_files(torch.from_numpy(values.copy()), base, str(path)), (note,))
