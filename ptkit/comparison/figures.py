"""How figures are written, the same in the terminal, in Markdown and in the report."""

from __future__ import annotations

import math

from ptkit.comparison.statistics import Difference
from ptkit.evaluation.statistics import Interval
from ptkit.formats.sizes import in_bytes

#: What stands where a figure does not exist (nothing trained, one seed, no "off").
NONE = "–"


def size(count: float | None) -> str:
    """Bytes in the unit a reader would choose."""
    return in_bytes(count) if count else NONE


def parameters(count: int, share: float) -> str:
    """Trained values and their share of the base."""
    return f"{count:,} ({percent(share)})" if count else NONE


def short_parameters(count: int, share: float) -> str:
    """`parameters` where there is little room: `15.4k 0.23%`."""
    if not count:
        return NONE
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit} {percent(share)}"
    return f"{count} {percent(share)}"


def percent(share: float) -> str:
    """A share with two digits that say something."""
    if share >= 0.1:
        return f"{share:.0%}"
    return f"{share:.2%}" if share >= 0.0005 else f"{share:.4%}"


def seconds(value: float, trains: bool) -> str:
    """Wall-clock training time."""
    return f"{value:.1f} s" if trains else NONE


def score(interval: Interval) -> str:
    """A score with its 95 % interval, where there is one."""
    return interval.written(".1f")


def forgetting(interval: Interval | None) -> str:
    """Nats per token lost."""
    return NONE if interval is None else _with_spread(interval, "+.3f", 1, "")


def drift(interval: Interval | None) -> str:
    """Nats per token between the base's predictions and the adapted ones."""
    return NONE if interval is None else _with_spread(interval, ".3f", 1, "")


def retention(interval: Interval | None) -> str:
    """Share of the base's next-token accuracy kept, in percent."""
    return NONE if interval is None else _with_spread(interval, ".1f", 100, "%")


def _with_spread(interval: Interval, form: str, scale: float, unit: str) -> str:
    """A mean, and the half-width of its interval where there are several seeds."""
    mean = f"{scale * interval.mean:{form}}{unit}"
    if interval.high is None:
        return mean
    return f"{mean} ± {scale * (interval.high - interval.mean):{form.lstrip('+')}}"


def added_time(milliseconds: float | None) -> str:
    """What an adapter adds to the time of a generated token."""
    return NONE if milliseconds is None else f"{milliseconds:+.2f} ms"


def difference(found: Difference | None) -> str:
    """A score minus the baseline's, its 95 % interval and corrected p value."""
    if found is None:
        return NONE
    shown = found.interval.written("+.1f")
    if found.interval.low is None:
        return shown
    small = found.corrected < 0.001
    chance = "p < 0.001" if small else f"p = {found.corrected:.3f}"
    return f"{shown}, {chance}"


def way(interval: Interval | None) -> str:
    """How far a score gets from the base's to full fine-tuning's, with its 95 % interval."""
    if interval is None:
        return NONE
    if interval.low is None or interval.high is None:
        return f"{interval.mean:.0%}"
    if math.isinf(interval.low) or math.isinf(interval.high):
        return f"{interval.mean:.0%} [unbounded]"
    return f"{interval.mean:.0%} [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def off(exact: bool | None) -> str:
    """Whether the base is bit-identical with the adapter off."""
    return {True: "exact", False: "NOT EXACT", None: "no off"}[exact]
