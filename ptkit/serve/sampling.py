"""From a row's logits to its next token."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from ptkit.errors import PtkitError

#: Below this temperature no other token than the likeliest has a probability float32 can hold.
_COLDEST = 1e-6


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


@dataclass(frozen=True)
class Token:
    """A chosen token. logprob, top: only where asked for; top: likeliest first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one answer, one after the other."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self._penalised = bool(sampling.presence_penalty or sampling.frequency_penalty)
        self._greedy = sampling.temperature < _COLDEST
        self._seen: Counter[int] = Counter()
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @property
    def takes_the_likeliest(self) -> bool:
        """Whether the next token is the likeliest one and nothing else is asked."""
        return self._greedy and self.sampling.logprobs is None and not self._penalised

    def choose(self, logits: Tensor) -> Token:
        """logits: `[vocabulary]`. Raises NotFiniteError when they are not usable."""
        scores = logits.float()
        if not bool(scores.isfinite().any()) or bool(scores.isnan().any()):
            raise NotFiniteError
        if self._penalised and self._seen:
            scores = scores.clone()
            ids = torch.tensor([*self._seen], device=scores.device)
            counts = torch.tensor([*self._seen.values()], device=scores.device)
            scores[ids] -= self.sampling.presence_penalty + self.sampling.frequency_penalty * counts
        chosen = self._drawn(scores)
        self._seen[chosen] += 1
        if self.sampling.logprobs is None:
            return Token(chosen)
        # As OpenAI and vLLM report them: of the model, before temperature and top-p.
        logprobs = logits.float().log_softmax(-1)
        values, ids = logprobs.topk(self.sampling.logprobs)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return Token(chosen, float(logprobs[chosen]), top)

    def _drawn(self, scores: Tensor) -> int:
        if self._greedy:
            return int(scores.argmax())
        # transformers' warpers take the tokens so far too, and do not look at them.
        none = torch.empty(1, 0, dtype=torch.long, device=scores.device)
        warped = TemperatureLogitsWarper(self.sampling.temperature)(none, scores[None])
        if self.sampling.top_p < 1:
            warped = TopPLogitsWarper(self.sampling.top_p)(none, warped)
        return int(torch.multinomial(warped.softmax(-1)[0], 1, generator=self._generator))
