"""Adapters that are trained in one batch: what they must share, and where they go on from."""

from __future__ import annotations

from collections.abc import Sequence

from ptkit.errors import UserError
from ptkit.training.adapter_trainer import AdapterTrainer, Job
from ptkit.training.checkpoint import Progress, saved_progress

#: Settings that belong to the step, so that jobs of one loop must agree on them.
SHARED_SETTINGS = ("autocast", "gradient_checkpointing", "gradient_accumulation", "report_to")


def require_shareable(jobs: Sequence[Job]) -> None:
    """Raise UserError for jobs that cannot share a batch."""
    first = jobs[0]
    for job in jobs[1:]:
        for key in SHARED_SETTINGS:
            if getattr(job.settings, key) != getattr(first.settings, key):
                raise UserError(f"adapters trained together must have the same `{key}`")
    if any(job.adapter.base is not first.adapter.base for job in jobs):
        raise UserError("adapters trained together must be of one base model")
    if first.adapter.base.head is not None:
        raise UserError(
            "adapters of a classifier cannot share a batch in training: each has its own head"
        )
    if len({job.teacher is None for job in jobs}) > 1:
        raise UserError("adapters trained together learn either all from a teacher, or none")
    if len({job.preference for job in jobs}) > 1:
        raise UserError("adapters trained together must have the same loss of pairs")
    for job in jobs:
        section = job.adapter.section
        if not section.shares_batch:
            raise UserError(
                f"`{section.title}` cannot share a batch with other adapters in training: "
                f"{section.alone}"
            )
    if first.settings.autocast == "fp16" or first.settings.report_to:
        raise UserError("adapters are trained together without fp16 and `report_to` only")


def resume_together(trainers: Sequence[AdapterTrainer]) -> None:
    """Let each of `trainers` go on from its newest checkpoint.

    All that are not finished go on from one step, because rows that share a batch are rounded
    together. Where a save was cut off, it is the step of the save before.
    """
    saved = [saved_progress(trainer.job.run) for trainer in trainers]
    newest = [own[-1] if own else Progress() for own in saved]
    steps = [p.step for t, p in zip(trainers, newest, strict=True) if not t.finished_by(p)]
    for trainer, own in zip(trainers, saved, strict=True):
        reached = [p.step for p in own if not steps or p.step <= min(steps)]
        if reached:
            trainer.resume(reached[-1])
