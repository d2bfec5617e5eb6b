"""Prefix tuning: keys and values learnt at every layer (Li & Liang 2021, section 4).

"Prefix-Tuning: Optimizing Continuous Prompts for Generation", https://arxiv.org/abs/2101.00190.
With `reparameterize`, an MLP makes them (section 4.3); PEFT's `PrefixEncoder` is the MLP. It may
stand beside values that are learnt directly (Razdaibiedina et al. 2023, "Residual Prompt Tuning",
https://arxiv.org/abs/2305.03937, section 3, for every layer's keys and values). Where the
base can read a soft prompt, the embeddings that it makes the start of learn too
(`learn_embeddings`). A prefix is then all that prompt tuning reaches, and more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ptkit.errors import AdapterError, ModelError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import (
    Adapter,
    Demonstrations,
    OwnRate,
    peft_config_dict,
    register,
)
from ptkit.methods.base_names import require_shapes
from ptkit.methods.gate_files import without_gate
from ptkit.methods.peft_tensors import virtual_tokens_of
from ptkit.methods.prefix_tuning.settings import (
    ENCODER,
    ENCODER_DECODER,
    HYBRID,
    INFIX,
    PLACELESS,
    UNLIKE,
    PrefixTuningSection,
)
from ptkit.methods.read_start import EMBEDDING_RATE, ReadStart, compiles_embeddings
from ptkit.methods.registry import compile_files
from ptkit.methods.start import start_files, start_shares, start_tokens
from ptkit.prefix import KVPrefix
from ptkit.runtime.architecture import places_in_table, reads_ids
from ptkit.runtime.attention_sites import takes_positions
from ptkit.runtime.base_model import Base
from ptkit.runtime.cache import has_state, shares_keys
from ptkit.runtime.compile import compile_tokens
from ptkit.runtime.infix import require_infix

#: How much slower than values beside it an MLP learns: the two rates that suit each alone.
MLP_RATE = 0.03

if TYPE_CHECKING:
    from peft import PrefixTuningConfig


@register
class PrefixTuning(Adapter):
    """A KV prefix, learnt directly or through an MLP on top of its start."""

    section_class = PrefixTuningSection
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
        *,
        placeless: bool = False,
    ) -> None:
        """start: PEFT's flat layout `[virtual_tokens, layers * 2 * kv_heads * head_dim]`; None:
        noise, as PEFT's
        read: what `start` becomes while its embeddings learn
        placeless: see `KVPrefix.placeless`

        What is learnt is a change of the start, in units of the start's RMS per layer and side.
        Keys and values differ in size by layer (30 times in the embedded base), while a step of
        AdamW has one size for all. Unscaled, a rate that moves the large ones destroys the small.
        """
        super().__init__(section, base)
        if (base.encoder_decoder or base.encoder) and section.position == "infix":
            raise ModelError(
                f"{base.id} has an encoder, which reads the input from both sides, so nothing of "
                "it comes before an infix; use `position: prefix`"
            )
        if section.position == "infix":
            require_infix(base.model)
        if placeless:
            _require_told_positions(base)
        self.placeless = placeless
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
        from peft.tuners.prefix_tuning import PrefixEncoder

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
        #: What is learnt beside an MLP, in the layout of its output.
        self.beside: nn.Parameter | None = None
        if section.reparameterize == "residual":
            self.beside = nn.Parameter(torch.zeros(rows, 2 * side * trained, device=device))
        self.gates: nn.Parameter | None = None
        if section.gates is not None:
            sides = 2 if section.gates == "keys_and_values" else 1
            # [trained layers, keys and values | values]
            self.gates = nn.Parameter(torch.ones(trained, sides, device=device))

    def _config(self, layers: int, virtual_tokens: int) -> PrefixTuningConfig:
        """PEFT's settings of a prefix for `layers` layers."""
        from peft import PrefixTuningConfig

        section, shape = self.section, self.base.layout.widest
        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=virtual_tokens,
            num_layers=layers,
            # In PREFIX_TUNING configs PEFT means the key/value heads and their total width.
            num_attention_heads=shape.kv_heads,
            token_dim=shape.kv_heads * shape.key_dim,
            num_transformer_submodules=1,
            prefix_projection=bool(section.reparameterize),
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
            if _learns_embeddings(section, base):
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
            if prefix.placeless:
                raise AdapterError(
                    f"a {files.peft_type} adapter lets its texts begin at position 0, and those "
                    "of a new prefix begin after it; start from another adapter"
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
        return cls(section, base, prefix.flat().float(), placeless=prefix.placeless)

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
        placeless = files.peft_type == PLACELESS
        return cls(section.model_copy(update=update), base, flat.float(), placeless=placeless)

    @classmethod
    def prefix_from_files(
        cls, files: AdapterFiles, section: PrefixTuningSection, base: Base
    ) -> KVPrefix:
        flat = _flat_of(files, base)
        # Copied: the tensors may be views of a mapped file, which may change under the adapter.
        place = base.model.device, base.model.dtype
        prefix = KVPrefix.from_flat(flat, base.layout, copied_to=place)
        placeless = files.peft_type == PLACELESS
        if placeless:
            _require_told_positions(base)
        return replace(prefix, infix=files.peft_type == INFIX, placeless=placeless)

    @property
    def virtual_tokens(self) -> int:
        return self.section.num_virtual_tokens

    @property
    def positions(self) -> int:
        return 0 if self.placeless else self.virtual_tokens

    @property
    def trainable_parameters(self) -> int:
        # Where layers differ, the narrower ones have room that nobody reads.
        used = super().trainable_parameters
        if self.section.reparameterize is not True:
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
        learnt = self.encoder(indices)
        if self.beside is not None:
            learnt = learnt + self.beside
        trained = start[row:, column:] + self.unit * learnt
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
        prefix = replace(prefix, infix=self.infix, placeless=self.placeless)
        return prefix.to(self.base.model.device, self.base.model.dtype)

    def own_rates(self) -> list[OwnRate]:
        if self.beside is not None:
            return [OwnRate([*self.encoder.parameters()], beta2=None, factor=MLP_RATE)]
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
        if self.placeless:
            config["peft_type"] = PLACELESS
        if self.base.encoder_decoder:
            config |= {"peft_type": ENCODER_DECODER, "task_type": "SEQ_2_SEQ_LM"}
        if self.base.encoder:
            config["peft_type"] = ENCODER
        return AdapterFiles(config, {"prompt_embeddings": self.flat().detach()})


def _learns_embeddings(section: PrefixTuningSection, base: Base) -> bool:
    """Whether the start learns on `base`. Raises ModelError where it is told to, and cannot."""
    able = compiles_embeddings(base) and not reads_ids(base.model)
    if section.learn_embeddings and not able:
        raise ModelError(
            f"{base.id} cannot make a prefix of embeddings (it has an encoder, or layers that "
            "keep a state or look up token ids); leave `learn_embeddings` out"
        )
    return able and section.learn_embeddings is not False and section.embeddings_matter()


def _require_told_positions(base: Base) -> None:
    """Raise AdapterError where a text behind virtual tokens cannot be told to begin at 0."""
    if places_in_table(base.model) is None or not takes_positions(base.model):
        raise AdapterError(
            f"a prefix that takes no positions is read on models with a table of positions, as "
            f"GPT-2; {base.id} has none"
        )


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
