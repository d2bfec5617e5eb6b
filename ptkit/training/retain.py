"""Learning a task while staying the base everywhere else: a second objective on general text.

The second target is the frozen base's own distribution, KL(base || adapted) per token. The base
is the same weights with the adapter off, so no second model is loaded.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ptkit.data.general_text import GENERAL_EN, general_texts
from ptkit.errors import UserError
from ptkit.evaluation.retention import text_windows
from ptkit.methods import ADAPTERS, Adapter
from ptkit.recipe.schema import RetainSection, RetentionSection
from ptkit.runtime.architecture import evaluating
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import all_logits
from ptkit.runtime.generation import generate
from ptkit.section import MethodSection
from ptkit.training.gate import require_gate_fits

#: Tokens of a general text's piece; short, so that a step reads several different ones.
WINDOW = 64
#: Texts the base writes where no general text is given.
WRITTEN = 128
#: Steepest change of an automatic weight in one step, up or down.
_RATE = 0.1
#: Beyond so many times its target a nat of divergence outweighs so many of the task's loss.
_MARGIN, _BEYOND = 1.5, 10.0


def general_windows(
    retain: RetainSection, retention: RetentionSection | None, base: Base, folder: Path
) -> Tensor:
    """Pieces of general text as token ids, each behind `base.lead`: of the recipe's text, or of the
    base's own. `[pieces, lead + WINDOW]`.

    Raises UserError when the text is one that forgetting is measured on: the figure would say
    how well that text was learnt.
    """
    if retain.text is None:
        return written_by_base(base)
    if retain.text == GENERAL_EN:
        raise UserError(
            f"`train.retain.text`: `{GENERAL_EN}` is what forgetting is measured on; give another "
            "file, or leave it out to let the base write its own"
        )
    measured = [] if retention is None else retention.text
    if retain.text in ([measured] if isinstance(measured, str) else measured):
        raise UserError(
            f"`train.retain.text` and `retention.text` are both `{retain.text}`: forgetting must "
            "be measured on text that was not trained on"
        )
    ((name, text),) = general_texts(retain.text, folder).items()
    lead = base.lead
    ids = text_windows(base, name, text, max_tokens=10**6)[:, len(lead) :].flatten()
    return _behind(lead, ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW))


def _behind(lead: list[int], pieces: Tensor) -> Tensor:
    return torch.cat([torch.tensor(lead, dtype=torch.long).expand(len(pieces), -1), pieces], dim=1)


def written_by_base(base: Base, count: int = WRITTEN, seed: int = 0) -> Tensor:
    """Texts sampled from the frozen base, each behind `base.lead`, `[count, lead + WINDOW]`; the
    global generator is left alone.

    On them the divergence is that of the base's own distribution, with no text needed.
    """
    if base.encoder_decoder:
        raise UserError(
            "an encoder-decoder writes no text without an input; give `train.retain.text`"
        )
    lead = base.lead
    begin = lead or [base.first_token_id]
    devices = [base.model.device] if base.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        texts = generate(
            base.model, [begin] * count, None, pad_token_id=base.pad_token_id,
            do_sample=True, top_k=0, max_new_tokens=WINDOW, min_new_tokens=WINDOW,
            eos_token_id=None,
        )  # fmt: skip
    return _behind(lead, torch.tensor(texts))


def require_retainable(section: RetainSection, method: MethodSection) -> None:
    """Raise UserError where `method` cannot be trained as `section` says."""
    if section.by == "gate":
        require_gate_fits(method)
    if not ADAPTERS[method.kind].has_off:
        raise UserError(
            f"`train.retain` needs the base beside the adapter; `{method.title}` changes the "
            "base's weights for good"
        )


class Retainer:
    """The divergence of one adapter in training, a few pieces of text a step.

    weight: what it counts beside the loss per target token. `auto` begins at 1 and is moved towards
        the weight that keeps the divergence at the target. Ziegler et al. 2019 (section 2.2) do so
        for language models fine-tuned from preferences
    """

    def __init__(
        self, adapter: Adapter, section: RetainSection, windows: Tensor, seed: int
    ) -> None:
        self._adapter = adapter
        self._section = section
        self._rows = max(1, section.tokens // WINDOW)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        self._windows = windows[order]

    @property
    def first_weight(self) -> float:
        """The weight of the first step."""
        return 1.0 if self._section.weight == "auto" else self._section.weight

    def divergence(self, step: int) -> Tensor:
        """KL(base || adapted) in nats per token on the pieces of `step`, differentiable."""
        adapter, model = self._adapter, self._adapter.model
        picked = (torch.arange(self._rows) + step * self._rows) % len(self._windows)
        ids = self._windows[picked].to(model.device)
        mask = torch.ones_like(ids)
        # Read as it will be served: dropout on one side would count as divergence.
        with evaluating(model):
            with torch.no_grad(), adapter.off():
                target = all_logits(model, ids, mask, None).float().log_softmax(-1)
            compiled = adapter.compiled()
            batch = None if compiled is None else compiled.for_rows(ids, mask)
            adapted = all_logits(model, ids, mask, batch).float().log_softmax(-1)
        total = nn.functional.kl_div(adapted, target, reduction="sum", log_target=True)
        return total / ids.numel()

    def score(self, validation_loss: float, divergence: float) -> float:
        """What a checkpoint is judged by: the task's loss, and the divergence where it is weighed.
        With an automatic weight it counts where it is clearly beyond the target."""
        if self._section.weight != "auto":
            return validation_loss + self._section.weight * divergence
        return validation_loss + _BEYOND * max(0.0, divergence - _MARGIN * self._section.target)

    def next_weight(self, weight: float, divergence: float) -> float:
        """The weight of the next step, given this step's and what it found."""
        if self._section.weight != "auto":
            return weight
        error = min(1.0, max(-1.0, divergence / self._section.target - 1))
        return min(1e4, max(1e-4, weight * (1 + _RATE * error)))
