"""The side of a peer in a process of its own: it answers requests until its input ends.

One JSON request per line comes on stdin, and one line of JSON on stdout answers it. The answer is
an object with `done`, with `lacks` (why the library cannot do that), or with `failed` (a
traceback). Tensors and rows come as files. Between requests the process waits and does nothing.
`ptkit.bench.peer_process` has the other side.

Only the standard library is imported: a copy of this file runs in environments without ptkit.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any, TextIO


class Lacking(Exception):
    """The library cannot do what was asked."""


def answer_requests(bench: Any, versions: str) -> None:
    """Say what runs here, then answer until stdin ends; `do` names a method of `bench`."""
    answers = _answers_to()
    # On a line of its own, even where something printed by an import has not ended its line.
    print("\n" + json.dumps({"ready": versions}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answered(bench, json.loads(line))), file=answers, flush=True)


def _answered(bench: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request: what is not `do` are arguments of the method."""
    try:
        return {"done": getattr(bench, request.pop("do"))(**request)}
    except Lacking as error:
        return {"lacks": str(error)}
    except Exception:
        return {"failed": traceback.format_exc()}


def _answers_to() -> TextIO:
    """Where answers go: stdout as it was. Whatever else is printed from now on, by libraries in
    Python or in C, goes to stderr and cannot get between them."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return own
