"""A task's examples: what the model reads, what it should write, how it is judged."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ptkit.data.chat_formats import ChatFormat, recognised
from ptkit.data.dialogue import Dialogue
from ptkit.data.sources import load_rows
from ptkit.data.splits import Origin
from ptkit.data.table import Table, kind_of
from ptkit.data.templates import Template
from ptkit.errors import DataError, did_you_mean
from ptkit.recipe.tasks import (
    ChatTask,
    ClassificationTask,
    GenerationTask,
    SequenceClassificationTask,
    Task,
    TokenClassificationTask,
)


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a task.

    target: what follows the input in training; references: acceptable texts (generation);
    label: the gold label (classification)
    words: those of the input, where each has a label of its own (token classification), and
        `target` their labels with spaces between.
    dialogue: the conversation (chat); `target` is then its last answer, and `input` what was said
        before, for people
    """

    input: str
    target: str
    references: tuple[str, ...]
    label: str | None = None
    words: tuple[str, ...] = ()
    dialogue: Dialogue | None = None

    @property
    def content(self) -> tuple[Any, ...]:
        """What makes two rows the same: what the model reads, and what it should write."""
        said = None if self.dialogue is None else repr(self.dialogue.messages)
        return self.input, self.target, self.words, said


@dataclass(frozen=True)
class TaskData:
    """The examples of the three splits.

    origins: where the rows of each split are from
    test_chose: the test rows are the validation rows, which choose the checkpoint
    form: how rows write conversations, in words; "" for other tasks
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    origins: dict[str, Origin] = field(default_factory=dict, compare=False)
    test_chose: bool = False
    form: str = ""

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
        others = {"train": self.train} | (
            {} if self.test_chose else {"validation": self.validation}
        )
        test = [example.content for example in self.test]
        found = {
            name: sum(content in seen for content in test)
            for name, rows in others.items()
            for seen in [{example.content for example in rows}]
        }
        return {name: count for name, count in found.items() if count}


#: Labels listed in an error; more than these mean that another column was meant.
MOST_LABELS = 50


@dataclass
class _Unknown:
    """Labels of the data that the task does not have; all of them are told at once."""

    known: Collection[str]
    where: str
    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, label: str, row: str) -> None:
        if label not in self.known:
            self.found.setdefault(label, []).append(row)

    def require_none(self) -> None:
        if not self.found:
            return
        listed = [*self.found.items()][:MOST_LABELS]
        lines = []
        for label, rows in listed:
            more = f" (and in {len(rows) - 1:,} more)" if len(rows) > 1 else ""
            hint = did_you_mean(label, self.known)
            lines.append(f"{rows[0]}{more}: the label `{label}` is not in `{self.where}`; {hint}")
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
    text, and references that are not lists of texts. So are conversations that are broken.
    """
    label = (
        task.label if isinstance(task, ClassificationTask | SequenceClassificationTask) else None
    )
    rows = load_rows(task.data, folder, label, given)
    known: Collection[str] = getattr(task, "labels", ())
    unknown = _Unknown(known, "task.labels")
    form = recognised(task, rows.train) if isinstance(task, ChatTask) else None
    if isinstance(task, ClassificationTask):
        unknown = _Unknown(task.verbalizer, "task.verbalizer")
    read = []
    for split, table in (
        ("train", rows.train),
        ("validation", rows.validation),
        ("test", rows.test),
    ):
        source = rows.origins[split].source  # rows that are held out stand in another split
        if isinstance(task, GenerationTask):
            read.append(_generation(task, table, source, judged=split == "test"))
        elif isinstance(task, ChatTask):
            assert form is not None
            read.append(_chats(task, form, table, source, judged=split == "test"))
        elif isinstance(task, TokenClassificationTask):
            read.append(_tagged(task, table, source, unknown))
        else:
            read.append(_labelled(task, table, source, unknown))
    unknown.require_none()
    if isinstance(task, ClassificationTask):  # their words are known only now
        read = [[_in_words(task, example) for example in part] for part in read]
    train, validation, test = read
    told = "" if form is None else str(form)
    return TaskData(train, validation, test, rows.origins, rows.test_chose, told)


def _in_words(task: ClassificationTask, example: Example) -> Example:
    label = example.target
    return Example(example.input, task.verbalizer[label], (label,), label)


def _generation(task: GenerationTask, rows: Table, source: str, *, judged: bool) -> list[Example]:
    input_, target = Template(task.input, "task.input"), Template(task.target, "task.target")
    for template in (input_, target):
        template.require(rows)
    # Only the rows that are judged need all acceptable texts; some sets give others none.
    judged = judged and task.references is not None
    if judged:
        _require_column(rows, str(task.references), "task.references")
    examples = []
    used = [
        *input_.columns_of(rows),
        *target.columns_of(rows),
        *([task.references] if judged else []),
    ]
    for number, row in rows.only([str(c) for c in used]).placed():
        where = f"{source} row {number}"
        text = target.render(row, where, complete=True)
        references: tuple[str, ...] = (text.strip(),)
        if judged and task.references is not None:
            references = _references(row[task.references], task.references, where)
        examples.append(Example(input_.render(row, where), text, references))
    return examples


def _chats(
    task: ChatTask, form: ChatFormat, rows: Table, source: str, *, judged: bool
) -> list[Example]:
    judged = judged and task.references is not None
    if judged:
        _require_column(rows, str(task.references), "task.references")
    examples = []
    for row, dialogue in form.dialogues(rows, source):
        target = dialogue.answer_text()
        references: tuple[str, ...] = (target.strip(),)
        if judged and task.references is not None:
            references = _references(row.get(task.references), task.references, dialogue.where)
        own = dialogue.with_system(task.system)
        examples.append(Example(own.as_text(), target, references, dialogue=own))
    return examples


def task_words(task: Task) -> str:
    """The words that every input of a task has: those around the columns of its template, or its
    system prompt. Empty where it has none."""
    if isinstance(task, ChatTask):
        return task.system or ""
    return "" if isinstance(task, TokenClassificationTask) else Template(task.input).words


def _references(value: Any, column: str, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise DataError(f"{where}: `{column}` should be a non-empty list of texts, found {value!r}")
    return tuple(value)


def _labelled(
    task: ClassificationTask | SequenceClassificationTask,
    rows: Table,
    source: str,
    unknown: _Unknown,
) -> list[Example]:
    """Every row's input, with its label as the target."""
    input_ = Template(task.input, "task.input")
    input_.require(rows)
    _require_column(rows, task.label, "task.label")
    examples = []
    used = [*input_.columns_of(rows), task.label]
    for number, row in rows.only(used).placed():
        where = f"{source} row {number}"
        label = _label(row[task.label], task.label, where)
        unknown.add(label, where)
        examples.append(Example(input_.render(row, where), label, (label,), label))
    return examples


def _tagged(
    task: TokenClassificationTask, rows: Table, source: str, unknown: _Unknown
) -> list[Example]:
    _require_column(rows, task.words, "task.words")
    _require_column(rows, task.tags, "task.tags")
    examples = []
    for number, row in rows.only([task.words, task.tags]).placed():
        words, values = row[task.words], row[task.tags]
        where = f"{source} row {number}"
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
        examples.append(Example(" ".join(words), target, (target,), words=tuple(words)))
    return examples


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
    if column not in rows.columns:
        raise DataError(
            f"`{key}` names the column `{column}`, which the data does not have; "
            + did_you_mean(column, rows.columns)
        )
