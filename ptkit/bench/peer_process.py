"""A peer's library in a process of its own, which lives as long as the bench.

It takes turns with ptkit's own steps, so that only one of them works at a time. How it answers is
in `peer_answers.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TextIO

import torch

from ptkit.bench.peers import Clock, Round, Trained, trainer_settings
from ptkit.errors import PtkitError, UserError
from ptkit.runtime.base_model import Base
from ptkit.runtime.progress import no_weights_bar


class NotReadyError(PtkitError):
    """The process ended before it could answer; the message is the last line that it wrote."""


class PeerProcess:
    """A process that answers requests.

    library: what it runs, for messages; log: a file for what it writes on stderr, open for reading
        and writing

    Raises OSError where `command` cannot be run.
    """

    def __init__(
        self, library: str, command: Sequence[str], log: TextIO, environment: Mapping[str, str]
    ) -> None:
        self.library, self.versions = library, ""
        self._log = log
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            encoding="utf-8", env=environment,
        )  # fmt: skip

    def wait_until_ready(self) -> str:
        """Wait until it has imported everything; returns its versions. Raises NotReadyError."""
        assert self._process.stdout is not None
        for line in self._process.stdout:  # libraries may print before they are ready, too
            if line.startswith('{"ready"'):
                self.versions = str(json.loads(line)["ready"])
                return self.versions
        raise NotReadyError(self._last_words())

    def asked(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request: an object with `done` or `lacks`. Raises PtkitError where
        something over there failed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PtkitError(f"the process of {self.library} ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise PtkitError(f"{self.library} failed ({self.versions}):\n{answer['failed']}")
        return answer

    def end(self) -> None:
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.communicate()

    def _last_words(self) -> str:
        """The last line it wrote on stderr."""
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1].strip() if lines else f"exit code {code}"


class SeparatePeer:
    """A peer of `ptkit bench train` whose library runs in a process of its own. A context: the
    process, and the folder that both read, end with it.

    versions: of what it runs. Raises UserError where it cannot be run or misses a library.
    """

    #: What it runs, for messages.
    library: ClassVar[str]

    def __init__(self) -> None:
        self._base: Base | None = None
        with ExitStack() as opened:  # closed again if it cannot be started
            self._folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
            log = opened.enter_context((self._folder / "log.txt").open("w+", encoding="utf-8"))
            # What it leaves behind when it is ended goes with the folder.
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(self._folder)}
            try:
                self._process = PeerProcess(self.library, self._command(), log, environment)
                opened.callback(self._process.end)
                self.versions = self._process.wait_until_ready()
            except OSError as error:
                raise UserError(self._unusable(f"cannot be run ({error.strerror})")) from error
            except NotReadyError as error:
                raise UserError(
                    self._unusable(f"{self.library} cannot be imported ({error})")
                ) from error
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    def _command(self) -> list[str]:
        """What is run; the folder is there already."""
        raise NotImplementedError

    def _unusable(self, reason: str) -> str:
        """The message where the process cannot be used, with what to do. reason: as it goes
        on after the name of what was given"""
        raise NotImplementedError

    def _save(self, base: Base, folder: Path) -> None:
        """Write what the process reads of the base."""
        base.model.save_pretrained(folder)

    def _hand_over(self, base: Base) -> dict[str, Any]:
        """Have the process load the base; returns its answer."""
        folder = self._folder / "base"
        with no_weights_bar():
            self._save(base, folder)
        answer = self._process.asked(
            "base", folder=str(folder), device=str(base.model.device),
            dtype=str(base.model.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
        )  # fmt: skip
        shutil.rmtree(folder)
        self._base = base
        return answer

    def _train(self, turn: Round, **start: Any) -> Trained:
        """Have it train on the batches of `turn`; `start` says from what."""
        rows = self._folder / "rows.json"
        rows.write_text(json.dumps(turn.labelled()), encoding="utf-8")
        asked = self._process.asked(
            "train", rows=str(rows), settings=trainer_settings(turn), **start
        )
        done = asked["done"]
        clock = Clock(done["ends"], done["losses"])
        return Trained(clock.losses, clock.per_step, done["memory"])
