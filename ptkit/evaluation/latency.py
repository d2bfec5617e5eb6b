"""What an adapter adds to the time of every generated token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from ptkit.methods import Adapter
from ptkit.runtime.forward import rows_for
from ptkit.runtime.generation import generate

#: Tokens generated per measurement, and measurements of each side, taken in turns.
NEW_TOKENS = 16
ROUNDS = 3
#: No round begins later than this; the other processes of a run wait for what one measures.
SECONDS = 60.0


@dataclass(frozen=True)
class Latency:
    """Milliseconds per generated token, for one row; medians over rounds.

    adapter: with the adapter on; None for a model that writes nothing, a classifier
    base: with it off, measured in turns; None without an "off"
    """

    adapter: float | None
    base: float | None

    @property
    def added(self) -> float | None:
        """What the adapter adds, in milliseconds; noise may make it negative."""
        return None if self.base is None or self.adapter is None else self.adapter - self.base


def _as_told(late: bool) -> bool:
    return late


def measure_latency(
    adapter: Adapter, prompt: list[int], agreed: Callable[[bool], bool] = _as_told
) -> Latency:
    """Time greedy generation after `prompt` with the adapter on and off.

    agreed: from whether it is late here to whether processes that measure together stop

    The first token, which reads the prompt, is not counted: what it costs depends on the prompt.
    """
    prompt = adapter.behind(prompt)
    compiled = adapter.compiled()
    batch = rows_for(None if compiled is None else compiled.detach(), [prompt])

    def per_token(on: bool) -> float:
        def seconds(tokens: int) -> float:
            started = time.perf_counter()
            generate(
                adapter.model, [prompt], batch if on else None,
                pad_token_id=adapter.base.pad_token_id,
                max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
            )  # fmt: skip
            return time.perf_counter() - started

        return 1000 * (seconds(NEW_TOKENS + 1) - seconds(1)) / NEW_TOKENS

    on, off = [], []
    begun = time.perf_counter()
    for number in range(ROUNDS):
        if number and agreed(time.perf_counter() - begun > SECONDS):
            break
        on.append(per_token(True))
        if adapter.has_off:
            with adapter.off():
                off.append(per_token(False))
    return Latency(statistics.median(on), statistics.median(off) if off else None)
