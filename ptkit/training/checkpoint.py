"""What a killed run resumes from: safetensors and JSON, complete or not there at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ptkit.errors import UserError
from ptkit.formats import atomic
from ptkit.methods import Adapter

_GENERATORS = ("cpu", "cuda")
_FOLDER = re.compile(r"checkpoint-(\d+)$")


@dataclass
class Progress:
    """How far a run has come.

    curve: one entry per validation, `{step, train_loss, validation_loss}` in nats per token; with
        `retain`, `divergence` and `retain_weight` of the step too.
    best_loss: validation loss of the best checkpoint; best_score: what made it the best, the same
        but with `retain`
    supervised: target tokens read, or pairs; scored: `{step, seconds, supervised_tokens, score}`
        of every validation, where the job scores
    retain_weight: of the next step; None before the first, and without `retain`
    """

    step: int = 0
    best_step: int = 0
    best_loss: float = float("inf")
    best_score: float = float("inf")
    stale_validations: int = 0
    seconds: float = 0.0
    tokens: int = 0
    supervised: int = 0
    peak_memory_bytes: int | None = 0
    loss_since_validation: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    scored: list[dict[str, float]] = field(default_factory=list)
    schedule: dict[str, Any] = field(default_factory=dict)
    retain_weight: float | None = None


def save_checkpoint(
    run: Path,
    progress: Progress,
    adapter: Adapter,
    best: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    random: Sequence[Mapping[str, Tensor]],
    average: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write `run/checkpoint-STEP`, and remove those that were cut off. The ones before it stay, for
    runs that go on together (see `keep_only`).

    random: the `random_states` of every process, in their order
    average: running means of the trained values; none without `train.average`
    """
    # A run that is often killed would fill the disk with parts of checkpoints.
    atomic.remove_leftovers(run)
    path = _folder(run, progress.step)
    with atomic.folder(path, replace=True) as scratch:
        save_file(_on_cpu(dict(adapter.trainable())), scratch / "trainable.safetensors")
        save_file(_on_cpu(best), scratch / "best.safetensors")
        if average:
            save_file(_on_cpu(dict(average)), scratch / "average.safetensors")
        save_file(_optimizer_tensors(adapter, optimizer), scratch / "optimizer.safetensors")
        states = {_key(i, name): t for i, own in enumerate(random) for name, t in own.items()}
        save_file(states, scratch / "random.safetensors")
        atomic.write_json(scratch / "progress.json", asdict(progress))


def keep_only(run: Path, step: int) -> None:
    """Delete all checkpoints of `run` but the one after `step`."""
    for path in _checkpoints(run):
        if path != _folder(run, step):
            atomic.remove(path)


def saved_progress(run: Path) -> list[Progress]:
    """How far each checkpoint of `run` had come, oldest first. There are several only where a save
    was cut off. Raises UserError when one is damaged."""
    return [_progress(path) for path in _checkpoints(run)]


def load_checkpoint(
    run: Path,
    step: int,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    process: int = 0,
    processes: int = 1,
) -> tuple[Progress, dict[str, Tensor], dict[str, Tensor]]:
    """Restore the checkpoint of `run` after `step` into `adapter`, `optimizer` and this process's
    generators.

    Returns the progress, the best parameters so far and the running means (none without
    `train.average`). Raises UserError when it was written by another number of processes: each has
    a part of every batch; and when its progress is damaged.
    """
    path = _folder(run, step)
    random = load_file(path / "random.safetensors")
    wrote = len({name.rpartition("/")[0] for name in random})
    if wrote != processes:
        raise UserError(
            f"{path} was written by {_many(wrote)}, and this run has {_many(processes)}, which "
            f"would learn from other rows; start it on {wrote}, or delete that folder to begin anew"
        )
    adapter.load_trainable(load_file(path / "trainable.safetensors"))
    _load_optimizer(adapter, optimizer, load_file(path / "optimizer.safetensors"))
    _restore_random(
        {n: random[_key(process, n)] for n in _GENERATORS if _key(process, n) in random}
    )
    device = adapter.base.model.device

    def read(file: Path) -> dict[str, Tensor]:
        return {n: t.clone().to(device) for n, t in load_file(file).items()}

    averages = path / "average.safetensors"
    average = read(averages) if averages.exists() else {}
    return _progress(path), read(path / "best.safetensors"), average


def remove_checkpoints(run: Path) -> None:
    """Delete what a finished run no longer needs."""
    for path in _checkpoints(run):
        atomic.remove(path)


def _progress(path: Path) -> Progress:
    try:
        return Progress(**json.loads((path / "progress.json").read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{path / 'progress.json'} is damaged, or another version's ({error}); delete {path} "
            "to begin anew"
        ) from error


def _folder(run: Path, step: int) -> Path:
    return run / f"checkpoint-{step:07d}"


def _checkpoints(run: Path) -> list[Path]:
    atomic.settle_all(run)
    return sorted(p for p in run.glob("checkpoint-*") if _FOLDER.match(p.name))


def _on_cpu(tensors: dict[str, Any]) -> dict[str, Tensor]:
    # Cloned: parameters may share storage (tied weights), which safetensors refuses.
    return {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}


def _optimizer_tensors(adapter: Adapter, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, parameter in adapter.trainable().items():
        for key, value in optimizer.state[parameter].items():
            state[f"{name}/{key}"] = value
    return _on_cpu(state)


def _load_optimizer(
    adapter: Adapter, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    parameters = adapter.trainable()
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for full_name, value in tensors.items():
        name, key = full_name.rsplit("/", 1)
        parameter = parameters[name]
        place = state_device(value, parameter, groups[parameter])
        # Copied: what safetensors gives is a view of the mapped file, which starts at any byte.
        # With two threads AdamW then rounds some values otherwise than a run that was not stopped.
        optimizer.state[parameter][key] = value.clone().to(place)


def state_device(value: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where AdamW expects `value` of its state of `parameter`. Moments are beside it, and the step
    count is on the CPU unless one kernel reads it there (`fused`, `capturable`)."""
    in_kernel = bool(group.get("fused")) or bool(group.get("capturable"))
    return parameter.device if value.ndim or in_kernel else torch.device("cpu")


def random_states() -> dict[str, Tensor]:
    """The states of this process's generators, by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _key(process: int, generator: str) -> str:
    """What a state is called in the file: the first process's as it ever was."""
    return f"{process}/{generator}" if process else generator


def _restore_random(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _many(processes: int) -> str:
    return "one process" if processes == 1 else f"{processes} processes"
