"""The training loop, on accelerate: one adapter, or several in one forward and backward.

Accelerate places, distributes and autocasts. The order of the data, the choice of the best
checkpoint and exact resumption are ours (`ptkit.training.adapter_trainer`). transformers' Trainer
is not used for four reasons. It resumes from pickles, may leave half-written checkpoints,
recomputes the prompt for every row, and trains one set of parameters at a time.

Several adapters share the base, not a gradient. Every row reads its own adapter's prefix, every
adapter's loss is divided by its own tokens, and each has its own optimiser. The result of each is
the one it has alone. Dropout in the base is the exception: its draws depend on the whole batch.
They share the cost of running a small batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor

from ptkit.data.encoded import EncodedExample, PairExample, StudiedText, TaskExample, passes_of
from ptkit.data.encoded_rows import Lengths
from ptkit.errors import UserError
from ptkit.methods.lora.fused import fused_low_rank
from ptkit.runtime.cache import sees_everything
from ptkit.runtime.checkpointing import recomputing
from ptkit.runtime.forward import collate
from ptkit.runtime.fused import fused_activations
from ptkit.runtime.made_again import making_again
from ptkit.runtime.placement import is_whole
from ptkit.runtime.precision import fastest_attention, mixed_precision, weights_cast_once
from ptkit.training.adapter_trainer import AdapterTrainer, Job
from ptkit.training.checkpoint import Progress, keep_only, random_states
from ptkit.training.context_cache import ContextCache
from ptkit.training.memory import PeakMemory, give_back_what_is_freed
from ptkit.training.objective import Objective
from ptkit.training.preference import references
from ptkit.training.processes import PATIENCE, DataParallel, current, require_own
from ptkit.training.together import require_shareable, resume_together

#: Tokens of a row from which on memory is the limit: what is wide is computed again.
LONG_ROWS = 2048


def fit(jobs: Sequence[Job]) -> list[Progress]:
    """Train the jobs' adapters, all on one base, and leave each with its best parameters by
    validation loss.

    Killed at any point, the same call goes on from each job's last checkpoint and ends with the
    same parameters. Raises PtkitError when a loss is not finite, UserError for jobs that cannot
    share a loop.
    """
    if len(jobs) > 1:
        require_shareable(jobs)
    # Accelerate keeps the precision of a process's first run; a later run may use another.
    AcceleratorState._reset_state()
    device = jobs[0].adapter.base.model.device
    with current(device):
        return _fit(jobs, device)


def first_loss(job: Job) -> float:
    """The validation loss of `job` before its first step."""
    AcceleratorState._reset_state()
    device = job.adapter.base.model.device
    with current(device):
        return _Loop([job], _accelerator(job, device)).first_loss()


def _accelerator(job: Job, device: torch.device) -> Accelerator:
    accelerator = Accelerator(
        mixed_precision=mixed_precision(job.settings.autocast, device),
        cpu=device.type == "cpu",
        log_with=job.settings.report_to or None,
        project_dir=job.run,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    require_own(device, PartialState())
    return accelerator


def _fit(jobs: Sequence[Job], device: torch.device) -> list[Progress]:
    settings = jobs[0].settings
    accelerator = _accelerator(jobs[0], device)
    if settings.report_to:
        tracked = {"learning_rate": jobs[0].learning_rate, **settings.model_dump()}
        # Trackers take plain values only.
        plain = {k: v if isinstance(v, int | float | str) else str(v) for k, v in tracked.items()}
        accelerator.init_trackers("ptkit", plain)
    try:
        return _Loop(jobs, accelerator).run()
    finally:
        if settings.report_to:
            accelerator.end_training()


@dataclass(frozen=True)
class _Gradients:
    """What an adapter's gradients of one step are of.

    loss: mean over the terms (see `EncodedExample.terms`); tokens: read by this process;
    supervised: the terms of all processes
    """

    loss: float
    tokens: int
    supervised: int


class _Loop:
    def __init__(self, jobs: Sequence[Job], accelerator: Accelerator) -> None:
        self.accelerator, self.settings = accelerator, jobs[0].settings
        if self.settings.retain is not None and accelerator.num_processes > 1:
            raise UserError("`train.retain` works in one process only")
        if jobs[0].teacher is not None and accelerator.num_processes > 1:
            raise UserError("a prefix learns from a teacher in one process only")
        if len(jobs) > 1 and accelerator.num_processes > 1:
            raise UserError("adapters are trained together in one process only")
        self.base = jobs[0].adapter.base
        self.parallel = DataParallel.of(self.base)
        self.contexts: ContextCache | None = None
        # What was read before the virtual tokens, kept as keys and values, has no window any more.
        able = sees_everything(self.base.model) and is_whole(self.base.model)
        if able and all(map(_inputs_can_be_kept, jobs)):
            self.contexts = ContextCache(self.base, self.settings.context_cache_mb * 10**6)
        self.model = jobs[0].adapter.model
        self.trainers = [AdapterTrainer(job, self.parallel) for job in jobs]
        adapters = [t.adapter for t in self.trainers]
        self.objective: Any = Objective(adapters, jobs[0].preference)
        if is_whole(self.base.model):
            self.objective = accelerator.prepare(self.objective)
        # Otherwise the base stays where it lies, and the adapters are beside it. Processes that
        # hold it together compute the same gradients, which DDP would only send around again.
        for trainer in self.trainers:
            trainer.optimizer = accelerator.prepare(trainer.plain_optimizer)

    def first_loss(self) -> float:
        """The first adapter's validation loss as it is."""
        with self.accelerator.autocast():
            self.trainers[0].study()
        return self.validation_loss(0)

    def run(self) -> list[Progress]:
        """Train until every adapter has finished."""
        self._own_random_numbers()
        resume_together(self.trainers)
        memory = PeakMemory(self.accelerator.device)
        if self.settings.gradient_checkpointing or self._long_rows():
            give_back_what_is_freed()
        try:
            with self._less_kept(), self._attention(), self._fused(), self._weights():
                with self.accelerator.autocast():
                    for trainer in self.trainers:
                        trainer.study()
                while active := [i for i, t in enumerate(self.trainers) if not t.finished]:
                    self._step(active, memory)
        finally:
            self.model.eval()
        for trainer in self.trainers:
            trainer.adapter.load_trainable(trainer.best)
        return [t.progress for t in self.trainers]

    def _save(self, trainers: Sequence[AdapterTrainer], memory: PeakMemory) -> None:
        """Save all of `trainers` where one of them is due. Their earlier checkpoints go last: a run
        that is killed in between still finds all of them at one step."""
        if not any(trainer.save_due for trainer in trainers):
            return
        random = gather_object([random_states()])  # each process has its own
        for trainer in trainers:
            peaks = (trainer.progress.peak_memory_bytes, memory.known())
            # What was before is no peak of it all where one part was not measured.
            trainer.progress.peak_memory_bytes = (
                None if None in peaks else max(p for p in peaks if p is not None)
            )
            if self.accelerator.is_main_process:
                trainer.save(random)
        if self.accelerator.is_main_process:
            for trainer in trainers:
                keep_only(trainer.job.run, trainer.progress.step)

    def _own_random_numbers(self) -> None:
        """Let the dropout of this process be its own. All began with one seed, so that the adapter
        starts alike in each; those that hold one base together go on with it."""
        if self.parallel.rank:
            seed = np.random.SeedSequence((self.trainers[0].job.seed, self.parallel.rank))
            torch.manual_seed(int(seed.generate_state(1)[0]))

    def _less_kept(self) -> AbstractContextManager[None]:
        """What gives up activations for memory: all that the recipe says, or what costs next to
        nothing where layers learn. Others keep no inputs, which is the most of it."""
        if self.settings.gradient_checkpointing:
            return recomputing(self.model)
        learning = any(t.adapter.changes_weights for t in self.trainers)
        return making_again(self.model) if learning and is_whole(self.base.model) else nullcontext()

    def _attention(self) -> AbstractContextManager[None]:
        """The attention that trains fastest, where the recipe leaves the choice."""
        if not self.base.free_attention:
            return nullcontext()
        return fastest_attention(self.model, self.accelerator.mixed_precision, self._longest)

    @cached_property
    def _longest(self) -> int:
        """Tokens of the longest row that is read."""
        parts = (rows for t in self.trainers for rows in (t.job.train, t.job.validation))
        return max(int(Lengths.of(rows).passes.max()) for rows in parts)

    @contextmanager
    def _fused(self) -> Iterator[None]:
        long_rows = self._long_rows()
        with fused_activations(self.model, long_rows=long_rows), fused_low_rank(self.model):
            yield

    def _long_rows(self) -> bool:
        """Whether memory is the limit, and the recipe does not yet give up all activations."""
        return self._longest >= LONG_ROWS and not self.settings.gradient_checkpointing

    def _weights(self) -> AbstractContextManager[None]:
        """The base's weights in autocast's precision. Where activations are given up for memory,
        so is this: there no two layers' copies exist at a time."""
        precision = self.accelerator.mixed_precision
        if precision == "no" or self.settings.gradient_checkpointing:
            return nullcontext()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        return weights_cast_once(self.model, dtype)

    def _step(self, active: list[int], memory: PeakMemory) -> None:
        """One optimiser step of every active adapter, then what is due after it."""
        clock = time.perf_counter()
        for i, taken in zip(active, gradients := self._gradients(active), strict=True):
            self.trainers[i].step(taken.loss, taken.tokens, taken.supervised)
        # An equal share of the common step each: together the shares are the time it took.
        share = (time.perf_counter() - clock) / len(active)
        for i in active:
            trainer = self.trainers[i]
            clock = time.perf_counter()
            if due := trainer.validation_due:
                with trainer.judged():
                    validation_loss = self.validation_loss(i)
                entry = trainer.validated(validation_loss)
                if self.settings.report_to:
                    self.accelerator.log(entry, step=trainer.progress.step)
            trainer.progress.seconds += share + time.perf_counter() - clock
            if due:
                trainer.score()
        self._save([self.trainers[i] for i in active], memory)
        for i, taken in zip(active, gradients, strict=True):
            self.trainers[i].report(taken.loss)

    def _gradients(self, active: list[int]) -> list[_Gradients]:
        """Gradients of each active adapter's own loss, summed over accumulated batches."""
        accelerator = self.accelerator
        self.model.train()
        # [active][accumulated] -> rows
        batches = [
            [self.trainers[i].next_batch() for _ in range(self.settings.gradient_accumulation)]
            for i in active
        ]
        terms = torch.tensor([sum(map(_terms, own)) for own in batches])
        everywhere = self._summed(terms.to(accelerator.device))
        # DDP averages gradients over processes; a loss is a mean over all its terms.
        scale = self.parallel.size / everywhere
        total = torch.zeros(len(active), device=accelerator.device)
        for n in range(self.settings.gradient_accumulation):
            part = [own[n] for own in batches]
            last = n == self.settings.gradient_accumulation - 1
            with nullcontext() if last else accelerator.no_sync(self.objective):
                with accelerator.autocast():
                    tensors = self._tensors(active, part)
                    losses = self.objective(active, **tensors)
                losses = losses * scale
                accelerator.backward(losses.sum())
                total += losses.detach() / self.parallel.size
        self._retain(active)
        accelerator.unscale_gradients()
        values = self._summed(total)
        read = [sum(len(row) for rows in own for row in rows) for own in batches]
        return [*map(_Gradients, values.tolist(), read, map(int, everywhere.tolist()))]

    def _summed(self, values: Tensor) -> Tensor:
        """The sum of `values` over the processes that read different rows."""
        summed: Any = values if self.parallel.size == 1 else self.accelerator.reduce(values)
        return summed

    def _retain(self, active: list[int]) -> None:
        """Add the gradients of the divergence from the base where an adapter is to stay near it."""
        for trainer in (self.trainers[i] for i in active):
            if trainer.retainer is None:
                continue
            with self.accelerator.autocast():
                divergence = trainer.retainer.divergence(trainer.progress.step)
            self.accelerator.backward(trainer.retain_weight * divergence)
            trainer.diverged(float(divergence.detach()))

    def _tensors(
        self, active: list[int], rows_of_each: list[list[EncodedExample]]
    ) -> dict[str, Any]:
        """What the objective takes for these rows of the `active` adapters."""
        rows = [row for rows in rows_of_each for row in rows]
        known: dict[str, Any] = {"rows": [len(passes_of(own)) for own in rows_of_each]}
        wanted = [
            teacher.outputs([row for row in own if isinstance(row, StudiedText)])
            for i, own in zip(active, rows_of_each, strict=True)
            if (teacher := self.trainers[i].job.teacher) is not None
        ]
        if wanted:
            known["wanted"] = torch.cat(wanted)
        if of_tasks := [row for row in rows if isinstance(row, TaskExample)]:
            known["tasks"] = [row.task for row in of_tasks]
            weights = torch.tensor([row.weight for row in of_tasks])
            known["weights"] = weights.to(self.accelerator.device)
        if pairs := [row for row in rows if isinstance(row, PairExample)]:
            known["reference"] = references(pairs, self.accelerator.device)
        rows = passes_of(rows)
        if self.contexts is not None:
            known["contexts"] = self.contexts.contexts(rows)
            rows = self.contexts.shortened(rows)
        together = collate(rows, self.base)
        return {n: t.to(self.accelerator.device) for n, t in together.items()} | known

    @torch.no_grad()
    def validation_loss(self, index: int) -> float:
        """Mean loss of an adapter's validation rows, in nats per target token or pair. Every
        process reads an equal part of the rows, and all have the same result."""
        self.model.eval()
        accelerator, trainer = self.accelerator, self.trainers[index]
        objective = accelerator.unwrap_model(self.objective)
        size = trainer.settings.batch_size * 2
        # Of rows sorted by their lengths every n-th: parts that take as long as each other.
        own = trainer.validation[self.parallel.rank :: self.parallel.size]
        total, count = 0.0, 0.0
        for start in range(0, len(own), size):
            rows = [*own[start : start + size]]
            with accelerator.autocast():
                tensors = self._tensors([index], [rows])
                total += float(objective([index], **tensors))
            count += _terms(rows)
        sums = torch.tensor([total, count], dtype=torch.float64, device=accelerator.device)
        total, count = self._summed(sums).tolist()
        return total / count


def _inputs_can_be_kept(job: Job) -> bool:
    """Whether the plain base reads the job's inputs, all but their last token, and nothing else
    does."""
    adapter = job.adapter
    return adapter.infix and not adapter.changes_weights and not adapter.depends_on_input


def _terms(rows: Sequence[EncodedExample]) -> int:
    return sum(row.terms for row in rows)
