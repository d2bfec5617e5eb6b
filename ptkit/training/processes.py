"""The processes of one run, as accelerate and torchrun start them, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ptkit.errors import UserError
from ptkit.launched import require_supported_launch
from ptkit.runtime.base_model import Base

#: How long a process waits for the others. One measures and writes for all, or finds a start for
#: all, which may take longer than the ten minutes that are NCCL's own limit.
PATIENCE = timedelta(days=1)

Row = TypeVar("Row")
Result = TypeVar("Result")


def processes(device: torch.device) -> PartialState:
    """This process among those of the run, which the first call joins. device: of the base

    Raises UserError where several processes were given one GPU, or started for FSDP or DeepSpeed.
    """
    require_supported_launch()
    state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
    require_own(device, state)
    return state


def require_own(device: torch.device, state: PartialState) -> None:
    """Raise UserError where `device` is not the one that accelerate gives this process."""
    if state.num_processes > 1 and device.index is not None and device != state.device:
        raise UserError(
            f"`model.device` is `{device}`, and process {state.process_index} of "
            f"{state.num_processes} works on `{state.device}`; write `cuda`, which gives each "
            "process a GPU of its own"
        )


def current(device: torch.device) -> AbstractContextManager[None]:
    """Within this context `device` is what accelerate works on.

    With one process accelerate takes `cuda` without a number, which is the current one: the first
    GPU, unless it is told otherwise.
    """
    if device.type != "cuda" or device.index is None:
        return nullcontext()
    chosen: AbstractContextManager[None] = torch.cuda.device(device)
    return chosen


@dataclass(frozen=True)
class DataParallel:
    """Which rows this process reads: part `rank` of `size` equal ones.

    state: all processes of the run. Where they hold one base together (tensor parallelism), they
        read the same rows, at the same time: there is one part
    """

    rank: int
    size: int
    state: PartialState

    @classmethod
    def of(cls, base: Base) -> DataParallel:
        """That of this process, in a run on `base`."""
        state = processes(base.model.device)
        if base.processes > 1:
            return cls(0, 1, state)
        return cls(state.process_index, state.num_processes, state)

    @property
    def together(self) -> bool:
        """Whether no process can run the base without the others."""
        return self.size < self.state.num_processes

    @property
    def measures(self) -> bool:
        """Whether this process measures what one measures for all: the first one does, and where
        they run the base together, all."""
        return self.state.is_main_process or self.together

    def any(self, flag: bool) -> bool:
        """`flag`, or where the processes run the base together, whether it is set in one of them."""
        return any(gather_object([flag])) if self.together else flag

    def map(
        self, rows: Sequence[Row], work: Callable[[Sequence[Row]], Sequence[Result]]
    ) -> list[Result]:
        """One result for each of `rows`, in their order, in every process; each does its part.

        work: from some rows to their results
        """
        if self.size == 1:
            return list(work(rows))
        own = rows[self.rank :: self.size]
        parts: list[list[Result]] = gather_object([list(work(own)) if own else []])
        return [parts[i % len(parts)][i // len(parts)] for i in range(len(rows))]
