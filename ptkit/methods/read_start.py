"""A prefix's start that learns: embeddings of virtual tokens, which the base reads.

In the base, what a virtual token is at one layer and at the next belong together: it makes both of
one embedding. Keys and values learnt layer by layer do not have this relation, and a short run does
not find it. One change of an embedding moves them all together. Prompt tuning has only that change,
a prefix has both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptkit.methods.start import rms, start_embeddings
from ptkit.runtime.base_model import Base
from ptkit.runtime.cache import has_state
from ptkit.runtime.compile import compile_embeddings

#: Times the rate of keys and values. Both count in units of their own size, but embeddings stand
#: long steps, as in prompt tuning.
EMBEDDING_RATE = 60.0


def compiles_embeddings(base: Base) -> bool:
    """Whether `base` makes a KV prefix of embeddings: decoders whose layers keep no state do."""
    return not (base.encoder or base.encoder_decoder or has_state(base.model))


class ReadStart(nn.Module):
    """What the base makes of real tokens plus a learnt change of their embeddings.

    The change `[virtual_tokens - frozen, hidden]` begins at zero and counts in units of the
    embeddings' RMS.
    """

    start: Tensor
    unit: Tensor

    def __init__(self, base: Base, tokens: Tensor, frozen: int = 0) -> None:
        """tokens: ids `[virtual_tokens]`
        frozen: how many of the first stay what they are
        """
        super().__init__()
        # In a tuple, so that the frozen base is not registered as a child.
        self._base = (base,)
        embedded = start_embeddings(base, tokens)
        self.frozen = frozen
        self.register_buffer("start", embedded)
        self.register_buffer("unit", rms(embedded))
        self.change = nn.Parameter(torch.zeros_like(embedded[frozen:]))

    def flat(self) -> Tensor:
        """PEFT's layout `[virtual_tokens, layers * 2 * kv_heads * head_dim]`, differentiable; one
        forward of a single row."""
        change = nn.functional.pad(self.unit * self.change, (0, 0, self.frozen, 0))
        return compile_embeddings(self._base[0].model, self.start + change).flat().float()
