"""Runs the methods of recipes/defaults-tiny.yaml on other recipes' tasks, and writes the tables of
docs/defaults.md from the results. Interrupted, the same command goes on where it was.

python scripts/compare_defaults.py RECIPE ... [--seeds 0 1] [--set KEY=VALUE] [--without auto]
    [--full]
python scripts/compare_defaults.py --tables
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ptkit.comparison import figures
from ptkit.comparison.autotuned import autotuned, share_read
from ptkit.comparison.grid import run_grid
from ptkit.comparison.merge import read_comparison
from ptkit.comparison.outputs import write_outputs
from ptkit.comparison.summary import MethodSummary, basis, shown_together, summarise
from ptkit.formats.cell_record import CellRecord
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import EvaluateSection, Recipe

ROOT = Path(__file__).resolve().parents[1]
METHODS = ROOT / "recipes" / "defaults-tiny.yaml"
PAGE = ROOT / "docs" / "defaults.md"
RESULTS = ROOT / "comparisons" / "defaults"
BEGIN, END = "<!-- made by scripts/compare_defaults.py -->", "<!-- end -->"
PROMPTS = ("prefix", "prompt", "P-tuning")
#: Its rate is that of tests/recipes.
FULL = {"kind": "full", "learning_rate": 1e-3}


def methods_of(listed: Recipe, without: str = "") -> list[dict[str, Any]]:
    """The methods of a recipe, without those with this end of their name."""
    return [
        m.model_dump(mode="json", exclude_defaults=True)
        for m in listed.methods
        if not without or not m.title.endswith(f", {without}")
    ]


def run(
    recipe: str, seeds: list[int], out: Path, overrides: list[str], without: str, full: bool
) -> None:
    """Compare the defaults on `recipe`'s task, in `out`/its name.

    without: leaves out the methods with this end of their name; full: fine-tunes all weights, too
    """
    listed = load_recipe(METHODS).recipe
    methods = methods_of(listed, without)
    methods += [FULL] if full else []
    name = load_recipe(recipe).recipe.name
    loaded = load_recipe(
        recipe,
        [
            f"methods={json.dumps(methods)}",
            f"train={json.dumps(listed.train.model_dump(mode='json', exclude_defaults=True))}",
            f"seeds={json.dumps(seeds)}",
            *overrides,
        ],
    )
    run_grid(loaded, out / name)
    comparison = read_comparison(out / name)
    write_outputs(comparison.folder, comparison.records, loaded.recipe)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table, its first column to the left."""
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


class Task:
    """One comparison: its summaries by method, and the differences within each prompt method."""

    def __init__(self, folder: Path) -> None:
        comparison = read_comparison(folder)
        task = comparison.loaded.recipe.task
        leading = task.model_copy(update={"metrics": task.metrics[:1]})  # the others are not shown
        self.recipe: Recipe = comparison.loaded.recipe.model_copy(update={"task": leading})
        self.records = comparison.records
        self.of = {s.family: s for s in summarise(folder, comparison.records, self.recipe)}
        self.peer, self.fixed = self._against(folder, "PEFT"), self._against(folder, "default")
        record = next(iter(self.of.values())).records[0]
        self.head = f"{self.recipe.name}: {record.score}"

    def records_of(self, method: str) -> list[CellRecord]:
        """The records of `method`'s seeds; none where the task was run without it."""
        return self.of[method].records if method in self.of else []

    def _against(self, folder: Path, other: str) -> dict[str, MethodSummary]:
        """Every prompt method's rows compared with its row called `other`."""
        rows = {}
        for prompt in PROMPTS:
            own = [r for r in self.records if r.family.startswith(f"{prompt}, ")]
            evaluate: EvaluateSection = self.recipe.evaluate.model_copy(
                update={"baseline": f"{prompt}, {other}"}
            )
            recipe = self.recipe.model_copy(update={"evaluate": evaluate})
            rows |= {s.family: s for s in summarise(folder, own, recipe)}
        return rows


