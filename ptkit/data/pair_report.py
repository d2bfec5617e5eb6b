"""What files of preferred and rejected answers hold, and what a model would read of them."""

from __future__ import annotations

import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptkit.data.chat_report import AT_A_TIME, by_name, digest_of, duplicates_of
from ptkit.data.chat_rows import ChatNotes
from ptkit.data.encoded import EncodedExample, PairExample
from ptkit.data.examples import Example
from ptkit.data.pair_formats import ANSWERS, pair_format
from ptkit.data.pair_rows import PairEncoder
from ptkit.data.read_files import read_files
from ptkit.data.summary import chat_lines
from ptkit.data.task import pair_examples
from ptkit.recipe.tasks import PreferenceTask


@dataclass(frozen=True)
class PairSplitReport:
    """One file of pairs.

    rows: pairs; prompt, chosen, rejected: median and most tokens of each part, as they are read
    shortened: pairs whose prompt loses its beginning
    duplicates: pairs that another of the files has, too, by its name
    notes: what was decided, in lines
    """

    name: str
    rows: int
    prompt: tuple[float, int]
    chosen: tuple[float, int]
    rejected: tuple[float, int]
    shortened: int
    duplicates: dict[str, int]
    notes: list[str]


@dataclass(frozen=True)
class PairReport:
    """Files of pairs: how they are written, each one, and the first rows as they are read.

    shown: of each row the text of its prompt, of the chosen and of the rejected answer
    """

    form: str
    splits: list[PairSplitReport]
    shown: list[tuple[str, str, str]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [dict(zip(("prompt", *ANSWERS), row, strict=True)) for row in self.shown]
        return {"form": self.form, "files": [asdict(s) for s in self.splits], "first_rows": rows}


def holds_pairs(file: Path) -> bool:
    """Whether `file` has columns of chosen and rejected answers. Raises DataError for a file that
    cannot be read."""
    return {*ANSWERS} <= {*read_files([file]).columns}


def inspect_pairs(
    files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, task: PreferenceTask, show: int
) -> PairReport:
    """What `files`, a split each, hold for `tokenizer` in a task of preferences.

    show: how many of the first rows are written out

    Raises DataError as training would: for broken rows, a template that refuses one, and so on.
    """
    tables = {name: read_files([path]) for name, path in by_name(files).items()}
    form = pair_format(task, next(iter(tables.values())))
    encoder = PairEncoder(tokenizer, task)
    found = {
        name: _Split(pair_examples(task, form, table, name), encoder, show)
        for name, table in tables.items()
    }
    keys = {name: split.keys for name, split in found.items()}
    splits: list[PairSplitReport] = []
    shown: list[tuple[str, str, str]] = []
    for name, split in found.items():
        splits.append(
            PairSplitReport(
                name=name, rows=len(split.prompt), prompt=_tokens(split.prompt),
                chosen=_tokens(split.chosen), rejected=_tokens(split.rejected),
                shortened=split.notes.shortened, duplicates=duplicates_of(name, keys),
                notes=chat_lines(task, name, split.notes),
            )
        )  # fmt: skip
        shown += [_texts(pair, tokenizer) for pair in split.first[: show - len(shown)]]
    return PairReport(str(form), splits, shown)


class _Split:
    """What one pass over the pairs of a file tells.

    keys: how often each occurs, by a digest of it
    prompt, chosen, rejected: tokens of that part, of each pair; first: the first `show` pairs
    """

    def __init__(self, examples: Iterable[Example], encoder: PairEncoder, show: int) -> None:
        self.notes, self.keys = ChatNotes(), Counter[bytes]()
        self.prompt, self.chosen, self.rejected = array("q"), array("q"), array("q")
        self.first: list[PairExample] = []
        left = iter(examples)
        while some := [*islice(left, AT_A_TIME)]:
            self.keys.update(map(_content, some))
            rows = encoder.rows(some)
            self.notes.add(rows.notes)
            pairs = [row for row in rows.encoded if isinstance(row, PairExample)]
            self.prompt.extend(len(pair.input_ids) for pair in pairs)
            self.chosen.extend(len(pair.target_ids) for pair in pairs)
            self.rejected.extend(len(pair.rejected.target_ids) for pair in pairs)
            self.first += pairs[: show - len(self.first)]


def _content(pair: Example) -> bytes:
    assert pair.rejected is not None
    return digest_of([pair.input, pair.target, pair.rejected.target])


def _tokens(lengths: Sequence[int]) -> tuple[float, int]:
    return float(statistics.median(lengths)), max(lengths)


def _texts(pair: PairExample, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    chosen: EncodedExample = pair.passes()[0]
    return text(chosen.input_ids), text(chosen.target_ids), text(pair.rejected.target_ids)
