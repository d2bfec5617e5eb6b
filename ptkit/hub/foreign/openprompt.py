"""OpenPrompt's templates, saved as their state: soft prompts, and prefixes of GPT-2."""

from __future__ import annotations

from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats.adapter_folder import is_pickle
from ptkit.hub.foreign import Foreign
from ptkit.hub.foreign.made import by_mlp, prefix_files, prompt_files
from ptkit.hub.foreign.source import Source
from ptkit.runtime.base_model import Base

LIBRARY = "OpenPrompt"
NEEDS_BASE = True
FORMATS = [
    (
        "OpenPrompt, `PrefixTuningTemplate` of GPT-2",
        "one file of tensors",
        "prefix tuning",
        "handed over as PEFT does, so its texts begin behind it too",
        "live, kept",
    ),
    (
        "OpenPrompt, `SoftTemplate` of a decoder",
        "one file of tensors",
        "prompt tuning",
        "the same embeddings before the text",
        "live, kept",
    ),
    (
        "OpenPrompt, `SoftTemplate` of T5",
        "one file of tensors",
        "ptkit's encoder prompt",
        "the same embeddings before what the encoder reads",
        "live, kept",
    ),
    (
        "OpenPrompt, `PrefixTuningTemplate` of T5",
        "one file of tensors",
        "refused",
        "it has none for the cross-attention, which ptkit's has",
        "live, kept",
    ),
    (
        "OpenPrompt, `PtuningTemplate` and `MixedTemplate`",
        "one file of tensors",
        "refused",
        "its tokens stand where the template puts them, not before the text",
        "live, kept",
    ),
]
#: What a template's state holds beside what it learnt: the base's own embeddings, and numbers.
_BESIDE = ("raw_embedding.weight", "input_tokens")


def found(source: Source) -> str | None:
    """What `source` is, where it may be a template's state: one file, which is not opened yet."""
    pickles = [name for name in source.names if is_pickle(name)]
    known = ("adapter_config.json", "config.json")
    if len(pickles) != 1 or any(name in source.names for name in known):
        return None
    return "a file of tensors, perhaps a template of OpenPrompt"


def why_not(source: Source) -> str | None:
    """None: names and settings do not tell."""
    return None


def read(source: Source, base: Base | None) -> Foreign:
    """The template as prefix or prompt tuning. Raises AdapterError for one that is neither."""
    assert base is not None
    (name,) = (name for name in source.names if is_pickle(name))
    where = str(source.path)
    tensors = {n: t for n, t in source.tensors(name).items() if n not in _BESIDE}
    if [*tensors] == ["soft_embeds"]:
        return Foreign(prompt_files(tensors["soft_embeds"], base, where))
    if any(n.startswith(("new_embedding", "soft_embedding")) for n in tensors):
        raise AdapterError(
            f"{where}: the tokens of this template stand where its text puts them, which the file "
            "does not say; train it again with ptkit"
        )
    if "decoder_wte.weight" in tensors:
        return Foreign(prefix_files(_prefix(tensors, base, where), base, where))
    raise AdapterError(
        f"{where} holds {', '.join([*tensors][:4]) or 'no tensors'}, which is no template of "
        "OpenPrompt and nothing else that ptkit knows"
    )


def _prefix(tensors: dict[str, Tensor], base: Base, where: str) -> Tensor:
    if base.encoder_decoder or "wte.weight" in tensors:
        raise AdapterError(
            f"{where}: it has prefixes for the encoder and the decoder, but none for what joins "
            "them; train it again with ptkit"
        )
    return by_mlp(tensors, "decoder_wte", "decoder_control_trans")
