"""How much of the base model is left while an adapter is on.

`forgetting` is the cross-entropy per token on general text with the adapter on, minus the
base's, as in PEFT's method comparison, so that figures compare. `retention` is the next-token
accuracy on that text, after / before: the score of the task the base was made for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ptkit.errors import DataError
from ptkit.methods import Adapter
from ptkit.prefix import KVPrefix, PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import supervised_logits, token_losses

#: Tokens per window. Windows are full, so nothing is padded.
WINDOW = 256
#: Logits held at once; keeps large vocabularies within memory.
MAX_LOGITS = 40_000_000


@dataclass(frozen=True)
class LanguageModelling:
    """A model's next-token predictions on a text.

    nats: mean cross-entropy per token; accuracy: share of tokens predicted first; tokens: n.
    """

    nats: float
    accuracy: float
    tokens: int


@dataclass(frozen=True)
class Retention:
    """The base and the adapter on the same text."""

    base: LanguageModelling
    adapter: LanguageModelling

    @property
    def forgetting(self) -> float:
        """Nats per token lost with the adapter on; 0 for the base itself."""
        return self.adapter.nats - self.base.nats

    @property
    def retention(self) -> float:
        """Next-token accuracy with the adapter on, relative to the base's."""
        return self.adapter.accuracy / self.base.accuracy

    def as_dict(self) -> dict[str, float]:
        """The fields of a record's `retention`."""
        return {
            "tokens": self.base.tokens,
            "base_nats": self.base.nats,
            "adapter_nats": self.adapter.nats,
            "forgetting": self.forgetting,
            "base_accuracy": self.base.accuracy,
            "adapter_accuracy": self.adapter.accuracy,
            "retention": self.retention,
        }


def text_windows(base: Base, text: str, max_tokens: int) -> torch.Tensor:
    """Full windows of token ids, `[windows, tokens]`. Raises DataError when there is none."""
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens]
    window = WINDOW if base.max_positions is None else min(WINDOW, base.max_positions // 4)
    count = len(ids) // window
    if not count:
        raise DataError(f"the retention text has {len(ids)} tokens, at least {window} are needed")
    return torch.tensor(ids[: count * window]).view(count, window)


@torch.no_grad()
def language_modelling(
    model: PreTrainedModel, windows: torch.Tensor, prefix: KVPrefix | None
) -> LanguageModelling:
    """Score `model` (with `prefix` before every window) on `windows` `[windows, tokens]`."""
    model.eval()
    vocabulary = model.get_output_embeddings().weight.shape[0]
    rows = max(1, MAX_LOGITS // (vocabulary * windows.shape[1]))
    nats, right, tokens = 0.0, 0, 0
    for part in windows.to(model.device).split(rows):
        batch = None if prefix is None else PrefixBatch.shared(prefix, len(part))
        logits, targets = supervised_logits(model, part, torch.ones_like(part), part, batch)
        nats += float(token_losses(logits, targets).sum(dtype=torch.float64))
        right += int((logits.argmax(-1) == targets).sum())
        tokens += len(targets)
    return LanguageModelling(nats / tokens, right / tokens, tokens)


def measure_retention(
    adapter: Adapter, windows: torch.Tensor, before: LanguageModelling
) -> Retention:
    """Compare `adapter` with the base's own result `before` on the same windows."""
    adapter.base.require_positions(
        adapter.virtual_tokens, windows.shape[1], f"`{adapter.section.title}`"
    )
    compiled = adapter.prefix()
    prefix = None if compiled is None else compiled.detach()
    return Retention(before, language_modelling(adapter.model, windows, prefix))


def off_probe(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` on `input_ids` `[1, tokens]`, to be compared bit for bit."""
    with torch.no_grad():
        return model(input_ids=input_ids.to(model.device), use_cache=False).logits[0]
