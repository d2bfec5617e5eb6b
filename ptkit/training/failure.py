"""What a cell or a trial failed of: a file in its folder, which the next success removes."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field

from ptkit.errors import FolderError, PtkitError
from ptkit.formats.typed_file import FileKind, FileSection, unchanged
from ptkit.training.titles import titled

if TYPE_CHECKING:
    from ptkit.training.cell import Cell

#: In the folder of a cell or a trial.
FAILED = "failed.json"

#: Of the system, where nothing else could be written either.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

Result = TypeVar("Result")


class Failure(FileSection):
    """A cell (or a trial of a search) that has no result, and why: `failed.json`.

    cell, method, family, sweep, seed: as a record has them (`ptkit.formats.cell_record.CellRecord`)
    error: the exception's name; reason: what it says, one line
    traceback: its lines, where the error was not raised on purpose; at: when, ISO 8601
    """

    cell: str
    method: str
    family: str
    sweep: dict[str, Any]
    seed: int
    error: str
    reason: str
    traceback: list[str] = Field(default_factory=list)
    at: str = ""

    @classmethod
    def of(cls, cell: Cell, error: Exception) -> Failure:
        """That `cell` failed of `error`."""
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        if isinstance(error, PtkitError):
            reason, trace = " ".join(lines), list[str]()
        else:
            reason = ": ".join([type(error).__name__, *lines[:1]])
            trace = "".join(traceback.format_exception(error)).splitlines()
        return cls(
            cell=cell.name,
            method=cell.method.title,
            family=cell.family or cell.method.title,
            sweep=cell.sweep,
            seed=cell.seed,
            error=type(error).__name__,
            reason=reason,
            traceback=trace,
            at=datetime.now(UTC).isoformat("T", "seconds"),
        )

    @property
    def method_title(self) -> str:
        """The method with its swept values, as summaries have it."""
        return titled(self.family, self.sweep)

    @property
    def title(self) -> str:
        """The method with its swept values, and the seed."""
        return f"{self.method_title}, seed {self.seed}"

    def as_row(self) -> dict[str, Any]:
        """For tables of results: what a record has too, and the reason as `failed`."""
        kept = self.model_dump(mode="json", exclude={"error", "traceback", "at"})
        return {**kept, "failed": kept.pop("reason")}

    def write(self, folder: Path) -> None:
        """Keep it in the folder of its cell."""
        _FAILURE.write(folder / FAILED, self)

    @classmethod
    def read(cls, folder: Path) -> Failure:
        """The one in `folder`. Raises PtkitError for a file this version does not read."""
        return _FAILURE.read_file(folder / FAILED)


_FAILURE = FileKind(Failure, (unchanged,), PtkitError, "delete it")


def attempted(cell: Cell, work: Callable[[], Result]) -> Result | Failure:
    """What `work` returns, or why it failed; the failure is kept in the folder of `cell`.

    Raises what ends everything: a folder that is in use or holds something else, a full disk.
    """
    try:
        return work()
    except Exception as error:
        if isinstance(error, FolderError) or (isinstance(error, OSError) and error.errno in _FULL):
            raise
        failure = Failure.of(cell, error)
    # Here, because a report reads failures and needs no tensors.
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)  # what was out of memory leaves room for the next
    failure.write(cell.folder)
    return failure


def failed_cells(failures: list[Failure]) -> str:
    """An error message that names them, each with its reason."""
    what = "1 cell" if len(failures) == 1 else f"{len(failures)} cells"
    lines = [f"{what} failed; the same command tries again:"]
    return "\n".join([*lines, *(f"{f.cell}: {f.reason}" for f in failures)])
