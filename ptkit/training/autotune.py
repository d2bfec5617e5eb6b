"""`start: auto` and `learning_rate: auto`: what a cell begins with, found before its run.

Starts are texts made from the task. Each is compiled as the method would, and all are scored on the
same training rows, in mixed batches. Rates are miniature runs, schedule included, that take their
steps in one batch and are judged on validation rows. Neither reads a test row, and both together
cost at most `START_SHARE` and `RATE_SHARE` of the run.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ptkit.data.encoded import EncodedExample
from ptkit.data.examples import Example
from ptkit.data.lazy import picked
from ptkit.data.task import task_words
from ptkit.errors import PtkitError, UserError
from ptkit.formats.cell_record import CHOSEN_SETTINGS, ChosenSettings, TriedRate, TriedStart
from ptkit.methods import Adapter
from ptkit.methods.start import token_ids
from ptkit.prefix_batch import PrefixBatch
from ptkit.recipe.schema import TrainSection
from ptkit.recipe.tasks import ClassificationTask, HeadedTask, Task
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import collate, supervised_counts, supervised_losses
from ptkit.runtime.precision import mixed_precision
from ptkit.section import MethodSection
from ptkit.training.adapter_trainer import Job
from ptkit.training.loop import first_loss, fit
from ptkit.training.processes import processes

#: Of the rows that a run's steps read, what the starts and the rates may read. A row that is
#: scored only counts half: the base is frozen, so its backward pass costs what its forward does.
START_SHARE, RATE_SHARE = 0.05, 0.10
#: Rates tried, as multiples of the method's default.
FACTORS = (0.1, 0.3, 1.0, 3.0)
#: Fewer rows than this say nothing about a start, fewer steps nothing about a rate.
FEWEST_ROWS, FEWEST_STEPS = 8, 10
#: A short test tells what fails, not which of two good choices ends better: the default is left
#: for a start that lowers its loss by this share, or where its own rate learns less than this
#: share of what the best one learns. In twenty steps of four rows defaults that end best have
#: learnt 0.84 of that.
CLEARLY_LOWER, ENOUGH = 0.1, 0.7

#: The start that is left for a clearly better one only.
OWN = "task"

#: The job that trains an adapter of a section without `auto`.
Make = Callable[[MethodSection], Job]


@dataclass(frozen=True)
class Autotuned:
    """A method with its `auto`s replaced by what was found, and the record of how; None where
    nothing was left open."""

    section: MethodSection
    record: ChosenSettings | None


def is_open(section: MethodSection) -> bool:
    """Whether something about the method is to be found before the run."""
    return "auto" in (getattr(section, "start", None), getattr(section, "learning_rate", None))


def autotune(
    section: MethodSection,
    make: Make,
    task: Task,
    examples: Sequence[Example],
    folder: Path,
) -> Autotuned:
    """Find what `section` leaves to `auto`; what was found before, in `folder`, is read back.

    examples: the training rows, in the order of the jobs' own. Where a run is too short to tell
    starts apart, and with a classification head, the start is the method's own. Raises UserError
    for a rate that cannot be found.
    """
    if not is_open(section):
        return Autotuned(section, None)
    done = folder / "chosen.json"
    if not done.exists():
        chosen = ChosenSettings()
        if getattr(section, "start", None) == "auto":
            chosen = _start(section, make, task, examples)
        if getattr(section, "learning_rate", None) == "auto":
            if isinstance(task, HeadedTask):
                raise UserError(
                    f"`{section.title}`: `learning_rate: auto` trains several rates in one batch, "
                    "and each would need a classification head of its own; give a rate"
                )
            settled = section.model_copy(update=chosen.settings)
            chosen = chosen.updated(**_rate(settled, make, folder / "rates"))
        CHOSEN_SETTINGS.write(done, chosen)
    shutil.rmtree(folder / "rates", ignore_errors=True)
    chosen = CHOSEN_SETTINGS.read_file(done)
    return Autotuned(section.model_copy(update=chosen.settings), chosen)


def starts(task: Task, examples: Sequence[Example], seed: int) -> list[dict[str, str]]:
    """Settings of the starts to try: the task's own words, answers, demonstrations, any words."""
    texts = [task_words(task)]
    drawn = random.Random(seed).sample(examples, min(64, len(examples)))
    # Short rows: with room for few tokens, their answers are still in it.
    short = sorted(drawn, key=lambda e: len(e.input) + len(e.target))[:2]
    texts += [example.input + example.target for example in (*drawn[:2], *short)]
    named = [{"start": OWN}, {"start": "vocabulary"}]
    if isinstance(task, ClassificationTask):
        named += [{"start": "labels"}, {"start": "examples"}]
    else:
        texts += [example.target for example in drawn[:2]]
    found = [{"start": "text", "start_text": text} for text in dict.fromkeys(texts) if text.strip()]
    return [*named, *found]


def _rows_read(train: TrainSection, share: float) -> int:
    return int(train.steps * train.batch_size * train.gradient_accumulation * share)


