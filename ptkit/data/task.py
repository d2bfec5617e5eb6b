"""A task's examples: what the model reads, what it should write, how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset

from ptkit.data.sources import load_rows
from ptkit.data.templates import Template
from ptkit.errors import DataError, did_you_mean
from ptkit.recipe.schema import (
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
    label: the gold label (classification); words: those of the input, where each has a label of
    its own (token classification), and `target` their labels with spaces between.
    """

    input: str
    target: str
    references: tuple[str, ...]
    label: str | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskData:
    """The examples of the three splits."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def load_task(task: Task, folder: Path) -> TaskData:
    """Read and render the data of `task`; relative paths start at `folder`.

    Raises DataError for data that cannot be read, templates that name a missing column, labels
    the task does not have, and references that are not lists of texts.
    """
    rows = load_rows(task.data, folder)
    readers: dict[type, Callable[[Any, Dataset, str], list[Example]]] = {
        GenerationTask: _generation,
        ClassificationTask: _worded,
        SequenceClassificationTask: _headed,
        TokenClassificationTask: _tagged,
    }
    read = readers[type(task)]
    return TaskData(
        *(
            read(task, dataset, split)
            for split, dataset in (
                ("train", rows.train),
                ("validation", rows.validation),
                ("test", rows.test),
            )
        )
    )


def _generation(task: GenerationTask, rows: Dataset, split: str) -> list[Example]:
    input_, target = Template(task.input, "task.input"), Template(task.target, "task.target")
    for template in (input_, target):
        template.require(rows.column_names)
    # Only the rows that are judged need all acceptable texts; some sets give others none.
    judged = task.references is not None and split == "test"
    if judged:
        _require_column(rows, str(task.references), "task.references")
    examples = []
    for number, row in enumerate(rows, start=1):
        text = target.render(row)
        references: tuple[str, ...] = (text.strip(),)
        if judged and task.references is not None:
            references = _references(row[task.references], task.references, split, number)
        examples.append(Example(input_.render(row), text, references))
    return examples


def _references(value: Any, column: str, split: str, number: int) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise DataError(
            f"{split} row {number}: `{column}` should be a non-empty list of texts, found {value!r}"
        )
    return tuple(value)


def _worded(task: ClassificationTask, rows: Dataset, split: str) -> list[Example]:
    return [
        Example(text, task.verbalizer[label], (label,), label)
        for text, label in _labelled(task, rows, split, task.verbalizer, "task.verbalizer")
    ]


def _headed(task: SequenceClassificationTask, rows: Dataset, split: str) -> list[Example]:
    return [
        Example(text, label, (label,), label)
        for text, label in _labelled(task, rows, split, task.labels, "task.labels")
    ]


def _labelled(
    task: ClassificationTask | SequenceClassificationTask,
    rows: Dataset,
    split: str,
    known: Collection[str],
    where: str,
) -> Iterator[tuple[str, str]]:
    """Input and label of every row; `where` names the key that lists the `known` labels."""
    input_ = Template(task.input, "task.input")
    input_.require(rows.column_names)
    _require_column(rows, task.label, "task.label")
    feature = rows.features[task.label]
    for number, row in enumerate(rows, start=1):
        label = _label(row[task.label], feature)
        _require_label(label, known, f"{split} row {number}", where)
        yield input_.render(row), label


def _tagged(task: TokenClassificationTask, rows: Dataset, split: str) -> list[Example]:
    _require_column(rows, task.words, "task.words")
    _require_column(rows, task.tags, "task.tags")
    feature = getattr(rows.features[task.tags], "feature", None)
    examples = []
    for number, row in enumerate(rows, start=1):
        words, values = row[task.words], row[task.tags]
        where = f"{split} row {number}"
        if not isinstance(words, list) or not words or not all(isinstance(w, str) for w in words):
            raise DataError(
                f"{where}: `{task.words}` should be a non-empty list of words, found {words!r}"
            )
        if not isinstance(values, list) or len(values) != len(words):
            raise DataError(
                f"{where}: `{task.tags}` should be a list of {len(words)} labels, one for each "
                f"word, found {values!r}"
            )
        tags = [_label(value, feature) for value in values]
        for tag in tags:
            _require_label(tag, task.labels, where, "task.labels")
        target = " ".join(tags)
        examples.append(Example(" ".join(words), target, (target,), words=tuple(words)))
    return examples


def _label(value: Any, feature: Any) -> str:
    """A label as the recipe writes it: by name, where the data has numbers and their names."""
    if isinstance(feature, ClassLabel) and isinstance(value, int) and value >= 0:
        return str(feature.int2str(value))
    return str(value)


def _require_column(rows: Dataset, column: str, key: str) -> None:
    if column not in rows.column_names:
        raise DataError(
            f"`{key}` names the column `{column}`, which the data does not have; "
            + did_you_mean(column, rows.column_names)
        )


def _require_label(label: str, known: Collection[str], row: str, where: str) -> None:
    if label not in known:
        raise DataError(
            f"{row}: the label `{label}` is not in `{where}`; {did_you_mean(label, known)}"
        )
