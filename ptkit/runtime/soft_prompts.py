"""Soft prompts that cannot be compiled to keys and values: every input is read with its own, where
tokens see those after them, and where layers keep a running state.

In an encoder what a virtual token leaves in a layer depends on the input. Its embeddings go before
those of the input, row by row. They take no positions: in models with absolute ones all stand
where the first token does (in encoder-decoders, nowhere). An encoder's outputs at virtual tokens
are dropped, so a head finds `[CLS]` where it always is; a decoder does read them, as in Lester et
al. (2021), section 2, where the prompt is part of what T5's encoder has read.

In a decoder with layers that keep a state (linear attention, convolutions) a prompt's embeddings
are read as text is, with positions of their own, right before the row's first token: a state
fades over padding in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptkit.prefix import PrefixBatch
from ptkit.runtime.architecture import first_position, is_encoder


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


@contextmanager
def soft_prompts_read(model: PreTrainedModel, batch: PrefixBatch | None) -> Iterator[None]:
    """Within this context `model` takes soft prompts as they should be taken.

    It is still called with `input_ids`: the prompts of `batch` are put in behind the caller's
    back, and their outputs taken out again. Only an encoder-decoder is called with
    `with_embeddings`.
    """
    if batch is None or batch.embeddings is None:
        yield
        return
    longest = batch.embeddings.shape[1]
    with ExitStack() as hooks:
        if model.config.is_encoder_decoder:
            _skip_positions(model.get_encoder(), longest, hooks)
        else:
            _read_along(model, batch, longest, hooks)
        yield


def has_positions(encoder: Any) -> bool:
    """Whether an encoder-decoder's encoder has absolute positions, as BART's; T5's are relative,
    and depend on distances alone."""
    return getattr(encoder, "embed_positions", None) is not None


def _skip_positions(encoder: Any, longest: int, hooks: ExitStack) -> None:
    """Let the first real token have the first absolute position, and virtual tokens none."""
    if not has_positions(encoder):
        return
    positions = encoder.embed_positions

    def shorter(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        asked, *rest = args  # a tensor, or the shape of one: `[rows, tokens]`
        real = asked[:, longest:] if isinstance(asked, Tensor) else (asked[0], asked[1] - longest)
        return (real if isinstance(asked, Tensor) else torch.Size(real), *rest)

    def padded(_: nn.Module, __: Any, found: Tensor) -> Tensor:
        return nn.functional.pad(found, (0, 0, longest, 0))

    hooks.callback(positions.register_forward_pre_hook(shorter).remove)
    hooks.callback(positions.register_forward_hook(padded).remove)


def _read_along(model: PreTrainedModel, batch: PrefixBatch, longest: int, hooks: ExitStack) -> None:
    """Put the prompts before the rows where the backbone begins, and take their outputs away
    where its layers end."""
    order: list[Tensor] = []

    def enter(
        _: nn.Module, args: tuple[Any, ...], kw: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        names = ("input_ids", "attention_mask")
        kw = {**dict(zip(names, args, strict=False)), **kw}
        mask = kw.pop("attention_mask")
        assert batch.embedded is not None
        order.append(_padding_first(torch.cat([batch.embedded.to(mask), mask], dim=1)))
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
        return (), kw

    def leave(_: nn.Module, __: Any, output: Any) -> Any:
        # Where each token of the input went to, `[rows, tokens, 1]`.
        at = order.pop().argsort(dim=1)[:, longest:, None]

        def own(states: Tensor) -> Tensor:
            return states.gather(1, at.expand(-1, -1, states.shape[-1]))

        output.last_hidden_state = own(output.last_hidden_state)
        if output.get("hidden_states") is not None:
            output.hidden_states = tuple(map(own, output.hidden_states))
        return output

    hooks.callback(model.base_model.register_forward_pre_hook(enter, with_kwargs=True).remove)
    hooks.callback(_stack(model).register_forward_hook(leave).remove)


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
