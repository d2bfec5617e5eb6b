"""What an adapter should make of a row, worked out by the plain model, without ptkit or PEFT.

One row at a time, nothing padded, nothing cached between tokens unless it is the very thing the
oracle stands on: every shortcut that the programs under test take is left out.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
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

from ptkit.families.subject import Row


class Oracle(ABC):
    """The right logits of one row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    @abstractmethod
    def logits(self, row: Row) -> Tensor:
        """Logits `[tokens of the answer, vocabulary]` that predict the answer, token by token."""

    def greedy(self, read: list[int], tokens: int) -> list[int]:
        """The likeliest next token, `tokens` times, everything being read anew each time."""
        written: list[int] = []
        for _ in range(tokens):
            written.append(int(self._next(read, written).argmax()))
        return written

    def beam(self, read: list[int], tokens: int, beams: int) -> list[int]:
        """The best of `beams` partial answers, all extended at every token."""
        best: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(tokens):
            longer = []
            for score, written in best:
                found = self._next(read, written).log_softmax(-1).topk(beams)
                longer += [
                    (score + float(value), [*written, int(token)])
                    for value, token in zip(found.values, found.indices, strict=True)
                ]
            best = sorted(longer, key=lambda entry: -entry[0])[:beams]
        return best[0][1]

    def _next(self, read: list[int], written: list[int]) -> Tensor:
        return self.logits(Row(read, [*written, 0]))[-1].float()

    def _plain(self, row: Row, **inputs: Any) -> Tensor:
        """The model's own logits of the answer."""
        device = self.model.device
        with torch.no_grad():
            if self.model.config.is_encoder_decoder:
                start = self.model.config.decoder_start_token_id
                begin = torch.tensor([[start, *row.answer[:-1]]], device=device)
                if "inputs_embeds" not in inputs:
                    inputs["input_ids"] = torch.tensor([row.input], device=device)
                return self.model(decoder_input_ids=begin, **{**inputs, "use_cache": False}).logits[
                    0
                ]
            logits = self.model(**inputs).logits[0]
        return logits[-len(row.answer) - 1 : -1]


class Merged(Oracle):
    """A model that does by itself what the adapter does (LoRA's matrices added to its weights)."""

    def logits(self, row: Row) -> Tensor:
        if self.model.config.is_encoder_decoder:
            return self._plain(row)
        ids = torch.tensor([row.input + row.answer], device=self.model.device)
        return self._plain(row, input_ids=ids, use_cache=False)


class Embedded(Oracle):
    """Soft prompts: their embeddings `[virtual_tokens, hidden]`, then those of the words."""

    def __init__(self, model: PreTrainedModel, embeddings: Tensor) -> None:
        super().__init__(model)
        self.embeddings = embeddings

    def logits(self, row: Row) -> Tensor:
        pairs = self.model.config.is_encoder_decoder
        reader = self.model.get_encoder() if pairs else self.model
        read = row.input if pairs else row.input + row.answer
        words = reader.get_input_embeddings()(torch.tensor([read], device=self.model.device))
        whole = torch.cat([self.embeddings[None].to(words.dtype), words], dim=1)
        return self._plain(row, inputs_embeds=whole, use_cache=False)


class Written(Oracle):
    """A text prompt: its tokens, then the row's."""

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int]) -> None:
        super().__init__(model)
        self.tokens = list(tokens)

    def logits(self, row: Row) -> Tensor:
        ids = torch.tensor([self.tokens + row.input + row.answer], device=self.model.device)
        return self._plain(row, input_ids=ids, use_cache=False)


class Inside(Oracle):
    """An infix of real tokens on a model of one layer, where it is the base reading them just
    before the last token of the input (deeper, real tokens would read what comes before them)."""

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int]) -> None:
        super().__init__(model)
        self.tokens = list(tokens)

    def logits(self, row: Row) -> Tensor:
        before, virtual = len(row.input) - 1, len(self.tokens)
        read = [*row.input[:-1], *self.tokens, row.input[-1]]
        ids = torch.tensor([read + row.answer], device=self.model.device)
        positions = torch.arange(ids.shape[1], device=ids.device)
        if not any(name.endswith("inv_freq") for name, _ in self.model.named_buffers()):
            # Learned positions are part of what is embedded: those of the first tokens.
            positions[before : before + virtual] = torch.arange(virtual, device=ids.device)
        return self._plain(
            row, input_ids=ids, position_ids=positions[None], use_cache=False,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip


class Attended(Oracle):
    """A prefix, by softmax(q [p; k] + mask) [p; v] in every attention (Li & Liang 2021, section 4;
    He et al. 2022, equation 5). Every word sees all of it, whatever the layer's window."""

    def __init__(
        self, model: PreTrainedModel, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        """keys, values: per attention module, `[kv_heads, virtual_tokens, head_dim]`."""
        super().__init__(model)
        self.tokens = keys[0].shape[1]
        self.prefix = dict(zip(attentions(model), zip(keys, values, strict=True), strict=True))
        AttentionInterface.register("written_out", self._attention)
        AttentionMaskInterface.register("written_out", _whole_mask)

    def logits(self, row: Row) -> Tensor:
        # Registered again: another oracle may have taken the name.
        AttentionInterface.register("written_out", self._attention)
        own = self.model.config._attn_implementation
        self.model.set_attn_implementation("written_out")
        try:
            if self.model.config.is_encoder_decoder:
                return self._plain(row)
            ids = torch.tensor([row.input + row.answer], device=self.model.device)
            positions = torch.arange(ids.shape[1], device=ids.device)[None] + self.tokens
            return self._plain(row, input_ids=ids, position_ids=positions, use_cache=False)
        finally:
            self.model.set_attn_implementation(own)

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


class Continued(Oracle):
    """A prefix, as the model's own cache of what it read before: for models whose attention is
    their own business. Only where all layers see everything."""

    def __init__(
        self, model: PreTrainedModel, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        super().__init__(model)
        self.pairs = list(zip(keys, values, strict=True))

    def logits(self, row: Row) -> Tensor:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(self.pairs):
            cache.update(key[None].clone(), value[None].clone(), layer)
        ids = torch.tensor([row.input + row.answer], device=self.model.device)
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
    reader.set_attn_implementation("noted")
    word = torch.full((1, 3), 3, device=model.device)
    try:
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                reader(input_ids=word, decoder_input_ids=word[:, :2], use_cache=False)
            else:
                reader(input_ids=word, use_cache=False)
    finally:
        reader.set_attn_implementation(own)
    # The encoder reads three words, the decoder two: lengths tell the sites apart.
    sites = {(3, 3): 0, (2, 2): 1, (2, 3): 2}
    return [module for module, queries, keys in
            sorted(seen, key=lambda entry: sites[entry[1:]])]  # fmt: skip


def prefix_oracle(
    model: PreTrainedModel, keys: Sequence[Tensor], values: Sequence[Tensor]
) -> Oracle:
    """`Attended` where the attention can be replaced, else `Continued`.

    model: of its own, not the one under test
    """
    model = copy.deepcopy(model)
    kind = Attended if type(model)._can_set_attn_implementation() else Continued
    return kind(model, keys, values)
