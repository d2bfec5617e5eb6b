"""The report: self-contained, complete, safe with hostile text, whole where figures are missing.

Records are invented: what is tested is what is made of them.
"""

from __future__ import annotations

import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
from markupsafe import escape
from rich.console import Console

from ptkit.comparison.advice import advice
from ptkit.comparison.answers import browsable
from ptkit.comparison.outputs import write_outputs
from ptkit.comparison.report import page_values, render_report
from ptkit.comparison.summary import MethodSummary, best_of
from ptkit.comparison.table import markdown_table, summary_table
from ptkit.evaluation.prediction import Prediction
from ptkit.evaluation.statistics import Interval
from ptkit.formats.cell_record import CellRecord
from ptkit.metrics.own import OwnMetric
from ptkit.metrics.registry import metric
from ptkit.recipe.load import load_recipe
from ptkit.training.cell import folder_name

#: title, kind, trained parameters, how many of ten words it gets right, forgetting
METHODS = [
    ("base", "base", 0, 3, 0.0),
    ("text_prompt", "text_prompt", 0, 5, 0.21),
    ("prompt_tuning", "prompt_tuning", 5_120, 7, 0.14),
    ("prefix_tuning", "prefix_tuning", 61_440, 8, -0.01),
    ("lora", "lora", 98_304, 8, 0.05),
    ("full", "full", 6_829_568, 9, 0.41),
]
UNTRAINED = METHODS[:2]
WORDS = ["the", "small", "red", "house", "near", "the", "river", "is", "very", "old"]
HOSTILE = """</pre><script>alert(1)</script><img src=x onerror="alert(2)">'"&{{ 7*7 }}[/red]|"""
VOID = {"meta", "link", "br", "img", "input", "circle", "line", "polyline"}


