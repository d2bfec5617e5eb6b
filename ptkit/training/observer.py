"""Who is told what a run is doing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ptkit.formats.cell_record import CellRecord
from ptkit.training.adapter_trainer import StepReport
from ptkit.training.failure import Failure

if TYPE_CHECKING:
    from ptkit.training.forecast import Forecast


class RunObserver:
    """Told what a run is doing; every method does nothing unless overridden."""

    def prepared(self, data: Sequence[str]) -> None:
        """The data are read; `data`: what was decided about them, in lines."""

    def planned(self, measured: Callable[[], Forecast]) -> None:
        """A long run is about to begin; `measured` finds out what it will take, on a few steps."""

    def cell_started(self, cell: str, steps: int) -> None:
        """A cell begins; `steps` is 0 for methods that train nothing."""

    def writing(self, done: int, texts: int) -> None:
        """Texts are being written to learn from."""

    def stepped(self, report: StepReport) -> None:
        """An optimiser step was taken."""

    def predicting(self, done: int, rows: int) -> None:
        """Test rows are being predicted."""

    def trial_finished(self, cell: str, validation_loss: float) -> None:
        """A trial of a search is over."""

    def trial_failed(self, failure: Failure) -> None:
        """A trial of a search has no result; the search goes on."""

    def noticed(self, cell: str, lines: Sequence[str]) -> None:
        """A cell shows signs that nothing was learnt; `lines`: what, and the likely cause."""

    def cell_finished(self, record: CellRecord, reused: bool) -> None:
        """The cell's record is on disk; `reused` when it was there already."""

    def cell_failed(self, failure: Failure) -> None:
        """A cell has no result; the others go on."""
