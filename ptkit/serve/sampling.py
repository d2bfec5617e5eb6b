"""From the logits of all answers of a step to their next tokens, in a few operations for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ptkit.errors import PtkitError

#: Below this temperature no other token than the likeliest has a probability float32 can hold.
_COLDEST = 1e-6
#: Of so many of the likeliest tokens `top_p` is looked for first, at least.
_LIKELIEST = 128


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
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        count = 0 if sampling.greedy else sampling.max_tokens
        self._drawn = iter(torch.rand(count, generator=generator, dtype=torch.float64).tolist())

    def draw(self) -> float:
        """The next of its random numbers, in [0, 1)."""
        return float(next(self._drawn))


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
    if warped:
        rows = [i for i, _ in warped]
        scores = _penalised(logits[rows].float(), [s for _, s in warped])
        for (i, _), token in zip(warped, _drawn(scores, [s for _, s in warped]), strict=True):
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
    """A token for each row of `scores` `[answers, vocabulary]`."""
    chosen = [0] * len(states)
    greedy = [i for i, s in enumerate(states) if s.sampling.greedy]
    for i, id in zip(greedy, scores[greedy].argmax(-1).tolist() if greedy else (), strict=True):
        chosen[i] = id
    for whole in (False, True):
        rows = [
            i for i, s in enumerate(states)
            if not s.sampling.greedy and (s.sampling.top_p >= 1) == whole
        ]  # fmt: skip
        if not rows:
            continue
        asked = [states[i].sampling for i in rows]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=scores.device, dtype=torch.float32)[:, None]

        own = (scores if len(rows) == len(states) else scores[rows]) / column(
            [s.temperature for s in asked]
        )
        draws = column([states[i].draw() for i in rows])
        if whole:
            found = _inverse(own.softmax(-1), draws)[:, 0].tolist()
        else:
            found = _of_likeliest(own, draws, column([s.top_p for s in asked]))
        for i, id in zip(rows, found, strict=True):
            chosen[i] = id
    return chosen


def _of_likeliest(scores: Tensor, draws: Tensor, top_p: Tensor) -> list[int]:
    """A token of each row of `scores` `[answers, vocabulary]`, of the likeliest ones whose
    probabilities add up to `top_p` `[answers, 1]` (Holtzman et al. 2020, "The curious case of
    neural text degeneration", section 3.1).

    Few tokens mostly are, so the vocabulary is not sorted: only where those are not enough, more
    are looked at.
    """
    vocabulary = scores.shape[-1]
    whole = scores.logsumexp(-1, keepdim=True)
    count = min(vocabulary, max(_LIKELIEST, vocabulary // 64))
    chosen = [0] * len(scores)
    left = list(range(len(scores)))
    while left:
        if len(left) < len(scores):
            index = torch.tensor(left, device=scores.device)
            parts = [t.index_select(0, index) for t in (scores, draws, top_p, whole)]
        else:
            parts = [scores, draws, top_p, whole]
        own, drawn, most, total = parts
        likely, ids = own.topk(count)
        probabilities = (likely - total).exp()
        before = probabilities.cumsum(-1) - probabilities
        place = _inverse(probabilities * (before < most), drawn)
        enough = (before[:, -1:] + probabilities[:, -1:] >= most) | (count == vocabulary)
        found = torch.cat([ids.gather(1, place), enough.long()], dim=1).tolist()
        for i, (id, is_enough) in zip(left, found, strict=True):
            if is_enough:
                chosen[i] = id
        left = [i for i, (_, is_enough) in zip(left, found, strict=True) if not is_enough]
        count = min(vocabulary, 16 * count)
    return chosen


def _inverse(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The place `[answers, 1]` where the sum of `probabilities` `[answers, places]` first is more
    than the part `draws` `[answers, 1]` of all of it."""
    sums = probabilities.cumsum(-1)
    total = sums[:, -1:]
    below = torch.minimum(draws * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(sums, below, right=True)
