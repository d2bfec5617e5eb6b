"""The comparison as a table: in the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest

from rich.table import Table
from rich.text import Text

from ptkit.comparison import figures
from ptkit.comparison.notebook import shown_in_notebook
from ptkit.comparison.scored import count_scored, kind_scored, retained, span
from ptkit.comparison.summary import MethodSummary, basis, best_of
from ptkit.evaluation.statistics import Interval
from ptkit.training.failure import Failure
from ptkit.training.titles import written

Row = dict[str, str]

#: What stands in place of the score of a cell that has none.
FAILED = "failed"


def _row(summary: MethodSummary) -> Row:
    """Column -> figure."""
    return {
        "method": summary.family,
        **{key: written(value) for key, value in summary.sweep.items()},
        f"{summary.score} [95 %]": figures.score(summary.leading),
        "seeds": str(len(summary.records)),
        "trained": figures.parameters(summary.trainable_parameters, summary.share),
        "on disk": figures.size(summary.bytes_on_disk),
        "time": figures.seconds(summary.seconds, summary.trains),
        "peak mem.": figures.size(summary.peak_memory_bytes),
        "forgetting": figures.forgetting(summary.forgetting),
        "retention": figures.retention(summary.retention),
        "off": figures.off(summary.off_exact),
    }


def _rows(
    summaries: Sequence[MethodSummary],
    failed: Sequence[Failure],
    row: Callable[[MethodSummary], Row],
) -> list[Row]:
    """The rows with the columns of all, those of failed cells last; methods that a sweep leaves
    alone have gaps in its own."""
    score = f"{summaries[0].score} [95 %]"
    rows = [row(s) for s in summaries]
    rows += [
        {
            "method": f"{failure.family}, seed {failure.seed}",
            **{key: written(value) for key, value in failure.sweep.items()},
            score: FAILED,
        }
        for failure in failed
    ]
    swept = dict.fromkeys(_swept(summaries, failed))
    names = ["method", *swept, *(n for n in rows[0] if n != "method" and n not in swept)]
    # What was not measured at all needs no column: forgetting, say, of classifiers.
    names = [n for n in names if any(each.get(n, figures.NONE) != figures.NONE for each in rows)]
    return [{name: each.get(name, figures.NONE) for name in names} for each in rows]


def _swept(summaries: Sequence[MethodSummary], failed: Sequence[Failure]) -> list[str]:
    """The keys that were swept, in order; some more than once."""
    return [key for s in summaries for key in s.sweep] + [key for f in failed for key in f.sweep]


def _short_row(summary: MethodSummary) -> Row:
    """`_row` for the width of a terminal; intervals over seeds are in the report."""

    def mean(interval: Interval | None) -> Interval | None:
        return interval and replace(interval, low=None, high=None)

    row = _row(summary)
    del row["seeds"]
    row["trained"] = figures.short_parameters(summary.trainable_parameters, summary.share)
    row["time"] = f"{summary.seconds:.0f} s" if summary.trains else figures.NONE
    row["forgetting"] = figures.forgetting(mean(summary.forgetting))
    row["retention"] = figures.retention(mean(summary.retention))
    renamed = {"peak mem.": "memory", "forgetting": "forget", "retention": "retain"}
    return {renamed.get(name, name): value for name, value in row.items()}


def caption(
    summaries: Sequence[MethodSummary], failed: Sequence[Failure] = (), *, spread: bool
) -> str:
    """What the figures are, and their n; why cells failed. spread: forgetting is shown with its
    interval."""
    text = (
        f"n = {count_scored(summaries)} {kind_scored(summaries)}; interval: 95 %, "
        f"{basis(summaries)}; peak memory beyond what was in use before"
    )
    together = [s for s in summaries if s.trained_together > 1]
    if together:
        names = ", ".join(s.title for s in together)
        text += (
            f"; seeds of {names} were trained {max(s.trained_together for s in together)} in a "
            "batch: time is a seed's share of it, memory that of the whole batch"
        )
    if measured := retained(summaries):
        over_seeds = ", ± over seeds" if spread else ""
        text += (
            f"; forgetting: nats per token on {span(r.tokens for r in measured)} tokens of "
            f"general text with the adapter on{over_seeds}; retention: next-token accuracy "
            "there, after / before; off: base logits with the adapter switched off"
        )
    for failure in failed:
        text += f". {failure.title} failed: {failure.reason.rstrip('.')}"
    return text + "."


def summary_table(summaries: Sequence[MethodSummary], failed: Sequence[Failure] = ()) -> Table:
    """The comparison for the terminal; the best score is bold."""
    best = best_of(summaries)
    seeds = max(len(s.records) for s in summaries)
    table = Table(
        # Text, because it names methods: a label in brackets is not rich's markup.
        caption=Text(
            f"{seeds} seed{'s' * (seeds > 1)}, {caption(summaries, failed, spread=False)}"
        ),
        caption_justify="left",
        pad_edge=False,
        box=None,
    )
    rows = _rows(summaries, failed, _short_row)
    swept = {*_swept(summaries, failed)}
    if swept:  # their columns need the room; the report has the others
        score = f"{best.score} [95 %]"
        kept = [n for n in rows[0] if n in {"method", *swept, score, "trained", "forget"}]
        rows = [{name: row[name] for name in kept} for row in rows]
    for name in rows[0]:
        # Where the width is short, long names fold; figures are never cut.
        is_name = name == "method"
        table.add_column(
            name,
            justify="left" if is_name else "right",
            header_style="bold",
            no_wrap=not is_name and name not in swept,
            overflow="fold",
        )
    for row, summary in zip_longest(rows, summaries):
        # Text, because a label or an interval in brackets is not rich's markup.
        cells = [Text(value) for value in row.values()]
        table.add_row(*cells, style="bold" if summary is best else None)
    return table


def html_table(summaries: Sequence[MethodSummary], failed: Sequence[Failure] = ()) -> str:
    """The comparison for a notebook; the best score is bold."""
    rows = _rows(summaries, failed, _row)
    best = summaries.index(best_of(summaries))
    return shown_in_notebook(rows, caption(summaries, failed, spread=True), bold=best)


def markdown_table(summaries: Sequence[MethodSummary], failed: Sequence[Failure] = ()) -> str:
    """The comparison for a README or a paper's draft."""
    rows = _rows(summaries, failed, _row)
    for row in rows:
        row["method"] = row["method"].replace("|", r"\|")
    lines = [
        "| " + " | ".join(rows[0]) + " |",
        "|---" + "|---:" * (len(rows[0]) - 1) + "|",
        *("| " + " | ".join(row.values()) + " |" for row in rows),
    ]
    return "\n".join(lines) + f"\n\n{caption(summaries, failed, spread=True)}\n"


#: What TeX would take for a command, and how to print it.
_TEX = {
    "\\": r"\textbackslash{}", "%": r"\%", "&": r"\&", "#": r"\#", "_": r"\_", "$": r"\$",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "–": "--",
}  # fmt: skip


def latex_table(summaries: Sequence[MethodSummary], failed: Sequence[Failure] = ()) -> str:
    """The comparison as a LaTeX table (package booktabs); the best score is bold."""
    rows = _rows(summaries, failed, _row)
    best = best_of(summaries)
    lines = [
        r"\begin{table}",
        r"\centering",
        r"\caption{" + _tex(caption(summaries, failed, spread=True)) + "}",
        r"\begin{tabular}{l" + "r" * (len(rows[0]) - 1) + "}",
        r"\toprule",
        " & ".join(map(_tex, rows[0])) + r" \\",
        r"\midrule",
    ]
    for row, summary in zip_longest(rows, summaries):
        cells = {name: _tex(value) for name, value in row.items()}
        if summary is best:
            score = f"{summary.score} [95 %]"
            cells[score] = rf"\textbf{{{cells[score]}}}"
        lines.append(" & ".join(cells.values()) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)
