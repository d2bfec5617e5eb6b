"""Fused operations of training: the same losses and gradients as the model's own operations."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from conftest import VOCABULARY, random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from test_paged_batch import base_of_family
from test_peft_parity import LEARNT, make_adapter, rows_of
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.activations import NewGELUActivation

from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import (
    IGNORED,
    pad_rows,
    supervised_logits,
    supervised_losses,
    token_losses,
)
from ptkit.runtime.fused import (
    CHUNK,
    _SwiGLU,
    fused_activations,
    has_plain_head,
    head_losses,
)
from ptkit.runtime.last_layer import last_block
from ptkit.runtime.views import name_of


def batch_of(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, mask = pad_rows(rows_of(lengths), 0, left=False)
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :3] = IGNORED
    return ids, mask, labels


@pytest.mark.parametrize("method", LEARNT)
def test_losses_and_gradients_are_those_of_the_whole_logits(family: str, method: str) -> None:
    torch.manual_seed(3)
    base = random_base(family)
    adapter = make_adapter(base, LEARNT[method])
    ids, mask, labels = batch_of([9, 12, 5])
    found = []
    for fused in (False, True):
        adapter.zero_grad()
        batch = PrefixBatch.shared(adapter.prefix(), len(ids))
        if fused:
            assert has_plain_head(base.model)
            with fused_activations(base.model):
                losses = supervised_losses(base.model, ids, mask, labels, batch)
        else:
            losses = token_losses(*supervised_logits(base.model, ids, mask, labels, batch))
        (losses * torch.linspace(0.5, 2, len(losses))).sum().backward()
        found.append((losses.detach(), [p.grad.clone() for p in adapter.trainable().values()]))
    (plain, wanted), (ours, got) = found
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 2 * CHUNK + 3),
    vocabulary=st.integers(2, 60),
    bias=st.booleans(),
    scale=st.floats(0.01, 40),
    seed=st.integers(0, 2**16),
)
def test_any_number_of_positions_in_chunks(
    count: int, vocabulary: int, bias: bool, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(6, vocabulary, bias=bias).requires_grad_(False)
    hidden = (torch.randn(count, 6, generator=generator) * scale).requires_grad_()
    targets = torch.randint(0, vocabulary, (count,), generator=generator)
    weights = torch.rand(count, generator=generator)
    expected = nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    (gradient,) = torch.autograd.grad((expected * weights).sum(), hidden)
    losses = head_losses(head, hidden, targets)
    (ours,) = torch.autograd.grad((losses * weights).sum(), hidden)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours, gradient, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(head_losses(head, hidden, targets), losses.detach())


def test_only_a_chunk_of_logits_is_ever_there() -> None:
    head = nn.Linear(4, 1000, bias=False).requires_grad_(False)
    hidden = torch.randn(5 * CHUNK, 4, requires_grad=True)
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head_losses(head, hidden, torch.zeros(5 * CHUNK, dtype=torch.long)).sum().backward()
    assert max(sizes) == hidden.numel()


def test_under_autocast_losses_are_float32_and_near() -> None:
    base = random_base("llama")
    ids, mask, labels = batch_of([9, 9])
    with torch.autocast("cpu", torch.bfloat16):
        ours = supervised_losses(base.model, ids, mask, labels, None)
        theirs = token_losses(*supervised_logits(base.model, ids, mask, labels, None))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, atol=0.05, rtol=0.02)


def softcapped() -> Base:
    return base_of_family("gemma2")


def test_heads_with_something_after_them_keep_their_own_way() -> None:
    """Gemma 2 caps its logits: leaving that out would train towards something else."""
    base = softcapped()
    assert base.model.config.final_logit_softcapping
    assert not has_plain_head(base.model)
    ids, mask, labels = batch_of([9, 6])
    ours = supervised_losses(base.model, ids, mask, labels, None)
    logits = base.model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    wanted = nn.functional.cross_entropy(
        logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED
    )[labels[:, 1:] != IGNORED]
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    plain = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, intermediate_size=48, final_logit_softcapping=None,
        )
    ).requires_grad_(False)  # fmt: skip
    assert has_plain_head(plain)


def test_a_trained_head_is_not_taken_for_a_frozen_one() -> None:
    base = random_base("gpt2")
    base.model.get_output_embeddings().requires_grad_(True)
    assert not has_plain_head(base.model)


def test_activations_are_back_afterwards_and_logits_bit_identical() -> None:
    base = random_base("gpt2")
    ids = torch.tensor(rows_of([9]))
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
        kinds = [type(m) for m in base.model.modules()]
        with fused_activations(base.model):
            assert not any(isinstance(m, NewGELUActivation) for m in base.model.modules())
            torch.testing.assert_close(base.model(input_ids=ids).logits, before)
        assert [type(m) for m in base.model.modules()] == kinds
        assert torch.equal(base.model(input_ids=ids).logits, before)


def test_swiglu_is_the_models_own_bit_for_bit_and_its_gradients_are_right() -> None:
    base = random_base("llama")
    before = [type(m) for m in base.model.modules()]
    ids = torch.tensor(rows_of([9]))
    found = []
    for fused in (False, True):
        embedded = base.model.get_input_embeddings()(ids).requires_grad_()
        with fused_activations(base.model) if fused else nullcontext():
            own = [type(m) for m in base.model.modules()]
            assert (own != before) == fused
            logits = base.model(inputs_embeds=embedded, use_cache=False).logits
            logits.square().sum().backward()
        found.append((logits.detach(), embedded.grad))
    assert [type(m) for m in base.model.modules()] == before
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    gate = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    up = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_SwiGLU.apply, (gate, up))


def test_what_is_set_on_a_module_in_training_stays_set() -> None:
    base = random_base("llama")
    with fused_activations(base.model):
        base.model.train()
    assert all(module.training for module in base.model.modules())


def test_the_last_block_is_found_in_training_whenever_it_was_asked_for() -> None:
    base = random_base("llama")
    block = last_block(base.model)
    assert block is not None
    with fused_activations(base.model):
        assert last_block(base.model) is block
        assert name_of(base.model, block).endswith("mlp")


def test_of_long_rows_nothing_as_wide_as_the_layer_is_kept() -> None:
    base = random_base("llama")
    wide = base.model.config.intermediate_size
    assert wide != base.model.config.vocab_size
    ids = torch.tensor(rows_of([9]))
    found = []
    for long_rows in (False, True):
        widths: list[int] = []

        def note(kept: torch.Tensor, widths: list[int] = widths) -> torch.Tensor:
            if not isinstance(kept, nn.Parameter):  # weights are there anyway
                widths.append(kept.shape[-1] if kept.ndim else 0)
            return kept.detach()

        embedded = base.model.get_input_embeddings()(ids).requires_grad_()
        with fused_activations(base.model, long_rows=long_rows):
            with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
                logits = base.model(inputs_embeds=embedded, use_cache=False).logits
            logits.square().sum().backward()
        assert (wide in widths) != long_rows
        found.append((logits.detach(), embedded.grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
