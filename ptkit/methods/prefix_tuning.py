"""Prefix tuning: keys and values learnt at every layer (Li & Liang 2021, section 4).

"Prefix-Tuning: Optimizing Continuous Prompts for Generation", https://arxiv.org/abs/2101.00190.
With `reparameterize`, an MLP makes them (section 4.3); PEFT's `PrefixEncoder` is the MLP. Where the
base can read a soft prompt, the embeddings that it makes the start of learn, too
(`learn_embeddings`): a prefix is then all that prompt tuning reaches, and more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from peft import PrefixTuningConfig
from peft.tuners.prefix_tuning import PrefixEncoder
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from ptkit.errors import AdapterError, ModelError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import (
    Adapter,
    Demonstrations,
    OwnRate,
    compile_files,
    peft_config_dict,
    register,
)
from ptkit.methods.base_names import require_shapes
from ptkit.methods.gate_files import without_gate
from ptkit.methods.peft_tensors import virtual_tokens_of
from ptkit.methods.read_start import EMBEDDING_RATE, ReadStart, compiles_embeddings
from ptkit.methods.start import PromptMethodSection, start_files, start_shares, start_tokens
from ptkit.prefix import KVPrefix
from ptkit.recipe.schema import register_method
from ptkit.runtime.architecture import reads_ids
from ptkit.runtime.base_model import Base
from ptkit.runtime.cache import has_state, shares_keys
from ptkit.runtime.compile import compile_tokens
from ptkit.runtime.infix import require_infix


class PrefixSettings(PromptMethodSection):
    """How a prefix is made, whether it is learnt by itself or with something beside it."""

    reparameterize: bool = False
    """Train an MLP whose output is added to the start (scaled as all learnt values are); its last
    layer begins at zero, so training departs from the start exactly. Folded at export."""
    encoder_hidden_size: int = Field(default=128, ge=1)
    """Width of that MLP."""
    trained_layers: int | None = Field(default=None, ge=1)
    """Upper layers whose keys and values are trained (Liu et al. 2022, P-tuning v2, section 4.3);
    those below stay what they were at the start, the real ones of its tokens. null: all."""
    sink: bool = False
    """Keep the first virtual token frozen, at the base's reading of its begin-of-text token: many
    bases rest their attention there (Xiao et al. 2024), and a trained token in its place disturbs
    all they read. It counts among `num_virtual_tokens`."""
    gates: Literal["values", "keys_and_values"] | None = None
    """Learn one factor per layer on the virtual tokens' values, or one on the keys and one on the
    values; they begin at 1 and are folded into the exported prefix exactly."""
    position: Literal["prefix", "infix"] = "prefix"
    """Where the virtual tokens stand: before the input, or (Li & Liang 2021, section 7.2) before
    its last token. PEFT knows no infix, so such an adapter is for ptkit only."""
    learning_rate: float | Literal["auto"] = 0.1
    """AdamW's peak learning rate, in units of the size (RMS) that keys and values have at the start
    in their layer, so that one rate fits all layers and bases; the MLP wants about 3e-3. `auto`: of
    four, the one nearest the default that learns enough in a short test before the run."""

    @field_validator("gates", mode="before")
    @classmethod
    def _gates_fold(cls, value: object) -> object:
        if value == "attention":
            raise ValueError(
                "a gate on attention weights cannot be folded into keys and values: it changes "
                "what each query's softmax sums to; use `values` or `keys_and_values`"
            )
        return value

    @model_validator(mode="after")
    def _start_is_real(self) -> PrefixSettings:
        if self.start == "random" and self.trained_layers is not None:
            raise ValueError(
                "`trained_layers` leaves layers at their start, which `start: random` has none of"
            )
        if self.sink and self.start == "random":
            raise ValueError("`sink` keeps a token of the start, which `start: random` has none of")
        if self.sink and self.num_virtual_tokens < 2:
            raise ValueError("`sink` takes one virtual token and leaves none to train; use 2")
        if self.sink and self.position == "infix":
            raise ValueError("an infix does not stand first, so there is no `sink` to keep")
        return self


@register_method
class PrefixTuningSection(PrefixSettings):
    """Prefix tuning (Li & Liang 2021), also known as P-tuning v2: learns keys and values."""

    kind: Literal["prefix_tuning"]
    """`prefix_tuning`."""
    learn_embeddings: bool | None = None
    """Train the embeddings of the start's tokens as well: the prefix is what the base makes of
    them, as in prompt tuning, plus what is learnt at every layer. Folded at export. null: where it
    can be, with a start of tokens, no `trained_layers` and no MLP, on a decoder without states."""

    @model_validator(mode="after")
    def _embeddings_are_read(self) -> PrefixTuningSection:
        if self.learn_embeddings and not self._embeddings_matter():
            raise ValueError(
                "`learn_embeddings` needs a `start` of tokens (neither `random` nor `adapter`), no "
                "`trained_layers` (those below would change, too) and no `reparameterize`"
            )
        return self

    def _embeddings_matter(self) -> bool:
        tokens = self.start not in ("random", "adapter")
        return tokens and self.trained_layers is None and not self.reparameterize

    def learns_embeddings(self, base: Base) -> bool:
        """Whether the start learns on `base`. Raises ModelError where it is told to, and cannot."""
        able = compiles_embeddings(base) and not reads_ids(base.model)
        if self.learn_embeddings and not able:
            raise ModelError(
                f"{base.id} cannot make a prefix of embeddings (it has an encoder, or layers that "
                "keep a state or look up token ids); leave `learn_embeddings` out"
            )
        return able and self.learn_embeddings is not False and self._embeddings_matter()


def prefix_section(settings: PrefixSettings, **changes: Any) -> PrefixTuningSection:
    """`settings` as those of a prefix that learns beside something else, with `changes`."""
    own = {name: getattr(settings, name) for name in PrefixSettings.model_fields if name != "kind"}
    own["learn_embeddings"] = False
    return PrefixTuningSection(kind="prefix_tuning", **{**own, **changes})


#: In place of PEFT's type: PEFT would take the same tensors for a prefix, and be silently wrong.
INFIX = "PTKIT_INFIX"
#: A prefix of the attention layers of a model that has others too (states, convolutions): PEFT
#: numbers layers from the first and would put it into the wrong ones.
HYBRID = "PTKIT_HYBRID_PREFIX"
#: A prefix of a base whose widest heads are not where most heads are (Gemma 4 31B): PEFT makes room
#: for as many heads as the layers with the widest ones have, and leaves the others without.
UNLIKE = "PTKIT_UNLIKE_PREFIX"
#: A prefix of the encoder, of the decoder and of what the decoder reads the encoder through (Li &
#: Liang 2021, section 4.1 and figure 2); PEFT's has the decoder's part only.
ENCODER_DECODER = "PTKIT_ENCODER_DECODER_PREFIX"
#: A prefix of an encoder by itself, whose tokens keep their positions; with PEFT's, those of the
#: virtual tokens are taken from them.
ENCODER = "PTKIT_ENCODER_PREFIX"


@register
class PrefixTuning(Adapter):
    """A KV prefix, learnt directly or through an MLP on top of its start."""

    section_class = PrefixTuningSection
    # CARTRIDGE differs in how it is trained: its file is the same flat prefix.
    peft_types = ("PREFIX_TUNING", "CARTRIDGE", INFIX, ENCODER_DECODER, ENCODER, HYBRID, UNLIKE)
    encoder_decoder = True
    section: PrefixTuningSection
    start: Tensor
    unit: Tensor

    def __init__(
        self,
        section: PrefixTuningSection,
        base: Base,
        start: Tensor | None,
        read: ReadStart | None = None,
    ) -> None:
        """start: PEFT's flat layout `[virtual_tokens, layers * 2 * kv_heads * head_dim]`; None:
        noise, as PEFT's
        read: what `start` becomes while its embeddings learn

        What is learnt is a change of the start, in units of the start's RMS per layer and side.
        Keys and values differ in size by layer (30 times in the embedded base) while a step of
        AdamW has one size for all: unscaled, a rate that moves the large ones wrecks the small.
        """
        super().__init__(section, base)
        if (base.encoder_decoder or base.encoder) and section.position == "infix":
            raise ModelError(
                f"{base.id} has an encoder, which reads the input from both sides, so nothing of "
                "it comes before an infix; use `position: prefix`"
            )
        if section.position == "infix":
            require_infix(base.model)
        if base.encoder_decoder and section.trained_layers is not None:
            raise ModelError("`trained_layers` counts the layers of one stack; leave it out here")
        layers = len(base.layout)
        trained = section.trained_layers or layers
        if trained > layers:
            raise ModelError(f"`trained_layers` is {trained}, but {base.id} has {layers} layers")
        self.config = self._config(layers, section.num_virtual_tokens)
        side = self.config.token_dim
        device = base.model.device
        #: Where the trained values begin in the flat layout: rows above and columns before stay.
        self.first = (1 if section.sink else 0, (layers - trained) * 2 * side)
        row, column = self.first
        rows = section.num_virtual_tokens - row
        self.trained_layers = trained
        self.encoder = PrefixEncoder(self._config(trained, rows)).to(device)
        if start is None:
            start = torch.zeros(rows, 2 * side * trained)
            unit = torch.ones(2 * trained)
        else:
            last = self.encoder.transform[-1] if section.reparameterize else self.encoder.embedding
            assert isinstance(last, nn.Linear | nn.Embedding)
            for parameter in last.parameters():
                nn.init.zeros_(parameter)
            unit = start[row:, column:].unflatten(1, (2 * trained, side)).square().mean((0, 2))
            # Of the part a layer uses: where layers differ, the narrower ones have zeros.
            used = [s.kv_heads * s.key_dim / side for s in base.layout[layers - trained :]]
            unit = (unit / torch.tensor(used).repeat_interleave(2).to(unit)).sqrt()
            unit = unit.masked_fill(unit == 0, 1.0)
        # [virtual_tokens, layers * 2 * kv_heads * head_dim]
        self.register_buffer("start", start.to(device))
        self.read = read
        # [trained layers * 2 * kv_heads * head_dim]
        self.register_buffer("unit", unit.repeat_interleave(side).to(device))
        self.gates: nn.Parameter | None = None
        if section.gates is not None:
            sides = 2 if section.gates == "keys_and_values" else 1
            # [trained layers, keys and values | values]
            self.gates = nn.Parameter(torch.ones(trained, sides, device=device))

    def _config(self, layers: int, virtual_tokens: int) -> PrefixTuningConfig:
        """PEFT's settings of a prefix for `layers` layers."""
        section, shape = self.section, self.base.layout.widest
        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=virtual_tokens,
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
        if section.start == "adapter":
            prefix = cls._of_adapters(section, base, demonstrations)
        else:
            tokens = start_tokens(section, base, demonstrations)
            if tokens is None:
                return cls(section, base, None)
            if section.sink:
                tokens = torch.tensor([base.first_token_id, *tokens[:-1].tolist()])
            prefix = compile_tokens(base.model, tokens)
            if section.learns_embeddings(base):
                read = ReadStart(base, tokens, frozen=int(section.sink))
                return cls(section, base, prefix.flat().float(), read)
        return cls(section, base, prefix.flat().float())

    @classmethod
    def _of_adapters(
        cls, section: PrefixTuningSection, base: Base, demonstrations: Demonstrations
    ) -> KVPrefix:
        """The mean of the compiled `start_adapter`s, whatever their method."""
        compiled = []
        for files in start_files(section, base, demonstrations):
            prefix = compile_files(without_gate(files), base)
            if not isinstance(prefix, KVPrefix):
                raise AdapterError(
                    f"a {files.peft_type} adapter weighs its prefixes by the input and is no start "
                    "for one prefix; start from one of those it was made of"
                )
            compiled.append(replace(prefix, infix=section.position == "infix"))
        return KVPrefix.averaged(compiled, start_shares(section))

    @classmethod
    def from_prefix(
        cls, prefix: KVPrefix, base: Base, section: PrefixTuningSection | None = None
    ) -> PrefixTuning:
        """An adapter of `prefix`, whatever method made it, to be saved or trained further.

        section: its settings, of as many virtual tokens; default: the plain ones
        """
        section = section or PrefixTuningSection(
            kind="prefix_tuning",
            num_virtual_tokens=prefix.virtual_tokens,
            position="infix" if prefix.infix else "prefix",
        )
        return cls(section, base, prefix.flat().float())

    @classmethod
    def from_files(
        cls, files: AdapterFiles, section: PrefixTuningSection, base: Base
    ) -> PrefixTuning:
        flat = _flat_of(files, base)
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
        flat = _flat_of(files, base)
        # Copied: the tensors may be views of a mapped file, which may change under the adapter.
        place = base.model.device, base.model.dtype
        prefix = KVPrefix.from_flat(flat, base.layout, copied_to=place)
        return replace(prefix, infix=files.peft_type == INFIX)

    @property
    def virtual_tokens(self) -> int:
        return self.section.num_virtual_tokens

    @property
    def trainable_parameters(self) -> int:
        # Where layers differ, the narrower ones have room that nobody reads.
        used = super().trainable_parameters
        if not self.section.reparameterize:
            side, rows = self.config.token_dim, self.virtual_tokens - self.first[0]
            layers = self.base.layout[len(self.base.layout) - self.trained_layers :]
            used -= rows * 2 * sum(side - s.kv_heads * s.key_dim for s in layers)
        return used

    @property
    def infix(self) -> bool:
        return self.section.position == "infix"

    def flat(self) -> Tensor:
        """The prefix in PEFT's layout, differentiable; the MLP runs once, not once per row."""
        row, column = self.first
        indices = torch.arange(self.virtual_tokens - row, device=self.start.device)
        start = self.start if self.read is None else self.read.flat()
        trained = start[row:, column:] + self.unit * self.encoder(indices)
        if self.gates is not None:
            trained = self._gated(trained)
        if column:
            trained = torch.cat([start[row:, :column], trained], dim=1)
        return torch.cat([self.start[:row], trained]) if row else trained

    def _gated(self, flat: Tensor) -> Tensor:
        """`flat` with each layer's values, and its keys where they have gates, times its gate."""
        assert self.gates is not None
        gates = nn.functional.pad(self.gates, (2 - self.gates.shape[1], 0), value=1.0)
        return (flat.unflatten(1, (gates.numel(), -1)) * gates.view(-1, 1)).flatten(1)

    def prefix(self) -> KVPrefix:
        prefix = KVPrefix.from_flat(self.flat(), self.base.layout)
        prefix = replace(prefix, infix=self.infix)
        return prefix.to(self.base.model.device, self.base.model.dtype)

    def own_rates(self) -> list[OwnRate]:
        if self.read is None:
            return []
        return [OwnRate([self.read.change], beta2=None, factor=EMBEDDING_RATE)]

    def own_files(self) -> AdapterFiles:
        config = peft_config_dict(self.config, self.base)
        if has_state(self.base.model):
            config["peft_type"] = HYBRID
        if not self.base.layout.wide_everywhere:
            config["peft_type"] = UNLIKE
        if self.infix:
            config["peft_type"] = INFIX
        if self.base.encoder_decoder:
            config |= {"peft_type": ENCODER_DECODER, "task_type": "SEQ_2_SEQ_LM"}
        if self.base.encoder:
            config["peft_type"] = ENCODER
        return AdapterFiles(config, {"prompt_embeddings": self.flat().detach()})


def _flat_of(files: AdapterFiles, base: Base) -> Tensor:
    """The prefix in `files`, in PEFT's layout, of the layers of `base` that have keys of their own.

    PEFT makes room for the others, too, and leaves it alone. Raises AdapterError where the settings
    are of a base of another shape, and as `virtual_tokens_of`.
    """
    shape, flat = base.layout.widest, virtual_tokens_of(files)
    own = every = len(base.layout)
    if shares_keys(base.model):
        every = base.model.config.get_text_config().num_hidden_layers
    expected = {
        "num_layers": [own, every],
        "num_attention_heads": [shape.kv_heads],
        "token_dim": [shape.kv_heads * shape.key_dim],
    }
    require_shapes(files.config, expected, base)
    if own < every and files.config.get("num_layers") == every:
        return flat[:, : flat.shape[1] * own // every]
    return flat
