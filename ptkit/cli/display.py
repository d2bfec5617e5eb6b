"""Live progress of runs in the terminal; plain lines where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from ptkit.training.record import CellRecord
from ptkit.training.run import Observer
from ptkit.training.trainee import StepReport


class LiveDisplay(Observer):
    """A bar for the whole grid and one for the cell under way, with its losses.

    Written to stderr, so that stdout stays for results. Without a terminal one line is printed
    per finished cell; `quiet` prints nothing.
    """

    def __init__(self, cells: int, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.cells = cells
        self.finished = 0
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim"),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self.grid: TaskID | None = None
        self.cell: TaskID | None = None
        self.name = ""

    def __enter__(self) -> LiveDisplay:
        self.progress.start()
        if self.cells > 1:
            self.grid = self.progress.add_task("cells", total=self.cells, note="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def _phase(self, description: str, total: int, **fields: Any) -> None:
        if self.cell is not None:
            self.progress.remove_task(self.cell)
        self.cell = self.progress.add_task(description, total=total, **{"note": "", **fields})

    def prepared(self, data: Sequence[str]) -> None:
        for line in data:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def cell_started(self, cell: str, steps: int) -> None:
        self.name = cell
        if steps:
            self._phase(f"[bold]{cell}[/] training", steps)

    def writing(self, done: int, texts: int) -> None:
        if self.cell is None or self.progress.tasks[-1].total != texts:
            self._phase("writing texts", texts)
        assert self.cell is not None
        self.progress.update(self.cell, completed=done)

    def stepped(self, report: StepReport) -> None:
        if self.cell is None:
            return
        note = f"loss {report.loss:.3f}"
        if report.validation_loss is not None:
            note += f" · validation {report.validation_loss:.3f}"
        self.progress.update(self.cell, completed=report.step, note=note)
        if report.step == report.steps:
            self._phase(f"[bold]{self.name}[/] predicting", 1)

    def predicting(self, done: int, rows: int) -> None:
        if self.cell is None or self.progress.tasks[-1].total != rows:
            self._phase(f"[bold]{self.name}[/] predicting", rows)
        assert self.cell is not None
        self.progress.update(self.cell, completed=done)

    def trial_finished(self, cell: str, validation_loss: float) -> None:
        self.console.print(
            f"{cell}: validation loss {validation_loss:.3f}", highlight=False, markup=False
        )

    def cell_finished(self, record: CellRecord, reused: bool) -> None:
        self.finished += 1
        if self.cell is not None:
            self.progress.remove_task(self.cell)
            self.cell = None
        if self.grid is not None:
            self.progress.update(self.grid, completed=self.finished)
        what = "already done" if reused else f"{record.train_seconds + record.eval_seconds:.0f} s"
        position = f"[{self.finished}/{self.cells}] " if self.cells > 1 else ""
        self.console.print(
            f"{position}{record.cell}: {record.score} {record.metrics[record.score]:.2f}  ({what})",
            highlight=False,
            markup=False,
        )
