"""A task's examples: what the model reads, what it should write, how it is judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ptkit.data.chat_formats import ChatFormat, recognised
from ptkit.data.examples import Example, examples_of
from ptkit.data.pair_formats import PairFormat, pair_format
from ptkit.data.sources import load_rows
from ptkit.data.splits import Origin
from ptkit.data.table import Row, Table
from ptkit.data.templates import Template
from ptkit.data.values import kind_of
from ptkit.errors import DataError, did_you_mean
from ptkit.recipe.tasks import (
    ChatTask,
    ClassificationTask,
    ConversationTask,
    GenerationTask,
    PreferenceTask,
    SequenceClassificationTask,
    Task,
    TokenClassificationTask,
)


@dataclass(frozen=True)
class TaskData:
    """The examples of the three splits.

    origins: where the rows of each split are from
    test_chose: the test rows are the validation rows, which choose the checkpoint
    form: how rows write conversations or pairs, in words; "" for other tasks
    test_only: the test rows stand for the other splits, because nothing is trained on them
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    origins: dict[str, Origin] = field(default_factory=dict, compare=False)
    test_chose: bool = False
    form: str = ""
    test_only: bool = False

    @property
    def test_split(self) -> str:
        """The source's name of the split the test rows are from."""
        origin = self.origins.get("test")
        return origin.source if origin else "test"

    @cached_property
    def test_repeats(self) -> dict[str, int]:
        """Another split -> how many test rows it has, too; only splits that have some.

        Rows that chose the checkpoint and are the test rows are told by `test_chose`.
        """
        if self.test_only:
            return {}
        others = {"train": self.train} | (
            {} if self.test_chose else {"validation": self.validation}
        )
        test = [example.content for example in self.test]
        wanted = {*test}
        found = {
            name: sum(content in seen for content in test)
            for name, rows in others.items()
            for seen in [wanted.intersection(example.content for example in rows)]
        }
        return {name: count for name, count in found.items() if count}


#: Labels listed in an error; more than these mean that another column was meant.
MOST_LABELS = 50


@dataclass
class _Unknown:
    """Labels of the data that the task does not have; all of them are told at once."""

    known: Collection[str]
    where: str
    found: dict[str, dict[str, None]] = field(default_factory=dict)

    def add(self, label: str, row: str) -> None:
        if label not in self.known:
            rows = self.found.setdefault(label, {})
            rows[row] = None  # once, where one file is several splits

    def require_none(self) -> None:
        if not self.found:
            return
        listed = [*self.found.items()][:MOST_LABELS]
        lines = []
        for label, rows in listed:
            more = f" (and in {len(rows) - 1:,} more)" if len(rows) > 1 else ""
            hint = did_you_mean(label, self.known)
            lines.append(
                f"{next(iter(rows))}{more}: the label `{label}` is not in `{self.where}`; {hint}"
            )
        if len(self.found) > len(listed):
            lines.append(
                f"... and {len(self.found) - len(listed):,} more labels: is it the right column?"
            )
        quoted = [json.dumps(label, ensure_ascii=False) for label, _ in listed]
        if self.where == "task.verbalizer":
            lines.append("to have them too, add to `task.verbalizer`:")
            lines += [
                f"    {name}: {json.dumps(f' {label}', ensure_ascii=False)}"
                for name, (label, _) in zip(quoted, listed, strict=True)
            ]
        else:
            lines.append("to have them too, add to `task.labels`:")
            lines += [f"    - {name}" for name in quoted]
        raise DataError("\n".join(lines))


def load_task(task: Task, folder: Path, given: Mapping[str, Table] | None = None) -> TaskData:
    """Read and render the data of `task`; relative paths start at `folder`.

    given: split -> rows that a program handed over, for `task.data.memory`

    Raises DataError for data that cannot be read, and for templates that name a missing column.
    Other reasons are missing targets and labels, labels the task does not have, values without a
    text, and references that are not lists of texts. So are broken conversations and pairs.
    """
    label = (
        task.label if isinstance(task, ClassificationTask | SequenceClassificationTask) else None
    )
    rows = load_rows(task.data, folder, label, given)
    known: Collection[str] = getattr(task, "labels", ())
    unknown = _Unknown(known, "task.labels")
    form: ChatFormat | PairFormat | None = None
    if isinstance(task, ChatTask):
        form = recognised(task, rows.train)
    elif isinstance(task, PreferenceTask):
        form = pair_format(task, rows.train)
    if isinstance(task, ClassificationTask):
        unknown = _Unknown(task.verbalizer, "task.verbalizer")
    read: list[Sequence[Example]] = []
    for split, table in (
        ("train", rows.train),
        ("validation", rows.validation),
        ("test", rows.test),
    ):
        source = rows.origins[split].source  # rows that are held out stand in another split
        if isinstance(task, GenerationTask):
            read.append(_generation(task, table, source, judged=split == "test"))
        elif isinstance(task, ChatTask):
            assert isinstance(form, ChatFormat)
            read.append(_chats(task, form, table, source, judged=split == "test"))
        elif isinstance(task, PreferenceTask):
            assert isinstance(form, PairFormat)
            read.append(pair_examples(task, form, table, source))
        elif isinstance(task, TokenClassificationTask):
            read.append(_tagged(task, table, source, unknown))
        else:
            read.append(_labelled(task, table, source, unknown))
    unknown.require_none()
    train, validation, test = read
    told = "" if form is None else str(form)
    test_only = given is not None and given.get("train") is given.get("test")
    return TaskData(train, validation, test, rows.origins, rows.test_chose, told, test_only)


