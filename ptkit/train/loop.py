"""The training loop of one adapter, on accelerate.

Accelerate places, distributes and autocasts; the order of the data, the choice of the best
checkpoint and exact resumption are here. transformers' Trainer is not used because it resumes
from pickles, may leave half-written checkpoints, and recomputes the prompt for every row.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import get_scheduler

from ptkit.data.encode import EncodedExample, length_grouped_batches
from ptkit.errors import DataError, PtkitError
from ptkit.methods import Adapter
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.attention import prefix_attention
from ptkit.train.checkpoint import Progress, load_checkpoint, save_checkpoint
from ptkit.train.memory import PeakMemory
from ptkit.train.objective import Objective, collate


@dataclass(frozen=True)
class StepReport:
    """What a progress display is told after every step.

    loss: training loss of the step; validation_loss: of the latest validation, if any; both in
    nats per target token.
    """

    step: int
    steps: int
    loss: float
    validation_loss: float | None


Report = Callable[[StepReport], None]


def fit(
    adapter: Adapter,
    train: Sequence[EncodedExample],
    validation: Sequence[EncodedExample],
    settings: TrainSection,
    learning_rate: float,
    *,
    seed: int,
    run: Path,
    report: Report | None = None,
) -> Progress:
    """Train `adapter` and leave it with its best parameters by validation loss.

    run: folder for checkpoints. If it holds some, training resumes there, and ends with the
    same parameters as a run that was never interrupted. Raises PtkitError when the loss is not
    finite.
    """
    if not train or not validation:
        raise DataError("training needs at least one row for training and one for validation")
    # Accelerate keeps the precision of a process's first run; a later run may use another.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=settings.autocast, cpu=adapter.base.model.device.type == "cpu",
        log_with=settings.report_to or None, project_dir=run,
    )  # fmt: skip
    if settings.report_to:
        accelerator.init_trackers(
            "ptkit", {"learning_rate": learning_rate, **settings.model_dump()}
        )
    loop = _Loop(adapter, train, validation, settings, learning_rate, seed, run, accelerator)
    try:
        return loop.run_to_end(report)
    finally:
        if settings.report_to:
            accelerator.end_training()


class _Loop:
    def __init__(
        self,
        adapter: Adapter,
        train: Sequence[EncodedExample],
        validation: Sequence[EncodedExample],
        settings: TrainSection,
        learning_rate: float,
        seed: int,
        run: Path,
        accelerator: Accelerator,
    ) -> None:
        self.adapter, self.train, self.settings = adapter, train, settings
        self.run, self.accelerator = run, accelerator
        self.pad = adapter.base.pad_token_id
        self.parameters = list(adapter.trainable().values())
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.parameters, lr=learning_rate, weight_decay=settings.weight_decay
        )
        schedule = "constant_with_warmup" if settings.schedule == "constant" else settings.schedule
        self.scheduler = get_scheduler(
            schedule, optimizer, settings.warmup_steps, num_training_steps=settings.steps
        )
        self.plain_optimizer = optimizer
        self.objective, self.optimizer = accelerator.prepare(Objective(adapter), optimizer)
        self.validation = sorted(validation, key=len)
        # fp16 and multi-process runs change the parameters' gradients, never their identity.
        self.batches = self._share(
            length_grouped_batches([len(e) for e in train], settings.batch_size, seed)
        )

    def _share(self, batches: Iterator[list[int]]) -> Iterator[list[int]]:
        """This process's batches: every n-th of the common order."""
        first, step = self.accelerator.process_index, self.accelerator.num_processes
        return itertools.islice(batches, first, None, step)

    def run_to_end(self, report: Report | None) -> Progress:
        settings, accelerator = self.settings, self.accelerator
        loaded = load_checkpoint(self.run, self.adapter, self.plain_optimizer)
        if loaded is None:
            progress, best = Progress(), self._parameters_now()
        else:
            progress, best = loaded
            self.scheduler.load_state_dict(progress.schedule)
            # The scheduler restores its count only; the rate of the next step is the group's.
            for group, rate in zip(
                self.plain_optimizer.param_groups, self.scheduler.get_last_lr(), strict=True
            ):
                group["lr"] = rate
        skip = progress.step * settings.gradient_accumulation
        batches = itertools.islice(self.batches, skip, None)
        memory = PeakMemory(accelerator.device)
        started, already = time.perf_counter(), progress.seconds
        model = self.adapter.model
        if settings.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        attention: Any = prefix_attention(model) if self.adapter.virtual_tokens else nullcontext()
        try:
            with attention:
                while progress.step < settings.steps and not self._stale(progress):
                    loss, tokens = self._step(batches)
                    progress.step += 1
                    progress.tokens += tokens
                    progress.loss_since_validation.append(loss)
                    last = progress.step == settings.steps
                    if last or progress.step % settings.eval_every == 0:
                        best = self._validate(progress, best)
                    if last or progress.step % settings.save_every == 0 or self._stale(progress):
                        progress.seconds = already + time.perf_counter() - started
                        progress.peak_memory_bytes = max(progress.peak_memory_bytes, memory.bytes())
                        progress.schedule = self.scheduler.state_dict()
                        if accelerator.is_main_process:
                            save_checkpoint(
                                self.run, progress, self.adapter, best, self.plain_optimizer
                            )
                    if report is not None:
                        latest = progress.curve[-1]["validation_loss"] if progress.curve else None
                        report(StepReport(progress.step, settings.steps, loss, latest))
        finally:
            if settings.gradient_checkpointing:
                model.activation_checkpointing_disable()
            model.eval()
        self.adapter.load_trainable(best)
        return progress

    def _stale(self, progress: Progress) -> bool:
        patience = self.settings.patience
        return patience is not None and progress.stale_validations >= patience

    def _step(self, batches: Iterator[list[int]]) -> tuple[float, int]:
        """One optimiser step. Returns its loss per target token and the tokens it read."""
        accelerator = self.accelerator
        self.adapter.model.train()
        parts = [
            collate([self.train[i] for i in next(batches)], self.pad)
            for _ in range(self.settings.gradient_accumulation)
        ]
        supervised = torch.tensor(sum(int((p["labels"] >= 0).sum()) for p in parts))
        everywhere = accelerator.reduce(supervised.to(accelerator.device)).item()
        # DDP averages gradients over processes; the loss is a mean over all their tokens.
        scale = accelerator.num_processes / everywhere
        total = torch.zeros((), device=accelerator.device)
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(self.objective):
                part = {n: t.to(accelerator.device) for n, t in part.items()}
                with accelerator.autocast():
                    loss = self.objective(**part) * scale
                accelerator.backward(loss)
                total += loss.detach() / accelerator.num_processes
        accelerator.clip_grad_norm_(self.parameters, self.settings.max_grad_norm)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        value = float(accelerator.reduce(total))
        if value != value or value in (float("inf"), float("-inf")):
            raise PtkitError(
                f"the loss became {value}: lower the method's `learning_rate`"
                + (" or use `autocast: bf16`" if self.settings.autocast == "fp16" else "")
            )
        return value, sum(int(p["attention_mask"].sum()) for p in parts)

    def _validate(self, progress: Progress, best: dict[str, Tensor]) -> dict[str, Tensor]:
        """Measure the validation loss; returns the best parameters so far."""
        loss = self.validation_loss()
        since = progress.loss_since_validation
        entry = {
            "step": progress.step,
            "train_loss": sum(since) / len(since),
            "validation_loss": loss,
        }
        progress.curve.append(entry)
        progress.loss_since_validation = []
        if self.settings.report_to:
            self.accelerator.log(entry, step=progress.step)
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step = loss, progress.step
            progress.stale_validations = 0
            return self._parameters_now()
        progress.stale_validations += 1
        return best

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean cross-entropy per target token over the validation rows, in nats."""
        self.adapter.model.eval()
        size = self.settings.batch_size * 2
        total, count = 0.0, 0
        for start in range(0, len(self.validation), size):
            part = collate(self.validation[start : start + size], self.pad)
            part = {n: t.to(self.accelerator.device) for n, t in part.items()}
            with self.accelerator.autocast():
                total += float(self.accelerator.unwrap_model(self.objective)(**part))
            count += int((part["labels"] >= 0).sum())
        return total / count

    def _parameters_now(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.adapter.trainable().items()}
