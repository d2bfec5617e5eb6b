"""Direct preference optimisation: the base with the adapter off is the reference.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward
Model", equation 7, https://arxiv.org/abs/2305.18290. No second model is loaded. What the base makes
of the answers never changes, so each answer is read once, before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ptkit.data.encoded import EncodedExample, PairExample, passes_of
from ptkit.methods import Adapter
from ptkit.recipe.tasks import PreferenceTask, Task
from ptkit.runtime.architecture import evaluating
from ptkit.runtime.forward import row_nats


@dataclass(frozen=True)
class Preference:
    """The loss of a pair of answers (see `PreferenceTask` for its settings)."""

    beta: float
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"

    def losses(self, nats: Tensor, reference: Tensor, tokens: Tensor) -> Tensor:
        """The loss of each pair, `[pairs]`.

        nats: cross-entropy of each answer by the adapter, `[rows]`: of a pair the chosen one, then
            the rejected one
        reference: the same by the base; tokens: how many tokens each answer has, `[rows]`
        """
        added = reference - nats  # to the log-probability of each answer
        if self.loss_type == "ipo":
            added = added / tokens
        margin = added[0::2] - added[1::2]
        if self.loss_type == "ipo":
            return (margin - 1 / (2 * self.beta)) ** 2
        if self.loss_type == "hinge":
            return torch.relu(1 - self.beta * margin)
        return -nn.functional.logsigmoid(self.beta * margin)


def preference_of(task: Task) -> Preference | None:
    """The loss of a task's pairs; None for tasks that have none."""
    if not isinstance(task, PreferenceTask):
        return None
    return Preference(task.beta, task.loss_type)


def references(pairs: Sequence[PairExample], device: torch.device) -> Tensor:
    """What the base made of the answers of `pairs`, `[rows]`, in the order of `passes_of`."""
    assert all(pair.reference is not None for pair in pairs)
    return torch.tensor([pair.reference for pair in pairs], device=device).flatten()


@torch.no_grad()
def with_references(
    adapter: Adapter, rows: Sequence[EncodedExample], wanted: Sequence[int], batch_size: int
) -> list[EncodedExample]:
    """`rows` with what the base of `adapter` makes of those with the numbers `wanted`.

    The result depends on `wanted` and `batch_size` only, so that a resumed run has the same.
    """
    found = list(rows)
    order = sorted(set(wanted), key=lambda i: (len(rows[i]), i))
    base = adapter.base
    with adapter.off(), evaluating(base.model):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            read = passes_of(rows[i] for i in part)
            nats = row_nats(base, base.model, read, None).view(-1, 2).tolist()
            for i, (chosen, rejected) in zip(part, nats, strict=True):
                pair = rows[i]
                assert isinstance(pair, PairExample)
                found[i] = replace(pair, reference=(chosen, rejected))
    return found
