"""Peak memory of a piece of work: CUDA's own count, or the process's resident set.

What is measured here is reported and decides nothing. Where a system does not tell it (a container
without `/proc`, a sandbox), there is no figure, and the work goes on.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

#: Of glibc's malloc.h.
_M_MMAP_THRESHOLD = -3


class PeakMemory:
    """Bytes above what was in use when this was made.

    On CUDA it is the allocator's peak. On Linux it is the kernel's high-water mark of the resident
    set, reset first where that is allowed. Otherwise it cannot be reset and the value is a lower
    bound.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._told = False
        gc.collect()
        self._before: int | None = None
        try:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                self._before = torch.cuda.memory_allocated(device)
                return
            if sys.platform == "linux":
                _reset_high_water()
            self._before = _high_water()
        except Exception as error:  # whatever it is, it is not the work's
            self._tell(error)

    def bytes(self) -> int:
        """The peak so far. Raises RuntimeError where it cannot be measured."""
        found = self.known()
        if found is None:
            raise RuntimeError("this system does not tell how much memory a process takes")
        return found

    def known(self) -> int | None:
        """The peak so far; None where it cannot be measured, which is logged once."""
        if self._before is None:
            return None
        try:
            if self.device.type == "cuda":
                return torch.cuda.max_memory_allocated(self.device) - self._before
            return max(0, _high_water() - self._before)
        except Exception as error:
            self._tell(error)
            return None

    def _tell(self, error: Exception) -> None:
        if not self._told:
            logger.warning(
                "peak memory is not measured: this system does not tell it (%s: %s)",
                type(error).__name__, error,
            )  # fmt: skip
        self._told = True


def give_back_what_is_freed() -> None:
    """Let the C library give every freed tensor of 128 KB or more back to the system at once.

    glibc keeps such memory for later and raises the size from which it does not (mallopt(3),
    `M_MMAP_THRESHOLD`). A process then takes twice what its tensors do. This is for callers who
    already trade time for memory, because pages are zeroed anew. Elsewhere nothing happens. It
    holds for the rest of the process.
    """
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 17)
    except (OSError, AttributeError):  # another C library
        logger.debug("this C library has no mallopt")


def _reset_high_water() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; musl has none
    if trim is not None:
        # Freed memory the C library still holds would hide the next peak.
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        logger.info("the mark of the highest memory cannot be reset (%s)", error)


def _high_water() -> int:
    """The most memory, in bytes, that this process has had at once."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
