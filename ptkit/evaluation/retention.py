"""How much of the base model is left while an adapter is on.

`forgetting` is the cross-entropy per token on general text with the adapter on, minus the
base's, as in PEFT's method comparison, so that figures compare. `retention` is the next-token
accuracy on that text, after / before: the score of the task the base was made for. `drift` is
the Kullback-Leibler divergence of the adapted predictions from the base's own, KL(base || adapter):
what changed, whether or not it became worse.

A window of text begins as every text of the base does: with the begin-of-text token, where the
tokenizer adds one. Without it the base reads what it was never trained on, and any virtual token in
its place would look like a gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptkit.data.encoded import IGNORED
from ptkit.errors import DataError
from ptkit.formats.figures import RecordedRetention, TextFigures
from ptkit.methods import Adapter
from ptkit.prefix import Compiled
from ptkit.runtime.architecture import is_encoder
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import input_tokens, supervised_logits, token_losses

#: Tokens per window. Windows are full, so nothing is padded.
WINDOW = 256
#: Logits held at once; keeps large vocabularies within memory. Also of the base's own
#: predictions that are kept to measure drift against.
MAX_LOGITS = 40_000_000


@dataclass(frozen=True)
class LanguageModelling:
    """A model's next-token predictions on a text.

    nats: mean cross-entropy per token; accuracy: share of tokens predicted first; tokens: n.
    """

    nats: float
    accuracy: float
    tokens: int

    @classmethod
    def pooled(cls, parts: list[LanguageModelling]) -> LanguageModelling:
        """Over all tokens of several texts."""
        tokens = sum(p.tokens for p in parts)
        nats = sum(p.nats * p.tokens for p in parts) / tokens
        return cls(nats, sum(p.accuracy * p.tokens for p in parts) / tokens, tokens)


@dataclass(frozen=True)
class GeneralProbe:
    """General texts and what the base itself makes of them.

    windows, untouched: per domain, `[windows, lead + tokens]` and the base's score
    lead: how many tokens of a window the tokenizer puts before a text
    kept: of how many windows per domain the base's predictions are kept, to measure drift
    against: as many as memory for logits allows
    at_once: windows that are read together; every part of the work is as many, whoever does it
    base_log_probs: of the parts that this process reads, by domain and first window: those of the
        kept windows, `[kept windows * (tokens - 1), vocabulary]`
    """

    windows: Mapping[str, Tensor]
    untouched: Mapping[str, LanguageModelling]
    kept: int
    at_once: int
    base_log_probs: Mapping[tuple[str, int], Tensor]
    lead: int = 0

    @property
    def drift_windows(self) -> Tensor:
        """The windows drift is measured on, of all domains."""
        return torch.cat([windows[: self.kept] for windows in self.windows.values()])


@dataclass(frozen=True)
class Retention:
    """The base and the adapter on the same texts.

    base, adapter: per domain; drift: nats per token over the first drift_tokens
    lead: tokens before each window of text (see `GeneralProbe`)
    """

    base: Mapping[str, LanguageModelling]
    adapter: Mapping[str, LanguageModelling]
    drift: float
    drift_tokens: int
    lead: int = 0

    @property
    def overall(self) -> TextFigures:
        """Over all tokens of all domains."""
        base, adapter = (
            LanguageModelling.pooled(list(side.values())) for side in (self.base, self.adapter)
        )
        return _compared(base, adapter)

    @property
    def recorded(self) -> RecordedRetention:
        """The figures as records state them: overall, drift, lead, and per domain."""
        return RecordedRetention(
            **self.overall.model_dump(),
            drift=self.drift,
            drift_tokens=self.drift_tokens,
            lead=self.lead,
            domains={n: _compared(self.base[n], self.adapter[n]) for n in self.base},
        )

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        return self.recorded.model_dump()


def _compared(base: LanguageModelling, adapter: LanguageModelling) -> TextFigures:
    return TextFigures(
        tokens=base.tokens,
        base_nats=base.nats,
        adapter_nats=adapter.nats,
        forgetting=adapter.nats - base.nats,
        base_accuracy=base.accuracy,
        adapter_accuracy=adapter.accuracy,
        # Of nothing, no share is kept.
        retention=adapter.accuracy / base.accuracy if base.accuracy else None,
    )


def text_windows(base: Base, name: str, text: str, max_tokens: int) -> Tensor:
    """Full windows of a text, each behind `base.lead`: token ids `[windows, lead + tokens]`.

    Raises DataError when there is none.
    """
    ids = base.encode_part(text)[:max_tokens]
    window = WINDOW if base.max_positions is None else min(WINDOW, base.max_positions // 4)
    count = len(ids) // window
    if not count:
        raise DataError(
            f"the retention text `{name}` has {len(ids)} tokens, at least {window} are needed"
        )
    lead = torch.tensor(base.lead, dtype=torch.long).expand(count, -1)
    return torch.cat([lead, torch.tensor(ids[: count * window]).view(count, window)], dim=1)


def _given_and_predicted(model: PreTrainedModel, width: int, lead: int) -> tuple[int, int]:
    """How many tokens of a window of `width` are only read, and how many are predicted: a causal
    model predicts all but the first; an encoder-decoder writes what it reads."""
    given = 0 if model.config.is_encoder_decoder else lead + 1
    return given, width - given


def _read(
    model: PreTrainedModel, part: Tensor, compiled: Compiled | None, given: int
) -> tuple[float, int, Tensor]:
    """Of all predicted tokens of some windows: the sum of their losses in nats, how many were
    predicted first, and their logits `[n, vocabulary]`, window by window."""
    part = part.to(model.device)
    mask = torch.ones_like(part)
    labels = part.clone()
    labels[:, :given] = IGNORED
    batch = None
    if compiled is not None:
        batch = compiled.for_rows(part, input_tokens(model, mask, labels))
    logits, targets = supervised_logits(model, part, mask, labels, batch)
    nats = float(token_losses(logits, targets).sum(dtype=torch.float64))
    return nats, int((logits.argmax(-1) == targets).sum()), logits


class Part(NamedTuple):
    """What was read of some windows of a domain: sums over their tokens.

    divergence: over the first `compared` of them
    """

    nats: float
    right: int
    tokens: int
    divergence: float
    compared: int


#: A part of the work: a domain, and the first of its windows that are read together.
Unit = tuple[str, int]
#: Does some work on parts of a list, maybe in several processes: one result for each, in order.
Share = Callable[[Sequence[Unit], Callable[[Sequence[Unit]], Sequence[Part]]], list[Part]]


def _alone(units: Sequence[Unit], work: Callable[[Sequence[Unit]], Sequence[Part]]) -> list[Part]:
    return list(work(units))


def _units(windows: Mapping[str, Tensor], at_once: int) -> list[Unit]:
    return [(name, start) for name, own in windows.items() for start in range(0, len(own), at_once)]


def _scores(units: Sequence[Unit], parts: Sequence[Part]) -> dict[str, LanguageModelling]:
    """Per domain, over the parts of all its windows."""
    scores = {}
    for name in dict.fromkeys(name for name, _ in units):
        own = [part for (of, _), part in zip(units, parts, strict=True) if of == name]
        tokens = sum(part.tokens for part in own)
        scores[name] = LanguageModelling(
            sum(part.nats for part in own) / tokens, sum(p.right for p in own) / tokens, tokens
        )
    return scores


def probe_base(
    base: Base, texts: Mapping[str, str], max_tokens: int, share: Share = _alone
) -> GeneralProbe:
    """Measure the base on `texts` (domain -> text), `max_tokens` of each.

    share: what divides the work between processes, as for `measure_retention`, which must divide it
        in the same way. Each process keeps the predictions of its own parts only

    Raises DataError for a text that does not fill one window.
    """
    windows = {name: text_windows(base, name, text, max_tokens) for name, text in texts.items()}
    model = base.model.eval()
    vocabulary = model.get_output_embeddings().weight.shape[0]
    width = next(iter(windows.values())).shape[1]
    at_once = max(1, MAX_LOGITS // (vocabulary * width))
    # Evenly from all domains, at least one window each.
    kept = max(1, at_once // len(windows))
    lead = len(base.lead)
    given, predicted = _given_and_predicted(model, width, lead)
    log_probs: dict[Unit, Tensor] = {}

    @torch.no_grad()
    def read(name: str, start: int) -> Part:
        part = windows[name][start : start + at_once]
        nats, right, logits = _read(model, part, None, given)
        compared = max(0, min(len(part), kept - start)) * predicted
        log_probs[name, start] = logits[:compared].float().log_softmax(-1)
        return Part(nats, right, len(logits), 0.0, compared)

    units = _units(windows, at_once)
    parts = share(units, lambda some: [read(*unit) for unit in some])
    return GeneralProbe(windows, _scores(units, parts), kept, at_once, log_probs, lead)


def measure_retention(adapter: Adapter, probe: GeneralProbe, share: Share = _alone) -> Retention:
    """Compare `adapter` with the base's own results on the same windows.

    Of a window the adapter is shown what is not predicted: a causal model's `lead` and first token,
    all that an encoder reads.

    share: what divides the work between processes. They take whole batches, so what is read
        together is the same for any number of them. The result is the same too, to the bit on one
        kind of device

    Raises ModelError when a window does not fit beside the virtual tokens.
    """
    adapter.base.require_positions(
        adapter.positions,
        next(iter(probe.windows.values())).shape[1],
        f"`{adapter.section.title}`",
    )
    model = adapter.model.eval()
    compiled = adapter.compiled()
    compiled = None if compiled is None else compiled.detach()
    # What the virtual tokens begin with already is not read again.
    begun = {
        name: windows.shape[1] - len(adapter.behind(windows[0].tolist()))
        for name, windows in probe.windows.items()
    }
    shown = {name: windows[:, begun[name] :] for name, windows in probe.windows.items()}

    @torch.no_grad()
    def read(name: str, start: int) -> Part:
        windows = shown[name]
        given, predicted = _given_and_predicted(model, windows.shape[1], probe.lead - begun[name])
        part = windows[start : start + probe.at_once]
        nats, right, logits = _read(model, part, compiled, given)
        # Of some windows the base's own log-probabilities are kept; `input` is the adapter.
        compared = max(0, min(len(part), probe.kept - start)) * predicted
        divergence = torch.nn.functional.kl_div(
            logits[:compared].float().log_softmax(-1), probe.base_log_probs[name, start],
            reduction="sum", log_target=True,
        )  # fmt: skip
        return Part(nats, right, len(logits), float(divergence), compared)

    units = _units(shown, probe.at_once)
    parts = share(units, lambda some: [read(*unit) for unit in some])
    compared = sum(part.compared for part in parts)
    # Rounding may leave a hair below zero where nothing changed.
    divergence = max(0.0, sum(part.divergence for part in parts) / compared)
    return Retention(probe.untouched, _scores(units, parts), divergence, compared, probe.lead)


def off_probe(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits on `input_ids` `[1, tokens]`, to be compared bit for bit."""
    ids = input_ids.to(model.device)
    options: dict[str, Any] = {"use_cache": False}
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = ids
    if is_encoder(model):
        options = {"attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        return model(input_ids=ids, **options).logits[0]
