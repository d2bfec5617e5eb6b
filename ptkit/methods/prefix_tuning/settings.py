"""What a recipe says of prefix tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ptkit.methods.prompt_settings import PromptMethodSection
from ptkit.section import FileType, register_method


class PrefixSettings(PromptMethodSection):
    """How a prefix is made, whether it is learnt by itself or with something beside it."""

    reparameterize: bool | Literal["residual"] = False
    """Train an MLP whose output is added to the start (scaled as all learnt values are). Its last
    layer begins at zero, so training departs from the start exactly. Folded at export. `residual`:
    values are learnt beside the MLP, and both are added (Razdaibiedina et al. 2023, who do so for
    the embeddings of a soft prompt). The MLP then learns 0.03 times as fast as they do."""
    encoder_hidden_size: int = Field(default=128, ge=1)
    """Width of that MLP."""
    trained_layers: int | None = Field(default=None, ge=1)
    """Upper layers whose keys and values are trained (Liu et al. 2022, P-tuning v2, section 4.3).
    Those below keep their start, the real keys and values of its tokens. null: all."""
    sink: bool = False
    """Keep the first virtual token frozen, at the base's reading of its begin-of-text token. It is
    an attention sink in many bases (Xiao et al. 2024), and a trained token in its place disturbs
    all they read. It counts among `num_virtual_tokens`."""
    gates: Literal["values", "keys_and_values"] | None = None
    """Learn one factor per layer on the virtual tokens' values, or one on the keys and one on the
    values. Factors begin at 1 and are folded into the exported prefix exactly."""
    position: Literal["prefix", "infix"] = "prefix"
    """Where the virtual tokens stand: before the input, or (Li & Liang 2021, section 7.2) before
    its last token. PEFT knows no infix, so such an adapter is for ptkit only."""
    learning_rate: float | Literal["auto"] = 0.1
    """AdamW's peak learning rate, in units of the size (RMS) that keys and values have at the start
    in their layer. So one rate fits all layers and bases; an MLP alone wants about 3e-3. `auto`: of
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

#: A prefix whose virtual tokens take no positions, as those of AdapterHub's and OpenDelta's
#: libraries: the text begins at position 0. PEFT lets it begin after them.
PLACELESS = "PTKIT_PLACELESS_PREFIX"


@register_method
class PrefixTuningSection(PrefixSettings):
    """Prefix tuning (Li & Liang 2021), also known as P-tuning v2: learns keys and values."""

    display_name: ClassVar[str] = "prefix tuning"
    on_split_base: ClassVar[bool] = True
    tags: ClassVar[tuple[str, ...]] = (
        "prefix-tuning", "prefix_tuning", "ptkit-infix", "ptkit-encoder-decoder-prefix",
        "ptkit-encoder-prefix", "ptkit-hybrid-prefix", "ptkit-unlike-prefix",
        "ptkit-placeless-prefix",
    )  # fmt: skip
    # CARTRIDGE differs in how it is trained: its file is the same flat prefix.
    file_types: ClassVar[Mapping[str, FileType]] = {
        "PREFIX_TUNING": FileType(),
        "CARTRIDGE": FileType(),
        INFIX: FileType("an infix", name="infix tuning"),
        ENCODER_DECODER: FileType(
            "it has a prefix for the encoder, too",
            name="prefix tuning (encoder, decoder and cross-attention)",
        ),
        ENCODER: FileType("its virtual tokens take no positions from the input"),
        HYBRID: FileType(
            "it has layers for those with attention only, and PEFT numbers all layers"
        ),
        UNLIKE: FileType(
            "the base has layers with more heads than its widest, which PEFT leaves out"
        ),
        PLACELESS: FileType("its texts begin at position 0, and behind PEFT's prefix after it"),
    }
    kind: Literal["prefix_tuning"]
    """`prefix_tuning`."""
    learn_embeddings: bool | None = None
    """Train the embeddings of the start's tokens as well. The prefix is what the base makes of
    them, as in prompt tuning, plus what is learnt at every layer. Folded at export. null: where it
    can be, with a start of tokens, no `trained_layers` and no MLP, on a decoder without states."""

    @model_validator(mode="after")
    def _embeddings_are_read(self) -> PrefixTuningSection:
        if self.learn_embeddings and not self.embeddings_matter():
            raise ValueError(
                "`learn_embeddings` needs a `start` of tokens (neither `random` nor `adapter`), no "
                "`trained_layers` (those below would change, too) and no `reparameterize`"
            )
        return self

    def embeddings_matter(self) -> bool:
        """Whether a change of the start's embeddings changes what is trained, and nothing else."""
        tokens = self.start not in ("random", "adapter")
        return tokens and self.trained_layers is None and not self.reparameterize


def prefix_section(settings: PrefixSettings, **changes: Any) -> PrefixTuningSection:
    """`settings` as those of a prefix that learns beside something else, with `changes`."""
    own = {name: getattr(settings, name) for name in PrefixSettings.model_fields if name != "kind"}
    own["learn_embeddings"] = False
    return PrefixTuningSection(kind="prefix_tuning", **{**own, **changes})