def _start(
    section: MethodSection, make: Make, task: Task, examples: Sequence[Example]
) -> ChosenSettings:
    """The candidate with the lowest loss per target token on a few training rows, or the method's
    own start where none is clearly lower; that, too, where there is nothing to tell them apart by.
    """
    untried = ChosenSettings(start=OWN, starts=[], start_rows=0)
    if isinstance(task, HeadedTask):  # a head that has not learnt says nothing about a start
        return untried
    settled = section.model_copy(update={"learning_rate": _default(section, "learning_rate")})

    def started(start: dict[str, str]) -> Job:
        return make(settled.model_copy(update=start))

    job = started({"start": OWN})
    # A text may be a training row, and would be no help but its own: those are not scored.
    half = len(job.train) // 2
    order = torch.randperm(len(job.train), generator=torch.Generator().manual_seed(job.seed))
    candidates = [
        start
        for start in starts(task, picked(examples, order[half:].numpy()), job.seed)
        if "start_text" not in start or token_ids(job.adapter.base, start["start_text"])
    ]
    budget = 2 * _rows_read(job.settings, START_SHARE) // len(candidates)
    rows = min(budget, 2 * job.settings.batch_size, half)
    if rows < FEWEST_ROWS:
        return untried
    # Of a pair, a start is to fit the answer that is wanted.
    scored = [job.train[i].passes()[0] for i in order[:rows].tolist()]
    adapters = (started(candidate).adapter for candidate in candidates)
    losses = _losses(job.adapter.base, adapters, scored, job.settings)
    best = min(range(len(losses)), key=losses.__getitem__)
    own = candidates.index({"start": OWN})
    if losses[best] > (1 - CLEARLY_LOWER) * losses[own]:
        best = own
    tried = [
        TriedStart.model_validate({**c, "loss": loss})
        for c, loss in zip(candidates, losses, strict=True)
    ]
    return ChosenSettings.model_validate({**candidates[best], "starts": tried, "start_rows": rows})


def _default(section: MethodSection, key: str) -> Any:
    return type(section).model_fields[key].default


@torch.no_grad()
def _losses(
    base: Base, adapters: Iterable[Adapter], rows: Sequence[EncodedExample], settings: TrainSection
) -> list[float]:
    """Cross-entropy per target token of the same rows with each adapter, in mixed batches as large
    as those of a validation. Of an adapter only its prefix is kept."""
    model, prefixes = base.model, [adapter.prefix() for adapter in adapters]
    pairs = [(i, row) for row in sorted(rows, key=len) for i in range(len(prefixes))]
    size = 2 * settings.batch_size
    precision = mixed_precision(settings.autocast, model.device)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    totals = torch.zeros(len(prefixes), dtype=torch.float64)
    with torch.autocast(model.device.type, dtype, dtype is not None):
        for at in range(0, len(pairs), size):
            owners, part = zip(*pairs[at : at + size], strict=True)
            batch = PrefixBatch.gathered([prefixes[i] for i in owners], base.layout)
            tensors = collate(part, base)
            losses = supervised_losses(model, **tensors, batch=batch)
            counts = supervised_counts(model, tensors["labels"]).cpu()
            totals.index_add_(
                0, torch.tensor(owners).repeat_interleave(counts), losses.double().cpu()
            )
    return (totals / sum(row.supervised for row in rows)).tolist()


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
        state = processes(jobs[0].adapter.base.model.device)
        if state.num_processes > 1 or jobs[0].settings.autocast == "fp16":
            raise UserError(
                "`learning_rate: auto` trains several rates in one batch, which takes one process "
                "and another `autocast` than `fp16`; give a rate"
            )
        before = first_loss(jobs[0])
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
        "rates": [TriedRate(rate=rate, loss=loss) for rate, loss in ended.items()],
        "rate_loss_before": before, "rate_steps": settings.steps,
        "rate_batch": settings.batch_size, "rate_judged": len(jobs[0].validation),
    }  # fmt: skip


def nearest_good(rates: Sequence[float], learnt: Sequence[float], default: float) -> float:
    """Of `rates`, the one nearest to `default` (as a ratio) that learns at least `ENOUGH` of what
    the best one does. Where none learns anything, it is the one that harms least. It is none above
    the default while one below it is good: the default is too high then, and what is higher has
    been lucky.

    learnt: by how much each lowered the loss
    """
    best = max(learnt)
    good = [r for r, own in zip(rates, learnt, strict=True) if own >= min(best, ENOUGH * best)]
    return min(good, key=lambda rate: (rate > default, abs(math.log(rate / default))))


def finds_rate(train: TrainSection, validation: int) -> bool:
    """Whether a run with these settings is long enough for `learning_rate: auto`.

    validation: rows of that split
    """
    return _shares(train, validation, len(FACTORS))[0] >= FEWEST_STEPS


def _shares(train: TrainSection, validation: int, rates: int) -> tuple[int, int, int]:
    """Steps, rows per step and validation rows of each of `rates` miniature runs."""
    budget = _rows_read(train, RATE_SHARE)
    batch = max(1, train.batch_size * train.gradient_accumulation // rates)
    judged = min(validation, max(1, budget // (2 * rates)))
    scored = judged * (rates + 1)  # after each miniature run, and once before
    return (budget - scored // 2) // (batch * rates), batch, judged


def _miniature(job: Job, rates: int, run: Path) -> Job:
    """`job` with so few steps and rows that `rates` of them read `RATE_SHARE` of its rows."""
    train = job.settings
    steps, batch, judged = _shares(train, len(job.validation), rates)
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
