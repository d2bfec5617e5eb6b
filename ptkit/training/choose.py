"""`start: auto` and `learning_rate: auto`: what a cell begins with, found before its run.

Starts are texts made from the task; each is compiled as the method would, and all are scored in
one mixed batch on the same training rows. Rates are miniature runs, schedule included, that take
their steps in one batch. Both read training rows for their gradients and validation rows for their
verdict, never a test row; together they cost at most `SHARE` of the run.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed

from ptkit.data.encode import EncodedExample
from ptkit.data.task import Example
from ptkit.data.templates import Template
from ptkit.errors import PtkitError, UserError
from ptkit.formats import atomic
from ptkit.methods import Adapter
from ptkit.recipe.schema import (
    ClassificationTask,
    GenerationTask,
    HeadedTask,
    MethodSection,
    Task,
    TrainSection,
)
from ptkit.runtime.attention import prefix_attention
from ptkit.runtime.forward import collate
from ptkit.training.loop import fit
from ptkit.training.objective import Objective
from ptkit.training.trainee import Job

#: Of the rows that a run's steps read, what the starts and the rates may read. A row that is
#: scored only counts half: the base is frozen, so its backward pass costs what its forward does.
START_SHARE, RATE_SHARE = 0.05, 0.10
#: Rates tried, as multiples of the method's default.
FACTORS = (0.1, 0.3, 1.0, 3.0)
#: Fewer steps than this say nothing about a rate.
FEWEST_STEPS = 10
#: A short test tells what fails, not which of two good choices ends better: the default is left
#: for a start that lowers its loss by this share, or where its own rate learns less than this
#: share of what the best one learns. In twenty steps of four rows defaults that end best have
#: learnt 0.84 of that.
CLEARLY_LOWER, ENOUGH = 0.1, 0.7

#: The job that trains an adapter of a section without `auto`.
Make = Callable[[MethodSection], Job]


@dataclass(frozen=True)
class Choice:
    """A method with its `auto`s replaced by what was found, and the record of how; None where
    nothing was left open."""

    section: MethodSection
    record: dict[str, Any] | None


def is_open(section: MethodSection) -> bool:
    """Whether something about the method is to be found before the run."""
    return "auto" in (getattr(section, "start", None), getattr(section, "learning_rate", None))


def choose(
    section: MethodSection,
    make: Make,
    task: Task,
    examples: Sequence[Example],
    folder: Path,
) -> Choice:
    """Find what `section` leaves to `auto`; what was found before, in `folder`, is read back.

    examples: the training rows. Raises UserError for a run too short to find it in, and for a
    task with a classification head.
    """
    if not is_open(section):
        return Choice(section, None)
    if isinstance(task, HeadedTask):
        raise UserError(
            f"`{section.title}`: `auto` tries several adapters in one batch, and each would need a "
            "classification head of its own; give `start` and `learning_rate`"
        )
    done = folder / "chosen.json"
    if not done.exists():
        found: dict[str, Any] = {}
        if getattr(section, "start", None) == "auto":
            found |= _start(section, make, task, examples)
        if getattr(section, "learning_rate", None) == "auto":
            found |= _rate(_settled(section, found), make, folder / "rates")
        atomic.write_json(done, found)
        shutil.rmtree(folder / "rates", ignore_errors=True)
    found = json.loads(done.read_text(encoding="utf-8"))
    return Choice(_settled(section, found), found)


def _settled(section: MethodSection, found: dict[str, Any]) -> MethodSection:
    """`section` with the settings that were found."""
    return section.model_copy(
        update={k: v for k, v in found.items() if k in ("start", "start_text", "learning_rate")}
    )


def starts(
    task: ClassificationTask | GenerationTask, examples: Sequence[Example], seed: int
) -> list[dict[str, str]]:
    """Settings of the starts to try: the task's own words, answers, demonstrations, any words."""
    texts = [Template(task.input).words]
    drawn = random.Random(seed).sample(list(examples), min(64, len(examples)))
    # Short rows: with room for few tokens, their answers are still in it.
    short = sorted(drawn, key=lambda e: len(e.input) + len(e.target))[:2]
    texts += [example.input + example.target for example in (*drawn[:2], *short)]
    named = [{"start": "task"}, {"start": "vocabulary"}]
    if isinstance(task, ClassificationTask):
        named += [{"start": "labels"}, {"start": "examples"}]
    else:
        texts += [example.target for example in drawn[:2]]
    found = [{"start": "text", "start_text": text} for text in dict.fromkeys(texts) if text.strip()]
    return [*named, *found]


def _rows_read(train: TrainSection, share: float) -> int:
    return int(train.steps * train.batch_size * train.gradient_accumulation * share)


