"""How a model computes attention, as transformers calls it: chosen, asked, and made to look for
prefixes."""

from __future__ import annotations

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from ptkit.errors import ModelError

#: What the names of the functions begin with that look for prefixes (`ptkit.runtime.attention`).
OURS = "ptkit_"


def attention_of(model: PreTrainedModel) -> str:
    """The attention that `model` computes with, as transformers calls it: `sdpa`, `eager`, ..."""
    return str(model.config._attn_implementation).removeprefix(OURS)


def take_prefixes(model: PreTrainedModel) -> None:
    """Let the attention functions of `model` look for prefixes among their arguments.

    Done once; without a prefix they stay what they were. Models with an attention of their own,
    and those that use another implementation than sdpa and eager, are left alone.
    """
    own = model.config._attn_implementation
    if own not in ("sdpa", "eager") or not model._can_set_attn_implementation():
        return
    if own == "sdpa" and not takes_sdpa(model.config):
        raise ModelError(
            f"{type(model).__name__} caps the logits of its attention, which the `sdpa` of "
            f"transformers {transformers.__version__} leaves out; load it with "
            'attn_implementation="eager", or install transformers>=5.21'
        )
    set_attention(model, f"{OURS}{own}")


def takes_sdpa(config: PretrainedConfig) -> bool:
    """Whether torch's attention computes what a model of `config` asks for. It caps no logits, as
    Gemma 2 does (report of 2024, section 2). From 5.21 on, transformers refuses `sdpa` for it."""
    return getattr(config.get_text_config(decoder=True), "attn_logit_softcapping", None) is None


def asked_attention(config: PretrainedConfig, asked: str, id: str) -> str | None:
    """The attention that a base of `config` is loaded with where `asked`, perhaps `auto`, is asked
    for; None: as transformers chooses. Raises ModelError for `sdpa` where it is not the model's."""
    if takes_sdpa(config):
        return None if asked == "auto" else asked
    if asked == "sdpa":
        raise ModelError(f"`{id}` has no `sdpa` attention; set `model.attention: auto`")
    return "eager"


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Let all parts of `model` compute attention in the way that transformers knows as `name`.

    Stacks of an encoder-decoder have copies of its config. Before transformers 5.20, those of T5
    keep theirs when the whole is told.
    """
    for part in [model, *model.modules()]:
        if (
            isinstance(part, PreTrainedModel)
            and part.config._attn_implementation != name
            and part._can_set_attn_implementation()
        ):
            part.set_attn_implementation(name)
