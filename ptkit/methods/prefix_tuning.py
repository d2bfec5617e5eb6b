"""Prefix tuning: keys and values learnt at every layer (Li & Liang 2021, section 4).

"Prefix-Tuning: Optimizing Continuous Prompts for Generation", https://arxiv.org/abs/2101.00190.
With `reparameterize`, an MLP makes them (section 4.3); PEFT's `PrefixEncoder` is the MLP.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from peft import PrefixTuningConfig
from peft.tuners.prefix_tuning import PrefixEncoder
from pydantic import Field, model_validator
from torch import Tensor, nn

from ptkit.errors import ModelError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, Demonstrations, peft_config_dict, register
from ptkit.methods.peft_tensors import virtual_tokens_of
from ptkit.methods.start import PromptMethodSection, start_tokens
from ptkit.prefix import KVPrefix
from ptkit.recipe.schema import register_method
from ptkit.runtime.base_model import Base
from ptkit.runtime.cache import has_state
from ptkit.runtime.compile import compile_tokens
from ptkit.runtime.infix import require_infix


@register_method
class PrefixTuningSection(PromptMethodSection):
    """Prefix tuning (Li & Liang 2021), also known as P-tuning v2: learns keys and values."""

    kind: Literal["prefix_tuning"]
    """`prefix_tuning`."""
    reparameterize: bool = False
    """Train an MLP that makes the prefix instead of the prefix itself; dropped at export."""
    encoder_hidden_size: int = Field(default=128, ge=1)
    """Width of that MLP."""
    trained_layers: int | None = Field(default=None, ge=1)
    """Upper layers whose keys and values are trained (Liu et al. 2022, P-tuning v2, section 4.3);
    those below stay what they were at the start, the real ones of its tokens. null: all."""
    position: Literal["prefix", "infix"] = "prefix"
    """Where the virtual tokens stand: before the input, or (Li & Liang 2021, section 7.2) before
    its last token. PEFT knows no infix, so such an adapter is for ptkit only."""
    learning_rate: float = 0.1
    """AdamW's peak learning rate. Keys and values of RoPE models are large: direct prefixes
    want 3e-2 to 3e-1, the MLP about 3e-3."""

    @model_validator(mode="after")
    def _lower_layers_are_real(self) -> PrefixTuningSection:
        if self.trained_layers is not None and self.start == "random":
            raise ValueError(
                "`trained_layers` leaves layers at their start, which `start: random` has none of"
            )
        return self


#: In place of PEFT's type: PEFT would take the same tensors for a prefix, and be silently wrong.
INFIX = "PTKIT_INFIX"
#: A prefix of the attention layers of a model that has others too (states, convolutions): PEFT
#: numbers layers from the first and would put it into the wrong ones.
HYBRID = "PTKIT_HYBRID_PREFIX"
#: A prefix of the encoder, of the decoder and of what the decoder reads the encoder through (Li &
#: Liang 2021, section 4.1 and figure 2); PEFT's has the decoder's part only.
ENCODER_DECODER = "PTKIT_ENCODER_DECODER_PREFIX"


@register
class PrefixTuning(Adapter):
    """A KV prefix, learnt directly or through an MLP on top of its start."""

    section_class = PrefixTuningSection
    # CARTRIDGE differs in how it is trained: its file is the same flat prefix.
    peft_types = ("PREFIX_TUNING", "CARTRIDGE", INFIX, ENCODER_DECODER, HYBRID)
    encoder_decoder = True
    section: PrefixTuningSection
    start: Tensor
    lower: Tensor

    def __init__(self, section: PrefixTuningSection, base: Base, start: Tensor | None) -> None:
        """start: PEFT's flat layout `[virtual_tokens, layers * 2 * kv_heads * head_dim]`."""
        super().__init__(section, base)
        if base.encoder_decoder and section.position == "infix":
            raise ModelError(
                f"{base.id} is an encoder-decoder: its encoder reads the input from both sides, so "
                "nothing of it comes before an infix; use `position: prefix`"
            )
        if section.position == "infix":
            require_infix(base.model)
        if base.encoder_decoder and section.trained_layers is not None:
            raise ModelError("`trained_layers` counts the layers of one stack; leave it out here")
        layers = len(base.layout)
        trained = section.trained_layers or layers
        if trained > layers:
            raise ModelError(f"`trained_layers` is {trained}, but {base.id} has {layers} layers")
        self.config = self._config(layers)
        device = base.model.device
        self.encoder = PrefixEncoder(self._config(trained)).to(device)
        # [virtual_tokens, values of the layers that are not trained]; no columns without any
        width = (layers - trained) * 2 * self.config.token_dim
        rows = section.num_virtual_tokens
        lower = torch.zeros(rows, width) if start is None else start[:, :width]
        self.register_buffer("lower", lower.clone().to(device))
        start = None if start is None else start[:, width:]
        if start is not None and section.reparameterize:
            last = self.encoder.transform[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            self.register_buffer("start", start.to(device))
        else:
            if start is not None:
                with torch.no_grad():
                    self.encoder.embedding.weight.copy_(start)
            self.register_buffer("start", torch.zeros((), device=device))

    def _config(self, layers: int) -> PrefixTuningConfig:
        """PEFT's settings of a prefix for `layers` layers."""
        section, shape = self.section, self.base.layout.uniform
        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=section.num_virtual_tokens,
            num_layers=layers,
            # In PREFIX_TUNING configs PEFT means the key/value heads and their total width.
            num_attention_heads=shape.kv_heads,
            token_dim=shape.kv_heads * shape.key_dim,
            num_transformer_submodules=1,
            prefix_projection=section.reparameterize,
            encoder_hidden_size=section.encoder_hidden_size,
        )

    @classmethod
    def create(
        cls, section: PrefixTuningSection, base: Base, demonstrations: Demonstrations
    ) -> PrefixTuning:
        tokens = start_tokens(section, base, demonstrations)
        start = None if tokens is None else compile_tokens(base.model, tokens).flat().float()
        return cls(section, base, start)

    @classmethod
    def from_prefix(cls, prefix: KVPrefix, base: Base) -> PrefixTuning:
        """An adapter of `prefix`, whatever method made it, to be saved or trained further."""
        section = PrefixTuningSection(
            kind="prefix_tuning",
            num_virtual_tokens=prefix.virtual_tokens,
            position="infix" if prefix.infix else "prefix",
        )
        return cls(section, base, prefix.flat().float())

    @classmethod
    def from_files(
        cls, files: AdapterFiles, section: PrefixTuningSection, base: Base
    ) -> PrefixTuning:
        flat = virtual_tokens_of(files)
        KVPrefix.from_flat(flat, base.layout)  # refuses shapes of another base
        # An MLP that made the prefix is folded in already: train on directly.
        update = {
            "num_virtual_tokens": flat.shape[0],
            "reparameterize": False,
            "position": "infix" if files.peft_type == INFIX else "prefix",
        }
        return cls(section.model_copy(update=update), base, flat.float())

    @classmethod
    def prefix_from_files(
        cls, files: AdapterFiles, section: PrefixTuningSection, base: Base
    ) -> KVPrefix:
        # Copied: the tensors may be views of a mapped file, which may change under the adapter.
        place = base.model.device, base.model.dtype
        prefix = KVPrefix.from_flat(virtual_tokens_of(files), base.layout, copied_to=place)
        return replace(prefix, infix=files.peft_type == INFIX)

    @property
    def virtual_tokens(self) -> int:
        return self.section.num_virtual_tokens

    @property
    def infix(self) -> bool:
        return self.section.position == "infix"

    def flat(self) -> Tensor:
        """The prefix in PEFT's layout, differentiable; the MLP runs once, not once per row."""
        indices = torch.arange(self.virtual_tokens, device=self.encoder.embedding.weight.device)
        learnt = self.start + self.encoder(indices)
        return torch.cat([self.lower, learnt], dim=1) if self.lower.shape[1] else learnt

    def prefix(self) -> KVPrefix:
        prefix = KVPrefix.from_flat(self.flat(), self.base.layout)
        prefix = replace(prefix, infix=self.infix)
        return prefix.to(self.base.model.device, self.base.model.dtype)

    def files(self) -> AdapterFiles:
        config = peft_config_dict(self.config, self.base)
        if has_state(self.base.model):
            config["peft_type"] = HYBRID
        if self.infix:
            config["peft_type"] = INFIX
        if self.base.encoder_decoder:
            config |= {"peft_type": ENCODER_DECODER, "task_type": "SEQ_2_SEQ_LM"}
        return AdapterFiles(config, {"prompt_embeddings": self.flat().detach()})
