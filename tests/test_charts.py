"""Charts: matplotlib's own, in the page's colours, the same every time, told to who cannot see."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from test_report import METHODS, compared

from ptkit.comparison.charts import Chart, Line, _plot, _scatter, charts_of, pareto
from ptkit.comparison.drawing import as_files, on_page, short
from ptkit.comparison.summary import MethodSummary
from ptkit.evaluation.statistics import Interval

PAGE = Path(__file__).resolve().parents[1] / "ptkit" / "comparison" / "page.html.j2"


@pytest.fixture(scope="module")
def summaries(tmp_path_factory: pytest.TempPathFactory) -> list[MethodSummary]:
    return compared(tmp_path_factory.mktemp("charts") / "out")[1]


@pytest.fixture(scope="module")
def charts(summaries: list[MethodSummary]) -> list[Chart]:
    return charts_of(summaries)


def test_the_same_figures_are_drawn_with_the_same_bytes(charts: list[Chart]) -> None:
    for chart in charts:
        assert on_page(chart.draw, chart.title) == on_page(chart.draw, chart.title)
        assert as_files(chart.draw) == as_files(chart.draw)


def test_every_colour_on_the_page_is_one_of_its_variables(charts: list[Chart]) -> None:
    defined = set(re.findall(r"(--[a-z0-9]+):", PAGE.read_text()))
    for chart in charts:
        svg = on_page(chart.draw, chart.title)
        used = set(re.findall(r"var\((--[a-z0-9]+)\)", svg))
        assert used >= {"--ink", "--soft", "--line"}
        assert used <= defined
        assert not re.search(r"(fill|stroke): (?!none|var\()", svg)


def test_svg_on_the_page_names_and_fetches_nothing(charts: list[Chart]) -> None:
    for chart in charts:
        svg = on_page(chart.draw, chart.title)
        tags = {node.tag for node in ElementTree.fromstring(svg).iter()}
        assert tags <= {"svg", "g", "path", "text", "title", "desc"}
        assert not re.search(r"\bid=|href|url\(|font-family|https?:", svg)


def test_a_reader_who_cannot_see_is_told_every_mark(summaries: list[MethodSummary]) -> None:
    scatter = next(c for c in charts_of(summaries) if "forgetting" in c.title)
    root = ElementTree.fromstring(on_page(scatter.draw, scatter.title))
    assert root.get("role") == "img"
    assert root.get("aria-label") == scatter.title
    told = root.findtext("desc") or ""
    assert root[0].tag == "desc"
    for summary in summaries:
        score = summary.leading
        said = f"{summary.title}: {score.mean:.1f} [{score.low:.1f}, {score.high:.1f}]"
        assert said in told
        assert told.count(said) == 1
        assert said in {node.text for node in root.iter("title")}


def test_no_interval_is_drawn_past_its_axes() -> None:
    """With two seeds an interval of forgetting may be wider than all the points lie apart."""
    spreads = [None, Interval(0.7, -0.4, 1.8, 0.1, 2), Interval(1.3, -0.6, 3.2, 0.2, 2)]
    score = Interval(9.0, 8.0, 10.0, 0.1, 2)
    points: Any = [
        (SimpleNamespace(title=f"m{i}", family=f"m{i}", leading=score), 0.7 * i, spread)
        for i, spread in enumerate(spreads)
    ]
    shade = {f"m{i}": i for i in range(3)}
    figure = Figure()
    axes = figure.subplots()
    _scatter(axes, points=points, shade=shade, names=("x", "y"))
    low, high = axes.get_xlim()
    ends = [x for bars in axes.collections for part in bars.get_segments() for x, _ in part]
    assert max(ends) - min(ends) > 3
    assert low <= min(ends)
    assert max(ends) <= high


def test_names_and_ticks_stay_text(charts: list[Chart]) -> None:
    for chart in charts:
        texts = {
            node.text for node in ElementTree.fromstring(on_page(chart.draw, "a")).iter("text")
        }
        assert texts >= {title for title, *_, parameters, _, _ in METHODS if parameters}


def test_a_name_is_no_formula_and_a_long_one_is_cut() -> None:
    level = Interval(1.0, None, None, None, 1)
    names = ["$x_1^2$ & <b>", "a" * 60]
    lines = [Line(name, i, ((0.0, level), (2.0, level))) for i, name in enumerate(names)]

    def draw(axes) -> None:
        _plot(axes, lines=lines, names=("step", "loss"))

    texts = {node.text for node in ElementTree.fromstring(on_page(draw, "a")).iter("text")}
    assert texts >= {names[0], short(names[1])}
    assert "a" * 30 not in "".join(text or "" for text in texts)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12),
    st.booleans(),
)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]], higher: bool) -> None:
    sign = 1 if higher else -1
    front = pareto(points, higher=higher)
    for x, y in points:
        beaten = any(a <= x and sign * b >= sign * y and (a, b) != (x, y) for a, b in points)
        assert ((x, y) in front) == (not beaten)
    assert front == sorted(set(front))


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of `#rgb` or `#rrggbb`."""
    digits = colour.lstrip("#")
    pairs = [c * 2 for c in digits] if len(digits) == 3 else re.findall("..", digits)
    shares = [int(pair, 16) / 255 for pair in pairs]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return sum(w * s for w, s in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_marks_and_text_stand_out_from_the_card(scheme: int) -> None:
    root = re.findall(r":root \{(.*?)\}", PAGE.read_text(), re.S)[scheme]
    colours = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]+)", root))
    card = luminance(colours["card"])

    def contrast(name: str) -> float:
        low, high = sorted((luminance(colours[name]), card))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(f"c{i}") >= 3 for i in range(10))  # WCAG 1.4.11
    assert min(contrast("ink"), contrast("soft")) >= 4.5  # WCAG 1.4.3
