"""Comparisons of different tasks on one page: their scores side by side, then each in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from ptkit.comparison import figures
from ptkit.comparison.cells import failures
from ptkit.comparison.merge import MergedComparison
from ptkit.comparison.report import page_values, templates
from ptkit.comparison.scored import count_scored, kind_scored
from ptkit.comparison.summary import (
    MethodSummary,
    anchor_of,
    baseline_of,
    basis,
    shown_together,
    summarise,
)
from ptkit.comparison.table import FAILED
from ptkit.errors import UserError
from ptkit.formats import atomic
from ptkit.recipe.schema import Recipe
from ptkit.training.failure import Failure


@dataclass(frozen=True)
class Task:
    """One comparison of the overview: the summaries of its methods, and the cells that failed."""

    recipe: Recipe
    recipe_text: str
    summaries: list[MethodSummary]
    failed: list[Failure]

    @property
    def name(self) -> str:
        """The recipe's name."""
        return self.recipe.name

    def of(self, method: str) -> MethodSummary | None:
        """The summary of `method`, if it was compared here."""
        return next((s for s in self.summaries if s.title == method), None)

    @property
    def has_both_ends(self) -> bool:
        """Whether the base and full fine-tuning were compared here."""
        ends = (anchor_of(self.recipe, "base"), anchor_of(self.recipe, "full"))
        return all(end is not None and self.of(end) is not None for end in ends)


@dataclass(frozen=True)
class OverviewCell:
    """One figure: what is shown, what it sorts by, and whether it is the best of its column."""

    shown: str
    value: float | str
    best: bool = False


@dataclass(frozen=True)
class OverviewRow:
    """A method's figures, one per task."""

    title: str
    colour: int
    cells: list[OverviewCell]


@dataclass(frozen=True)
class OverviewTable:
    """Methods by tasks."""

    title: str
    note: str
    columns: list[str]
    rows: list[OverviewRow]


