"""A forked process is as one that was started: arguments, streams, environment, end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest

PROGRAMS = {
    "arguments": "import sys; print(sys.argv, __name__)",
    "place": "import os; print(os.getcwd(), os.environ['OWN'], os.environ.get('HF_HUB_OFFLINE'))",
    "path": "import sys; print(sys.path[:2])",
    "streams": "import sys; print(sys.stdin.read()[::-1]); print('told', file=sys.stderr)",
    "message": "import sys; sys.exit('no such thing')",
    "code": "import sys; sys.exit(7)",
    "at exit": "import atexit, threading, time; atexit.register(print, 'last')\n"
               "threading.Thread(target=lambda: (time.sleep(0.1), print('first'))).start()",
    "killed": "import os; print('here', flush=True); os.kill(os.getpid(), 9); print('gone')",
    "interrupted": "import os, signal, sys; sys.stderr = open(os.devnull, 'w')\n"
                   "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                   "os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(5)",
    "grandchild": "import subprocess, sys\n"
                  "sys.exit(subprocess.run([sys.executable, '-c', 'import sys; sys.exit(5)'])"
                  ".returncode)",
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_does_what_a_started_one_does(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAMS[name], "one", "two words"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "input": "abc",
               "env": {**os.environ, "OWN": "1", "PYTHONPATH": "OWN"}}  # fmt: skip
    started, found = subprocess.run(command, **options), forked.run(command, **options)
    for part in ("args", "returncode", "stdout", "stderr"):
        assert getattr(found, part) == getattr(started, part), part


def test_an_error_ends_it_with_its_traceback() -> None:
    done = forked.run([sys.executable, "-c", "1 / 0"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"
    with pytest.raises(subprocess.CalledProcessError):
        forked.run([sys.executable, "-c", "1 / 0"], stderr=subprocess.DEVNULL, check=True)


def test_it_is_waited_for_and_killed() -> None:
    command = [sys.executable, "-c", "print('here', flush=True); import time; time.sleep(60)"]
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run(command, timeout=0.2, stdout=subprocess.DEVNULL)
    with forked.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(20) == process.poll() == -signal.SIGTERM


def test_it_has_the_libraries_and_with_a_word_no_ptkit() -> None:
    code = "import sys; print([n in sys.modules for n in ('torch', 'ptkit.api', 'conftest')])"
    for given, loaded in (("", "[True, True, False]"), ("1", "[True, False, False]")):
        env = {**os.environ, forked.WITHOUT_PTKIT: given}
        done = forked.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout.strip() == loaded
