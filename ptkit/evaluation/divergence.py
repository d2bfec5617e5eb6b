"""How close a student's predictions come to a teacher's, on texts neither was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ptkit.data.encoded import StudiedText
from ptkit.evaluation.retention import MAX_LOGITS
from ptkit.evaluation.statistics import Interval, bootstrap_interval
from ptkit.metrics.metric import Statistics
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import collate, supervised_logits

#: Texts read in one forward pass, at most.
BATCH = 32


@dataclass(frozen=True)
class Divergence:
    """A student beside its teacher.

    kl: KL(teacher || student), nats per token, with its 95 % bootstrap interval over texts
    agreement: share of tokens, 0..1, where both put the same token first, with its interval
    tokens: predicted, in all texts
    """

    kl: Interval
    agreement: Interval
    tokens: int


class _PerToken:
    """The sum of one column per token, the last column."""

    def __init__(self, column: int) -> None:
        self.column = column

    def score(self, rows: Statistics) -> float:
        return float(rows[:, self.column].sum() / rows[:, -1].sum())


@torch.no_grad()
def measure_divergence(
    base: Base,
    texts: Sequence[StudiedText],
    teachers: Sequence[KVPrefix],
    student: KVPrefix | None,
    *,
    lead: Sequence[int] = (),
    resamples: int = 1000,
) -> Divergence:
    """`student` (None: nothing before the texts) beside the teacher, which has in view the entry of
    `teachers` that a text names (see `StudiedText.chunk`).

    lead: what the teachers begin with and every text too; the teacher reads it once
    """
    base.model.eval()
    vocabulary = base.model.get_output_embeddings().weight.shape[0]
    size = min(BATCH, max(1, MAX_LOGITS // (vocabulary * max(map(len, texts)))))
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = np.zeros((len(texts), 3))  # [texts, divergence and agreement and tokens]
    for start in range(0, len(order), size):
        part = order[start : start + size]
        rows = [texts[i] for i in part]
        tensors, behind = collate(rows, base), collate([row.behind(lead) for row in rows], base)
        seen = PrefixBatch.of_rows([teachers[row.chunk] for row in rows], base.layout)
        wanted, _ = supervised_logits(base.model, **behind, batch=seen)
        own = None if student is None else PrefixBatch.shared(student, len(rows))
        logits, _ = supervised_logits(base.model, **tensors, batch=own)
        same = (logits.argmax(-1) == wanted.argmax(-1)).double()
        log_wanted, log_found = (t.float().log_softmax(-1) for t in (wanted, logits))
        divergences = torch.nn.functional.kl_div(
            log_found, log_wanted, reduction="none", log_target=True
        ).double().sum(-1)  # fmt: skip
        counts = [row.supervised for row in rows]
        for i, kl, agreed, count in zip(
            part, divergences.split(counts), same.split(counts), counts, strict=True
        ):
            # Rounding may leave a hair below zero where nothing differs.
            found[i] = max(0.0, float(kl.sum())), float(agreed.sum()), count
    kl, agreement = (
        bootstrap_interval(_PerToken(column), [found], resamples=resamples, seed=0)
        for column in (0, 1)
    )
    return Divergence(kl, agreement, int(found[:, 2].sum()))