class Page(HTMLParser):
    """What a browser would fetch or run, and whether every tag is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}:
                self.addresses.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def compared(
    folder: Path,
    methods: list[tuple[str, str, int, int, float]] = METHODS,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    task: str = "generation",
    retention: bool = True,
    hostile: str = "",
    name: str = "invented",
    count: int = 30,
) -> tuple[str, list[MethodSummary]]:
    """The page and summaries of an invented comparison of `count` test rows."""
    generation = task == "generation"
    recipe: dict[str, Any] = {
        "name": name,
        "description": f"Which method writes best?{hostile}",
        "task": {"kind": task, "data": {"builtin": "facts-to-text"}, "input": "{facts}"},
        "methods": [{"kind": kind, "label": title + hostile} for title, kind, *_ in methods],
        "seeds": list(seeds),
        "evaluate": {"bootstrap": 100},
    }
    recipe["task"] |= {"target": "{text}"} if generation else {"verbalizer": {"a": "A", "b": "B"}}
    if not retention:
        recipe["retention"] = None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    loaded = load_recipe(folder / "recipe.yaml")
    metrics = {"bleu": 1.0, "chrf": 2.0} if generation else {"accuracy": 1.0, "macro_f1": 1.0}
    records = []
    for title, kind, parameters, right, forgetting in methods:
        for seed in seeds if parameters else seeds[:1]:
            cell = f"{folder_name(title + hostile)}-seed{seed}"
            rows = []
            for i in range(count):
                gold = " ".join(WORDS[i % 4 :]) if generation else "ab"[i % 2]
                words = [w if (i + j + seed) % 10 < right else "no" for j, w in enumerate(WORDS)]
                said = " ".join(words[i % 4 :]) if generation else "ab"[(i * 7 + right) % 10 > 5]
                references = [gold, "another"][: 1 + generation * (i % 2)]
                rows.append({
                    "input": f"row {i}{hostile}",
                    "prediction": said + hostile,
                    "references": references,
                    "label": None if generation else gold,
                    "details": {},
                })  # fmt: skip
            place = folder / "cells" / cell / "predictions.jsonl"
            place.parent.mkdir(parents=True)
            place.write_text("".join(json.dumps(row) + "\n" for row in rows))
            lost = forgetting + 0.01 * seed if parameters else forgetting
            text = {
                "tokens": 20_000,
                "base_nats": 3.4,
                "adapter_nats": 3.4 + lost,
                "forgetting": lost,
                "base_accuracy": 0.4,
                "adapter_accuracy": 0.388,
                "retention": 0.97,
            }
            drift = {"drift": 0.1, "drift_tokens": 512, "lead": 0}
            kept = {**text, **drift, "domains": {"general": text}}
            records.append(
                CellRecord(
                    recipe="invented",
                    cell=cell,
                    method=title + hostile,
                    kind=kind,
                    family=title + hostile,
                    sweep={},
                    tuned=None,
                    seed=seed,
                    settings={},
                    n_train=500 if parameters else 0,
                    n_test=count,
                    metrics=metrics,
                    score=next(iter(metrics)),
                    trainable_parameters=parameters,
                    base_parameters=6_829_568,
                    bytes_on_disk=4 * parameters,
                    train_seconds=12.0 if parameters else 0.0,
                    train_steps=300,
                    best_step=250,
                    tokens_per_second=5000.0,
                    peak_memory_bytes=120_000_000 if parameters else None,
                    eval_seconds=2.0,
                    curve=[
                        {"step": s, "train_loss": 4.0 / s, "validation_loss": 5.0 / s}
                        for s in (100, 200, 300)
                    ]
                    if parameters
                    else [],
                    retention=kept if retention else None,
                    decode_ms=5.0,
                    added_ms=None if kind == "full" else 0.1,
                    adapter_off_exact=None if kind == "full" else True,
                    adapter_path=None,
                    versions={"ptkit": "0.1.0", "torch": "2.13.0"},
                    hardware=f"2 CPU cores{hostile}",
                    started="2026-01-01T00:00:00+00:00",
                )
            )
    for record in records:
        record.write(folder / "cells" / record.cell / "record.json")
    summaries = write_outputs(folder, records, loaded.recipe)
    return (folder / "report.html").read_text(), summaries


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[MethodSummary]]:
    return compared(tmp_path_factory.mktemp("usual") / "out")


def test_page_fetches_nothing_and_is_small(usual) -> None:
    page = Page(usual[0])
    assert page.addresses
    assert all(address.startswith("data:") for address in page.addresses)
    assert not re.search(r"url\(|@import|https?://|fetch\(|XMLHttpRequest", usual[0])
    assert len(usual[0].encode()) < 1_500_000
    assert page.open == []


def test_page_names_model_n_seeds_methods_versions_and_definitions(usual) -> None:
    text = " ".join(Page(usual[0]).text.split())
    for said in (
        "tiny-en", "30 test rows", "3 seeds: 0, 1, 2", "2 CPU cores", "torch 2.13.0",
        "Student's t over seeds together with a bootstrap over rows", "100 resamples",
        "Cross-entropy per token on 20,000 tokens of general text",
        "Next-token accuracy on that text, after / before",
        "Full fine-tuning has no “off”",
        "The exact recipe", '"name": "invented"',
        *(title for title, *_ in METHODS),
    ):  # fmt: skip
        assert said in text


def test_every_score_stands_with_its_interval_and_seeds(usual) -> None:
    table = usual[0].split("<tbody>")[1].split("</tbody>")[0]
    rows = table.split("<tr")[1:]
    assert len(rows) == len(METHODS)
    for row, summary in zip(rows, usual[1], strict=True):
        for interval in summary.metrics.values():
            assert f"{interval.mean:.1f} [{interval.low:.1f}, {interval.high:.1f}]" in row
        assert f">{len(summary.records)}</td>" in row
    assert table.count("no off") == 2  # shown and sorted by, in the row of full fine-tuning
    assert "no off" in rows[-1]


def test_tiles_give_the_highest_mean_the_least_forgetting_and_the_smallest(usual) -> None:
    tiles = usual[0].split('<ul class="tiles">')[1].split("</ul>")[0].split("<li>")[1:]
    titles = [re.search(r'</span>(\w+)</span>\s*<span class="beside">', t)[1] for t in tiles]
    assert titles == ["full", "prefix_tuning", "prompt_tuning"]
    full = usual[1][-1].leading
    assert f"[{full.low:.1f}, {full.high:.1f}]" in tiles[0]
    assert "20.5 KB" in tiles[2]


def test_figures_that_do_not_exist_sort_last(usual) -> None:
    base = usual[0].split("<tbody>")[1].split("</tr>")[0]
    # Time, speed and peak memory of a method that trains nothing.
    assert base.count('data-value=""') == 3


def test_charts_have_names_and_no_broken_numbers(usual) -> None:
    charts = re.findall(r"<svg.*?</svg>", usual[0], re.S)
    assert len(charts) == 3
    for chart in charts:
        assert 'role="img" aria-label="' in chart
        assert "nan" not in chart
        assert "inf" not in chart


def test_metrics_are_given_with_their_librarys_signature(usual) -> None:
    bleu = sacrebleu.metrics.BLEU()
    bleu.corpus_score(["a"] * 2, [["a", "b"], ["c", None]])
    assert f"bleu: sacrebleu {bleu.get_signature()}" in Page(usual[0]).text
    assert "nrefs:var" in usual[0]


def test_hostile_text_is_shown_and_never_run(tmp_path: Path) -> None:
    source, summaries = compared(tmp_path / "out", hostile=HOSTILE)
    page = Page(source)
    assert page.tags.count("script") == 2  # the page's own, and the answers as data
    assert "img" not in page.tags
    assert page.handlers == []
    assert page.open == []
    assert "{{ 7*7 }}" in page.text
    # description, prediction of every method in every sample, hardware
    assert source.count(str(escape(HOSTILE))) > 6 * len(METHODS)
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(summary_table(summaries))
    assert "[/red]" in console.export_text().replace("\n", "")
    lines = markdown_table(summaries).splitlines()[: 2 + len(METHODS)]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(cells) == 1


def test_the_base_and_full_fine_tuning_are_known_by_what_they_are_not_by_their_names(
    tmp_path: Path,
) -> None:
    _, summaries = compared(tmp_path / "out", [
        ("prompt", "prompt_tuning", 5_120, 6, 0.1), ("plain", "base", 0, 3, 0.0),
        ("all of it", "full", 6_829_568, 9, 0.4),
    ], seeds=(0,))  # fmt: skip
    ways = {s.family: s.way for s in summaries}
    assert all(way is not None for way in ways.values())
    assert (ways["plain"].mean, ways["all of it"].mean) == (0, 1)
    assert 0 < ways["prompt"].mean < 1
    assert [s.family for s in summaries if s.against is None] == ["all of it"]


@pytest.mark.parametrize(
    ("options", "charts", "tiles"),
    [
        ({"seeds": (0,)}, 3, 3),
        ({"retention": False}, 2, 2),
        ({"methods": UNTRAINED}, 1, 1),
        ({"methods": UNTRAINED, "retention": False}, 0, 1),
        ({"methods": METHODS[2:3], "seeds": (5,)}, 2, 3),
        ({"methods": [("a", "lora", 9, 10, 0.0), ("b", "full", 9, 10, 0.0)]}, 3, 3),
        ({"task": "classification"}, 3, 3),
    ],
    ids=["one seed", "no retention", "nothing trained", "bare", "one method", "ties", "labels"],
)
def test_report_is_whole_where_figures_are_missing(
    tmp_path: Path, options: dict[str, Any], charts: int, tiles: int
) -> None:
    source, summaries = compared(tmp_path / "out", **options)
    page = Page(source)
    assert page.open == []
    assert page.tags.count("svg") == charts
    assert source.split('<ul class="tiles">')[1].split("</ul>")[0].count("<li>") == tiles
    assert "None" not in page.text.replace('"retention": null', "")
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", page.text)
    assert all(s.title in page.text for s in summaries)
    if summaries[0].forgetting is None:
        assert "Next-token accuracy" not in page.text
        headings = source.split("<thead>")[1].split("</thead>")[0]
        assert "bleu" in headings
        assert not any(name in headings for name in ("forgetting", "retention", "drift"))


def test_labels_say_whether_they_are_right(tmp_path: Path) -> None:
    source, summaries = compared(tmp_path / "out", task="classification")
    shown = source.partition("Every answer")[0]  # before the script that shows them all
    marks = shown.count("✓ right"), shown.count("✗ wrong")
    right = sum(
        s.samples[i].prediction == s.samples[i].references[0]
        for s in summaries
        for i in range(0, 30, 5)
    )
    assert marks == (right, 6 * len(METHODS) - right)
    assert 0 < right < 6 * len(METHODS)


def test_terminal_table_keeps_every_figure_at_100_columns(tmp_path: Path) -> None:
    long = [(t if p else f"{t}-{'very-' * 8}long", k, p, r, f) for t, k, p, r, f in METHODS]
    _, summaries = compared(tmp_path / "out", long)
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(summary_table(summaries))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for summary in summaries:
        assert f"[{summary.leading.low:.1f}, {summary.leading.high:.1f}]" in text
    assert "3 seeds, n = 30" in text


def test_unlike_numbers_of_rows_in_a_sweep_are_told_as_a_range(tmp_path: Path) -> None:
    _, summaries = compared(tmp_path / "out")
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml").recipe

    def variant(summary: MethodSummary, rows: int, leaked: int, better: float) -> MethodSummary:
        said = {"n_test": rows, "test_repeats": {"train": leaked}}
        leading = replace(summary.leading, mean=summary.leading.mean + better)
        return replace(
            summary,
            sweep={"limits.test": rows},
            records=tuple(record.model_copy(update=said) for record in summary.records),
            samples=summary.samples[:rows],
            metrics={**summary.metrics, summary.score: leading},
        )

    # Of one method the best has 8 rows, of the others 3: they cannot stand side by side.
    swept = [variant(s, 3, 1, i and 9.0) for i, s in enumerate(summaries)]
    swept += [variant(s, 8, 2, 0.1) for s in summaries]
    said = "n = 3 to 8 test rows, of which up to 2 are training rows too;"
    page = Page(render_report(recipe, swept, "")).text
    assert said in markdown_table(swept)
    assert said in page
    assert "3 of 3 test rows, of which 1 are training rows too, spread evenly" in page
    assert "n = 8 test rows, of which 2 are training rows too;" in markdown_table(swept[6:])


def test_with_one_row_figures_stand_without_intervals(tmp_path: Path) -> None:
    page, summaries = compared(tmp_path / "out", count=1)
    console = Console(width=200, file=io.StringIO())
    console.print(summary_table(summaries))
    table, markdown = console.file.getvalue(), markdown_table(summaries)
    said = "n = 1 test rows; interval: 95 %, not known, because one row does not show"
    assert said in markdown
    assert said in " ".join(table.split())
    columns = [line for line in markdown.splitlines() if line.startswith("| ")][1:]
    assert len(columns) == len(METHODS)
    assert not [line for line in columns if "[" in line]
    assert not re.search(r"\d \[[-+\d]", Page(page).text)
    assert "p &lt; 0.001" not in page
    assert advice(summaries) is None


def test_plots_and_latex_are_written(usual, tmp_path: Path) -> None:
    compared(tmp_path / "out", hostile=r" 50% & $x_1$ \\ {#}~^")
    names = {p.name for p in (tmp_path / "out" / "plots").iterdir()}
    assert names == {
        f"{name}.{suffix}"
        for name in ("bleu-against-trained-parameters", "bleu-against-forgetting",
                     "learning-curves")
        for suffix in ("png", "svg")
    }  # fmt: skip
    tex = (tmp_path / "out" / "table.tex").read_text()
    body = tex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == len(METHODS)
    columns = {len(re.findall(r"(?<!\\)&", line)) for line in body}
    assert columns == {tex.split("tabular}{l")[1].split("}")[0].count("r")}
    assert r"50\% \& \$x\_1\$ \textbackslash{}" in tex
    assert tex.count(r"\textbf{") == 1


def test_the_smallest_method_level_with_the_best_is_the_one_to_take(usual, tmp_path: Path) -> None:
    page, summaries = usual
    given = advice(summaries)
    assert given is not None
    best = best_of(summaries)
    level = [
        s
        for s in summaries
        if s.leading.low <= best.leading.mean <= s.leading.high
        and best.leading.low <= s.leading.mean <= best.leading.high
    ]
    assert given.title == min(level, key=lambda s: s.bytes_on_disk).title
    text = " ".join(Page(page).text.split())
    assert f"Take {given.title}: {given.sentence}" in text
    _, one_seed = compared(tmp_path / "out", seeds=(0,))
    assert "One seed was run" in " ".join(advice(one_seed).reasons)


def test_advice_says_what_the_choice_rests_on(usual) -> None:
    _, summaries = usual
    best = best_of(summaries)
    small = replace(best, family="small", bytes_on_disk=0, trainable_parameters=1)
    given = advice([*summaries, small])
    assert given.title == "small"
    assert f"level with the highest ({best.title}" in given.sentence
    apart = replace(small.leading, mean=0.0, low=0.0, high=0.1)
    lower = replace(small, metrics={**small.metrics, small.score: apart})
    assert advice([*summaries, lower]).title != "small"
    bare = replace(best.leading, low=None, high=None)
    assert advice([replace(best, metrics={best.score: bare})]) is None


@pytest.mark.parametrize("higher", [True, False])
def test_of_two_of_one_size_the_better_is_taken(usual, tmp_path: Path, higher: bool) -> None:
    """Whichever way is better."""
    compared(tmp_path / "out")
    recipe = load_recipe(tmp_path / "out" / "recipe.yaml").recipe
    best = best_of(usual[1])

    def scored(family: str, mean: float) -> MethodSummary:
        leading = replace(best.leading, mean=mean, low=40.0, high=60.0)
        metrics = {**best.metrics, best.score: leading}
        return replace(best, family=family, metrics=metrics, higher_is_better=higher)

    both = [scored("more", 52.0), scored("less", 48.0)]
    for own in (both, both[::-1]):
        better = "more" if higher else "less"
        assert advice(own).title == best_of(own).title == better
        tiles = page_values(recipe, own, "")["highlights"]
        (tile,) = (tile for tile in tiles if "smallest" in tile["name"])
        assert tile["title"] == better


def test_every_answer_is_on_the_page_with_the_score_of_its_row(usual, tmp_path: Path) -> None:
    page, summaries = usual
    held = re.search(r'<script type="application/json">(.*?)</script>', page, re.DOTALL)
    data = json.loads(held[1])
    assert data["of"] == len(data["rows"]) == 30
    assert data["methods"] == [s.title for s in summaries]
    for i, row in enumerate(data["rows"]):
        for summary, (text, score) in zip(summaries, row["answers"], strict=True):
            prediction = summary.samples[i]
            assert text == prediction.prediction
            alone = metric("bleu")([prediction.prediction], [prediction.references])
            assert score == pytest.approx(alone, abs=1e-3)
    labels, _ = compared(tmp_path / "out", task="classification")
    held = re.search(r'<script type="application/json">(.*?)</script>', labels, re.DOTALL)
    answers = [a for row in json.loads(held[1])["rows"] for a in row["answers"]]
    assert {score for _, score in answers} == {0.0, 1.0}


def words_apart(prediction: str, references: list[str]) -> float:
    """A metric of one's own, below zero and above one."""
    return len(prediction.split()) - len(references[0].split()) / 2


