"""A peer's library in a process of its own, which lives as long as the bench.

It takes turns with ptkit's own steps, so that only one of them works at a time. How it answers is
in `peer_answers.py`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from ptkit.errors import PtkitError


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
