"""Several adapters answering as one: prompt ensembling (Lester et al. 2021, section 6).

The K adapters read the same input as K rows of one batch. So an ensemble costs one batch of the
shared base. An ensemble of fine-tuned models needs K models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptkit.errors import UserError
from ptkit.runtime.processors import DRAFTED, AcrossRows, setting

EnsembleBy = Literal["vote", "average"]


def vote(answers: Sequence[str]) -> str:
    """The commonest of `answers`; among equally common ones the one that comes first."""
    stripped = [answer.strip() for answer in answers]
    winner, _ = Counter(stripped).most_common(1)[0]
    return answers[stripped.index(winner)]


def label_votes(scores: Tensor, by: EnsembleBy) -> Tensor:
    """Index `[texts]` of the label an ensemble decides for.

    scores: log-probabilities `[texts, adapters, labels]`
    by: `vote`: each adapter for its likeliest label, the likelier sum of log-probabilities
        deciding a tie; `average`: the likeliest by mean log-probability
    """
    mean = scores.mean(1)
    if by == "average":
        return mean.argmax(-1)
    labels = scores.shape[-1]
    votes = torch.nn.functional.one_hot(scores.argmax(-1), labels).sum(1)
    tied = votes == votes.max(-1, keepdim=True).values
    return mean.masked_fill(~tied, float("-inf")).argmax(-1)


def require_greedy(model: PreTrainedModel, options: dict[str, Any]) -> None:
    """Raise UserError where `generate` with `options` would not write one greedy answer per row.

    The rows of a group stay alike only as long as all of them take the likeliest token, at once.
    """
    counts = ("num_beams", "num_return_sequences")
    wrong = [name for name in counts if (setting(model, options, name) or 1) > 1]
    others = ("do_sample", "prefill_chunk_size", *DRAFTED)
    wrong += [name for name in others if setting(model, options, name)]
    if wrong:
        raise UserError(
            f"an ensemble by `average` writes one greedy answer, but {', '.join(wrong)} is set, in "
            "the call or in the model's generation config; set it back in the call "
            "(`do_sample=False`, `num_beams=1`), or use `vote`"
        )


class AveragedLogProbabilities(AcrossRows):
    """Gives the `count` rows of each group the mean of their log-probabilities.

    All rows of a group then continue with the same token. It comes after every other processor, so
    each row is processed as it would be alone.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: `[groups * count, vocabulary]`, the rows of a group side by side."""
        grouped = scores.float().log_softmax(-1).view(-1, self.count, scores.shape[-1])
        return grouped.mean(1).repeat_interleave(self.count, 0).to(scores.dtype)
