"""What the backward pass makes again: the same gradients, bit for bit, and less kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import random_base
from test_unpadded import learnt
from torch import Tensor, nn

from ptkit.methods import ADAPTERS, Adapter, Demonstrations
from ptkit.methods.full.settings import FullSection
from ptkit.methods.lora.settings import LoraSection
from ptkit.runtime import made_again
from ptkit.runtime.base_model import Base
from ptkit.runtime.fused import fused_activations
from ptkit.runtime.made_again import can_be_made_again, making_again

LENGTHS = [4, 12, 7, 2]
SECTIONS = {
    "lora": LoraSection(kind="lora", rank=2),
    "lora-dropout": LoraSection(kind="lora", rank=2, dropout=0.5),
    "full": FullSection(kind="full"),
}


def adapter_of(base: Base, method: str) -> Adapter:
    section = SECTIONS[method]
    adapter = ADAPTERS[section.kind].create(section, base, Demonstrations([], 0))
    with torch.no_grad():  # LoRA begins at nothing
        for value in adapter.trainable().values():
            value.add_(0.1 * torch.randn_like(value))
    return adapter


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """What the passes within keep for their backward passes, each storage once."""
    seen: dict[int, int] = {}
    held: list[Tensor] = []
    total = [0]

    def note(packed: made_again._Part | made_again._Kept) -> None:
        whole = packed.origin.inputs if isinstance(packed, made_again._Part) else (packed.tensor,)
        for tensor in whole:
            storage = tensor.untyped_storage()
            held.append(tensor)
            seen[storage.data_ptr()] = storage.nbytes()
        total[0] = sum(seen.values())

    inner = made_again._packed

    def packed(tensor: Tensor) -> made_again._Part | made_again._Kept:
        made = inner(tensor)
        note(made)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made_again, "_packed", packed)
        yield total


@pytest.mark.parametrize("method", SECTIONS)
def test_gradients_are_the_same_bits(family: str, method: str) -> None:
    torch.manual_seed(3)
    base = random_base(family)
    adapter = adapter_of(base, method)
    base.model.train()
    with fused_activations(base.model):
        torch.manual_seed(0)
        wanted, gradients = learnt(base, adapter, LENGTHS)
        with making_again(base.model):
            torch.manual_seed(0)
            losses, found = learnt(base, adapter, LENGTHS)
    assert torch.equal(losses, wanted)
    for one, other in zip(found, gradients, strict=True):
        assert torch.equal(one, other)


def test_less_is_kept_of_a_layer_that_learns() -> None:
    base = random_base("llama")
    adapter = adapter_of(base, "lora")
    sizes = []
    with fused_activations(base.model), pytest.MonkeyPatch.context() as patch:
        for again in (False, True):
            if not again:
                patch.setattr(made_again, "can_be_made_again", lambda *_: None)
                patch.setattr("ptkit.runtime.fused.can_be_made_again", lambda *_: None)
            else:
                patch.undo()
            with kept_bytes() as total, making_again(base.model):
                learnt(base, adapter, LENGTHS)
            sizes.append(total[0])
    assert sizes[1] < 0.9 * sizes[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_made_in_the_precision_of_its_pass(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))
    given = torch.randn(5, 6)
    gradients = []
    for again in (False, True):
        layers.zero_grad()
        with torch.autocast("cpu", dtype):
            if again:
                with making_again(layers):
                    result = layers(given)
            else:
                result = layers(given)
        result.float().square().sum().backward()
        gradients.append([p.grad.clone() for p in layers.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_outside_of_the_context_the_model_is_as_it_was() -> None:
    base = random_base("llama")
    with making_again(base.model):
        assert any(m._forward_hooks for m in base.model.modules())
    assert not any(m._forward_hooks for m in base.model.modules())


def test_a_result_that_was_changed_in_place_is_kept() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    given = torch.randn(3, 4, requires_grad=True)
    with making_again(nn.Module()):
        made = given * 2
        can_be_made_again(made, lambda x: x * 2, given)
        made.add_(1)
        (made @ weight).sum().backward()
    assert torch.equal(weight.grad, (given.detach() * 2 + 1).T @ torch.ones(3, 4))


@pytest.mark.parametrize("again", [False, True])
def test_what_was_read_and_then_changed_in_place_is_an_error(again: bool) -> None:
    """As it is without the context."""
    weight = torch.randn(4, 4, requires_grad=True)
    given = torch.randn(3, 4, requires_grad=True) + 0
    with making_again(nn.Module()):
        read = given * 2
        if again:
            can_be_made_again(read, lambda x: x * 2, given)
        result = (read @ weight).sum()
        (given if again else read).add_(1)
        with pytest.raises(RuntimeError, match="changed in place"):
            result.backward()


def test_norms_with_a_state_are_kept() -> None:
    class CountingLayerNorm(nn.LayerNorm):
        def __init__(self) -> None:
            super().__init__(4)
            self.register_buffer("passes", torch.zeros(()))

    assert made_again._is_cheap(nn.LayerNorm(4))
    assert not made_again._is_cheap(CountingLayerNorm())
    assert not made_again._is_cheap(nn.BatchNorm1d(4))
    assert not made_again._is_cheap(nn.ReLU())
