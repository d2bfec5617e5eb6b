"""Virtual tokens before the last token of the input: infix tuning (Li & Liang 2021, section 7.2).

Everything before that token is read as by the plain base, so it depends on nothing that is
learnt. The last token stays behind the virtual ones, for something real must be read after them:
the first word of the answer is predicted there.

A learnt key is that of one of the first positions. Models with rotary position embeddings (Su et
al. 2021, section 3.4.2) turn a key by an angle that depends on the distance alone. A key further
right is the same key, turned. Elsewhere positions are added to the input and a key has none.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ptkit.errors import ModelError
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.cache import layers_with_keys, whole_cache
from ptkit.runtime.compile import reading
from ptkit.runtime.facts import known
from ptkit.runtime.locks import running
from ptkit.runtime.placement import own_part

#: How far a key read at another position may be from the turned one, relative to its length.
_TOLERANCE = 2e-2


def placed_before_last(
    model: PreTrainedModel, batch: PrefixBatch, attention_mask: Tensor, last: Tensor
) -> PrefixBatch:
    """`batch` with every infix where it belongs in these rows; itself when there is none.

    attention_mask: `[rows, tokens]`, 1 on real tokens
    last: `[rows]`, index of the last token of each row's input
    """
    if batch.infix is None:
        return batch
    seen_from = torch.where(batch.infix, last, 0)
    index = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    before = (attention_mask * (index < seen_from[:, None])).sum(-1)
    return replace(_moved(model, batch, before), seen_from=seen_from)


def placed_behind(model: PreTrainedModel, batch: PrefixBatch, contexts: PrefixBatch) -> PrefixBatch:
    """`contexts`, then the virtual tokens of `batch`, all infixes, as one prefix of what follows.

    contexts: keys and values of the rows' inputs without their last token
    """
    assert batch.infix is not None
    assert bool(batch.infix.all())
    moved = _moved(model, batch, contexts.visible.sum(-1))
    if not contexts.longest:
        return replace(moved, infix=None)
    return PrefixBatch(
        tuple(torch.cat(pair, dim=2) for pair in zip(contexts.keys, moved.keys, strict=True)),
        tuple(torch.cat(pair, dim=2) for pair in zip(contexts.values, moved.values, strict=True)),
        torch.cat([contexts.visible, moved.visible], dim=1),
    )


def read_before_last(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    batch: PrefixBatch,
    cache: Cache,
) -> None:
    """Put the rows' virtual tokens and all tokens of their inputs but the last into `cache`.

    input_ids, attention_mask: `[rows, tokens]`, left-padded. Rows with an infix read their input
    without it; the cache then holds its keys where they belong, for whatever is read next.
    """
    assert batch.infix is not None
    mask = attention_mask[:, :-1]
    moved = own_part(model, _moved(model, batch, mask.sum(-1)))
    for layer, (keys, values) in enumerate(zip(moved.keys, moved.values, strict=True)):
        cache.update(keys, values, layer)
    if not mask.shape[1]:
        return
    whole, counted = (
        torch.cat([(t & ~batch.infix[:, None]).to(mask.dtype), mask], dim=1)
        for t in (batch.visible, batch.placed)
    )
    positions = (counted.cumsum(-1) - 1).clamp(min=0)[:, -mask.shape[1] :]
    with running(model):
        model.base_model(
            input_ids=input_ids[:, :-1], attention_mask=whole, position_ids=positions,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip


def _moved(model: PreTrainedModel, batch: PrefixBatch, offsets: Tensor) -> PrefixBatch:
    """`batch` with the keys of its infix rows `offsets` `[rows]` positions further right."""
    assert batch.infix is not None
    shift = torch.where(batch.infix, offsets, 0)[:, None].float()  # [rows, 1]
    keys = []
    for own, frequencies in zip(batch.keys, _frequencies(model), strict=True):
        if frequencies is not None:
            own = _turned(own, *_cos_sin(shift * frequencies.to(shift.device)))
        keys.append(own)
    return replace(batch, keys=tuple(keys))


def _cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Of `angles` `[rows, half]`, as `_turned` takes them: `[rows, 1, 1, dim]`."""
    both = torch.cat([angles, angles], dim=-1)[:, None, None]
    return both.cos(), both.sin()


def _turned(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`keys` `[rows, heads, tokens, dim]` turned by the angles of `cos`, `sin` `[rows, 1, 1, dim]`;
    dimensions beyond those of the angles have no position."""
    width = cos.shape[-1]
    turning, still = keys[..., :width].float(), keys[..., width:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.cat([turned.to(keys.dtype), still], dim=-1)


def _frequencies(model: PreTrainedModel) -> list[Tensor | None]:
    """Angles per position of each layer's keys, `[half of the rotary dimensions]`; None for a
    layer that does not turn them.

    Found out by reading one token at two positions, for layers of one model may differ (Gemma 3
    has other frequencies where there is a window, SmolLM 3 none in every fourth layer). Raises
    ModelError where keys are turned in another way.
    """
    return known(model, _found_frequencies)


def require_infix(model: PreTrainedModel) -> None:
    """Raise ModelError when the place of an infix cannot be kept in `model`."""
    _frequencies(model)


@torch.no_grad()
def _found_frequencies(model: PreTrainedModel) -> list[Tensor | None]:
    if not model._can_set_attn_implementation():
        raise ModelError(
            f"{type(model).__name__} cannot read an infix: its attention is its own (not on "
            "transformers' AttentionInterface), where all words see the same; use "
            "`position: prefix`"
        )
    rotary = [
        buffer.detach().float() for name, buffer in model.named_buffers()
        if name.endswith("inv_freq")
    ]  # fmt: skip
    distance = 11
    here, there = (_keys_alone(model, position) for position in (0, distance))
    if not rotary:  # positions are added to what is embedded
        return [None] * len(here)
    candidates: list[Tensor | None] = [*rotary, None]

    def agrees(layer: int, frequencies: Tensor | None) -> bool:
        turned = here[layer]
        if frequencies is not None:
            turned = _turned(turned, *_cos_sin(distance * frequencies[None].to(turned.device)))
        length = there[layer].norm()
        return bool(length > 0 and (turned - there[layer]).norm() <= _TOLERANCE * length)

    found = []
    for layer in range(len(here)):
        fitting = [c for c in candidates if agrees(layer, c)]
        if not fitting:
            raise ModelError(
                f"{type(model).__name__} gives keys their positions in a way ptkit does not know, "
                "so an infix cannot be placed in it; use `position: prefix`"
            )
        found.append(fitting[0])
    return found


def _keys_alone(model: PreTrainedModel, position: int) -> list[Tensor]:
    """The keys of one word, each layer's `[1, heads, 1, dim]`, read alone at `position`.

    Alone it attends to itself only, so its keys differ by their positions in every layer.
    """
    # Any word; the first ones may be padding, whose embedding is zero.
    word = int(model.config.get_text_config().vocab_size) // 2
    token = torch.full((1, 1), word, dtype=torch.long, device=model.device)
    cache = whole_cache(model)
    with reading(model):
        model.base_model(
            input_ids=token, position_ids=torch.full_like(token, position),
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
    return [layer.keys for layer in layers_with_keys(cache)]
