"""What a benchmark found: figures with their unit, spread and target."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from ptkit.training.provenance import hardware, versions

Unit = Literal["x", "s", "ms", "us", "bytes", "%", "nats", ""]


@dataclass(frozen=True)
class Figure:
    """One measured value.

    low, high: quartiles over rounds, where there are several
    at_least, at_most: the target, where there is one
    """

    what: str
    value: float
    unit: Unit = ""
    low: float | None = None
    high: float | None = None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.at_least is None and self.at_most is None:
            return None
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)


def times(found: tuple[float, float, float]) -> tuple[float, Unit, float, float]:
    """A ratio and its quartiles (see `ptkit.bench.timing.ratio`) as a figure takes them."""
    return found[0], "x", found[1], found[2]


@dataclass(frozen=True)
class BenchResult:
    """A benchmark's figures.

    settings: what was run; parity: how the candidates' results were checked against each other
    left_out: what could not be measured, and why
    disagreed: candidates whose results differ, and how; no figure of theirs is reported
    """

    name: str
    settings: dict[str, Any]
    parity: str
    figures: list[Figure] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    disagreed: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`, with the machine and the versions."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        figures = [{**asdict(f), "met": f.met} for f in self.figures]
        return {
            "bench": self.name,
            "settings": self.settings,
            "parity": self.parity,
            "figures": figures,
            "left_out": self.left_out,
            "disagreed": self.disagreed,
            "hardware": hardware(device),
            "system": platform.platform(),
            "versions": versions(),
        }