def tables(folders: list[Path]) -> str:
    """The page's tables."""
    tasks = [Task(folder) for folder in folders]
    head = ["", *(task.head for task in tasks)]
    order = {m.title: i for i, m in enumerate(load_recipe(METHODS).recipe.methods)}
    known = dict.fromkeys(name for task in tasks for name in task.of)
    methods = sorted(known, key=lambda name: order.get(name, len(order)))  # `full` last

    def cells(name: str, shown) -> list[str]:
        return [shown(t.of[name]) if name in t.of else figures.NONE for t in tasks]

    lines = ["### Scores", ""]
    for task in tasks:
        record = max(task.records, key=lambda r: len(r.curve))
        seeds = sorted({r.seed for r in task.records if r.curve})
        train = task.recipe.train
        lines.append(
            f"* {task.recipe.name}: {train.steps} steps of {train.batch_size} of "
            f"{record.n_train} training rows, n = {record.n_test} test rows, "
            f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}"
        )
    scores = ([m, *cells(m, lambda s: figures.score(s.leading))] for m in methods)
    lines += ["", *table(head, scores)]
    based = basis([s for task in tasks for s in task.of.values() if s.trains])
    lines += [f"Mean over seeds. Interval: 95 %, {based}.", ""]
    lines += ["### Default minus PEFT's default, on the same test rows", ""]
    lines += differences(head, [t.peer for t in tasks], "default")
    if any("full" in task.of for task in tasks):
        lines += ["### Share of the way from the base to full fine-tuning", ""]
        ways = ([m, *cells(m, lambda s: figures.way(s.way))] for m in methods if m != "full")
        lines += table(head, ways)
        lines += [
            "(method - base) / (full - base) of the means above, with a 95 % interval (Fieller) "
            "over seeds and rows.",
            "",
        ]
    if any(method.endswith(", auto") for method in methods):
        lines += ["### `learning_rate: auto` minus the default", ""]
        lines += differences(head, [t.fixed for t in tasks], "auto")
    lines += ["### What `auto` chose, and the share of the run's rows it read", ""]
    asked = [m for m in methods if any(r.chosen for t in tasks for r in t.records_of(m))]
    lines += table(head, ([m, *(chosen(t, m) for t in tasks)] for m in asked))
    lines += [
        "Start (and rate), and of how many seeds where they differ. A row that is scored only "
        "counts half.", "",
    ]  # fmt: skip
    lines += ["### Forgetting", ""]
    lines += table(
        head, ([m, *cells(m, lambda s: figures.forgetting(s.forgetting))] for m in methods)
    )
    measured = [r.retention for t in tasks for r in t.records if r.retention]
    tokens = min(m.tokens for m in measured)
    texts = ", ".join(sorted({text for m in measured for text in m.domains}))
    lines += [f"Nats per token on {tokens:,.0f} tokens of {texts}, ± over seeds.", ""]
    return "\n".join(lines)


def differences(head: Iterable[str], tasks: list[dict[str, MethodSummary]], row: str) -> list[str]:
    """A table of what each prompt method's `row` differs by, a column for each task."""

    names = [f"{prompt}, {row}" for prompt in PROMPTS]
    found = shown_together([[t[name] for name in names if name in t] for t in tasks])
    columns = [{s.family: figures.difference(s.against) for s in own} for own in found]
    lines = table(head, ([p, *(c.get(f"{p}, {row}", figures.NONE) for c in columns)]
                         for p in PROMPTS))  # fmt: skip
    together = sum(len(column) for column in columns)
    return [*lines, f"p values are corrected for the {together} differences shown (Holm).", ""]


def chosen(task: Task, method: str) -> str:
    """What the cells of `method` found, and what finding it cost."""
    records = task.records_of(method)
    text = autotuned(records)
    if text is None:
        return figures.NONE
    share = max(share_read(record, task.recipe.train) for record in records)
    return f"{text} [{share:.0%}]".replace("|", "\\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--without", default="", help="leave out these rows: `auto`")
    parser.add_argument("--full", action="store_true", help="fine-tune all weights, too")
    parser.add_argument("--tables", action="store_true", help="write docs/defaults.md")
    given = parser.parse_args()
    for recipe in given.recipes:
        run(recipe, given.seeds, given.out, given.set, given.without, given.full)
    if given.tables:
        folders = sorted(p.parent for p in given.out.glob("*/recipe.yaml"))
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
        text = f"{before}{BEGIN}\n\n{tables(folders)}{END}{after}"
        PAGE.write_text(text, encoding="utf-8")
        print(PAGE)


if __name__ == "__main__":
    main()
