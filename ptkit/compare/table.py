"""The comparison as a table: in the terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ptkit.compare import figures
from ptkit.compare.summary import MethodSummary


def _columns(summaries: Sequence[MethodSummary]) -> list[str]:
    first = summaries[0]
    return [
        "method",
        f"{first.score} [95 %]",
        "seeds",
        "trained",
        "on disk",
        "time",
        "peak mem.",
        "forgetting",
        "retention",
        "off",
    ]


def _cells(summary: MethodSummary) -> list[str]:
    return [
        summary.title,
        figures.score(summary.leading),
        str(len(summary.records)),
        figures.parameters(summary.trainable_parameters, summary.share),
        figures.size(summary.bytes_on_disk),
        figures.seconds(summary.seconds, summary.trains),
        figures.size(summary.peak_memory_bytes),
        figures.forgetting(summary.forgetting),
        figures.retention(summary.retention),
        figures.off(summary.off_exact),
    ]


def caption(summaries: Sequence[MethodSummary]) -> str:
    """What the figures are, and their n."""
    record = summaries[0].records[0]
    text = (
        f"n = {record.n_test} test rows; interval: 95 % bootstrap over seeds and rows; "
        "peak memory beyond what was in use before"
    )
    if record.retention is not None:
        text += (
            f"; forgetting: nats per token on {int(record.retention['tokens']):,} tokens of "
            "general text with the adapter on, ± over seeds; retention: next-token accuracy "
            "there, after / before; off: base logits with the adapter switched off"
        )
    return text + "."


def summary_table(summaries: Sequence[MethodSummary]) -> Table:
    """The comparison for the terminal; the best score is bold."""
    best = max(summaries, key=lambda s: s.leading.mean)
    table = Table(caption=caption(summaries), caption_justify="left", pad_edge=False, box=None)
    for i, name in enumerate(_columns(summaries)):
        table.add_column(name, justify="left" if i == 0 else "right", header_style="bold")
    for summary in summaries:
        table.add_row(*_cells(summary), style="bold" if summary is best else None)
    return table


def markdown_table(summaries: Sequence[MethodSummary]) -> str:
    """The comparison for a README or a paper's draft."""
    names = _columns(summaries)
    lines = [
        "| " + " | ".join(names) + " |",
        "|---" + "|---:" * (len(names) - 1) + "|",
        *("| " + " | ".join(_cells(s)) + " |" for s in summaries),
    ]
    return "\n".join(lines) + f"\n\n{caption(summaries)}\n"
