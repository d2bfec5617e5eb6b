"""`ptkit bench memory`: time and memory of a training step as the work grows, beside PEFT."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import get_peft_model

from ptkit.bench.bases import ParityError, bench_base, random_prompts
from ptkit.bench.result import BenchResult, Figure
from ptkit.bench.timing import interleaved, ratio
from ptkit.comparison.drawing import paper, written
from ptkit.data.encoded import EncodedExample
from ptkit.extras import require
from ptkit.formats import atomic
from ptkit.formats.sizes import in_bytes
from ptkit.methods import ADAPTERS, Demonstrations, create_adapter
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import collate
from ptkit.runtime.fused import fused_activations
from ptkit.training.memory import PeakMemory
from ptkit.training.objective import Objective

Axis = Literal["virtual", "input", "rows"]
#: What grows, and the values it takes; the others stay at their first-named default.
AXES: dict[Axis, tuple[int, ...]] = {
    "virtual": (1, 8, 32, 128, 512),
    "input": (32, 128, 512, 1024),
    "rows": (1, 4, 16, 64),
}
DEFAULTS: dict[Axis, int] = {"virtual": 20, "input": 64, "rows": 8}
TARGET_TOKENS = 24


@dataclass(frozen=True)
class GrowthPoint:
    """A step at one size: seconds and peak bytes of both sides, and PEFT's time over ptkit's."""

    axis: Axis
    size: int
    seconds: dict[str, float]
    memory: dict[str, int]
    faster: tuple[float, float, float]


def bench_memory(
    model: str,
    *,
    method: str = "prompt_tuning",
    axes: Sequence[Axis] = ("virtual", "input", "rows"),
    rounds: int = 3,
    plot: Path | None = None,
) -> BenchResult:
    """Forward and backward of `method` at every size of `axes`; `plot`: a PNG or SVG of them.

    Sizes beyond the base's positions are left out. The losses of both sides must agree.
    """
    if plot is not None:
        require("report", "`ptkit bench memory --plot`")
    base = bench_base(model)
    base.model.eval()  # without dropout, so that losses can be compared
    points = []
    # Nothing of what happens once in a process is charged to the first size.
    _measured(base, method, "virtual", {**DEFAULTS, "virtual": 1, "rows": 1}, rounds=1)
    for axis in axes:
        for size in AXES[axis]:
            at = {**DEFAULTS, axis: size}
            limit = base.max_positions
            if limit is None or at["virtual"] + at["input"] + TARGET_TOKENS <= limit:
                points.append(_measured(base, method, axis, at, rounds))
    if plot is not None:
        _draw(points, plot, f"{method} on {model}: a training step")
    figures = []
    for p in points:
        where = f"{p.axis} {p.size}"
        figures += [
            Figure(f"{where}: a step, ptkit", p.seconds["ptkit"], "s"),
            Figure(f"{where}: PEFT / ptkit", p.faster[0], "x", p.faster[1], p.faster[2]),
            Figure(f"{where}: peak memory, ptkit", p.memory["ptkit"], "bytes"),
            Figure(f"{where}: memory, ptkit / PEFT", p.memory["ptkit"] / p.memory["peft"], "x"),
        ]
    return BenchResult(
        "memory", {"model": model, "method": method, "rounds": rounds, "defaults": dict(DEFAULTS)},
        "the loss of every size", figures,
    )  # fmt: skip


def _measured(base: Base, method: str, axis: Axis, at: dict[Axis, int], rounds: int) -> GrowthPoint:
    section_class: Any = ADAPTERS[method].section_class
    section = section_class(kind=method, num_virtual_tokens=at["virtual"], start="random")
    torch.manual_seed(0)
    adapter: Any = create_adapter(section, base, Demonstrations((), 0))
    peer: Any = get_peft_model(base.model, copy.deepcopy(adapter.config))
    peer.prompt_encoder["default"].load_state_dict(adapter.encoder.state_dict())
    inputs = random_prompts(base, at["rows"], at["input"])
    targets = random_prompts(base, at["rows"], TARGET_TOKENS, seed=1)
    rows = [EncodedExample(i, t) for i, t in zip(inputs, targets, strict=True)]
    tensors = collate(rows, base)
    objective = Objective([adapter])
    tokens = at["rows"] * TARGET_TOKENS

    def ours() -> float:
        with fused_activations(base.model):
            loss = objective([0], [len(rows)], **tensors).sum() / tokens
            loss.backward()
        return _cleared(loss, adapter.trainable().values())

    def theirs() -> float:
        loss = peer(**tensors).loss
        loss.backward()
        return _cleared(loss, peer.parameters())

    candidates = {"ptkit": ours, "peft": theirs}
    losses: dict[str, float] = {}
    memory: dict[str, int] = {}
    for name, run in candidates.items():  # it warms up, too: the largest steps take a minute
        peak = PeakMemory(base.model.device)
        losses[name] = run()
        memory[name] = max(1, peak.bytes())
    mine, other = losses["ptkit"], losses["peft"]
    if not abs(mine - other) <= 1e-3 * abs(other):
        raise ParityError(f"{axis} {at[axis]}: the loss is {mine} here, {other} with PEFT")
    timings = interleaved(candidates, rounds=rounds, warm_up=0)
    return GrowthPoint(
        axis, at[axis], {name: t.median for name, t in timings.items()}, memory,
        ratio(timings["peft"], timings["ptkit"]),
    )  # fmt: skip


def _cleared(loss: torch.Tensor, parameters: Any) -> float:
    for parameter in parameters:
        parameter.grad = None
    return float(loss.detach())


def _draw(points: Sequence[GrowthPoint], path: Path, title: str) -> None:
    from matplotlib import ticker
    from matplotlib.figure import Figure

    names = {"virtual": "virtual tokens", "input": "input tokens", "rows": "rows"}
    axes = list(dict.fromkeys(p.axis for p in points))
    with paper():
        figure = Figure(figsize=(3.6 * len(axes), 5.6), layout="constrained")
        grid = figure.subplots(2, len(axes), squeeze=False)
        for column, axis in enumerate(axes):
            own = [p for p in points if p.axis == axis]
            sizes = [p.size for p in own]
            top, bottom = grid[0][column], grid[1][column]
            for side, label, colour in (("peft", "PEFT", "#cc3311"), ("ptkit", "ptkit", "#0077bb")):
                style: dict[str, Any] = {"color": colour, "label": label}
                top.plot(sizes, [p.seconds[side] for p in own], "o-", **style)
                bottom.plot(sizes, [p.memory[side] for p in own], "o-", **style)
            for part, what, shown in (
                (top, "seconds", lambda value, _: f"{value:,g}"),
                (bottom, "peak memory", lambda value, _: in_bytes(value)),
            ):
                part.set(xscale="log", yscale="log", xlabel=names[axis])
                part.set_xticks(sizes, [str(s) for s in sizes])
                part.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
                part.yaxis.set_major_formatter(ticker.FuncFormatter(shown))
                part.minorticks_off()
                if column == 0:
                    part.set_ylabel(what)
        grid[0][0].legend()
        figure.suptitle(title)
        form: Literal["png", "svg"] = "svg" if path.suffix == ".svg" else "png"
        atomic.write_bytes(path, written(figure, form))
