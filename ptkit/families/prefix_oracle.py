"""What a KV prefix should make of a row: in attentions written out, or read from a cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

from ptkit.families.model_under_test import TokenRow
from ptkit.families.oracle import Oracle, own_positions
from ptkit.runtime.attention_choice import set_attention


class Attended(Oracle):
    """A prefix, by softmax(q [p; k] + mask) [p; v] in every attention (Li & Liang 2021, section 4;
    He et al. 2022, equation 5). Every word sees all of it, whatever the layer's window."""

    def __init__(
        self,
        model: PreTrainedModel,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        *,
        takes_positions: bool = True,
    ) -> None:
        """keys, values: per attention module, `[kv_heads, virtual_tokens, head_dim]`
        takes_positions: words have the positions after those of the virtual tokens
        """
        super().__init__(model)
        self.tokens, self.takes_positions = keys[0].shape[1], takes_positions
        pairs = list(zip(keys, values, strict=True))
        modules: list[Any] = attentions(model)
        own = [m for m in modules if not getattr(m, "is_kv_shared_layer", False)]
        self.prefix = dict(zip(own, pairs, strict=True))
        for module in modules:  # one that shares keys and values has those of its kind's last
            if module not in self.prefix:
                alike = [m for m in own if m.layer_type == module.layer_type]
                self.prefix[module] = self.prefix[alike[-1]]
        AttentionInterface.register("written_out", self._attention)
        AttentionMaskInterface.register("written_out", _whole_mask)

    def logits(self, row: TokenRow) -> Tensor:
        # Registered again: another oracle may have taken the name.
        AttentionInterface.register("written_out", self._attention)
        own = self.model.config._attn_implementation
        set_attention(self.model, "written_out")
        try:
            if self.model.config.is_encoder_decoder:
                return self._plain(row)
            ids = self._ids(row)
            if not self.takes_positions:
                return self._read(row, input_ids=ids)
            positions = own_positions(self.model.base_model, ids) + self.tokens
            return self._read(row, input_ids=ids, position_ids=positions)
        finally:
            set_attention(self.model, own)

    def _attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
        scaling: float | None = None, **kw: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        before, after = (t.to(key.dtype)[None] for t in self.prefix[module])
        groups = query.shape[1] // key.shape[1]
        keys = torch.cat([before, key], dim=2).repeat_interleave(groups, dim=1)
        values = torch.cat([after, value], dim=2).repeat_interleave(groups, dim=1)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = (query @ keys.transpose(-1, -2)).float() * scaling
        if kw.get("softcap"):  # Gemma 2
            scores = kw["softcap"] * (scores / kw["softcap"]).tanh()
        for added in (mask, kw.get("position_bias")):
            if added is not None:
                scores[..., self.tokens :] += added
        if kw.get("s_aux") is not None:  # GPT-OSS: a score that takes attention to nowhere
            sink = kw["s_aux"].reshape(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
            weights = torch.cat([scores, sink.float()], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        return (weights.to(values.dtype) @ values).transpose(1, 2).contiguous(), None


class DisentangledOracle(Oracle):
    """A prefix in DeBERTa's attention, which cannot be replaced. The result adds what a module
    makes of the words and what the prefix gives, each in the share of its exponentials. Virtual
    tokens have contents and no distances (He et al. 2021, section 3.1)."""

    def __init__(
        self, model: PreTrainedModel, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        super().__init__(model)
        modules = [m for m in model.modules() if hasattr(m, "disentangled_attention_bias")]
        self.prefix = dict(zip(modules, zip(keys, values, strict=True), strict=True))

    def logits(self, row: TokenRow) -> Tensor:
        hooks = [m.register_forward_hook(self._joined, with_kwargs=True) for m in self.prefix]
        try:
            return self._plain(row, input_ids=self._ids(row), output_attentions=True)
        finally:
            for hook in hooks:
                hook.remove()

    def _joined(
        self, module: Any, args: tuple[Any, ...], kw: dict[str, Any], output: Any
    ) -> tuple[Tensor, Tensor]:
        context, shares = output
        hidden, heads = args[0], module.num_attention_heads
        read = hidden if kw.get("query_states") is None else kw["query_states"]
        query, key = (module.transpose_for_scores(t, heads) for t in (
            module.query_proj(read), module.key_proj(hidden)))  # fmt: skip
        kinds = 1 + len({"c2p", "p2c"} & {*module.pos_att_type})
        scale = (kinds * query.shape[-1]) ** 0.5
        scores = query @ key.transpose(-1, -2) / scale
        if module.relative_attention:
            scores = scores + module.disentangled_attention_bias(
                query, key, kw["relative_pos"], kw["rel_embeddings"], kinds
            )
        before, after = (t.to(query.dtype) for t in self.prefix[module])
        given = (query @ before.transpose(-1, -2) / scale).float()  # [heads, words, virtual]
        # Any score tells how much all of them weigh, given its share: the largest does it best.
        largest = shares[0].float().argmax(-1, keepdim=True)
        score = scores.float().gather(-1, largest)
        weight = score - shares[0].float().gather(-1, largest).log()
        joined = torch.cat([weight, given], dim=-1).softmax(-1)
        own = context.view(hidden.shape[1], heads, -1).transpose(0, 1).float()
        mixed = joined[..., :1] * own + joined[..., 1:] @ after.float()
        return mixed.to(context.dtype).transpose(0, 1).flatten(1)[None], shares


class Continued(Oracle):
    """A prefix, as the model's own cache of what it read before: for models whose attention is
    their own business. Only where all layers see everything."""

    def __init__(
        self, model: PreTrainedModel, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        super().__init__(model)
        self.pairs = list(zip(keys, values, strict=True))

    def logits(self, row: TokenRow) -> Tensor:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(self.pairs):
            cache.update(key[None].clone(), value[None].clone(), layer)
        ids = self._ids(row)
        mask = ids.new_ones(1, self.pairs[0][0].shape[1] + ids.shape[1])
        return self._plain(
            row, input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True
        )


def _whole_mask(*args: Any, **kw: Any) -> Tensor:
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return eager_mask(*args, **{**kw, **skips})


def attentions(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that attend, found by letting the model read a word.

    In the order in which a prefix holds them: encoder, decoder, and what the decoder reads the
    encoder through, each from the first layer up.
    """
    seen: list[tuple[nn.Module, int, int]] = []

    def note(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> tuple[Tensor, None]:
        seen.append((module, query.shape[2], key.shape[2]))
        heads = value.shape[1]
        mean = value.mean(dim=2, keepdim=True).repeat_interleave(query.shape[1] // heads, dim=1)
        return mean.expand(-1, -1, query.shape[2], -1).transpose(1, 2).contiguous(), None

    AttentionInterface.register("noted", note)
    AttentionMaskInterface.register("noted", _whole_mask)
    reader: Any = model
    own = model.config._attn_implementation
    set_attention(reader, "noted")
    word = torch.full((1, 3), 3, device=model.device)
    try:
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                reader(input_ids=word, decoder_input_ids=word[:, :2], use_cache=False)
            else:
                reader.base_model(input_ids=word)
    finally:
        set_attention(reader, own)
    # The encoder reads three words, the decoder two: lengths tell the sites apart.
    sites = {(3, 3): 0, (2, 2): 1, (2, 3): 2}
    return [module for module, queries, keys in
            sorted(seen, key=lambda entry: sites[entry[1:]])]  # fmt: skip


def prefix_oracle(
    model: PreTrainedModel,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    takes_positions: bool = True,
) -> Oracle:
    """`Attended` where the attention can be replaced, else `Disentangled` or `Continued`.

    model: of its own, not the one under test
    """
    model = copy.deepcopy(model)
    if type(model)._can_set_attn_implementation():
        return Attended(model, keys, values, takes_positions=takes_positions)
    if any(hasattr(module, "disentangled_attention_bias") for module in model.modules()):
        return DisentangledOracle(model, keys, values)
    return Continued(model, keys, values)
