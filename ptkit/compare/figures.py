"""How figures are written, the same in the terminal, in Markdown and in the report."""

from __future__ import annotations

from ptkit.evaluate.statistics import Interval

#: What stands where a figure does not exist (nothing trained, one seed, no "off").
NONE = "–"


def size(count: float | None) -> str:
    """Bytes in the unit a reader would choose."""
    if not count:
        return NONE
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 100 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


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
    """A score with its 95 % interval."""
    return f"{interval.mean:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def forgetting(interval: Interval | None) -> str:
    """Nats per token lost, with the half-width of its interval where there are several seeds."""
    if interval is None:
        return NONE
    if interval.high is None:
        return f"{interval.mean:+.3f}"
    return f"{interval.mean:+.3f} ± {interval.high - interval.mean:.3f}"


def retention(interval: Interval | None) -> str:
    """Share of the base's next-token accuracy kept, in percent."""
    if interval is None:
        return NONE
    if interval.high is None:
        return f"{interval.mean:.1%}"
    return f"{interval.mean:.1%} ± {100 * (interval.high - interval.mean):.1f}"


def off(exact: bool | None) -> str:
    """Whether the base is bit-identical with the adapter off."""
    return {True: "exact", False: "NOT EXACT", None: "no off"}[exact]
