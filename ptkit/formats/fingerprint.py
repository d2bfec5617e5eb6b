"""A fingerprint of a base model: which weights and tokenizer an adapter was made for.

The model and its precision are separate. The fingerprint is of the checkpoint's own names and
values. So it is one for whatever type or quantisation the checkpoint is loaded in. Checkpoints of
one model in different precisions (a GGUF file of four bits, the original) have different values.
Their sketches, a few values of all layers, are as close as the coarser precision allows.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptkit.formats.checkpoint import Sampled, of_model, sample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Values of a sketch: of vectors (norms, biases), and as many of matrices.
SKETCH = 256
#: How far vectors may be apart, as a share of their length. Quantisers leave them alone, training
#: moves them; bfloat16 keeps a value to one part in 512.
_VECTORS_APART = 0.004
#: How far matrices may be apart, by bits of the coarser precision. Rounding a normal variable to
#: blocks of 32 is off by 0.3 to 0.6 % of its length at eight bits, 7 to 10 % at four, 20 to 35 % at
#: two and three; another training of the same architecture is off by 140 %.
_MATRICES_APART = ((16, 0.004), (8, 0.03), (4, 0.15), (0, 0.4))
_BITS = {"float32": 32, "F32": 32, "bfloat16": 16, "BF16": 16, "float16": 16, "F16": 16,
         "int8": 8, "nf4": 4}  # fmt: skip
_LAYERED = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Identity:
    """What a base model is.

    fingerprint: 16 hex digits over names, shapes and sampled values of all its tensors
    sketch: a digest of the names and shapes of its layers, and values of them, as text. It is empty
        where the model is nothing but layers without numbers
    """

    fingerprint: str
    sketch: str = ""

    @classmethod
    def of(cls, tensors: Sequence[Sampled]) -> Identity:
        """The identity of a checkpoint with these tensors, which are sorted by name."""
        digest = hashlib.sha256()
        for tensor in tensors:
            digest.update(f"{tensor.name} {tensor.shape}".encode())
            digest.update(tensor.values.view(torch.int16).numpy().tobytes())
        return cls(digest.hexdigest()[:16], _sketch(tensors))


def of_loaded(model: PreTrainedModel, without: Collection[str] = ()) -> Identity:
    """The identity of a model in memory, in a floating type.

    without: names of modules that are left out, because they were never pretrained
    """
    return Identity.of(of_model(model, without))


def is_same_model(sketch: str, precision: str, other: str, other_precision: str) -> bool:
    """Whether two sketches are of one model in two precisions, as far as rounding lets them tell.

    Two checkpoints of the same precision with different fingerprints are different models.
    """
    if not sketch or not other or precision == other_precision:
        return False
    (names, *values), (other_names, *other_values) = sketch.split(":"), other.split(":")
    if names != other_names or [len(v) for v in values] != [len(v) for v in other_values]:
        return False
    bits = min(_bits(precision), _bits(other_precision))
    matrices_apart = next(apart for least, apart in _MATRICES_APART if bits >= least)
    limits = (_VECTORS_APART, matrices_apart)
    return all(
        _apart(a, b) <= limit for a, b, limit in zip(values, other_values, limits, strict=True)
    )


def legacy_fingerprint(model: PreTrainedModel, without: Collection[str] = ()) -> str:
    """What adapters without a sketch recorded: of the loaded modules' names, ties twice."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if any(name.startswith(f"{module}.") for module in without):
            continue
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(sample(value).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """16 hex digits over the vocabulary (tokens and their ids)."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()[:16]


def _sketch(tensors: Sequence[Sampled]) -> str:
    """Layers have one name in every checkpoint of a model; what is beside them is tied in one and
    stored twice in another, so it is left out."""
    layered = [t for t in tensors if _LAYERED.search(f".{t.name}") and t.shape]
    if not layered:
        return ""
    names = hashlib.sha256(repr([(t.name, t.shape) for t in layered]).encode()).hexdigest()[:8]
    vectors = [t for t in layered if len(t.shape) == 1]
    matrices = [t for t in layered if len(t.shape) > 1]
    return ":".join([names, _some_values(vectors), _some_values(matrices)])


def _some_values(tensors: Sequence[Sampled]) -> str:
    if not tensors:
        return ""
    picked = []
    for number in range(SKETCH):
        values = tensors[number * len(tensors) // SKETCH].values
        picked.append(values[number * 97 % len(values)])  # 97: other places in every tensor
    return base64.b64encode(torch.stack(picked).view(torch.int16).numpy().tobytes()).decode()


def _apart(a: str, b: str) -> float:
    first, second = _values(a), _values(b)
    scale = max(float(first.norm()), float(second.norm()))
    return float((first - second).norm()) / scale if scale else 0.0


def _values(text: str) -> Tensor:
    raw = bytearray(base64.b64decode(text))
    return torch.frombuffer(raw, dtype=torch.bfloat16).float() if raw else torch.zeros(0)


def _bits(precision: str) -> int:
    """Bits of a value: those of a type's name, of ggml's types the number in it."""
    number = re.search(r"Q(\d)", precision)
    return _BITS.get(precision, int(number[1]) if number else 32)


def file_stamp(file: str) -> tuple[int, int, int] | None:
    """What a change of the file on disk would change: inode, size, time of writing; None without
    it."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
