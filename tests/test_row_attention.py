"""Attention of rows in one line, and of heads in groups: outputs and gradients of plain attention
with everything written out."""

from __future__ import annotations

import pytest
import torch
from conftest import random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from test_peft_parity import LEARNT, make_adapter
from test_unpadded import learnt
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptkit.runtime import attention
from ptkit.runtime.grouped_queries import grouped
from ptkit.runtime.row_attention import attended_by_row

DIM = 8


def written_out(
    query: Tensor, read: tuple[Tensor, Tensor], mask: Tensor, scale: float | None
) -> Tensor:
    """Attention with keys and values repeated for every head, by products and a softmax."""
    times = query.shape[1] // read[0].shape[1]
    keys, values = (tensor.repeat_interleave(times, dim=1) for tensor in read)
    factor = DIM**-0.5 if scale is None else scale
    scores = (query @ keys.transpose(2, 3)) * factor
    return (scores + mask).softmax(-1) @ values


def hiding(tokens: int, virtual: int, hidden: int) -> Tensor:
    """A causal mask behind `virtual` tokens, of which the first `hidden` are seen by nobody."""
    seen = torch.ones(tokens, virtual + tokens, dtype=torch.bool).tril(virtual)
    seen[:, :hidden] = False
    return torch.zeros(1, 1, *seen.shape).masked_fill(~seen, float("-inf"))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), virtual=st.integers(0, 9),
    kv_heads=st.integers(1, 2), times=st.integers(1, 3), scale=st.sampled_from([None, 0.2]),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_rows_in_a_line_attend_as_each_by_itself(
    lengths: list[int], virtual: int, kv_heads: int, times: int, scale: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    tokens, rows = sum(lengths), len(lengths)
    query = torch.randn(1, kv_heads * times, tokens, DIM, requires_grad=True)
    key, value = (torch.randn(1, kv_heads, tokens, DIM, requires_grad=True) for _ in range(2))
    fronts, masks, learning = None, None, [query, key, value]
    causal = [hiding(length, virtual, row % (virtual + 1)) for row, length in enumerate(lengths)]
    if virtual:
        fronts = tuple(torch.randn(rows, kv_heads, virtual, DIM, requires_grad=True) for _ in "kv")
        masks = causal
        learning += fronts
    output = attended_by_row(query, key, value, lengths, fronts, masks, scale)
    parts = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), causal, strict=True)
    expected = []
    for row, (own_query, own_key, own_value, mask) in enumerate(parts):
        read = own_key, own_value
        if fronts is not None:
            read = tuple(
                torch.cat([front[row, None], own], dim=2)
                for front, own in zip(fronts, read, strict=True)
            )
        expected.append(written_out(own_query, read, mask, scale).transpose(1, 2))
    wanted = torch.cat(expected, dim=1)
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-4)
    upstream = torch.randn_like(wanted)
    found = torch.autograd.grad(output, learning, upstream)
    for one, other in zip(found, torch.autograd.grad(wanted, learning, upstream), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_heads_in_groups_have_the_outputs_and_gradients_of_repeated_ones() -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 6, 5, DIM, requires_grad=True)
    read = tuple(torch.randn(2, 2, 8, DIM, requires_grad=True) for _ in "kv")
    mask = hiding(5, 3, 1)
    output = grouped(query, *read, mask.isfinite().logical_and(mask == 0), None)
    wanted = written_out(query, read, mask, None).transpose(1, 2)
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-4)
    upstream = torch.randn_like(wanted)
    learning = (query, *read)
    found = torch.autograd.grad(output, learning, upstream)
    for one, other in zip(found, torch.autograd.grad(wanted, learning, upstream), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_keys_of_a_group_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of full rows behind a prefix repeats no keys where heads share them."""
    torch.manual_seed(0)
    base = random_base("llama")
    config = base.model.config
    assert config.num_attention_heads > config.num_key_value_heads
    adapter = make_adapter(base, LEARNT["prefix"])
    taken: list[tuple[int, int]] = []

    def noted(query: Tensor, key: Tensor, *more: object) -> Tensor:
        taken.append((query.shape[1], key.shape[1]))
        return grouped(query, key, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "grouped", noted)
    learnt(base, adapter, [12, 12])
    assert set(taken) == {(config.num_attention_heads, config.num_key_value_heads)}


def test_one_token_and_one_head_each_are_plain() -> None:
    query, key, value = (torch.randn(1, 1, 1, DIM) for _ in range(3))
    output = attended_by_row(query, key, value, [1])
    expected = scaled_dot_product_attention(query, key, value).transpose(1, 2)
    torch.testing.assert_close(output, expected)
