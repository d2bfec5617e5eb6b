"""Processes of Python for the tests, forked from one that has loaded the libraries already.

A process of its own takes seconds to load torch and transformers. Each of these begins as such a
process does after that: its own environment, folder, streams, arguments, signals and exit code.
"""

from __future__ import annotations

import array
import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Where a zygote listens: environment that libraries read as they are loaded -> its socket.
_PLACES = "PTKIT_TEST_ZYGOTES"
#: Set for a process that must not have ptkit loaded.
WITHOUT_PTKIT = "PTKIT_TEST_WITHOUT_PTKIT"
_READ_AT_LOADING = ("HF_", "TRANSFORMERS_", WITHOUT_PTKIT)
_SIZE = 4
_Process = subprocess.Popen


def _key(env: Mapping[str, str]) -> str:
    return json.dumps(
        sorted((k, v) for k, v in env.items() if v and k.startswith(_READ_AT_LOADING))
    )


def _place(env: Mapping[str, str]) -> str:
    """The socket of the zygote for this environment, which is started at the first request."""
    places = json.loads(os.environ.get(_PLACES, "{}"))
    key = _key(env)
    if key not in places:
        folder = tempfile.mkdtemp(prefix="zygote-")
        places[key] = os.path.join(folder, "socket")
        process = _Process(
            [sys.executable, str(Path(__file__).with_name("zygote.py")), places[key]],
            stdin=subprocess.PIPE, cwd=folder,
            env={**env, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                 "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
        )  # fmt: skip
        os.environ[_PLACES] = json.dumps(places)
        owner = os.getpid()

        def end() -> None:
            if os.getpid() == owner:
                process.stdin.close()
                process.wait(20)

        atexit.register(end)
        while not os.path.exists(places[key]):
            assert process.poll() is None, "the zygote ended"
            time.sleep(0.02)
    return places[key]


def _forkable(args: Any, executable: Any, options: Mapping[str, Any]) -> bool:
    """Whether it is this Python without options of its own, on a system where a process that has
    loaded the libraries can be forked."""
    if sys.platform != "linux":
        return False
    if not isinstance(args, Sequence) or isinstance(args, str | bytes) or len(args) < 2:
        return False
    first = os.fspath(args[1])
    plain = first in ("-m", "-c", "-u") or not first.startswith("-")
    return args[0] == sys.executable and executable in (None, args[0]) and plain and not options


class Popen(_Process):
    """`subprocess.Popen`; one of this Python is forked from a zygote."""

    _told: socket.socket | None = None

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: bool,
                       pass_fds: Any, cwd: Any, env: Any, startupinfo: Any, creationflags: int,
                       shell: bool, p2cread: int, p2cwrite: int, c2pread: int, c2pwrite: int,
                       errread: int, errwrite: int, *rest: Any) -> None:  # fmt: skip
        new_session = bool(rest[5])
        odd = {"preexec_fn": preexec_fn, "pass_fds": pass_fds, "shell": shell}
        if not _forkable(args, executable, {k: v for k, v in odd.items() if v}):
            return super()._execute_child(
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
                creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
                *rest,
            )  # fmt: skip
        env = {os.fsdecode(k): os.fsdecode(v) for k, v in (env or os.environ).items()}
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(_place(env))
        env[_PLACES] = os.environ[_PLACES]
        body = json.dumps({
            "words": [os.fsdecode(word) for word in args[1:]], "env": env,
            "cwd": os.fsdecode(cwd or os.getcwd()), "new_session": new_session,
        }).encode()  # fmt: skip
        streams = [own if own != -1 else n for n, own in enumerate((p2cread, c2pwrite, errwrite))]
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))
        connection.sendmsg([len(body).to_bytes(_SIZE, "big")], [rights])
        connection.sendall(body)
        self.pid = int.from_bytes(connection.recv(_SIZE, socket.MSG_WAITALL), "big")
        assert self.pid, "the zygote ended"
        self._child_created = True
        self._told = connection
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _status(self, wait: bool) -> int | None:
        """How it ended, if it has; as `waitpid` says it."""
        assert self._told is not None
        try:
            flags = socket.MSG_WAITALL if wait else socket.MSG_DONTWAIT
            told = self._told.recv(_SIZE, flags)
        except BlockingIOError:
            return None
        self._told.close()
        return int.from_bytes(told, "big") if told else 9  # with its zygote

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._told is None:
            return super()._try_wait(wait_flags)
        status = self._status(wait=not wait_flags & os.WNOHANG)
        return (0, 0) if status is None else (self.pid, status)

    def _internal_poll(self, *given: Any, **named: Any) -> int | None:
        if self._told is None:
            return super()._internal_poll(*given, **named)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None:
                    status = self._status(wait=False)
                    if status is not None:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def run(
    command: Sequence[Any], *, input: Any = None, capture_output: bool = False,
    timeout: float | None = None, check: bool = False, **options: Any,
) -> subprocess.CompletedProcess[Any]:  # fmt: skip
    """`subprocess.run`."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            out, errors = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, errors)
    if check:
        done.check_returncode()
    return done
