"""What an adapter should make of a row, worked out by the plain model, without ptkit or PEFT.

One row at a time, nothing padded, and nothing cached between tokens unless the oracle is about the
cache. Every shortcut of the programs under test is left out.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ptkit.families.model_under_test import TokenRow


class Oracle(ABC):
    """The right logits of one row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    @abstractmethod
    def logits(self, row: TokenRow) -> Tensor:
        """Logits `[tokens of the answer, vocabulary]` that predict the answer, token by token; of
        a labelled row, `[labelled, labels]`."""

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
        return self.logits(TokenRow(read, [*written, 0]))[-1].float()

    def _plain(self, row: TokenRow, **inputs: Any) -> Tensor:
        """The model's own logits of the answer."""
        device = self.model.device
        with torch.no_grad():
            if self.model.config.is_encoder_decoder:
                start = self.model.config.decoder_start_token_id
                begin = torch.tensor([[start, *row.answer[:-1]]], device=device)
                read = inputs or {"input_ids": torch.tensor([row.input], device=device)}
                return self.model(decoder_input_ids=begin, **read, use_cache=False).logits[0]
            logits = self.model(**inputs).logits
        if row.labelled:
            return logits.flatten(0, -2)[-len(row.answer) :]
        return logits[0, -len(row.answer) - 1 : -1]

    def _read(self, row: TokenRow, **inputs: Any) -> Tensor:
        """The model's own logits of the answer, nothing being cached."""
        if not (row.labelled or self.model.config.is_encoder_decoder):  # not all can be told so
            inputs["use_cache"] = False
        return self._plain(row, **inputs)

    def _ids(self, row: TokenRow) -> Tensor:
        return torch.tensor([row.whole], device=self.model.device)


class Merged(Oracle):
    """A model that does by itself what the adapter does (LoRA's matrices added to its weights)."""

    def logits(self, row: TokenRow) -> Tensor:
        if self.model.config.is_encoder_decoder:
            return self._plain(row)
        return self._read(row, input_ids=self._ids(row))


class Embedded(Oracle):
    """Soft prompts: their embeddings `[virtual_tokens, hidden]`, then those of the words, all of
    them as one text. A decoder writes, or labels, as it does after text; of an encoder-decoder the
    encoder reads it."""

    def __init__(self, model: PreTrainedModel, embeddings: Tensor) -> None:
        super().__init__(model)
        self.embeddings = embeddings

    def logits(self, row: TokenRow) -> Tensor:
        pairs = self.model.config.is_encoder_decoder
        reader = self.model.get_encoder() if pairs else self.model
        read = torch.tensor([row.input if pairs else row.whole], device=self.model.device)
        # Some encoders scale what they look up themselves, and not what they are given.
        words = reader.get_input_embeddings()(read) * getattr(reader, "embed_scale", 1.0)
        whole = torch.cat([self.embeddings[None].to(words.dtype), words], dim=1)
        return self._read(row, inputs_embeds=whole)


class Listened(Oracle):
    """A soft prompt in the encoder of an encoder-decoder, written out. Words keep their absolute
    positions, and virtual tokens have none. The decoder reads the outputs at all of them (Lester et
    al. 2021, section 2)."""

    def __init__(self, model: PreTrainedModel, embeddings: Tensor) -> None:
        super().__init__(model)
        self.embeddings = embeddings

    def logits(self, row: TokenRow) -> Tensor:
        encoder = self.model.get_encoder()
        scaled = self.embeddings * getattr(encoder, "embed_scale", 1.0)
        if not hasattr(encoder, "embed_positions"):  # relative ones: it is a longer text
            return Embedded(self.model, scaled).logits(row)
        read = torch.tensor([row.input], device=self.model.device)
        with torch.no_grad():
            (places,) = _given_out(encoder.embed_positions, lambda: encoder(input_ids=read))
            words = encoder.get_input_embeddings()(read) * getattr(encoder, "embed_scale", 1.0)
            states = torch.cat([scaled[None].to(words.dtype), words + places], dim=1)
            if hasattr(encoder, "layernorm_embedding"):
                states = encoder.layernorm_embedding(states)
            for layer in encoder.layers:
                states = layer(states, None)
            if hasattr(encoder, "layer_norm"):
                states = encoder.layer_norm(states)
        seen = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        return self._plain(row, encoder_outputs=(states,), attention_mask=seen)


