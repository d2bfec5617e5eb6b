"""`python zygote.py SOCKET`: a process with the libraries loaded, that others are forked from.

A program, not a part of the tests: `forked` starts it, and asks it for processes.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import selectors
import signal
import socket
import sys
import threading
import traceback
import types
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch",
    "torch.distributed.run",
    "transformers",
    "transformers.generation.utils",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3.modeling_qwen3",
    "peft",
    "accelerate",
    "accelerate.commands.launch",
    "safetensors.torch",
)
OWN = (
    "ptkit.api", "ptkit.bank", "ptkit.comparison.grid", "ptkit.cli.main", "ptkit.serve.app",
    "ptkit.hub.export",
)  # fmt: skip
_SIZE = 4


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """One request: what to run, and the three streams that it is given."""
    head, ancillary, _, _ = connection.recvmsg(_SIZE, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i")
    for _, _, data in ancillary:
        streams.frombytes(data)
    left, body = int.from_bytes(head, "big"), b""
    while len(body) < left:
        body += connection.recv(left - len(body))
    return json.loads(body), list(streams)


def become(asked: dict[str, Any], streams: list[int], own_path: list[str]) -> None:
    """This process is now one that was just started so."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    if asked["new_session"]:
        os.setsid()
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["env"])
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    unbuffered = asked["words"][0] == "-u" or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdout.reconfigure(line_buffering=os.isatty(1), write_through=unbuffered)
    if asked["words"][0] == "-u":
        del asked["words"][0]
    paths = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [*map(os.path.abspath, paths), *own_path]
    importlib.invalidate_caches()
    random.seed()
    import numpy
    import torch

    numpy.random.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def program(words: list[str]) -> None:
    """What Python does with the words after its own name."""
    first, *rest = words
    main = types.ModuleType("__main__")
    if first == "-m":
        import runpy

        name, *arguments = rest
        sys.argv = [name, *arguments]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(name, run_name="__main__", alter_sys=True)
        return
    sys.modules["__main__"] = main
    if first == "-c":
        code, *arguments = rest
        sys.argv = ["-c", *arguments]
        sys.path.insert(0, "")
        exec(compile(code, "<string>", "exec"), main.__dict__)
        return
    sys.argv = words
    path = Path(first)
    sys.path.insert(0, str(path.resolve().parent))
    main.__dict__["__file__"] = first
    exec(compile(path.read_text(encoding="utf-8"), first, "exec"), main.__dict__)


def ended(words: list[str]) -> int:
    """Run it as the interpreter does, to the end -> the exit code."""
    code = 0
    try:
        program(words)
    except SystemExit as error:
        if isinstance(error.code, int) or error.code is None:
            code = error.code or 0
        else:
            print(error.code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        threading._shutdown()  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code


def serve(path: str) -> None:
    """Fork a process for every connection, and say there how it ended; until stdin is closed."""
    import subprocess

    from forked import WITHOUT_PTKIT, Popen  # what these start is forked, too

    subprocess.Popen = Popen  # type: ignore[misc]
    own = () if os.environ.get(WITHOUT_PTKIT) else OWN
    gc.disable()  # of what is loaded nothing is garbage
    for name in (*LIBRARIES, *own):
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    given = set(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    own_path = [p for p in sys.path[1:] if p not in given]
    running: dict[int, socket.socket] = {}
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the tests end what they started
    with selectors.DefaultSelector() as selector:
        for watched in (listener.fileno(), woken, 0):
            selector.register(watched, selectors.EVENT_READ)
        while True:
            ready = {key.fd for key, _ in selector.select()}
            if 0 in ready and not os.read(0, 1):
                break
            if woken in ready:
                os.read(woken, 4096)
                while True:
                    try:
                        pid, status = os.waitpid(-1, os.WNOHANG)
                    except ChildProcessError:
                        break
                    if pid == 0:
                        break
                    with running.pop(pid) as told, contextlib.suppress(OSError):
                        told.sendall(status.to_bytes(_SIZE, "big"))
            if listener.fileno() in ready:
                connection, _ = listener.accept()
                asked, streams = receive(connection)
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    selector.close()
                    for held in (listener, connection, *running.values()):
                        held.close()
                    os.close(woken)
                    os.close(wake)
                    become(asked, streams, own_path)
                    code = ended(asked["words"])
                    os._exit(code)
                for stream in streams:
                    os.close(stream)
                running[pid] = connection
                connection.sendall(pid.to_bytes(_SIZE, "big"))
    for pid in running:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    os.unlink(path)
    os.rmdir(os.path.dirname(path))


if __name__ == "__main__":
    serve(sys.argv[1])
