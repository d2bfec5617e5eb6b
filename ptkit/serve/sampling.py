"""From the logits of all answers of a step to their next tokens, in a few operations for all."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptkit.errors import PtkitError

#: Below this temperature no other token than the likeliest has a probability float32 can hold.
_COLDEST = 1e-6
#: Scores that are looked at together on a CPU. More do not stay in its cache, and fresh memory for
#: them costs more than the arithmetic: 32 rows of 49,152 take 17 to 29 ms at once, 11 in parts.
_AT_ONCE = 1 << 18


class NotFiniteError(PtkitError):
    """A row's logits are not finite: its adapter, or the base, produces no usable values."""

    def __init__(
        self, message: str = "the model's output is not finite under this adapter"
    ) -> None:
        super().__init__(message)


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen, in OpenAI's terms.

    temperature: 0 is greedy
    seed: the same seed gives the same answer to the same request, whatever runs beside it
    stop: texts that end the answer; they are not part of it
    logprobs: report each token's log-probability and those of so many likeliest; None: neither
    presence_penalty, frequency_penalty: taken from the logit of every token of the answer so far,
        once, and once per occurrence
    ignore_eos: go on after the end-of-text token (vLLM's option, for benchmarks)
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False

    @property
    def greedy(self) -> bool:
        """Whether every token is the likeliest one."""
        return self.temperature < _COLDEST

    @property
    def penalised(self) -> bool:
        """Whether tokens of the answer so far are less likely."""
        return bool(self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True)
class Token:
    """A chosen token. logprob, top: only where asked for; top: likeliest first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class SamplerState:
    """What `sample` knows of one answer: the tokens so far and its random numbers."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seen: Counter[int] = Counter()
        self.random = random.Random(sampling.seed)


def sample(logits: Tensor, states: Sequence[SamplerState]) -> list[Token | None]:
    """The next token of every answer; None where its logits are not finite.

    logits: `[answers, vocabulary]`
    """
    # max gives a NaN where there is one, so a bad row is noticed at no further cost.
    best, ids = logits.max(-1)
    usable = best.isfinite().tolist()
    chosen = ids.tolist()
    asked = [(i, s) for i, s in enumerate(states) if usable[i]]
    warped = [
        (i, s) for i, s in asked if not s.sampling.greedy or (s.sampling.penalised and s.seen)
    ]
    together = len(states)
    if logits.device.type == "cpu":
        together = max(1, _AT_ONCE // logits.shape[-1])
    for start in range(0, len(warped), together):
        part = warped[start : start + together]
        scores = _penalised(logits[[i for i, _ in part]].float(), [s for _, s in part])
        for (i, _), token in zip(part, _drawn(scores, [s for _, s in part]), strict=True):
            chosen[i] = token
    for i, state in asked:
        if state.sampling.penalised:
            state.seen[chosen[i]] += 1
    tokens: list[Token | None] = [
        Token(id) if good else None for id, good in zip(chosen, usable, strict=True)
    ]
    reported = [(i, s.sampling.logprobs) for i, s in asked if s.sampling.logprobs is not None]
    if reported:
        rows = [i for i, _ in reported]
        # As OpenAI and vLLM report them: of the model, before penalties, temperature and top-p.
        logprobs = logits[rows].float().log_softmax(-1)
        own = logprobs.gather(1, torch.tensor([[chosen[i]] for i in rows], device=logits.device))
        values, ids = logprobs.topk(max(count for _, count in reported))
        found = zip(reported, own[:, 0].tolist(), ids.tolist(), values.tolist(), strict=True)
        for (i, count), logprob, top, likely in found:
            pairs = tuple(zip(top[:count], likely[:count], strict=True))
            tokens[i] = Token(chosen[i], logprob, pairs)
    return tokens


def _penalised(scores: Tensor, states: Sequence[SamplerState]) -> Tensor:
    """`scores` `[answers, vocabulary]` less the penalties of the tokens so far."""
    rows, ids, amounts = [], [], []
    for row, state in enumerate(states):
        if not state.sampling.penalised:
            continue
        for id, count in state.seen.items():
            rows.append(row)
            ids.append(id)
            asked = state.sampling
            amounts.append(asked.presence_penalty + asked.frequency_penalty * count)
    if rows:
        scores[rows, ids] -= torch.tensor(amounts, device=scores.device)
    return scores


def _drawn(scores: Tensor, states: Sequence[SamplerState]) -> list[int]:
    """A token for each row of `scores` `[answers, vocabulary]`.

    With `top_p` it is one of the likeliest, whose probabilities add up to that (Holtzman et al.
    2020, "The curious case of neural text degeneration", section 3.1). Nothing is sorted: a token
    is drawn from all, and kept where those that are likelier add up to less. Otherwise it and all
    that are no likelier are left out, and another one is drawn.
    """
    chosen = [0] * len(states)
    greedy = [i for i, s in enumerate(states) if s.sampling.greedy]
    for i, id in zip(greedy, scores[greedy].argmax(-1).tolist() if greedy else (), strict=True):
        chosen[i] = id
    left = [i for i, s in enumerate(states) if not s.sampling.greedy]
    if not left:
        return chosen

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=scores.device)[:, None]

    temperatures = column([states[i].sampling.temperature for i in left])
    warped = (scores if len(left) == len(states) else scores[left]) / temperatures
    probabilities = warped.softmax(-1)
    while left:
        place = _inverse(probabilities, column([states[i].random.random() for i in left]))
        own = probabilities.gather(1, place)
        likelier = probabilities * (probabilities > own)
        top_p = [states[i].sampling.top_p for i in left]
        inside = likelier.sum(-1, keepdim=True) < column(top_p)
        found = torch.cat([place, inside.long()], dim=1).tolist()
        again = []
        for row, (i, (id, is_inside)) in enumerate(zip(left, found, strict=True)):
            if is_inside or top_p[row] >= 1:
                chosen[i] = id
            else:
                again.append(row)
        left = [left[row] for row in again]
        probabilities = likelier[again]
    return chosen


def _inverse(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The place `[answers, 1]` where the sum of `probabilities` `[answers, places]` first is more
    than the part `draws` `[answers, 1]` of all of it."""
    sums = probabilities.cumsum(-1)
    total = sums[:, -1:]
    below = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, below, right=True)
