"""One adapter in training: its own data order, optimiser, schedule, best parameters and saves."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import get_scheduler

from ptkit.data.encode import length_grouped_batches
from ptkit.data.encoded import EncodedExample, StudiedText
from ptkit.data.encoded_rows import Lengths
from ptkit.data.lazy import picked
from ptkit.errors import DataError, PtkitError, UserError
from ptkit.methods import Adapter
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.dropout import dropout_of
from ptkit.training.checkpoint import Progress, load_checkpoint, save_checkpoint
from ptkit.training.preference import Preference, with_references
from ptkit.training.processes import DataParallel
from ptkit.training.retain import Retainer
from ptkit.training.teacher import Teacher

#: Seconds after which a step is saved although `save_every` does not ask for it.
SAVED_AFTER = 60.0
#: Such a save waits for this many times what the last one took: it costs a fiftieth at most.
_SAVING_SHARE = 50
#: Steps between validations with `eval_every: auto` where rows are many.
SELDOM_STEPS = 50


@dataclass(frozen=True)
class StepReport:
    """What a progress display is told after every step.

    loss: training loss of the step; validation_loss: of the latest validation, if any; both in
    nats per target token, or per pair of answers.
    """

    step: int
    steps: int
    loss: float
    validation_loss: float | None


Report = Callable[[StepReport], None]


@dataclass(frozen=True)
class Job:
    """An adapter to train.

    run: folder for checkpoints; if it holds some, training resumes there
    report: told after every step
    general: pieces of general text for `train.retain`, `[pieces, tokens]`; None without it
    beta2: AdamW's decay of the squared gradients
    teacher: of rows that are `StudiedText`s: losses are then divergences from it, not
        cross-entropies; None where labels are learnt
    preference: of rows that are `PairExample`s: the loss of a pair; None elsewhere
    score: what is scored at every validation, beside the loss; None: nothing
    """

    adapter: Adapter
    train: Sequence[EncodedExample]
    validation: Sequence[EncodedExample]
    settings: TrainSection
    learning_rate: float
    seed: int
    run: Path
    report: Report | None = None
    general: Tensor | None = None
    beta2: float = 0.999
    teacher: Teacher | None = None
    preference: Preference | None = None
    score: Callable[[Adapter], float] | None = None

    def __post_init__(self) -> None:
        if not self.train or not self.validation:
            raise DataError("training needs at least one row for training and one for validation")
        if self.teacher is not None and self.settings.gradient_checkpointing:
            raise UserError(
                "a prefix that learns from a teacher is read without dropout, in a mode in which "
                "nothing is checkpointed; set `gradient_checkpointing: false`"
            )
        if self.preference is not None and self.settings.gradient_checkpointing:
            dropped = dropout_of(self.adapter.model)
            if dropped:
                name, value = next(iter(dropped.items()))
                raise UserError(
                    f"pairs are read without dropout, and layers that are recomputed have it "
                    f"({value:g} in `{name}`); set `gradient_checkpointing: false`"
                )


def _groups(job: Job) -> list[dict[str, Any]]:
    """The parameter groups of a job's optimiser."""
    rate, head_rate = job.learning_rate, job.settings.head_learning_rate
    return parameter_groups(job.adapter, rate, job.beta2, head_rate)


def parameter_groups(
    adapter: Adapter, learning_rate: float, beta2: float, head_learning_rate: float
) -> list[dict[str, Any]]:
    """What AdamW is given: the adapter's parameters, and those with a rate of their own."""
    trained = adapter.trainable().values()
    apart: list[dict[str, Any]] = []
    for own in adapter.own_rates():
        rate = own.factor * learning_rate if own.learning_rate is None else own.learning_rate
        betas = (0.9, beta2 if own.beta2 is None else own.beta2)
        apart.append({"params": own.parameters, "lr": rate, "betas": betas})
    if adapter.head is not None:
        apart.append({"params": [*adapter.head.parameters()], "lr": head_learning_rate})
    elsewhere = {parameter for group in apart for parameter in group["params"]}
    rest = [p for p in trained if p not in elsewhere]
    if not rest and len(apart) == 1 and adapter.head is not None:  # a head alone
        return [{"params": [*trained]}]
    return [{"params": rest}, *apart] if rest else apart


