"""Rows as token ids, kept on disk: tokenising is most of a run's start, and the same every time.

Files lie in `$PTKIT_CACHE/tokens` (default `~/.cache/ptkit/tokens`). Their name is a digest of all
that the ids depend on: the tokenizer, the task's lengths and labels, and every row. They may be
deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tokenizers
from transformers import PreTrainedTokenizerBase

from ptkit.data.arrow_file import ArrowFile, write_arrow
from ptkit.data.chat_rows import ChatEncoder, ChatNotes, ChatRows, Cut, cut_example
from ptkit.data.chat_template import ChatTemplate
from ptkit.data.encode import encode_examples
from ptkit.data.encoded import EncodedExample, PairExample
from ptkit.data.encoded_rows import (
    PAIR_SCHEMA,
    SCHEMA,
    EncodedPairs,
    EncodedRows,
    batch_of,
    pair_batch_of,
)
from ptkit.data.examples import FEWEST_ROWS, Example, Facts
from ptkit.data.lazy import Mapped
from ptkit.data.pair_rows import PairEncoder
from ptkit.formats.cache_home import cache_home, make_room
from ptkit.recipe.tasks import ChatTask, ConversationTask, PreferenceTask, Task

#: Counted up when the same rows and tokenizer give other ids than before.
_VERSION = 4
#: The least recently used files go when all take more bytes than this.
MOST_BYTES = 20_000_000_000
#: Rows that are encoded at a time.
_BATCH = 2_000
#: Of a row that is a part of a conversation, which (see `Cut`).
_CUT_SCHEMA = pa.schema([*SCHEMA, *(pa.field(name, pa.int32()) for name in Cut._fields)])


def cache_folder() -> Path:
    """Where token ids are kept; the environment variable `PTKIT_CACHE` moves it."""
    return cache_home() / "tokens"


def encode_cached(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    pairs: bool = False,
) -> Sequence[EncodedExample]:
    """`encode_examples`. Many rows are read from a file, which holds those that were encoded
    before."""
    if isinstance(task, PreferenceTask):
        return encode_pairs_cached(examples, tokenizer, task).encoded
    # A slow tokenizer does not say what it is made of.
    if len(examples) < FEWEST_ROWS or not tokenizer.is_fast:
        return encode_examples(examples, tokenizer, task, pairs=pairs)

    def batches(_: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        for some in _parts(examples):
            yield batch_of(encode_examples(some, tokenizer, task, pairs=pairs))

    # What is asked before the last answer is a part of what is learnt of a conversation.
    told = ["asked", *_of_template(tokenizer, task)] if isinstance(task, ChatTask) else []
    name = _digest(examples, tokenizer, task, [pairs, *told])
    file = _cached(name, SCHEMA, batches)
    if file is None or len(file) != len(examples):
        return encode_examples(examples, tokenizer, task, pairs=pairs)
    return EncodedRows(file)


def encode_conversations(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: ConversationTask
) -> ChatRows:
    """The rows that training reads of conversations or pairs, and what was decided on the way."""
    if isinstance(task, PreferenceTask):
        return encode_pairs_cached(examples, tokenizer, task)
    assert isinstance(task, ChatTask)
    return encode_chats_cached(examples, tokenizer, task)


def encode_chats_cached(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: ChatTask
) -> ChatRows:
    """The rows that training reads of conversations (see `ChatEncoder.rows`); many are read from a
    file."""
    encoder = ChatEncoder(tokenizer, task)
    if len(examples) < FEWEST_ROWS:
        return encoder.rows(examples)

    def batches(told: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        notes = ChatNotes()
        for number, some in enumerate(_parts(examples)):
            found = encoder.cuts(some, notes, number * _BATCH)
            cuts = np.array([cut for cut, _ in found], dtype=np.int32).reshape(-1, 3)
            columns = dict(zip(Cut._fields, cuts.T, strict=True))
            yield batch_of([row for _, row in found], columns)
        told |= asdict(notes)

    name = _digest(examples, tokenizer, task, ["learnt", *_of_template(tokenizer, task)])
    file = _cached(name, _CUT_SCHEMA, batches)
    if file is None:
        return encoder.rows(examples)
    columns = [
        np.concatenate([batch.column(name).to_numpy() for batch in file.mapped()])
        for name in Cut._fields
    ]

    def read(number: int) -> Example:
        return cut_example(examples, Cut(*(int(column[number]) for column in columns)))

    return ChatRows(Mapped(read, range(len(file))), EncodedRows(file), ChatNotes(**file.notes))


def encode_pairs_cached(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: PreferenceTask
) -> ChatRows:
    """The rows that training reads of pairs (see `PairEncoder.rows`); many are read from a file."""
    encoder = PairEncoder(tokenizer, task)
    if len(examples) < FEWEST_ROWS or not tokenizer.is_fast:
        return encoder.rows(examples)

    def batches(told: dict[str, Any]) -> Iterator[pa.RecordBatch]:
        notes = ChatNotes()
        for some in _parts(examples):
            found = encoder.rows(some)
            notes.add(found.notes)
            yield pair_batch_of([row for row in found.encoded if isinstance(row, PairExample)])
        told |= asdict(notes)

    name = _digest(examples, tokenizer, task, ["pairs", *_of_template(tokenizer, task)])
    file = _cached(name, PAIR_SCHEMA, batches)
    if file is None or len(file) != len(examples):
        return encoder.rows(examples)
    return ChatRows(examples, EncodedPairs(file), ChatNotes(**file.notes))


def _parts(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """The examples in order, so many at a time: each part is read and given back."""
    left = iter(examples)
    while some := [*islice(left, _BATCH)]:
        yield some


def _cached(
    name: str, schema: pa.Schema, batches: Callable[[dict[str, Any]], Iterator[pa.RecordBatch]]
) -> ArrowFile | None:
    """The file called `name`, which is written where it is not there. None where it cannot be: a
    home that cannot be written to costs memory and time only.

    batches: what to write; adds to what it is given what the file is to note
    """
    path = cache_folder() / f"{name}.arrow"
    with contextlib.suppress(OSError, pa.ArrowInvalid, KeyError, ValueError):  # absent or damaged
        found = ArrowFile(path)
        path.touch()  # used just now
        return found
    notes: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        write_arrow(path, schema, batches(notes), notes)
        make_room(path, MOST_BYTES)
        return ArrowFile(path)
    return None


def _of_template(tokenizer: PreTrainedTokenizerBase, task: ConversationTask) -> list[Any]:
    """All that the text of a conversation depends on, beside the conversation and the task."""
    own = tokenizer.chat_template
    told = json.dumps([own, task.chat_template])
    dated = ChatTemplate(tokenizer, task.chat_template).dated
    day = date.today().isoformat() if dated else ""
    return [told, tokenizer.special_tokens_map, sorted(tokenizer.added_tokens_decoder), day]


def _digest(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: Task, more: list[Any]
) -> str:
    made_of = json.loads(tokenizer.backend_tokenizer.to_str())
    # What its last call was asked for, not what it is.
    rules = {k: v for k, v in made_of.items() if k not in ("truncation", "padding")}
    settings = [
        _VERSION, tokenizers.__version__, rules, type(tokenizer).__name__, tokenizer.eos_token_id,
        more, task.model_dump(mode="json", exclude={"data", "metrics"}), Facts.of(examples).digest,
    ]  # fmt: skip
    told = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:32]
