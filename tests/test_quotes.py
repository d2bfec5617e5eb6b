"""No row of a CSV or TSV file is lost at a quote that is a letter."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptkit.data.read_files import read_files
from ptkit.errors import DataError


def written(folder: Path, name: str, lines: list[str]) -> Path:
    path = folder / name
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "quoted",
    [
        {5: '"Sentence five', 11: '"Sentence eleven'},
        {5: '"Sentence five', 11: 'Sentence eleven"'},  # the two could be a cell's marks
        {39: '"The last one'},
        {7: '"Stop" said he'},
        {7: 'nails of 5" and more'},
    ],
)
def test_quotes_of_a_tsv_without_quoted_cells_are_letters(
    quoted: dict[int, str], tmp_path: Path
) -> None:
    texts = [quoted.get(i, f"Sentence number {i}") for i in range(40)]
    lines = ["sentence\tlabel", *(f"{text}\tpos" for text in texts)]
    rows = [*read_files([written(tmp_path, "rows.tsv", lines)])]
    assert [row["sentence"] for row in rows] == texts


CELLS = st.text(st.sampled_from('ab "\t\n,'), min_size=1, max_size=8).filter(str.strip)


@pytest.mark.parametrize(("suffix", "separator"), [(".csv", ","), (".tsv", "\t")])
@given(cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6))
def test_files_with_quoted_cells_read_as_they_were_written(
    suffix: str, separator: str, cells: list[tuple[str, str]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    path = tmp_path_factory.mktemp("quoted") / f"rows{suffix}"
    frame = pd.DataFrame([*cells, ("several\nlines", "x")], columns=["a", "b"])
    frame.to_csv(path, sep=separator, index=False)
    assert [tuple(row.values()) for row in read_files([path])] == [*frame.itertuples(index=False)]


def test_a_csv_whose_quotes_swallow_rows_is_refused_with_the_line(tmp_path: Path) -> None:
    lines = ["text,label", *(f"row {i} of many,x" for i in range(20))]
    lines[6], lines[12] = '"row 5 of many,x', '"row 11 of many,x'
    with pytest.raises(DataError, match=r"rows.csv:7: a quote begins a cell .* to line 13"):
        read_files([written(tmp_path, "rows.csv", lines)])
    lines[12] = 'row 11 of many",x'
    with pytest.raises(DataError, match=r"rows.csv:7: a quote begins a cell .* to line 13"):
        read_files([written(tmp_path, "rows.csv", lines)])


def test_a_tsv_of_uneven_lines_with_a_stray_quote_is_refused(tmp_path: Path) -> None:
    lines = ["text\tlabel", '"two', 'lines"\tx', '"a stray one\tx', "the last\tx"]
    with pytest.raises(DataError, match=r"rows.tsv:4: a quote begins a cell"):
        read_files([written(tmp_path, "rows.tsv", lines)])
