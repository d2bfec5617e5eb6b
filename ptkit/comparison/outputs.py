"""The files of a finished comparison: results, tables, plots and the report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from ptkit.comparison.cells import failures
from ptkit.comparison.charts import charts_of, write_charts
from ptkit.comparison.report import render_report
from ptkit.comparison.summary import MethodSummary, summarise
from ptkit.comparison.table import latex_table, markdown_table
from ptkit.formats import atomic
from ptkit.formats.cell_record import CellRecord
from ptkit.recipe.schema import Recipe
from ptkit.training.failure import Failure


def write_outputs(
    folder: Path, records: Sequence[CellRecord], recipe: Recipe
) -> list[MethodSummary]:
    """Write all outputs from the cells below `folder`; returns the summaries they show.

    A cell that failed is a row of its own in all of them, with the reason.
    """
    summaries = summarise(folder, records, recipe)
    failed = failures(recipe, folder)
    lines = [r.as_line() for r in records]
    lines += [json.dumps(failure.as_row(), ensure_ascii=False) for failure in failed]
    atomic.write_text(folder / "results.jsonl", "".join(f"{line}\n" for line in lines))
    atomic.write_text(folder / "results.csv", _csv(records, failed))
    atomic.write_text(folder / "table.md", markdown_table(summaries, failed))
    atomic.write_text(folder / "table.tex", latex_table(summaries, failed))
    write_charts(charts_of(summaries), folder / "plots")
    recipe_text = (folder / "recipe.yaml").read_text(encoding="utf-8")
    atomic.write_text(folder / "report.html", render_report(recipe, summaries, recipe_text, failed))
    return summaries


def _csv(records: Sequence[CellRecord], failed: Sequence[Failure]) -> str:
    """One row per cell, metrics and retention in columns of their own."""
    rows = []
    for record in records:
        values = record.as_dict()
        nested = {
            "settings",
            "curve",
            "scored",
            "versions",
            "metrics",
            "retention",
            "sweep",
            "tuned",
            "chosen",
        }
        row = {k: v for k, v in values.items() if k not in nested}
        row |= {f"sweep_{k}": v for k, v in record.sweep.items()}
        row |= {f"tuned_{k}": v for k, v in (record.tuned.settings if record.tuned else {}).items()}
        row |= {f"metric_{k}": v for k, v in record.metrics.items()}
        if record.retention is not None:
            overall = record.retention.model_dump(exclude={"domains"})
            row |= {f"retention_{k}": v for k, v in overall.items()}
            for domain, own in record.retention.domains.items():
                row[f"retention_forgetting_{domain}"] = own.forgetting
        rows.append(row)
    for failure in failed:
        row = failure.as_row()
        rows.append(row | {f"sweep_{k}": v for k, v in row.pop("sweep").items()})
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=list(dict.fromkeys(k for r in rows for k in r)))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
