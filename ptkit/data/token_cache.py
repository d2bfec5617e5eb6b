"""Rows as token ids, kept on disk: tokenising is most of a run's start, and the same every time.

Files lie in `$PTKIT_CACHE/tokens` (default `~/.cache/ptkit/tokens`). Their name is a digest of all
that the ids depend on: the tokenizer, the task's lengths and labels, and every row. They may be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path

import numpy as np
import tokenizers
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from transformers import PreTrainedTokenizerBase

from ptkit.data.encode import encode_examples
from ptkit.data.encoded import EncodedExample
from ptkit.data.task import Example
from ptkit.formats import atomic
from ptkit.formats.cache_home import cache_home
from ptkit.recipe.tasks import ConversationTask, Task

#: Fewer rows are tokenised as fast as they are read.
FEWEST_ROWS = 1_000
#: Counted up when the same rows and tokenizer give other ids than before.
_VERSION = 2
#: The least recently used files go when all take more bytes than this.
MOST_BYTES = 2_000_000_000


def cache_folder() -> Path:
    """Where token ids are kept; the environment variable `PTKIT_CACHE` moves it."""
    return cache_home() / "tokens"


def encode_cached(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    pairs: bool = False,
) -> list[EncodedExample]:
    """`encode_examples`, read from the cache where the same rows have been encoded before."""
    # A slow tokenizer does not say what it is made of, nor any which chat template is its own.
    named = tokenizer.is_fast and not isinstance(task, ConversationTask)
    if len(examples) < FEWEST_ROWS or not named:
        return encode_examples(examples, tokenizer, task, pairs=pairs)
    path = cache_folder() / f"{_digest(examples, tokenizer, task, pairs)}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError):  # absent or damaged
        found = _read(path)
        if len(found) == len(examples):
            path.touch()  # used just now
            return found
    encoded = encode_examples(examples, tokenizer, task, pairs=pairs)
    with contextlib.suppress(OSError):  # a home that cannot be written to costs time only
        _write(path, encoded)
    return encoded


def _digest(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: Task, pairs: bool
) -> str:
    made_of = json.loads(tokenizer.backend_tokenizer.to_str())
    # What its last call was asked for, not what it is.
    rules = {k: v for k, v in made_of.items() if k not in ("truncation", "padding")}
    settings = [
        _VERSION, tokenizers.__version__, rules, type(tokenizer).__name__, tokenizer.eos_token_id,
        pairs,
        task.model_dump(mode="json", exclude={"data", "metrics"}),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for example in examples:
        digest.update(repr((example.input, example.target, example.words)).encode())
    return digest.hexdigest()[:32]


def _read(path: Path) -> list[EncodedExample]:
    tensors = load_file(path)
    inputs, targets = (
        [ids[a:b] for a, b in pairwise(accumulate(tensors[f"{part}_lengths"].tolist(), initial=0))]
        for part, ids in ((part, tensors[f"{part}_ids"].tolist()) for part in ("input", "target"))
    )
    return [EncodedExample(i, t) for i, t in zip(inputs, targets, strict=True)]


def _write(path: Path, encoded: Sequence[EncodedExample]) -> None:
    tensors = {}
    for part in ("input", "target"):
        rows = [getattr(row, f"{part}_ids") for row in encoded]
        tensors[f"{part}_ids"] = np.fromiter(chain.from_iterable(rows), dtype=np.int32)
        tensors[f"{part}_lengths"] = np.fromiter(map(len, rows), dtype=np.int32)
    atomic.write_bytes(path, save(tensors))
    newest_first = sorted(path.parent.glob("*.safetensors"), key=_used, reverse=True)
    for file, upto in zip(
        newest_first, accumulate(f.stat().st_size for f in newest_first), strict=True
    ):
        if upto > MOST_BYTES and file != path:
            file.unlink(missing_ok=True)


def _used(file: Path) -> float:
    return file.stat().st_mtime
