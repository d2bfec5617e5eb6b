"""What a training step minimises: cross-entropy of the target tokens, given the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ptkit.data.encode import EncodedExample
from ptkit.methods import Adapter
from ptkit.prefix import PrefixBatch
from ptkit.runtime.forward import IGNORED, supervised_logits, token_losses


def collate(rows: Sequence[EncodedExample], pad_token_id: int) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels`, each `[rows, longest]`."""
    longest = max(map(len, rows))
    shape = (len(rows), longest)
    ids = torch.full(shape, pad_token_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.input_ids + row.target_ids)
        ids[i, : len(row)] = tokens
        mask[i, : len(row)] = 1
        labels[i, len(row.input_ids) : len(row)] = tokens[len(row.input_ids) :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


class Objective(nn.Module):
    """Summed loss of a batch under an adapter; a module so that DDP can wrap it."""

    def __init__(self, adapter: Adapter) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats, summed over the supervised tokens of all rows.

        The adapter compiles once, whatever the number of rows; its prefix is expanded over
        them without a copy.
        """
        prefix = self.adapter.prefix()
        batch = None if prefix is None else PrefixBatch.shared(prefix, len(input_ids))
        logits, targets = supervised_logits(
            self.adapter.model, input_ids, attention_mask, labels, batch
        )
        return token_losses(logits, targets).sum()
