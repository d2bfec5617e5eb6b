"""What files of preferred and rejected answers hold, and what a model would read of them."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptkit.data.chat_report import duplicates_of
from ptkit.data.encoded import EncodedExample, PairExample
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
    tables = {path.name: read_files([path]) for path in files}
    form = pair_format(task, next(iter(tables.values())))
    examples = {name: pair_examples(task, form, table, name) for name, table in tables.items()}
    keys = {
        name: Counter((e.input, e.target, e.rejected and e.rejected.target) for e in own)
        for name, own in examples.items()
    }
    encoder = PairEncoder(tokenizer, task)
    splits: list[PairSplitReport] = []
    shown: list[tuple[str, str, str]] = []
    for name, own in examples.items():
        rows = encoder.rows(own)
        pairs = [row for row in rows.encoded if isinstance(row, PairExample)]
        splits.append(
            PairSplitReport(
                name=name, rows=len(own),
                prompt=_tokens([len(pair.input_ids) for pair in pairs]),
                chosen=_tokens([len(pair.target_ids) for pair in pairs]),
                rejected=_tokens([len(pair.rejected.target_ids) for pair in pairs]),
                shortened=rows.notes.shortened,
                duplicates=duplicates_of(name, keys),
                notes=chat_lines(task, name, rows.notes),
            )
        )  # fmt: skip
        shown += [_texts(pair, tokenizer) for pair in pairs[: show - len(shown)]]
    return PairReport(str(form), splits, shown)


def _tokens(lengths: Sequence[int]) -> tuple[float, int]:
    return float(statistics.median(lengths)), max(lengths)


def _texts(pair: PairExample, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids))

    chosen: EncodedExample = pair.passes()[0]
    return text(chosen.input_ids), text(chosen.target_ids), text(pair.rejected.target_ids)
