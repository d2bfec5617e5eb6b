"""A KV prefix on disk: a folder with `adapter.json` and `prefix.safetensors`."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ptkit.errors import AdapterError

#: Of the two files together; another one is refused. 2 brought `chat`.
FORMAT = 2
ABOUT, TENSORS = "adapter.json", "prefix.safetensors"
#: Bytes that `adapter.json`, and the header of the tensors, may have.
_SMALL = 1_000_000
_NUMBERS = ("virtual_tokens", "layers", "kv_heads", "head_dim")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ChatRecord:
    """How the adapter is asked in conversations.

    template: Jinja's text, where it was trained on conversations; None: the base's own
    system: the system prompt of conversations that bring none
    question: Jinja's text for a single question, where it was trained on inputs of one form
    ends: token ids at which an answer ends, beside the base's own
    lead: token ids that every prompt begins with
    """

    template: str | None = None
    system: str | None = None
    question: str | None = None
    ends: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()

    @classmethod
    def read(cls, found: Any) -> ChatRecord:
        """From the value of `chat`. Raises AdapterError where it is something else."""
        if not isinstance(found, dict):
            raise AdapterError(f"{ABOUT}: `chat` is missing or of another type")
        texts: dict[str, Any] = {n: found.get(n) for n in ("template", "system", "question")}
        for name, text in texts.items():
            if text is not None and not isinstance(text, str):
                raise AdapterError(f"{ABOUT}: `chat.{name}` is neither a text nor null")
        ids: dict[str, Any] = {name: found.get(name) for name in ("ends", "lead")}
        for name, tokens in ids.items():
            if not isinstance(tokens, list) or not all(_is_id(token) for token in tokens):
                raise AdapterError(f"{ABOUT}: `chat.{name}` is no list of token ids")
        return cls(**texts, ends=tuple(ids["ends"]), lead=tuple(ids["lead"]))


@dataclass(frozen=True)
class PrefixRecord:
    """What `adapter.json` states.

    virtual_tokens, layers, kv_heads, head_dim: tensors `keys.LAYER` and `values.LAYER` are
        `[kv_heads, virtual_tokens, head_dim]`, keys as their positions turned them
    dtype: of the tensors; sha256: of their file
    base: the base it was made for: `id`, `fingerprint`, `sketch`, `precision`
    rope: the base's rotary settings; None where it has none
    chat: how it is asked in conversations
    made_from: `method`, `name` and `template` of the adapter, and what it scored; for people only
    """

    virtual_tokens: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    sha256: str
    base: dict[str, Any]
    rope: dict[str, Any] | None = None
    chat: ChatRecord = ChatRecord()
    made_from: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        values = 2 * self.layers * self.kv_heads * self.virtual_tokens * self.head_dim
        return values * _DTYPES[self.dtype].itemsize

    def as_json(self) -> dict[str, Any]:
        """The content of `adapter.json`."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def read(cls, data: bytes) -> PrefixRecord:
        """From the bytes of `adapter.json`. Raises AdapterError where they are something else."""
        try:
            found = json.loads(data)
            json.dumps(found, allow_nan=False)  # a list of adapters can be sent
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"{ABOUT} is not JSON ({error}); export the adapter again") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            told = found.get("format") if isinstance(found, dict) else type(found).__name__
            raise AdapterError(f"{ABOUT} has format {told!r}, expected {FORMAT}; export it again")
        numbers: dict[str, Any] = {name: found.get(name) for name in _NUMBERS}
        for name, value in numbers.items():
            if type(value) is not int or not 0 < value < 2**24:
                raise AdapterError(f"{ABOUT}: `{name}` is {value!r}, expected a positive number")
        for name, kind in (("sha256", str), ("base", dict), ("made_from", dict)):
            if not isinstance(found.get(name), kind):
                raise AdapterError(f"{ABOUT}: `{name}` is missing or of another type")
        if re.fullmatch("[0-9a-f]{64}", found["sha256"]) is None:
            raise AdapterError(f"{ABOUT}: `sha256` is not a digest of 64 hex digits")
        if found.get("dtype") not in _DTYPES:
            raise AdapterError(f"{ABOUT}: `dtype` is none of {', '.join(_DTYPES)}")
        rope = found.get("rope")
        if rope is not None and not isinstance(rope, dict):
            raise AdapterError(f"{ABOUT}: `rope` is neither an object nor null")
        return cls(
            **numbers, dtype=found["dtype"], sha256=found["sha256"], base=found["base"], rope=rope,
            chat=ChatRecord.read(found.get("chat")), made_from=found["made_from"],
        )  # fmt: skip


def _is_id(token: Any) -> bool:
    return type(token) is int and 0 <= token < 2**31


def read_record(folder: Path) -> PrefixRecord:
    """The record in `folder`. Raises AdapterError when it is missing or damaged."""
    return PrefixRecord.read(_read(folder / ABOUT, _SMALL))


def read_checked(folder: Path, record: PrefixRecord) -> bytes:
    """The file of tensors in `folder`, whole, which is what `record` states.

    Raises AdapterError when it is missing, cut off, changed, of another shape or not finite.
    """
    data = _read(folder / TENSORS, record.nbytes + _SMALL)
    if len(data) < record.nbytes:
        raise AdapterError(
            f"{TENSORS} has {len(data):,} bytes, its values alone take {record.nbytes:,}; "
            "it is not written completely, or damaged"
        )
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise AdapterError(f"{TENSORS} is not the file that {ABOUT} was written for, or is damaged")
    tensors = tensors_of(data)
    expected = (record.kv_heads, record.virtual_tokens, record.head_dim)
    names = {f"{part}.{layer}" for part in ("keys", "values") for layer in range(record.layers)}
    if tensors.keys() != names:
        odd = min(tensors.keys() ^ names)
        raise AdapterError(f"{TENSORS}: `{odd}` is {'missing' if odd in names else 'not expected'}")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected or tensor.dtype != _DTYPES[record.dtype]:
            raise AdapterError(
                f"{TENSORS}: `{name}` is {tensor.dtype} {tuple(tensor.shape)}, expected "
                f"{record.dtype} {expected}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{TENSORS}: `{name}` holds values that are not finite")
    return data


def tensors_of(data: bytes) -> Mapping[str, Tensor]:
    """Name -> tensor. Raises AdapterError for what is not a safetensors file."""
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{TENSORS} is not a safetensors file: {error}") from None


def _read(file: Path, most: int) -> bytes:
    try:
        with file.open("rb") as opened:
            data = opened.read(most + 1)
    except FileNotFoundError:
        raise AdapterError(f"{file.name} is missing") from None
    except OSError as error:
        raise AdapterError(f"{file.name} cannot be read: {error.strerror}") from None
    if len(data) > most:
        raise AdapterError(f"{file.name} is larger than {most:,} bytes, which it never is")
    return data
