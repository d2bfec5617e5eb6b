"""Peak memory of a piece of work: CUDA's own count, or the process's resident set."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch


class PeakMemory:
    """Bytes above what was in use when this was made.

    On CUDA the allocator's peak. On Linux the kernel's high-water mark of the resident set,
    reset first; elsewhere it cannot be reset and the value is a lower bound.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
            return
        if sys.platform == "linux":
            # Freed memory the C library still holds would hide the next peak.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        self._before = self._high_water()

    def bytes(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        return max(0, self._high_water() - self._before)

    @staticmethod
    def _high_water() -> int:
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            line = next(row for row in status.splitlines() if row.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
