"""Inputs to answer, from files of rows and columns."""

from __future__ import annotations

from pathlib import Path

from ptkit.data.read_files import read_files
from ptkit.data.templates import Template
from ptkit.errors import DataError


def table_inputs(file: Path, pattern: str | None) -> list[str]:
    """One input for each row of a data file: its columns in the template `pattern`.

    pattern: of the adapter that answers; None where it has none. Raises DataError for a file that
    cannot be read or lacks a column, for a row that lacks a value, and without a template.
    """
    if pattern is None:
        raise DataError(
            f"{file} has rows and columns, and no adapter's template says what an input is made "
            "of; give an adapter that was trained with ptkit, or a text file with one input per "
            "line"
        )
    rows = read_files([file])
    template = Template(pattern, "input")
    template.require(rows)
    return [
        template.render(row, f"{file}, row {number}", complete=True)
        for number, row in rows.placed()
    ]


def table_sentences(file: Path, column: str) -> list[list[str]]:
    """The words of each row's sentence: the list in `column`, or its text, split at spaces.

    Raises DataError as `table_inputs` does.
    """
    rows = read_files([file])
    if column not in rows.columns:
        raise DataError(f"{file} has no column `{column}`, in which the adapter expects words")
    sentences = []
    for number, row in rows.placed():
        words = row[column].split() if isinstance(row[column], str) else row[column]
        if not words or not all(isinstance(word, str) for word in words):
            raise DataError(f"{file}, row {number}: `{column}` should be a list of words")
        sentences.append(words)
    return sentences
