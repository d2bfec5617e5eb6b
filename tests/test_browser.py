"""The report in a real browser: no error, no request, usable on a phone, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_overview import several
from test_report import HOSTILE, compared

WIDTHS = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser") / "out"
    compared(folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def overview(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return several(tmp_path_factory.mktemp("overview")) / "overview.html"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["report", "overview"])
def test_report_is_quiet_complete_and_fits_the_screen(
    browser: Any, width: str, scheme: str, which: str, request: pytest.FixtureRequest
) -> None:
    report: Path = request.getfixturevalue(which)
    wide, high = WIDTHS[width]
    page = browser.new_page(viewport={"width": wide, "height": high}, color_scheme=scheme)
    faults: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report.as_uri(), wait_until="networkidle")
    assert faults == []
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    # Nothing but the table, which scrolls by itself, is wider than the screen.
    assert page.evaluate("document.documentElement.scrollWidth") <= wide
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    lightness = [sum(map(int, c[4:-1].split(","))) for c in (ink, paper)]
    assert (lightness[0] < lightness[1]) == (scheme == "light")
    for text in page.query_selector_all("svg text"):
        box, frame = text.bounding_box(), page.viewport_size
        assert box is None or box["x"] >= 0
        assert box is None or box["x"] + box["width"] <= frame["width"]
    page.close()


def test_headings_sort_the_table_both_ways(browser: Any, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())

    def column(index: int) -> list[float]:
        return page.evaluate(
            f"[...document.querySelectorAll('#summary tbody tr')]"
            f".map(row => row.children[{index}].dataset.value).filter(v => v).map(Number)"
        )

    head = page.locator("#summary thead button", has_text="bleu [95 %]")
    index = page.evaluate(
        "[...document.querySelectorAll('#summary thead th')]"
        ".findIndex(th => th.textContent.includes('bleu [95 %]'))"
    )
    head.click()
    assert column(index) == sorted(column(index), reverse=True)
    head.focus()
    page.keyboard.press("Enter")
    assert column(index) == sorted(column(index))
    assert page.locator("#summary thead [aria-sort=ascending]").count() == 1
    page.close()


def test_answers_are_browsed_by_method_worst_first(browser: Any, report: Path) -> None:
    page = browser.new_page()
    page.goto(report.as_uri())
    form = page.locator("form.browse")

    def scores() -> list[float]:
        return [float(t.split()[-1]) for t in form.locator("dt.chosen + dd span").all_inner_texts()]

    form.locator("select[name=method]").select_option(label="base")
    assert form.locator("output").inner_text() == "30 rows"
    assert len(scores()) == 10
    worst = scores()
    form.locator("button[name=on]").click()
    worst += scores()
    assert worst == sorted(worst)
    assert form.locator(".pages span").inner_text() == "11 to 20"
    form.locator("input[name=text]").fill("row 17")
    assert form.locator("output").inner_text() == "1 row"
    assert form.locator(".rows code").inner_text() == "row 17"
    form.locator("input[name=text]").press("Enter")  # a form that is sent would leave the page
    assert page.url == report.as_uri()
    form.locator("input[name=text]").fill("nowhere")
    assert form.locator("output").inner_text() == "0 rows"
    page.close()


def test_hostile_answers_are_text_when_browsed(browser: Any, tmp_path: Path) -> None:
    compared(tmp_path / "out", hostile=HOSTILE)
    page = browser.new_page()
    shown: list[str] = []
    page.on("dialog", lambda dialog: (shown.append(dialog.message), dialog.dismiss()))
    page.goto((tmp_path / "out" / "report.html").as_uri(), wait_until="networkidle")
    assert shown == []
    assert page.locator("form.browse .rows img").count() == 0
    assert HOSTILE.split()[-1] in page.locator("form.browse .rows").inner_text()
    page.close()
