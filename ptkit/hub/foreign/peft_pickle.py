"""PEFT 0.2 to 0.6, which pickled its weights."""

from __future__ import annotations

from typing import Final

from ptkit.formats.adapter_files import AdapterFiles
from ptkit.formats.adapter_folder import CONFIG, PICKLED_WEIGHTS, WEIGHTS
from ptkit.hub.foreign import Foreign
from ptkit.hub.foreign.source import Source
from ptkit.runtime.base_model import Base

LIBRARY = "PEFT's pickled weights"
NEEDS_BASE = False
FORMATS = [
    (
        "PEFT 0.2 to 0.6, all methods but the next three",
        "`adapter_config.json`, `adapter_model.bin`",
        "the same, as safetensors",
        "the tensors are copied",
        "live, kept",
    ),
    (
        "PEFT 0.2 and 0.3, soft prompt of T5 or BART",
        "the same",
        "refused",
        "there the decoder reads its second half; since 0.4 nothing does",
        "live, kept",
    ),
    (
        "PEFT 0.2 to 0.6, prefix of T5 or BART",
        "the same",
        "refused where it is used",
        "it has the decoder's part only, and ptkit's has the encoder's too",
        "live, kept",
    ),
    (
        "PEFT 0.2, LoRA of parts of a joined projection (`enable_lora`)",
        "the same",
        "refused",
        "later versions of PEFT cannot hold it",
        "live, kept",
    ),
]
#: Soft prompts.
_SOFT: Final = ("PROMPT_TUNING", "P_TUNING")
#: Settings that PEFT writes since 0.4.
_SINCE_0_4: Final = ("auto_mapping", "revision")


def found(source: Source) -> str | None:
    """What `source` is, where PEFT pickled it."""
    kind = source.settings(CONFIG).get("peft_type")
    if PICKLED_WEIGHTS not in source.names or WEIGHTS in source.names or not isinstance(kind, str):
        return None
    return f"a {kind} adapter of PEFT with pickled weights"


def why_not(source: Source) -> str | None:
    """Why it is refused: two that PEFT itself reads otherwise today, or not at all."""
    settings = source.settings(CONFIG)
    if settings.get("enable_lora"):
        return (
            "its LoRA changes parts of a joined projection (`enable_lora`), which PEFT did until "
            "0.2 alone; train it again with ptkit"
        )
    older = not any(name in settings for name in _SINCE_0_4)
    halves = settings.get("num_transformer_submodules") == 2
    if older and halves and settings.get("peft_type") in _SOFT:
        return (
            "PEFT before 0.4 let the decoder read the second half of such a soft prompt, and ptkit "
            "and later versions read the first half alone; train it again with ptkit"
        )
    return None


def read(source: Source, base: Base | None) -> Foreign:
    """The adapter with its settings as they are, and its tensors."""
    files = AdapterFiles(source.settings(CONFIG), source.tensors(PICKLED_WEIGHTS))
    return Foreign(files)