def _start(
    section: MethodSection,
    make: Make,
    task: ClassificationTask | GenerationTask,
    examples: Sequence[Example],
) -> dict[str, Any]:
    """The candidate with the lowest loss per target token on a few training rows, or the default
    where none is clearly lower."""
    settled = section.model_copy(update={"learning_rate": _default(section, "learning_rate")})
    job = make(settled.model_copy(update={"start": "vocabulary"}))
    candidates = starts(task, examples, job.seed)
    budget = _rows_read(job.settings, START_SHARE)
    rows = min(2 * budget // len(candidates), job.settings.batch_size * 2, len(job.train))
    if not rows:
        raise UserError(
            f"`start: auto` scores {len(candidates)} starts in {START_SHARE:.0%} of the run, which "
            f"`train.steps: {job.settings.steps}` leaves no row for; name a start"
        )
    order = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(job.seed))
    drawn = [job.train[i] for i in order[:rows].tolist()]
    adapters = []
    for candidate in candidates:
        set_seed(job.seed)
        adapters.append(make(settled.model_copy(update=candidate)).adapter)
    losses = _losses(adapters, drawn)
    own = next(i for i, c in enumerate(candidates) if c["start"] == _default(section, "start"))
    best = min(range(len(losses)), key=losses.__getitem__)
    if losses[best] > (1 - CLEARLY_LOWER) * losses[own]:
        best = own
    tried = [{**c, "loss": loss} for c, loss in zip(candidates, losses, strict=True)]
    return {**candidates[best], "starts": tried, "start_rows": rows}


def _default(section: MethodSection, key: str) -> Any:
    return type(section).model_fields[key].default


@torch.no_grad()
def _losses(adapters: Sequence[Adapter], rows: Sequence[EncodedExample]) -> list[float]:
    """Cross-entropy per target token of the same rows with each adapter, in one mixed batch."""
    base = adapters[0].base
    together = collate([row for _ in adapters for row in rows], base)
    with prefix_attention(base.model):
        total = Objective(adapters)(range(len(adapters)), [len(rows)] * len(adapters), **together)
    return (total / sum(len(row.target_ids) for row in rows)).tolist()


def _rate(section: MethodSection, make: Make, folder: Path) -> dict[str, Any]:
    """The rate nearest the default whose miniature run, in `folder`, learns enough.

    A rate at which the loss stops being finite is given up, and those below it are tried again.
    """
    default = float(_default(section, "learning_rate"))
    rates = [float(f"{default * factor:.3g}") for factor in FACTORS]
    ended: dict[float, float] = {}
    while not ended:
        jobs = [
            _miniature(
                make(section.model_copy(update={"learning_rate": rate})), len(FACTORS),
                folder / f"{len(rates)}" / f"{rate:g}",
            )
            for rate in rates
        ]  # fmt: skip
        processes = PartialState(cpu=jobs[0].adapter.base.model.device.type == "cpu")
        if processes.num_processes > 1 or jobs[0].settings.autocast == "fp16":
            raise UserError(
                "`learning_rate: auto` trains several rates in one batch, which takes one process "
                "and another `autocast` than `fp16`; give a rate"
            )
        (before,) = _losses([jobs[0].adapter], jobs[0].validation)
        try:
            progresses = fit(jobs)
        except PtkitError:
            if len(rates) == 1:
                raise
            rates.pop()
            continue
        ended = {r: progress.best_loss for r, progress in zip(rates, progresses, strict=True)}
    chosen = nearest_good(rates, [before - loss for loss in ended.values()], default)
    settings = jobs[0].settings
    return {
        "learning_rate": chosen,
        "rates": [{"rate": rate, "loss": loss} for rate, loss in ended.items()],
        "rate_loss_before": before, "rate_steps": settings.steps,
        "rate_batch": settings.batch_size, "rate_judged": len(jobs[0].validation),
    }  # fmt: skip


def nearest_good(rates: Sequence[float], learnt: Sequence[float], default: float) -> float:
    """Of `rates`, the one nearest to `default` (as a ratio) that learns at least `ENOUGH` of what
    the best one does; where none learns anything, the one that harms least. None above the default
    while one below it is good: the default is too high then, and what is higher has been lucky.

    learnt: by how much each lowered the loss
    """
    best = max(learnt)
    good = [r for r, own in zip(rates, learnt, strict=True) if own >= min(best, ENOUGH * best)]
    return min(good, key=lambda rate: (rate > default, abs(math.log(rate / default))))


def _miniature(job: Job, rates: int, run: Path) -> Job:
    """`job` with so few steps and rows that `rates` of them read `RATE_SHARE` of its rows."""
    train = job.settings
    budget = _rows_read(train, RATE_SHARE)
    batch = max(1, train.batch_size * train.gradient_accumulation // rates)
    judged = min(len(job.validation), max(1, budget // (2 * rates)))
    scored = judged * (rates + 1)  # after each miniature run, and once before
    steps = (budget - scored // 2) // (batch * rates)
    if steps < FEWEST_STEPS:
        raise UserError(
            f"`learning_rate: auto` tries {rates} rates in {RATE_SHARE:.0%} of the run, "
            f"{max(0, steps)} steps each with `train.steps: {train.steps}`, and {FEWEST_STEPS} are "
            "needed; give a rate, or train longer"
        )
    short = train.model_copy(
        update={
            "steps": steps, "batch_size": batch, "gradient_accumulation": 1,
            "warmup_steps": train.warmup_steps * steps // train.steps,
            "eval_every": steps, "save_every": steps, "patience": None, "report_to": [],
        }
    )  # fmt: skip
    validation = [job.validation[i * len(job.validation) // judged] for i in range(judged)]
    return replace(job, validation=validation, settings=short, run=run, report=None)
