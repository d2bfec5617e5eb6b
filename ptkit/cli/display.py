"""Live progress of runs in the terminal; plain lines where there is none."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

import typer
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

from ptkit.formats.cell_record import CellRecord
from ptkit.training.adapter_trainer import StepReport
from ptkit.training.failure import Failure
from ptkit.training.forecast import Forecast, in_time, price_of, priced
from ptkit.training.learnt import FlatLoss
from ptkit.training.observer import RunObserver


class LiveDisplay(RunObserver):
    """A bar for the whole grid and one for the running cell, with its losses.

    Written to stderr, so that stdout stays for results. Without a terminal a line is printed every
    `EVERY` seconds, and one per finished cell; `quiet` prints nothing.
    """

    #: Seconds between two lines about a cell under way.
    EVERY = 15.0

    def __init__(
        self, cells: int, *, quiet: bool = False, price_per_hour: float | None = None
    ) -> None:
        self.price_per_hour = price_per_hour
        self.console = Console(stderr=True, quiet=quiet)
        self.cells = cells
        self.ended: set[str] = set()
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
        self.lines = not quiet and not self.console.is_terminal
        self.began = self.told = time.monotonic()
        self.first_step = 0
        self.flat = FlatLoss()

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

    def planned(self, measured: Callable[[], Forecast]) -> None:
        # Of a single run its own first steps tell as much, without being measured beforehand.
        if self.console.quiet or (self.cells == 1 and self.price_per_hour is None):
            return
        for line in measured().lines(self.price_per_hour):
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _line(self, text: str, left: float | None = None) -> None:
        """Say `text` where there is no terminal, unless something was said a moment ago.

        left: of the work, as a multiple of what was done since it began
        """
        now = time.monotonic()
        if not self.lines or now - self.told < self.EVERY:
            return
        self.told = now
        ahead = "" if left is None else f", {in_time((now - self.began) * left)} left"
        self.console.print(f"{self.name}: {text}{ahead}", highlight=False, markup=False)

    def cell_started(self, cell: str, steps: int) -> None:
        self.name = cell
        self.began = time.monotonic()
        self.first_step = 0
        self.flat = FlatLoss()
        if steps:
            self._phase(f"[bold]{cell}[/] training", steps)

    def writing(self, done: int, texts: int) -> None:
        if self.cell is None or self.progress.tasks[-1].total != texts:
            self._phase("writing texts", texts)
        assert self.cell is not None
        self.progress.update(self.cell, completed=done)
        self._line(f"{done} of {texts} texts written")

    def stepped(self, report: StepReport) -> None:
        if self.cell is None:
            return
        if not self.first_step:  # a resumed run begins where it was
            self.first_step, self.began = report.step, time.monotonic()
        warning = self.flat.add(report)
        if warning is not None:
            self._say(f"{self.name}: {warning}")
        note = f"loss {report.loss:.3f}"
        if report.validation_loss is not None:
            note += f" · validation {report.validation_loss:.3f}"
        self.progress.update(self.cell, completed=report.step, note=note)
        taken = report.step - self.first_step
        left = (report.steps - report.step) / taken if taken else None
        self._line(f"step {report.step} of {report.steps}, {note.replace(' · ', ', ')}", left)
        if report.step == report.steps:
            self._phase(f"[bold]{self.name}[/] predicting", 1)

    def predicting(self, done: int, rows: int) -> None:
        if self.cell is None or self.progress.tasks[-1].total != rows:
            self._phase(f"[bold]{self.name}[/] predicting", rows)
            self.began = time.monotonic()
        assert self.cell is not None
        self.progress.update(self.cell, completed=done)
        self._line(f"{done} of {rows} rows predicted")

    def trial_finished(self, cell: str, validation_loss: float) -> None:
        self.console.print(
            f"{cell}: validation loss {validation_loss:.3f}", highlight=False, markup=False
        )

    def trial_failed(self, failure: Failure) -> None:
        self._end_phase()
        self._say(f"{failure.cell}: failed: {failure.reason}")

    def noticed(self, cell: str, lines: Sequence[str]) -> None:
        for line in lines:
            self._say(f"{cell}: {line}")

    def cell_finished(self, record: CellRecord, reused: bool) -> None:
        what = "already done" if reused else f"{record.train_seconds + record.eval_seconds:.0f} s"
        self._ended(
            record.cell, f"{record.score} {record.metrics[record.score]:.2f}  ({what})"
        )  # fmt: skip

    def cell_failed(self, failure: Failure) -> None:
        self._ended(failure.cell, f"failed: {failure.reason}")

    def _ended(self, cell: str, what: str) -> None:
        """Say once what came of `cell`."""
        self._end_phase()
        if cell in self.ended:  # it was read again on the way to another
            return
        self.ended.add(cell)
        if self.grid is not None:
            self.progress.update(self.grid, completed=len(self.ended))
        position = f"[{len(self.ended)}/{self.cells}] " if self.cells > 1 else ""
        self._say(f"{position}{cell}: {what}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def _end_phase(self) -> None:
        if self.cell is not None:
            self.progress.remove_task(self.cell)
            self.cell = None


def say_plan(
    data: Sequence[str], measured: Forecast, *, as_json: bool, price_per_hour: float | None = None
) -> None:
    """Print what `--dry-run` found: for people, or as one line of JSON."""
    if as_json:
        found = {"data": [*data], **asdict(measured), **price(measured.seconds, price_per_hour)}
        typer.echo(json.dumps(found))
        return
    for line in (*data, *measured.lines(price_per_hour)):
        typer.echo(line)


def say_price(seconds: float, price_per_hour: float | None) -> None:
    """Print what training and scoring cost, where the price of an hour is known."""
    if price_per_hour is not None:
        typer.echo(f"trained and scored in {in_time(seconds)}: {priced(seconds, price_per_hour)}")


def price(seconds: float, price_per_hour: float | None) -> dict[str, float]:
    """The same for JSON; nothing without the price of an hour."""
    if price_per_hour is None:
        return {}
    return {"price_per_hour": price_per_hour, "price": price_of(seconds, price_per_hour)}
