"""Soft prompts as engines that know nothing of adapters are given them.

What prompt tuning and P-tuning learn are input embeddings, so an engine that only knows a
vocabulary can serve them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptkit.errors import AdapterError
from ptkit.hub.engine_adapters import engine_adapters
from ptkit.methods.soft_prompt import SoftPrompt
from ptkit.runtime.base_model import Base

#: What an engine's client needs to know of the adapters.
PROMPTS = "prompts.json"


@dataclass(frozen=True)
class Soft:
    """A soft prompt: what an adapter puts before the input, `[virtual_tokens, hidden]`."""

    name: str
    embeddings: Tensor
    template: str | None

    @property
    def tokens(self) -> list[str]:
        """Its special tokens, one per row of the embeddings."""
        return [f"<|{self.name}:{i}|>" for i in range(len(self.embeddings))]


def soft_prompts(sources: Sequence[Path], base: Base | None) -> tuple[Base, list[Soft]]:
    """The soft prompts of adapters of one base, which is loaded unless given.

    Raises AdapterError for a method that learns something else than input embeddings, UserError
    when two adapters have one name.
    """
    found: list[Soft] = []
    for source, adapter in engine_adapters(sources, base):
        if not isinstance(adapter, SoftPrompt):
            raise AdapterError(
                f"{source.path} is a {source.files.peft_type} adapter: it learns no input "
                "embeddings, so it cannot become tokens; `--as transformers` and `ptkit serve` "
                "take keys and values"
            )
        embeddings = adapter.embeddings().detach().float().cpu()
        found.append(Soft(source.name, embeddings, source.template))
        base = adapter.base
    assert base is not None
    return base, found


def prompts_file(base: Base, softs: Sequence[Soft], prompts: Mapping[str, str]) -> dict[str, Any]:
    """What `prompts.json` says of the adapters."""
    return {
        "base": {"id": base.id, "revision": base.revision, "fingerprint": base.fingerprint},
        "adapters": {
            soft.name: {
                "virtual_tokens": len(soft.embeddings),
                **({"prompt": prompts[soft.name]} if soft.name in prompts else {}),
                "template": soft.template,
            }
            for soft in softs
        },
    }


def embedding_scale(model: PreTrainedModel) -> float:
    """What the model multiplies the rows of its embedding by when it looks them up (Gemma does)."""
    table: Any = model.get_input_embeddings()
    row = int(table.weight.float().norm(dim=-1).argmax())
    with torch.no_grad():
        looked_up = table(torch.tensor([[row]], device=table.weight.device))[0, 0].float()
        stored = table.weight[row].float()
    return float((looked_up @ stored) / (stored @ stored))
