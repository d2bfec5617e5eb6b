"""DeBERTa's disentangled attention (He et al. 2021, "DeBERTa", section 3.1) with a prefix.

It is not on transformers' `AttentionInterface`, so its forward is written out here. Scores are
those of contents plus what distances add; a virtual token has a content and no distance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptkit.runtime.attention import Call, Noted, Placed, Repeats, in_place
from ptkit.runtime.views import StandIn, name_of


class Disentangled:
    """The back end of DeBERTa."""

    def put(
        self, model: PreTrainedModel, prefixes: Repeats | None, call: Call, noted: Noted = None
    ) -> None:
        placed = in_place(model, prefixes, call, noted)
        call.replaced |= {
            name_of(model, module): Attending(module, placed) for module in placed.layers
        }


class Attending(StandIn):
    """An attention module of DeBERTa's with the prefixes of one forward pass."""

    def __init__(self, inner: nn.Module, placed: Placed) -> None:
        super().__init__(inner)
        self.placed = placed

    def forward(self, *args: Any, **kw: Any) -> tuple[Tensor, Tensor | None]:
        return _attend(self.inner, self.placed, *args, **kw)


def _attend(
    module: Any,
    placed: Placed,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`DisentangledSelfAttention.forward`; its arguments, names and results."""
    rows, heads = len(hidden_states), module.num_attention_heads

    def by_head(tensor: Tensor) -> Tensor:
        return tensor.view(rows, heads, *tensor.shape[1:])

    read = hidden_states if query_states is None else query_states
    query = module.transpose_for_scores(module.query_proj(read), heads)
    key = module.transpose_for_scores(module.key_proj(hidden_states), heads)
    value = module.transpose_for_scores(module.value_proj(hidden_states), heads)
    kinds = 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)
    added: dict[str, Any] = {}
    if module.relative_attention:
        distances = module.disentangled_attention_bias(
            query, key, relative_pos, module.pos_dropout(rel_embeddings), kinds
        )
        if isinstance(distances, Tensor):
            added["position_bias"] = by_head(distances)
    keys, values, mask = placed.before(
        module, query.shape[1], by_head(key), by_head(value), attention_mask.bool(), added
    )
    assert mask is not None
    scores = by_head(query) @ keys.transpose(-1, -2) / (query.shape[-1] * kinds) ** 0.5
    scores = scores + added.get("position_bias", 0)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    shares = module.dropout(scores.softmax(-1))
    context = (shares @ values).transpose(1, 2).flatten(2)
    return context, shares if output_attentions else None
