"""P-tuning: soft embeddings produced by a small encoder (Liu et al. 2021, section 3).

"GPT Understands, Too", https://arxiv.org/abs/2103.10385. PEFT's `PromptEncoder` is the encoder; its
output is added to embeddings that learn as well (Razdaibiedina et al. 2023, "Residual Prompt
Tuning", https://arxiv.org/abs/2305.03937).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Demonstrations, OwnRate, register
from ptkit.methods.p_tuning.settings import PTuningSection
from ptkit.methods.soft_prompt import SoftPrompt, prompt_learning_shape
from ptkit.methods.start import rms
from ptkit.runtime.base_model import Base

#: The encoder's output counts this many times the start's size. AdamW moves all weights by the same
#: amount, and a rate that the encoder's hidden units live through changes the embeddings too
#: little; like this, a step changes them about as much as one of prompt tuning does.
OUTPUT_SCALE = 20.0
#: Times the encoder's rate, for the embeddings it adds to: as fast as prompt tuning's.
EMBEDDING_RATE = 200.0


@register
class PTuning(SoftPrompt):
    """Embeddings made by PEFT's prompt encoder, on top of a start of real tokens.

    With a start other than `random`, the encoder's last layer begins at zero. Its output is added
    to the start's embeddings, in units of `OUTPUT_SCALE` times their RMS, so training departs from
    real tokens. So does a change `[num_virtual_tokens, hidden]` learnt beside it. The exported file
    holds the sum, as PEFT expects.
    """

    section_class = PTuningSection
    section: PTuningSection
    start: Tensor
    unit: Tensor

    def __init__(self, section: PTuningSection, base: Base, start: Tensor | None) -> None:
        from peft import PromptEncoder, PromptEncoderConfig

        super().__init__(section, base)
        shape = prompt_learning_shape(base)
        self.config = PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=section.num_virtual_tokens,
            encoder_reparameterization_type=section.encoder.upper(),
            encoder_hidden_size=section.encoder_hidden_size,
            **shape,
        )
        device = base.model.device
        self.encoder = PromptEncoder(self.config).to(device)
        self.change: nn.Parameter | None = None
        if start is None:
            start, unit, self.scale = torch.tensor(0.0), torch.tensor(1.0), 1.0
        else:
            unit, self.scale = rms(start), OUTPUT_SCALE
            if section.learn_embeddings:
                self.change = nn.Parameter(torch.zeros_like(start, device=device))
            last = self.encoder.mlp_head[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.register_buffer("start", start.to(device))
        self.register_buffer("unit", unit.to(device))

    @classmethod
    def create(cls, section: PTuningSection, base: Base, demonstrations: Demonstrations) -> PTuning:
        return cls(section, base, cls.start_from(section, base, demonstrations))

    @classmethod
    def from_files(cls, files: AdapterFiles, section: PTuningSection, base: Base) -> PTuning:
        soft = cls.read_embeddings(files, base)
        # The encoder that made the embeddings is not in the file; a fresh one goes on from them.
        update = {
            "num_virtual_tokens": soft.shape[0],
            "encoder": str(files.config.get("encoder_reparameterization_type", "mlp")).lower(),
            "encoder_hidden_size": files.config.get("encoder_hidden_size") or 128,
        }
        if update["encoder"] not in ("mlp", "lstm") or not _is_width(update["encoder_hidden_size"]):
            raise AdapterError(f"no encoder of P-tuning's: {update}")
        return cls(section.model_copy(update=update), base, soft)

    def embeddings(self) -> Tensor:
        indices = torch.arange(self.virtual_tokens, device=self.start.device)
        moved = self.scale * self.encoder(indices[None])[0]
        if self.change is not None:
            moved = moved + self.change
        return self.start + self.unit * moved

    def own_rates(self) -> list[OwnRate]:
        if self.change is None:
            return []
        return [OwnRate([self.change], beta2=None, factor=EMBEDDING_RATE)]


def _is_width(value: object) -> bool:
    """Whether `value`, read from a file, is a width somebody may have trained with."""
    return type(value) is int and 1 <= value <= 65_536