class Labelled(Oracle):
    """A soft prompt that an encoder reads, in front of the words. Its outputs go no further than
    the last layer: the head finds the first word, or all of them, where they always are.

    as_text: virtual tokens have the first positions and words those after them. Otherwise words
        have their own, and virtual tokens all have that of the first word
    """

    def __init__(self, model: PreTrainedModel, embeddings: Tensor, *, as_text: bool) -> None:
        super().__init__(copy.deepcopy(model))
        self.embeddings, self.as_text = embeddings, as_text
        self.backbone: Any = self.model.base_model
        self.pooler = getattr(self.backbone, "pooler", None)

    def logits(self, row: TokenRow) -> Tensor:
        ids, virtual = self._ids(row), len(self.embeddings)
        positions = own_positions(self.backbone, ids)
        first = int(positions.min())
        if self.as_text:
            before = torch.arange(first, first + virtual, device=ids.device)
            positions = torch.cat([before[None], positions + virtual], dim=1)
        else:
            positions = nn.functional.pad(positions, (virtual, 0), value=first)
        with torch.no_grad():
            words = self.backbone.get_input_embeddings()(ids)
            whole = torch.cat([self.embeddings[None].to(words.dtype), words], dim=1)
            states = self.backbone(
                inputs_embeds=whole, attention_mask=torch.ones_like(positions),
                position_ids=positions,
            )[0][:, virtual:]  # fmt: skip
            pooled = None if self.pooler is None else self.pooler(states)
        read = _HasRead(BaseModelOutputWithPooling(states, pooled))
        setattr(self.model, self.model.base_model_prefix, read)
        try:
            return self._plain(row, input_ids=ids, attention_mask=torch.ones_like(ids))
        finally:
            setattr(self.model, self.model.base_model_prefix, self.backbone)


class _HasRead(nn.Module):
    """A backbone that has read already."""

    def __init__(self, output: BaseModelOutputWithPooling) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kw: Any) -> BaseModelOutputWithPooling:
        return self.output


class TextPromptOracle(Oracle):
    """A text prompt: its tokens, then the row's."""

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int]) -> None:
        super().__init__(model)
        self.tokens = list(tokens)

    def logits(self, row: TokenRow) -> Tensor:
        ids = torch.tensor([self.tokens + row.whole], device=self.model.device)
        return self._read(row, input_ids=ids)


class Inside(Oracle):
    """An infix of real tokens on a model of one layer. There it is the base reading them just
    before the last token of the input. In a deeper model, real tokens would read what comes before
    them."""

    def __init__(self, model: PreTrainedModel, tokens: Sequence[int]) -> None:
        super().__init__(model)
        self.tokens = list(tokens)

    def logits(self, row: TokenRow) -> Tensor:
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


def own_positions(backbone: PreTrainedModel, ids: Tensor) -> Tensor:
    """The positions `[1, tokens]` that `backbone` gives words by itself: RoBERTa's begin after that
    of padding."""
    tables = [m for name, m in backbone.named_modules()
              if name.endswith("position_embeddings") and isinstance(m, nn.Embedding)]  # fmt: skip
    if not tables:
        return torch.arange(ids.shape[1], device=ids.device)[None]
    seen: list[Tensor] = []
    hook = tables[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            backbone(input_ids=ids)
    finally:
        hook.remove()
    return seen[0].expand_as(ids)


def _given_out(module: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """What `module` returns while `run` is called."""
    found: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, __, output: found.append(output))
    try:
        run()
    finally:
        hook.remove()
    return found
