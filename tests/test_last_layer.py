"""The last feed-forward block is run at the positions that are read, and nothing else changes."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from test_fused import batch_of
from test_peft_parity import LEARNT, make_adapter
from torch import Tensor, nn

from ptkit.families.kinds import DECODER
from ptkit.families.model_under_test import small_model
from ptkit.families.shapes import FAMILIES, small
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.checkpointing import recomputing
from ptkit.runtime.forward import IGNORED, supervised_logits, supervised_losses, token_losses
from ptkit.runtime.last_layer import last_block

#: Decoders whose last layer has no module for its feed-forward block, one that says more than its
#: hidden states (gpt_oss: where it sent tokens), or no attention.
WHOLE = {"opt", "opt (projected)", "gpt_oss", "lfm2"}
DECODERS = [name for name, family in FAMILIES.items() if family.model_type in (
    "gpt2", "opt", "bloom", "gptj", "gpt_neox", "gpt_bigcode", "falcon", "llama", "mistral",
    "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "mixtral", "qwen3_moe",
    "gpt_oss", "qwen3_next", "lfm2")]  # fmt: skip


def rows_read(base: Base, run) -> list[int]:
    """How many positions the last feed-forward block sees in each of `run`'s forwards."""
    block = last_block(base.model)
    assert block is not None
    seen: list[int] = []
    # As a block of Bloom's is given two tensors, any of them will do.
    hook = block.register_forward_hook(lambda _, args, out: seen.append(out[..., 0].numel()))
    try:
        run()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", DECODERS)
def test_losses_and_gradients_of_every_family_stay(name: str) -> None:
    base = small_model(name, small(FAMILIES[name].config), DECODER).base()
    assert (last_block(base.model) is None) == (name in WHOLE)
    ids, mask, labels = batch_of([9, 12, 5])
    found = []
    for whole in (True, False):
        embedded: list[Tensor] = []

        def keep(_: nn.Module, args: object, out: Tensor, into: list[Tensor] = embedded) -> Tensor:
            into.append(out.detach().requires_grad_())
            return into[-1]

        hook = base.embedding.register_forward_hook(keep)
        try:
            if whole:
                losses = token_losses(*supervised_logits(base.model, ids, mask, labels, None))
            else:
                losses = supervised_losses(base.model, ids, mask, labels, None)
        finally:
            hook.remove()
        (gradient,) = torch.autograd.grad(losses.sum(), embedded[-1])
        found.append((losses.detach(), gradient))
    torch.testing.assert_close(found[1][0], found[0][0], atol=2e-4, rtol=2e-4)
    assert (found[1][1] - found[0][1]).norm() <= 1e-3 * found[0][1].norm()


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=5),
    read=st.integers(0, 2**16),
    method=st.sampled_from(sorted(LEARNT)),
)
def test_any_rows_and_any_positions(lengths: list[int], read: int, method: str) -> None:
    base = random_base("qwen3")
    adapter = make_adapter(base, LEARNT[method])
    ids, mask, labels = batch_of([length + 3 for length in lengths])
    drawn = torch.rand(labels.shape, generator=torch.Generator().manual_seed(read)) < 0.5
    labels = labels.masked_fill(drawn, IGNORED)
    labels[0, 2] = ids[0, 2]  # at least one
    found = []
    batch = PrefixBatch.shared(adapter.prefix(), len(ids))
    found.append(token_losses(*supervised_logits(base.model, ids, mask, labels, batch)))
    seen = rows_read(
        base, lambda: found.append(supervised_losses(base.model, ids, mask, labels, batch))
    )
    parameters = list(adapter.trainable().values())
    wanted, ours = (torch.autograd.grad(f.sum(), parameters, retain_graph=True) for f in found)
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)
    # The block's own hook runs before ours puts its rows back into their places.
    assert seen[-1] == (labels[:, 1:] != IGNORED).sum()
    for mine, theirs in zip(ours, wanted, strict=True):
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm() + 1e-7


def test_checkpointed_layers_are_left_whole() -> None:
    base = random_base("llama")
    ids, mask, labels = batch_of([9, 12, 5])
    wanted = supervised_losses(base.model, ids, mask, labels, None)
    with recomputing(base.model):
        seen = rows_read(base, lambda: supervised_losses(base.model, ids, mask, labels, None))
        found = supervised_losses(base.model, ids, mask, labels, None)
    assert seen == [mask.sum()], "every token but padding"
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_soft_prompts_read_with_the_input_are_left_whole() -> None:
    """In a hybrid they lengthen what the layers read, and the block with it."""
    base = small_model("qwen3_next", small(FAMILIES["qwen3_next"].config), DECODER).base()
    adapter = make_adapter(base, LEARNT["prompt"])
    ids, mask, labels = batch_of([9, 12, 5])
    with torch.no_grad():
        batch = PrefixBatch.shared(adapter.prefix(), len(ids))
        losses = supervised_losses(base.model, ids, mask, labels, batch)
        wanted = token_losses(*supervised_logits(base.model, ids, mask, labels, batch))
    torch.testing.assert_close(losses, wanted, atol=1e-4, rtol=1e-4)


def test_a_model_whose_forward_was_replaced_is_read_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_base("llama")
    ids, mask, labels = batch_of([9, 12, 5])
    adapter = make_adapter(base, LEARNT["prefix"])
    batch = PrefixBatch.shared(adapter.prefix(), len(ids))
    wanted = supervised_losses(base.model, ids, mask, labels, batch)
    own, passes = base.model.forward, []
    monkeypatch.setattr(base.model, "forward", lambda **kw: passes.append(1) or own(**kw))
    found = supervised_losses(base.model, ids, mask, labels, batch)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert passes == [1]


def test_other_threads_read_everything() -> None:
    """A pass that leaves positions out is stopped in its last block, while others read."""
    base = random_base("gpt2")
    ids, mask, labels = batch_of([9, 12, 5])
    wanted = base.model(input_ids=ids, attention_mask=mask).logits
    lean, reached, go_on = threading.Event(), threading.Event(), threading.Event()
    narrow: list[int] = []

    def stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        if threading.current_thread() is thread:
            narrow.append(args[0][..., 0].numel())
            reached.set()
            go_on.wait(30)

    def read() -> None:
        lean.wait(30)
        supervised_losses(base.model, ids, mask, labels, None)

    supervised_losses(base.model, ids, mask, labels, None)  # what is asked of a model once
    block = last_block(base.model)
    assert block is not None
    thread = threading.Thread(target=read)
    hook = block.register_forward_pre_hook(stop)
    thread.start()
    lean.set()
    assert reached.wait(30)
    try:
        here = base.model(input_ids=ids, attention_mask=mask).logits
    finally:
        go_on.set()
        thread.join(30)
        hook.remove()
    assert narrow == [(labels[:, 1:] != IGNORED).sum()]
    assert torch.equal(here, wanted)
