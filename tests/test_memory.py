"""A figure that no decision rests on: where it cannot be had, the work goes on without."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ptkit.training import memory
from ptkit.training.memory import PeakMemory

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("write_text", PermissionError(13, "Permission denied")),
        ("read_text", FileNotFoundError(2, "No such file")),
        ("read_text", StopIteration()),
    ],
)
def test_a_failed_measurement_is_told_once_and_raises_nothing(
    where: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(Path, where, fails)
    peak = PeakMemory(CPU)
    found = [peak.known(), peak.known()]
    if where == "write_text":  # not reset, it is still a lower bound
        assert all(value is not None and value >= 0 for value in found)
        assert not caplog.records
    else:
        assert found == [None, None]
        assert len(caplog.records) == 1
        with pytest.raises(RuntimeError, match="does not tell"):
            peak.bytes()


def test_a_c_library_without_malloc_trim_and_a_status_without_the_mark(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Name: python\n")
    assert PeakMemory(CPU).bytes() >= 0


def test_a_failed_measurement_on_the_device_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> int:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", fails)
    assert PeakMemory(torch.device("cuda")).known() is None


def test_training_and_serving_are_imported_where_there_is_no_resource_module() -> None:
    """As on Windows, which has neither it nor fcntl."""
    code = (
        "import sys, psutil, filelock, multiprocess\n"  # these have other ways there
        "sys.modules['resource'] = sys.modules['fcntl'] = None\n"
        "import ptkit.training.loop, ptkit.training.run, ptkit.serve.run, ptkit.api\n"
        "sys.platform = 'win32'\n"
        "import torch, types\n"
        "told = types.SimpleNamespace(peak_wset=5 * 10**9)\n"
        "psutil.Process.memory_info = lambda _: told\n"
        "from ptkit.training.memory import PeakMemory\n"
        "peak = PeakMemory(torch.device('cpu')); told.peak_wset += 7\n"
        "assert peak.known() == 7, peak.known()\n"
        "ptkit.serve.run._raise_file_limit()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
