"""Comparisons of different tasks side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_cli import ptkit, refused
from test_report import METHODS, compared

from ptkit.comparison import figures
from ptkit.comparison.merge import MergedComparison, read_comparison
from ptkit.comparison.overview import write_overview
from ptkit.comparison.statistics import in_family
from ptkit.comparison.summary import MethodSummary
from ptkit.errors import UserError


def several(folder: Path, hostile: str = "") -> Path:
    """An overview of two invented comparisons, in `folder`."""
    compared(folder / "texts", name="texts", hostile=hostile)
    compared(folder / "labels", METHODS[:-1], name="labels", task="classification")
    parts = [read_comparison(folder / name) for name in ("texts", "labels")]
    write_overview(parts, folder, "Two tasks" + hostile)
    return folder


@dataclass(frozen=True)
class Two:
    """Two invented comparisons, in `folder`."""

    folder: Path
    texts: list[MethodSummary]
    labels: list[MethodSummary]

    def parts(self) -> list[MergedComparison]:
        return [read_comparison(self.folder / name) for name in ("texts", "labels")]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Two:
    folder = tmp_path_factory.mktemp("two")
    _, texts = compared(folder / "texts", name="texts")
    _, labels = compared(folder / "labels", name="labels", task="classification")
    return Two(folder, texts, labels)


def test_figures_are_those_of_the_comparisons(two: Two, tmp_path: Path) -> None:
    texts, labels, parts = two.texts, two.labels, two.parts()
    tables = {table.title: table for table in write_overview(parts, tmp_path, "Two tasks")}
    scores = tables["Score"]
    assert scores.columns == ["texts: bleu", "labels: accuracy"]
    for i, own in enumerate((texts, labels)):
        assert [row.cells[i].value for row in scores.rows] == [s.leading.mean for s in own]
        best = [row.title for row in scores.rows if row.cells[i].best]
        highest = max(s.leading.mean for s in own)
        assert best == [s.title for s in own if s.leading.mean == highest]
    assert {"Forgetting", "Trained parameters"} <= tables.keys()
    shares = tables.get("Share of the way from the base to full fine-tuning")
    if shares is not None:
        by_name = {row.title: row.cells[0].value for row in shares.rows}
        assert by_name["base"] == 0
        assert by_name["full"] == 1
    text = (tmp_path / "overview.md").read_text()
    assert text.startswith("# Two tasks\n")
    assert f"{texts[1].leading.mean:.1f} [" in text


def test_p_values_are_corrected_for_all_differences_of_the_page(two: Two, tmp_path: Path) -> None:
    own = [s.against for s in (*two.texts, *two.labels) if s.against is not None]
    tables = {table.title: table for table in write_overview(two.parts(), tmp_path, "Two tasks")}
    shown = {cell.shown for row in tables["Difference"].rows for cell in row.cells}
    together = [figures.difference(difference) for difference in in_family(own)]
    assert {*together} <= shown
    assert {figures.difference(difference) for difference in own} != {*together}
    assert f"{len(own)} differences" in tables["Difference"].note
    page = (tmp_path / "overview.html").read_text()
    assert page.count(f"the {len(own)} differences that are shown together") == 2


def test_page_is_one_file_that_escapes_what_it_shows(tmp_path: Path) -> None:
    page = (several(tmp_path, "<script>alert(1)</script>") / "overview.html").read_text()
    assert "<script>alert" not in page
    assert not re.search(r"(?:src|href)=[\"'](?!#|data:)", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {"texts", "labels", "texts-summary", "labels-summary"} <= set(ids)
    assert page.count('class="sortable"') >= 4
    assert len(page) < 1_500_000


def test_command_and_its_refusals(two: Two, tmp_path: Path) -> None:
    asked = ("report", "texts", "labels", "--overview", "T")
    assert "give --out" in refused(*asked, cwd=two.folder)
    done = ptkit(*asked, "--out", tmp_path / "both", cwd=two.folder)
    assert done.stdout.strip() == f"{tmp_path}/both/overview.html"
    parts = [two.parts()[0]] * 2
    with pytest.raises(UserError, match="two of these comparisons are called texts"):
        write_overview(parts, tmp_path, "T")
