"""A task's examples: what the model reads, what it should write, how it is judged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset

from ptkit.data.sources import load_rows
from ptkit.data.templates import Template
from ptkit.errors import DataError, did_you_mean
from ptkit.recipe.schema import ClassificationTask, GenerationTask


@dataclass(frozen=True, slots=True)
class Example:
    """One row of a task.

    target: what follows the input in training; references: acceptable texts (generation);
    label: the gold label (classification).
    """

    input: str
    target: str
    references: tuple[str, ...]
    label: str | None = None


@dataclass(frozen=True)
class TaskData:
    """The examples of the three splits."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def load_task(task: GenerationTask | ClassificationTask, folder: Path) -> TaskData:
    """Read and render the data of `task`; relative paths start at `folder`.

    Raises DataError for data that cannot be read, templates that name a missing column, labels
    without words, and references that are not lists of texts.
    """
    rows = load_rows(task.data, folder)
    read = _generation if isinstance(task, GenerationTask) else _classification
    return TaskData(
        *(
            read(task, dataset, split)  # type: ignore[arg-type]
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
    if judged and task.references not in rows.column_names:
        raise DataError(
            f"`task.references` names the column `{task.references}`, which the data does not "
            f"have; {did_you_mean(str(task.references), rows.column_names)}"
        )
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


def _classification(task: ClassificationTask, rows: Dataset, split: str) -> list[Example]:
    input_ = Template(task.input, "task.input")
    input_.require(rows.column_names)
    if task.label not in rows.column_names:
        raise DataError(
            f"`task.label` names the column `{task.label}`, which the data does not have; "
            + did_you_mean(task.label, rows.column_names)
        )
    feature = rows.features[task.label]
    examples = []
    for number, row in enumerate(rows, start=1):
        value = row[task.label]
        if isinstance(feature, ClassLabel) and isinstance(value, int) and value >= 0:
            value = feature.int2str(value)
        label = str(value)
        if label not in task.verbalizer:
            raise DataError(
                f"{split} row {number}: the label `{label}` has no words in `task.verbalizer`; "
                + did_you_mean(label, task.verbalizer)
            )
        words = task.verbalizer[label]
        examples.append(Example(input_.render(row), words, (label,), label))
    return examples