def _plain(
    rows: Table, columns: Sequence[str], source: str, read: Callable[[str, Row], Example]
) -> Sequence[Example]:
    """The examples that `read` makes of a row's place and plain values in `columns`."""
    used = rows.only(columns)
    return examples_of(used, lambda number, row: read(used.where(number, source), used.plain(row)))


def _generation(
    task: GenerationTask, rows: Table, source: str, *, judged: bool
) -> Sequence[Example]:
    input_, target = Template(task.input, "task.input"), Template(task.target, "task.target")
    for template in (input_, target):
        template.require(rows)
    # Only the rows that are judged need all acceptable texts; some sets give others none.
    column = task.references if judged else None
    if column is not None:
        _require_column(rows, column, "task.references")

    def read(where: str, row: Row) -> Example:
        text = target.render(row, where, complete=True)
        references = _references(row, column, text, where)
        return Example(input_.render(row, where), text, references)

    used = [*input_.columns_of(rows), *target.columns_of(rows), *([column] if column else [])]
    return _plain(rows, used, source, read)


def _chats(
    task: ChatTask, form: ChatFormat, rows: Table, source: str, *, judged: bool
) -> Sequence[Example]:
    column = task.references if judged else None
    if column is not None:
        _require_column(rows, column, "task.references")

    def read(number: int, row: Row) -> Example:
        dialogue = form.dialogue(row, rows.where(number, source), rows.features)
        target = dialogue.answer_text()
        references = _references(row, column, target, dialogue.where)
        own = dialogue.with_system(task.system)
        return Example(own.as_text(), target, references, dialogue=own)

    return examples_of(rows, read)


def pair_examples(
    task: PreferenceTask, form: PairFormat, table: Table, source: str
) -> Sequence[Example]:
    """The pairs of `table` as examples: the preferred answer, beside it the rejected one. Raises
    DataError for a broken row.

    source: what messages call rows that are in no file of this machine
    """
    used, pair_of = form.reader(task, table, source)

    def read(number: int, row: Row) -> Example:
        pair = pair_of(number, row)
        chosen, rejected = pair.dialogues or (None, None)
        other = Example(pair.input, pair.rejected, (pair.rejected,), dialogue=rejected)
        return Example(
            pair.input, pair.chosen, (pair.chosen,), dialogue=chosen, rejected=other,
            where=pair.where,
        )  # fmt: skip

    return examples_of(used, read)


def task_words(task: Task) -> str:
    """The words that every input of a task has: those around the columns of its template, or its
    system prompt. Empty where it has none."""
    if isinstance(task, ConversationTask):
        written = Template(task.input).words if isinstance(task, PreferenceTask) else ""
        return task.system or written
    return "" if isinstance(task, TokenClassificationTask) else Template(task.input).words


def _references(row: Row, column: str | None, target: str, where: str) -> tuple[str, ...]:
    """The acceptable texts in `column`, or the target where there is none."""
    if column is None:
        return (target.strip(),)
    value = row.get(column)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise DataError(f"{where}: `{column}` should be a non-empty list of texts, found {value!r}")
    return tuple(value)


def _labelled(
    task: ClassificationTask | SequenceClassificationTask,
    rows: Table,
    source: str,
    unknown: _Unknown,
) -> Sequence[Example]:
    """Every row's input, with its label's words as the target, or the label itself."""
    input_ = Template(task.input, "task.input")
    input_.require(rows)
    _require_column(rows, task.label, "task.label")
    words = task.verbalizer if isinstance(task, ClassificationTask) else {}

    def read(where: str, row: Row) -> Example:
        label = _label(row[task.label], task.label, where)
        unknown.add(label, where)
        return Example(input_.render(row, where), words.get(label, label), (label,), label)

    return _plain(rows, [*input_.columns_of(rows), task.label], source, read)


def _tagged(
    task: TokenClassificationTask, rows: Table, source: str, unknown: _Unknown
) -> Sequence[Example]:
    _require_column(rows, task.words, "task.words")
    _require_column(rows, task.tags, "task.tags")

    def read(where: str, row: Row) -> Example:
        words, values = row[task.words], row[task.tags]
        if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
            raise DataError(
                f"{where}: `{task.words}` should be a non-empty list of words, found {words!r}"
            )
        if not isinstance(values, list) or len(values) != len(words):
            raise DataError(
                f"{where}: `{task.tags}` should be a list of {len(words)} labels, one for each "
                f"word, found {values!r}"
            )
        tags = [_label(value, task.tags, where) for value in values]
        for tag in tags:
            unknown.add(tag, where)
        target = " ".join(tags)
        return Example(" ".join(words), target, (target,), words=tuple(words))

    return _plain(rows, [task.words, task.tags], source, read)


def _label(value: Any, column: str, where: str) -> str:
    if value is None:
        raise DataError(
            f"{where}: the label in the column `{column}` is missing; fill it in, or leave the "
            "row out"
        )
    if not isinstance(value, str):
        raise DataError(f"{where}: `{column}` should hold labels, found {kind_of(value)}")
    return value


def _require_column(rows: Table, column: str, key: str) -> None:
    if not rows.columns:
        raise DataError(f"the data has no rows, so `{key}` finds no column `{column}`")
    if column not in rows.columns:
        raise DataError(
            f"`{key}` names the column `{column}`, which the data does not have; "
            + did_you_mean(column, rows.columns)
        )
