"""Soft prompts that cannot be compiled to keys and values.

Every input is read with its own, where tokens see those after them, and where layers keep a running
state.

In an encoder what a virtual token leaves in a layer depends on the input. Its embeddings go before
those of the input, row by row. They take no positions: in models with absolute ones all stand where
the first token does (in encoder-decoders, nowhere). An encoder's outputs at virtual tokens are
dropped, so a head finds `[CLS]` at its usual place. A decoder does read them, as in Lester et al.
(2021), section 2, where the prompt is part of what T5's encoder has read.

A decoder may have layers that keep a state (linear attention, convolutions). There a prompt's
embeddings are read as text is, with positions of their own, right before the row's first token. A
state fades over padding in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.architecture import first_position, is_encoder
from ptkit.runtime.attention import Call
from ptkit.runtime.views import StandIn, name_of, viewed


def with_embeddings(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, batch: PrefixBatch | None
) -> dict[str, Tensor]:
    """What is read, as arguments of `model`: the input, after its soft prompt if any; padding at
    the left of the input before both.

    input_ids, attention_mask: `[rows, tokens]`
    """
    if batch is None or batch.embeddings is None:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
    assert batch.embedded is not None
    own = model.get_input_embeddings()(input_ids)
    read = torch.cat([batch.embeddings.to(own.dtype), own], dim=1)
    if model.config.is_encoder_decoder:
        # Some encoders scale what they look up themselves, and not what they are given.
        read = read * getattr(model.get_encoder(), "embed_scale", 1.0)
    mask = torch.cat([batch.embedded.to(attention_mask), attention_mask], dim=1)
    order = _padding_first(mask)
    return {
        "inputs_embeds": read.gather(1, order[..., None].expand_as(read)),
        "attention_mask": mask.gather(1, order),
    }


def _padding_first(mask: Tensor) -> Tensor:
    """The order of the columns of each row, `[rows, columns]`, in which padding at the left of its
    prompt and at the left of its input come first, and the rest after them as it was.

    mask: `[rows, columns]`, of prompts and of inputs after them
    """
    # Behind a row's last token there is padding at the right, which stays there.
    tokens_after = mask.flip(1).cumsum(1).flip(1)
    ahead = (mask == 0) & (tokens_after > 0)
    return torch.argsort((~ahead).to(torch.uint8), dim=1, stable=True)


def put_soft_prompts(model: PreTrainedModel, batch: PrefixBatch, call: Call) -> None:
    """Change `call`, a forward pass of `model`, so that it reads the soft prompts of `batch`.

    An encoder or a decoder is still called with `input_ids`. The prompts are put in where its
    backbone begins, and their outputs are taken out where its layers end. An encoder-decoder is
    called with `with_embeddings`.
    """
    assert batch.embeddings is not None
    longest = batch.embeddings.shape[1]
    if model.config.is_encoder_decoder:
        encoder = model.get_encoder()
        name = name_of(model, encoder)
        call.replaced |= {
            f"{name}.{part}": other for part, other in skipped_positions(encoder, longest).items()
        }
        return
    backbone = model.base_model
    call.replaced[name_of(model, backbone)] = _ReadingAlong(model, backbone, batch)


def has_positions(encoder: Any) -> bool:
    """Whether an encoder-decoder's encoder has absolute positions, as BART's; T5's are relative,
    and depend on distances alone."""
    return getattr(encoder, "embed_positions", None) is not None


def skipped_positions(encoder: Any, longest: int) -> dict[str, nn.Module]:
    """What `encoder` runs in place of its own modules, so that the first real token has the first
    absolute position, and `longest` virtual tokens none."""
    if not has_positions(encoder):
        return {}
    return {"embed_positions": _PositionsOfWords(encoder.embed_positions, longest)}


class _PositionsOfWords(StandIn):
    """A table of positions that `longest` virtual tokens take none of."""

    def __init__(self, inner: nn.Module, longest: int) -> None:
        super().__init__(inner)
        self.longest = longest

    def forward(self, asked: Any, *args: Any, **kw: Any) -> Tensor:
        # A tensor, or the shape of one: `[rows, tokens]`.
        real = (
            asked[:, self.longest :] if isinstance(asked, Tensor)
            else torch.Size((asked[0], asked[1] - self.longest))
        )  # fmt: skip
        return nn.functional.pad(self.inner(real, *args, **kw), (0, 0, self.longest, 0))


class _ReadingAlong(StandIn):
    """A backbone that reads the prompts of `batch` before its rows, and gives back the rows."""

    def __init__(self, model: PreTrainedModel, inner: nn.Module, batch: PrefixBatch) -> None:
        super().__init__(inner)
        # In a tuple: neither is a part of this module.
        self.held = (model, batch)

    def forward(self, *args: Any, **kw: Any) -> Any:
        model, batch = self.held
        names = ("input_ids", "attention_mask")
        kw = {**dict(zip(names, args, strict=False)), **kw}
        mask = kw.pop("attention_mask")
        assert batch.embeddings is not None
        assert batch.embedded is not None
        longest = batch.embeddings.shape[1]
        order = _padding_first(torch.cat([batch.embedded.to(mask), mask], dim=1))
        kw |= with_embeddings(model, kw.pop("input_ids"), mask, batch)
        if is_encoder(model):
            own = _positions(model, mask)
            kw["position_ids"] = nn.functional.pad(own, (longest, 0), value=int(own.min()))
        elif kw.get("position_ids") is not None:
            # Rows may begin later, behind keys and values of a prefix.
            begin = (kw["position_ids"] - (mask.cumsum(-1) - 1)).masked_fill(mask == 0, 0).amax(1)
            whole = kw["attention_mask"]
            kw["position_ids"] = (whole.cumsum(-1) - 1 + begin[:, None]).clamp(min=0)
        if kw.get("token_type_ids") is not None:
            kw["token_type_ids"] = nn.functional.pad(kw["token_type_ids"], (longest, 0))
        # Where each token of the input goes to, `[rows, tokens, 1]`.
        at = order.argsort(dim=1)[:, longest:, None]
        stack = _stack(model)
        if stack is model.base_model:
            return _only_words(self.inner(**kw), at)
        name = name_of(model.base_model, stack)
        # Asked of `inner`: what runs in this pass may be a view of it.
        replaced = {name: _GivingWords(self.inner.get_submodule(name), at)}
        return viewed(self.inner, replaced)(**kw)


class _GivingWords(StandIn):
    """The layers of a backbone, whose outputs are those `at` the words alone."""

    def __init__(self, inner: nn.Module, at: Tensor) -> None:
        super().__init__(inner)
        self.at = at

    def forward(self, *args: Any, **kw: Any) -> Any:
        return _only_words(self.inner(*args, **kw), self.at)


def _only_words(output: Any, at: Tensor) -> Any:
    def own(states: Tensor) -> Tensor:
        return states.gather(1, at.expand(-1, -1, states.shape[-1]))

    output.last_hidden_state = own(output.last_hidden_state)
    if output.get("hidden_states") is not None:
        output.hidden_states = tuple(map(own, output.hidden_states))
    return output


def _positions(model: PreTrainedModel, mask: Tensor) -> Tensor:
    """The position ids `[rows, tokens]` an encoder gives its tokens by itself."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0) + first_position(model)


def _stack(model: PreTrainedModel) -> nn.Module:
    """The module that runs the backbone's layers one after the other."""
    depth = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if any(isinstance(c, nn.ModuleList) and len(c) == depth for c in module.children()):
            return module
    raise AssertionError(f"{type(model).__name__} has no list of {depth} layers")