@pytest.mark.parametrize(
    ("name", "better", "found"),
    [
        (f"{__name__}:words_apart", 1, [0.5, -0.5, None]),
        ("ter", -1, [33.333, 66.667, 100.0]),
        ("perplexity", -1, [20.086, 403.429, 1.0]),
    ],
)
def test_scores_of_rows_are_in_the_metrics_own_unit(
    usual, monkeypatch: pytest.MonkeyPatch, name: str, better: int, found: list[float | None]
) -> None:
    monkeypatch.setattr(OwnMetric, "value", one_row_has_no_value(OwnMetric.value))
    rows = [
        Prediction("in", said, ("one two three",), details={"nats": nats, "tokens": 1})
        for said, nats in (("one two", 3.0), ("one", 6.0), ("", 0.0))
    ]
    summary = replace(usual[1][0], score=name, samples=tuple(rows))
    data = browsable([summary], generation=True)
    assert [row["answers"][0][1] for row in data["rows"]] == found
    assert (data["better"], data["digits"]) == (better, 2)


def one_row_has_no_value(value: Any) -> Any:
    return lambda self, said, references: value(self, said, references) if said else math.nan


@pytest.mark.parametrize("name", ["perplexity", "ter", "reward_margin"])
def test_an_interval_of_what_is_not_in_0_to_100_is_not_cut(name: str) -> None:
    limits = metric(name).limits
    assert Interval(250.0, 150.0, 350.0, None, 1, 9).within(*limits).high == 350.0
    assert (Interval(-2.0, -3.0, -1.0, None, 1, 9).within(*limits).low == -3.0) == (
        name == "reward_margin"
    )
