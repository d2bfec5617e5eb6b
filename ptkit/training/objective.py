"""What a training step minimises: cross-entropy of the target tokens, given the input. It may be
their divergence from a teacher's predictions, or the loss of pairs of answers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ptkit.methods import Adapter
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.architecture import evaluating
from ptkit.runtime.checkpointing import recomputes
from ptkit.runtime.forward import (
    input_tokens,
    summed_by_row,
    supervised_counts,
    supervised_divergences,
    supervised_losses,
)
from ptkit.runtime.infix import placed_behind
from ptkit.training.preference import Preference


class Objective(nn.Module):
    """Losses of a batch whose rows belong to one or several adapters of one base.

    A module, so that DDP can wrap it.

    preference: the loss of pairs, where rows are pairs of answers that follow each other
    """

    def __init__(self, adapters: Sequence[Adapter], preference: Preference | None = None) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(adapters)
        self.preference = preference

    def forward(
        self,
        active: Sequence[int],
        rows: Sequence[int],
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        contexts: PrefixBatch | None = None,
        wanted: Tensor | None = None,
        tasks: Sequence[int] | None = None,
        weights: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy in nats of each active adapter's rows, summed over their supervised
        tokens, `[active]`. With `wanted` it is the divergence KL(teacher || adapter) instead, and
        with `reference` the losses of their pairs.

        active: indices of the adapters in this batch, in the order of their rows
        rows: how many rows each of them has; they add up to the rows of the tensors
        contexts: for infixes, what was read of the rows before them (see
            `ptkit.training.context_cache`)
        wanted: what a teacher makes of the rows (see `ptkit.training.teacher`)
        tasks, weights: of a multi-task prompt's rows, the task of each and what its losses count,
            `[rows]`
        reference: cross-entropy in nats of each row's targets by the base alone, `[rows]`

        Every adapter compiles once, whatever the number of its rows.
        """
        adapters: list[Adapter] = [self.adapters[i] for i in active]  # type: ignore[misc]
        batch = None
        if len(adapters) > 1:
            prefixes = [adapter.prefix() for adapter in adapters]
            owner = [prefix for prefix, n in zip(prefixes, rows, strict=True) for _ in range(n)]
            batch = PrefixBatch.gathered(owner, adapters[0].base.layout)
        elif tasks is not None:
            batch = adapters[0].for_tasks(tasks)
        elif (compiled := adapters[0].compiled()) is not None:
            read = input_tokens(adapters[0].model, attention_mask, labels)
            batch = compiled.for_rows(input_ids, read)
        if contexts is not None:
            assert batch is not None
            batch = placed_behind(adapters[0].model, batch, contexts)
        model = adapters[0].model
        # Compared with what the base makes of the same tokens, a row is read as it will be served:
        # dropout on one side would count as a difference. Layers recompute in training mode only;
        # there nothing has dropout (see `ptkit.training.adapter_trainer`).
        compared = wanted is not None or reference is not None
        with evaluating(model) if compared and not recomputes(model) else nullcontext():
            if wanted is None:
                losses = supervised_losses(model, input_ids, attention_mask, labels, batch)
            else:
                losses = supervised_divergences(
                    model, input_ids, attention_mask, labels, batch, wanted
                )
        counts = supervised_counts(model, labels)
        if weights is not None:
            losses = losses * weights.repeat_interleave(counts)
        if reference is not None:
            assert self.preference is not None
            nats = summed_by_row(losses, counts)
            losses = self.preference.losses(nats, reference, counts)
            rows, counts = [n // 2 for n in rows], torch.ones_like(losses, dtype=torch.long)
        if len(active) == 1:
            return losses.sum()[None]
        # Supervised tokens come row by row, so each adapter's are together.
        own = [int(part.sum()) for part in counts.split(list(rows))]
        return torch.stack([part.sum() for part in losses.split(own)])
