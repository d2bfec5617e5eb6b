"""Direct preference optimisation: the base with the adapter off is the reference.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward
Model", equation 7, https://arxiv.org/abs/2305.18290. No second model is loaded. What the base makes
of the answers never changes, so each answer is read once, before the first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ptkit.data.encoded import EncodedExample, PairExample, passes_of
from ptkit.data.encoded_rows import Lengths
from ptkit.data.lazy import Lazy
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


class Referenced(Lazy[EncodedExample]):
    """Pairs with what the base makes of their answers, where that is known.

    pairs: `PairExample`s; known: nats of the chosen answer and of the rejected one, `[pairs, 2]`,
        NaN where the base did not read them
    """

    def __init__(self, pairs: Sequence[EncodedExample], known: np.ndarray) -> None:
        self._pairs, self._known = pairs, known

    def __len__(self) -> int:
        return len(self._pairs)

    def entry(self, number: int) -> EncodedExample:
        pair = self._pairs[number]
        assert isinstance(pair, PairExample)
        chosen, rejected = self._known[number].tolist()
        return pair if math.isnan(chosen) else replace(pair, reference=(chosen, rejected))


@torch.no_grad()
def with_references(
    adapter: Adapter, rows: Sequence[EncodedExample], wanted: Sequence[int], batch_size: int
) -> Referenced:
    """`rows` with what the base of `adapter` makes of those with the numbers `wanted`. Only the
    rows of a batch are in memory at a time.

    The result depends on `wanted` and `batch_size` only, so that a resumed run has the same.
    """
    known = np.full((len(rows), 2), np.nan)
    order = np.unique(np.asarray(wanted, dtype=np.int64))
    order = order[np.argsort(Lengths.of(rows).whole[order], kind="stable")]
    base = adapter.base
    with adapter.off(), evaluating(base.model):
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            read = passes_of(rows[int(i)] for i in part)
            known[part] = row_nats(base, base.model, read, None).view(-1, 2).tolist()
    return Referenced(rows, known)
