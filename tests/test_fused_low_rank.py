"""LoRA's layer as one operation: the same losses and gradients as PEFT's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from test_made_again import LENGTHS, adapter_of
from test_unpadded import learnt
from torch import Tensor, nn

from ptkit.methods.lora import fused
from ptkit.methods.lora.fused import fused_low_rank


class Two(nn.Module):
    """Two layers, of which the first is given what needs no gradient."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 10, bias=bias), nn.Linear(10, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.one(x).tanh())


def lora_of(config: dict[str, Any], bias: bool = True) -> nn.Module:
    model = get_peft_model(Two(bias), LoraConfig(target_modules=["one", "other"], **config))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_()
    return model


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    output = model(x)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return output.detach(), found


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every layer that ran as one operation."""
    calls: list[int] = []
    inner = fused._plain_adapter

    def noted(layer: Linear, x: Tensor) -> str | None:
        name = inner(layer, x)
        calls.extend([1] if name else [])
        return name

    monkeypatch.setattr(fused, "_plain_adapter", noted)
    return calls


@settings(max_examples=30, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3), rank=st.integers(1, 5),
    alpha=st.integers(1, 40), bias=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_rank_and_scale(
    shape: list[int], rank: int, alpha: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    model = lora_of({"r": rank, "lora_alpha": alpha}, bias)
    x = torch.randn(*shape, 6)
    wanted, of_peft = gradients(model, x)
    with fused_low_rank(model):
        output, ours = gradients(model, x)
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
    assert ours.keys() == of_peft.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, of_peft[name], atol=1e-4, rtol=1e-4)


def test_it_is_used_and_goes(used: list[int]) -> None:
    model = lora_of({"r": 2})
    with fused_low_rank(model):
        gradients(model, torch.randn(3, 6))
    assert len(used) == 2
    gradients(model, torch.randn(3, 6))
    assert len(used) == 2
    assert {type(m) for m in model.modules() if isinstance(m, Linear)} == {Linear}


@pytest.mark.parametrize(
    "config",
    [
        {"r": 2, "lora_dropout": 0.5},
        {"r": 2, "use_dora": True},
        {"r": 2, "lora_bias": True},
        {"r": 2, "bias": "lora_only"},
    ],
)
def test_what_is_more_than_that_stays_pefts(config: dict[str, Any], used: list[int]) -> None:
    torch.manual_seed(0)
    model = lora_of(config)
    x = torch.randn(3, 6)
    torch.manual_seed(1)
    wanted, of_peft = gradients(model, x)
    torch.manual_seed(1)
    with fused_low_rank(model):
        output, ours = gradients(model, x)
    assert not used
    assert torch.equal(output, wanted)
    assert all(torch.equal(ours[name], of_peft[name]) for name in of_peft)


def test_autocast_several_adapters_and_none_stay_pefts(used: list[int]) -> None:
    model: Any = lora_of({"r": 2})
    x = torch.randn(3, 6)
    with fused_low_rank(model):
        with torch.autocast("cpu", torch.bfloat16):
            gradients(model, x)
        with model.disable_adapter():
            model(x)
        model.add_adapter("more", LoraConfig(target_modules=["one", "other"], r=3))
        model.base_model.set_adapter(["default", "more"])
        gradients(model, x)
        assert not used
        model.merge_adapter(["default"])
        model(x)
    assert not used


def test_losses_and_gradients_are_those_of_pefts_layers(family: str) -> None:
    torch.manual_seed(3)
    base = random_base(family)
    adapter = adapter_of(base, "lora")
    wanted, of_peft = learnt(base, adapter, LENGTHS)
    with fused_low_rank(base.model):
        losses, ours = learnt(base, adapter, LENGTHS)
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(ours, of_peft, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9