def validate_every(job: Job, processes: int) -> int:
    """Steps between validations. With `auto`, no more rows are validated on than were trained on
    since the last time, as long as `SELDOM_STEPS` is not sooner. That is a quarter of the time at
    most, because a row that is trained on has a backward pass too."""
    settings = job.settings
    if settings.eval_every != "auto":
        return settings.eval_every
    rows_a_step = settings.batch_size * settings.gradient_accumulation * processes
    return min(SELDOM_STEPS, math.ceil(max(len(job.train), len(job.validation)) / rows_a_step))


class AdapterTrainer:
    """The state of one job. What happens to it depends on its own data and seed only.

    parallel: which part of every batch order is this process's.
    """

    def __init__(self, job: Job, parallel: DataParallel) -> None:
        self.job, self.adapter, self.settings = job, job.adapter, job.settings
        self._parallel = parallel
        self.parameters = list(job.adapter.trainable().values())
        self.plain_optimizer = torch.optim.AdamW(
            _groups(job),
            lr=job.learning_rate,
            betas=(0.9, job.beta2),
            weight_decay=self.settings.weight_decay,
            fused=True,  # one pass over the values: a tenth of a step of full fine-tuning
        )
        self.optimizer: torch.optim.Optimizer = self.plain_optimizer
        schedule = self.settings.schedule
        self.scheduler = get_scheduler(
            "constant_with_warmup" if schedule == "constant" else schedule,
            self.plain_optimizer,
            self.settings.warmup_steps,
            num_training_steps=self.settings.steps,
        )
        self.train: Sequence[EncodedExample] = job.train
        by_length = np.argsort(Lengths.of(job.validation).whole, kind="stable")
        self.validation: Sequence[EncodedExample] = picked(job.validation, by_length)
        self.retainer: Retainer | None = None
        retain = self.settings.retain
        if retain is not None and retain.by == "divergence":
            assert job.general is not None
            self.retainer = Retainer(job.adapter, retain, job.general, job.seed)
        self.progress = Progress()
        self.divergence = 0.0
        self.best = self._parameters_now()
        #: Running means of the trained values, with `train.average`; else nothing.
        self.average: dict[str, Tensor] = {}
        # When the last checkpoint was written, and how many seconds that took.
        self._saved, self._saving = time.monotonic(), 0.0
        self._order = self._batches()
        self._validate_every = validate_every(job, parallel.size)

    def _batches(self) -> Iterator[list[int]]:
        """The numbers of the rows of this process's batches, without end."""
        lengths = Lengths.of(self.job.train).whole
        order = length_grouped_batches(lengths, self.settings.batch_size, self.job.seed)
        return itertools.islice(order, self._parallel.rank, None, self._parallel.size)

    def resume(self, step: int) -> None:
        """Go on from the checkpoint after `step`."""
        state = self._parallel.state
        self.progress, self.best, self.average = load_checkpoint(
            self.job.run, step, self.adapter, self.plain_optimizer, state.process_index,
            state.num_processes,
        )  # fmt: skip
        self.scheduler.load_state_dict(self.progress.schedule)
        # The scheduler restores its count only; the rate of the next step is the group's.
        for group, rate in zip(
            self.plain_optimizer.param_groups, self.scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = rate
        read = self.progress.step * self.settings.gradient_accumulation
        self._order = itertools.islice(self._order, read, None)

    def study(self) -> None:
        """Let the teacher, if there is one, read what is learnt from it, and the base the answers
        that an adapter's are compared with."""
        if self.job.teacher is not None:
            rows = (*self.job.train, *self.job.validation)
            self.job.teacher.study([row for row in rows if isinstance(row, StudiedText)])
        if self.job.preference is not None:
            # Of more rows than a run reads, it needs only those; a resumed one all of them again.
            count = self.settings.steps * self.settings.gradient_accumulation
            read = [i for batch in itertools.islice(self._batches(), count) for i in batch]
            judged = range(self._parallel.rank, len(self.validation), self._parallel.size)
            size = self.settings.batch_size
            self.train = with_references(self.adapter, self.train, read, size)
            self.validation = with_references(self.adapter, self.validation, judged, size)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or validation has not improved for too long."""
        return self.finished_by(self.progress)

    def finished_by(self, progress: Progress) -> bool:
        """Whether a run that has come so far is finished."""
        return progress.step >= self.settings.steps or self._stale(progress)

    def _stale(self, progress: Progress) -> bool:
        patience = self.settings.patience
        return patience is not None and progress.stale_validations >= patience

    def next_batch(self) -> list[EncodedExample]:
        """The rows of the next batch."""
        return [self.train[i] for i in next(self._order)]

    def step(self, loss: float, tokens: int, supervised: int) -> None:
        """Take the optimiser step that the parameters' gradients ask for.

        loss: of this step, see `StepReport`; tokens: read for it; supervised: those among them
        that the loss is over. Raises PtkitError when the loss is not finite.
        """
        if not math.isfinite(loss):
            raise PtkitError(
                f"the loss became {loss}: lower the method's `learning_rate`"
                + (" or use `autocast: bf16`" if self.settings.autocast == "fp16" else "")
            )
        torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.progress.step += 1
        self.progress.tokens += tokens
        self.progress.supervised += supervised
        self.progress.loss_since_validation.append(loss)
        self._averaged()

    def _averaged(self) -> None:
        """Move the running means, if there are any, by what this step made of the values."""
        over = self.settings.average
        if over is None:
            return
        now = {n: p.detach() for n, p in self.adapter.trainable().items()}
        if not self.average:
            self.average = {name: value.clone() for name, value in now.items()}
        for name, value in now.items():
            self.average[name].lerp_(value, 1 / min(self.progress.step, over))

    @contextmanager
    def judged(self) -> Iterator[None]:
        """The adapter with the values that are validated, and kept if they are the best: those of
        the last step, or the running means. Afterwards it has the last step's again."""
        if not self.average:
            yield
            return
        last = self._parameters_now()
        self.adapter.load_trainable(self.average)
        try:
            yield
        finally:
            self.adapter.load_trainable(last)

    @property
    def retain_weight(self) -> float:
        """What the divergence from the base counts in this step; 0 without `retain`."""
        if self.retainer is None:
            return 0.0
        kept = self.progress.retain_weight
        return self.retainer.first_weight if kept is None else kept

    def diverged(self, divergence: float) -> None:
        """Note this step's divergence from the base, and weigh the next one's."""
        assert self.retainer is not None
        self.divergence = divergence
        self.progress.retain_weight = self.retainer.next_weight(self.retain_weight, divergence)

    @property
    def validation_due(self) -> bool:
        """Whether the step just taken is one to validate after."""
        step = self.progress.step
        return step == self.settings.steps or step % self._validate_every == 0

    def validated(self, loss: float) -> dict[str, float]:
        """Note a validation loss and keep the parameters if it is the best; the curve's entry."""
        progress = self.progress
        since = progress.loss_since_validation
        entry = {
            "step": progress.step,
            "train_loss": sum(since) / len(since),
            "validation_loss": loss,
        }
        if self.retainer is not None:
            entry |= {"divergence": self.divergence, "retain_weight": self.retain_weight}
        progress.curve.append(entry)
        progress.loss_since_validation = []
        score = loss if self.retainer is None else self.retainer.score(loss, self.divergence)
        if score < progress.best_score:
            progress.best_score, progress.best_loss = score, loss
            progress.best_step = progress.step
            progress.stale_validations = 0
            with self.judged():
                self.best = self._parameters_now()
        else:
            progress.stale_validations += 1
        return entry

    def score(self) -> None:
        """Score what was just validated, where the job asks for it."""
        if self.job.score is None:
            return
        progress = self.progress
        with self.judged():
            score = self.job.score(self.adapter)
        progress.scored.append(
            {
                "step": progress.step,
                "seconds": progress.seconds,
                "supervised_tokens": progress.supervised,
                "score": score,
            }
        )

    @property
    def save_due(self) -> bool:
        """Whether the step just taken is one to save after: the last, every `save_every`-th, and
        any after a minute in which nothing was saved. Processes have clocks of their own and must
        save together, so with several of them time has no say."""
        if self.finished or self.progress.step % self.settings.save_every == 0:
            return True
        waits = max(SAVED_AFTER, _SAVING_SHARE * self._saving)
        return self._parallel.size == 1 and time.monotonic() - self._saved >= waits

    def save(self, random: Sequence[Mapping[str, Tensor]]) -> None:
        """Write a checkpoint; it appears complete or not at all.

        random: the state of every process's generators
        """
        started = time.monotonic()
        self.progress.schedule = self.scheduler.state_dict()
        save_checkpoint(
            self.job.run, self.progress, self.adapter, self.best, self.plain_optimizer, random,
            self.average,
        )  # fmt: skip
        self._saved = time.monotonic()
        self._saving = self._saved - started

    def report(self, loss: float) -> None:
        """Tell the job's display, if it has one."""
        if self.job.report is not None:
            curve = self.progress.curve
            latest = curve[-1]["validation_loss"] if curve else None
            self.job.report(StepReport(self.progress.step, self.settings.steps, loss, latest))

    def _parameters_now(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.adapter.trainable().items()}
