"""Rows read in one line, without their padding: the same losses and gradients as in a rectangle."""

from __future__ import annotations

import pytest
import torch
from conftest import random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from test_paged_batch import base_of_family
from test_peft_parity import LEARNT, make_adapter, rows_of
from torch import Tensor

from ptkit.methods import ADAPTERS, Adapter, Demonstrations
from ptkit.methods.lora.settings import LoraSection
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime import attention, fused, unpadded
from ptkit.runtime.attention import Placed
from ptkit.runtime.base_model import Base
from ptkit.runtime.facts import holds
from ptkit.runtime.forward import IGNORED, input_tokens, pad_rows, supervised_losses

#: Methods whose prefixes stand before, within and behind the input, or are none at all.
METHODS = {
    **LEARNT,
    "infix": {"kind": "prefix_tuning", "num_virtual_tokens": 5, "position": "infix"},
}


def learnt(base: Base, adapter: Adapter, lengths: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Losses of the second half of rows of these lengths, and the adapter's gradients."""
    ids, mask = pad_rows(rows_of(lengths), 0, left=False)
    labels = ids.masked_fill(mask == 0, IGNORED)
    for row, length in enumerate(lengths):
        labels[row, : max(1, length // 2)] = IGNORED
    adapter.zero_grad()
    compiled = adapter.compiled()
    batch: PrefixBatch | None = None
    if compiled is not None:
        batch = compiled.for_rows(ids, input_tokens(adapter.model, mask, labels))
    losses = supervised_losses(adapter.model, ids, mask, labels, batch)
    (losses * torch.linspace(0.5, 2, len(losses))).sum().backward()
    return losses.detach(), [p.grad.clone() for p in adapter.trainable().values()]


def lines(monkeypatch: pytest.MonkeyPatch, most_filled: float) -> list[int]:
    """The tokens of every pass that is read in one line from now on."""
    monkeypatch.setattr(unpadded, "MOST_FILLED", most_filled)
    seen: list[int] = []
    inner = unpadded._in_one_line

    def noted(*arguments) -> Tensor:
        kept = inner(*arguments)
        seen.append(len(kept))
        return kept

    monkeypatch.setattr(unpadded, "_in_one_line", noted)
    return seen


@pytest.mark.parametrize("method", [*METHODS, "lora"])
def test_losses_and_gradients_are_those_of_the_rectangle(
    family: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    base = random_base(family)
    if method == "lora":
        section = LoraSection(kind="lora", rank=2)
        adapter: Adapter = ADAPTERS["lora"].create(section, base, Demonstrations([], 0))
    else:
        adapter = make_adapter(base, METHODS[method])
    with torch.no_grad():  # LoRA begins at nothing
        for value in adapter.trainable().values():
            value.add_(0.1 * torch.randn_like(value))
    lengths = [4, 12, 7, 2]
    wanted, gradients = learnt(base, adapter, lengths)
    seen = lines(monkeypatch, 0.9)
    losses, found = learnt(base, adapter, lengths)
    assert seen[-1] == sum(lengths)
    monkeypatch.setattr(unpadded, "MOST_FILLED", 0.0)
    wanted, gradients = learnt(base, adapter, lengths)
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(found, gradients, strict=True):
        assert (mine - theirs).norm() <= 1e-4 * theirs.norm() + 1e-9


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(2, 20), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_any_lengths(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    base = random_base("llama")
    adapter = make_adapter(base, LEARNT["prefix"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unpadded, "MOST_FILLED", 0.0)
        wanted, _ = learnt(base, adapter, lengths)
        patch.setattr(unpadded, "MOST_FILLED", 0.999)
        losses, _ = learnt(base, adapter, lengths)
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=1e-5)


def test_long_rows_make_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """They attend in parts, as they do in a full rectangle."""
    base = random_base("llama")
    adapter = make_adapter(base, LEARNT["prefix"])
    monkeypatch.setattr(unpadded, "MOST_FILLED", 0.0)
    wanted, _ = learnt(base, adapter, [4, 12, 7])
    monkeypatch.setattr(unpadded, "MOST_FILLED", 0.9)
    monkeypatch.setattr(unpadded, "LEAST_TOKENS", 12)
    monkeypatch.setattr(attention, "LEAST_TOKENS", 12)
    monkeypatch.delattr(Placed, "_joined")
    losses, _ = learnt(base, adapter, [4, 12, 7])
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=1e-5)


def test_full_rows_and_padding_before_them_stay_a_rectangle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = random_base("llama")
    adapter = make_adapter(base, LEARNT["prefix"])
    learnt(base, adapter, [3, 12])  # asks the model
    seen = lines(monkeypatch, 0.9)
    learnt(base, adapter, [12, 12, 12])
    learnt(base, adapter, [12, 12, 11])
    assert not seen
    ids, mask = pad_rows(rows_of([3, 12]), 0, left=True)
    labels = ids.masked_fill(mask == 0, IGNORED)
    supervised_losses(base.model, ids, mask, labels, None)
    assert not seen


@pytest.mark.parametrize("kind", ["mistral", "gemma2", "gemma4", "bloom"])
def test_families_with_windows_or_positions_from_the_mask_stay_a_rectangle(kind: str) -> None:
    assert not unpadded._reads_one_line(base_of_family(kind).model)


@pytest.mark.parametrize("kind", ["opt", "gpt_neox", "gpt_bigcode", "falcon"])
def test_other_families_read_one_line_only_where_it_is_the_same(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of_family(kind)
    adapter = make_adapter(base, LEARNT["prefix"])
    losses, _ = learnt(base, adapter, [4, 12, 7, 2])
    monkeypatch.setattr(unpadded, "MOST_FILLED", 0.0)
    wanted, _ = learnt(base, adapter, [4, 12, 7, 2])
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=1e-5)


def test_what_training_that_diverges_hides_is_found_out_later() -> None:
    base = random_base("llama")
    with torch.no_grad():
        weight = base.model.get_input_embeddings().weight
        kept = weight.clone()
        weight.fill_(float("inf"))
    assert not fused.has_plain_head(base.model)
    assert not holds(base.model, unpadded._reads_one_line)
    with torch.no_grad():
        weight.copy_(kept)
    assert fused.has_plain_head(base.model)
    assert holds(base.model, unpadded._reads_one_line)


def test_memory_that_runs_out_is_no_answer_about_a_family(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_base("llama")

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(base.model, "forward", full)
        with pytest.raises(torch.OutOfMemoryError):
            holds(base.model, unpadded._reads_one_line)
    assert holds(base.model, unpadded._reads_one_line)