def write_overview(parts: Sequence[MergedComparison], out: Path, title: str) -> list[OverviewTable]:
    """Write `overview.html` and `overview.md` to the folder `out`; returns the tables they show.

    Raises UserError for two comparisons of one name.
    """
    names = [part.loaded.recipe.name for part in parts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two of these comparisons are called {', '.join(twice)}")
    summaries = [summarise(part.folder, part.records, part.loaded.recipe) for part in parts]
    tasks = [
        Task(
            part.loaded.recipe,
            (part.folder / "recipe.yaml").read_text(encoding="utf-8"),
            own,
            failures(part.loaded.recipe, part.folder),
        )
        for part, own in zip(parts, shown_together(summaries), strict=True)
    ]
    tables = tables_of(tasks)
    atomic.write_text(out / "overview.html", _page(tasks, tables, title))
    atomic.write_text(out / "overview.md", _markdown(tables, title))
    return tables


def tables_of(tasks: Sequence[Task]) -> list[OverviewTable]:
    """Scores, the share of the way to full fine-tuning, forgetting and cost, method by task."""
    methods = list(dict.fromkeys(s.title for task in tasks for s in task.summaries))
    failed = {(failure.method_title, task.name) for task in tasks for failure in task.failed}
    methods += sorted({method for method, _ in failed} - {*methods})

    def table(
        title: str,
        note: str,
        column: Callable[[Task], str],
        cell: Callable[[Task, MethodSummary], tuple[str, float | str]],
        better: Callable[[Task], int],
    ) -> OverviewTable:
        """better: 1 where the highest figure is marked, -1 the lowest, 0 none."""
        figures_of = {
            (method, task.name): cell(task, summary)
            for method in methods for task in tasks
            if (summary := task.of(method)) is not None
        }  # fmt: skip
        best: dict[str, float] = {}
        for task in tasks:
            known = [
                value for (_, name), (_, value) in figures_of.items()
                if name == task.name and isinstance(value, int | float)
            ]  # fmt: skip
            sign = better(task)
            if known and sign:
                best[task.name] = max(known) if sign > 0 else min(known)

        def of(method: str, task: Task) -> OverviewCell:
            # Of some seeds only: those that did not fail are in the figure.
            missing = FAILED if (method, task.name) in failed else figures.NONE
            shown, value = figures_of.get((method, task.name), (missing, ""))
            return OverviewCell(shown, value, best=value == best.get(task.name))

        rows = [
            OverviewRow(method, number % 10, [of(method, task) for task in tasks])
            for number, method in enumerate(methods)
        ]
        return OverviewTable(title, note, [column(task) for task in tasks], rows)

    def headed(task: Task) -> str:
        return f"{task.name}: {task.summaries[0].score}"

    based = "; ".join(dict.fromkeys(_based(task, tasks) for task in tasks))
    counts = ", ".join(f"{task.name} {_rows(task)}" for task in tasks)
    baselines = " or ".join(dict.fromkeys(baseline_of(task.recipe) for task in tasks))
    scores = table(
        "Score", f"Mean over seeds. Interval: 95 %, {based}. n: {counts}. Marked: the best mean of "
        "a task (all of equal ones); whether a difference is more than chance is told by its "
        "paired test below.",
        headed, lambda _, s: (figures.score(s.leading), s.leading.mean),
        lambda task: 1 if task.summaries[0].higher_is_better else -1,
    )  # fmt: skip
    differences = table(
        "Difference", f"The score minus that of {baselines}, on the same rows, over seeds and rows "
        "in the same way. Each interval is for one difference alone. p values are corrected for "
        f"the {_compared(tasks)} differences of this table (Holm).",
        lambda task: task.name,
        lambda _, s: (figures.difference(s.against), s.against.interval.mean if s.against else ""),
        lambda _: 0,
    )  # fmt: skip
    forgetting = table(
        "Forgetting", "Nats per token lost on general text with the adapter on, ± over seeds; "
        "marked: the least of the methods that train.",
        lambda task: task.name,
        lambda _, s: (
            figures.forgetting(s.forgetting),
            s.forgetting.mean if s.forgetting and s.trains else "",
        ),
        lambda _: -1,
    )  # fmt: skip
    cost = table(
        "Trained parameters", "And their share of the base.", lambda task: task.name,
        lambda _, s: (
            figures.parameters(s.trainable_parameters, s.share), s.trainable_parameters or ""
        ),
        lambda _: 0,
    )  # fmt: skip
    found = [scores, differences]
    if all(task.has_both_ends for task in tasks):
        found.append(
            table(
                "Share of the way from the base to full fine-tuning",
                "(method - base) / (full - base) of the means, with a 95 % interval (Fieller) over "
                "seeds and rows.", lambda task: task.name,
                lambda _, s: (figures.way(s.way), s.way.mean if s.way else ""), lambda _: 0,
            )
        )  # fmt: skip
    if any(s.forgetting for task in tasks for s in task.summaries):
        found.append(forgetting)
    return [*found, cost]


def _compared(tasks: Sequence[Task]) -> int:
    return sum(s.against is not None for task in tasks for s in task.summaries)


def _rows(task: Task) -> str:
    return f"{count_scored(task.summaries)} {kind_scored(task.summaries)}"


def _based(task: Task, tasks: Sequence[Task]) -> str:
    """What the intervals of `task` are over; its name first where others differ."""
    said = {other.name: basis(other.summaries) for other in tasks}
    return said[task.name] if len({*said.values()}) == 1 else f"{task.name}: {said[task.name]}"


def _page(tasks: Sequence[Task], tables: Sequence[OverviewTable], title: str) -> str:
    environment = templates()
    body = environment.get_template("comparison.html.j2")
    shown = []
    for task in tasks:
        values = page_values(
            task.recipe, task.summaries, task.recipe_text, task.failed, f"{task.name}-",
            _compared(tasks),
        )  # fmt: skip
        # Rendered by the same escaping environment, hence safe to put in as it is.
        shown.append({**values, "anchor": task.name, "html": Markup(body.render(**values))})
    return environment.get_template("overview.html.j2").render(
        title=title, tasks=shown, tables=tables
    )


def _markdown(tables: Sequence[OverviewTable], title: str) -> str:
    lines = [f"# {title}", ""]
    for table in tables:
        lines += [f"## {table.title}", "", f"| method | {' | '.join(table.columns)} |",
                  f"|---|{'---:|' * len(table.columns)}"]  # fmt: skip
        for row in table.rows:
            cells = (f"**{c.shown}**" if c.best else c.shown for c in row.cells)
            lines.append(f"| {row.title} | {' | '.join(cells)} |")
        lines += ["", table.note, ""]
    return "\n".join(lines)
