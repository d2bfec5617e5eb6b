"""The reserved cache holds what transformers' own growing cache holds, whatever is done to it."""

from __future__ import annotations

import pytest
import torch
from conftest import random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from ptkit.runtime.cache import ReservedCache, cache_for
from ptkit.runtime.generation import generate

operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("reorder"), st.integers(0, 5)),
        st.tuples(st.just("crop"), st.integers(1, 3)),
        st.tuples(st.just("select"), st.integers(1, 2)),
    ),
    max_size=12,
)


@given(operations=operations, reserved=st.integers(0, 12), rows=st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_equals_the_cache_that_concatenates(operations, reserved: int, rows: int) -> None:
    ours, theirs = ReservedCache(reserved), DynamicCache()
    generator = torch.Generator().manual_seed(0)
    length = 0
    for what, number in [("append", 2), *operations]:
        if what == "append":
            keys, values = torch.randn(2, rows, 2, number, 3, generator=generator)
            for layer in range(2):
                found = ours.update(keys, values, layer)
                expected = theirs.update(keys, values, layer)
                assert all(map(torch.equal, found, expected))
            length += number
        elif what == "repeat" and rows < 8:
            ours.batch_repeat_interleave(number)
            theirs.batch_repeat_interleave(number)
            rows *= number
        elif what == "reorder":
            order = torch.randint(0, rows, (rows,), generator=generator)
            ours.reorder_cache(order)
            theirs.reorder_cache(order)
        elif what == "crop" and length > number:
            ours.crop(-number)
            theirs.crop(-number)
            length -= number
        elif what == "select" and rows > number:
            ours.batch_select_indices(torch.arange(number))
            theirs.batch_select_indices(torch.arange(number))
            rows = number
        assert ours.get_seq_length() == theirs.get_seq_length() == length
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)


def test_generation_copies_nothing_while_the_reserve_lasts(family: str, monkeypatch) -> None:
    model = random_model(family)
    addresses = set()
    update = ReservedCache.update

    def watched(self, keys, values, layer, *args, **kw):
        found = update(self, keys, values, layer, *args, **kw)
        if layer == 0:
            addresses.add(found[0].data_ptr())
        return found

    monkeypatch.setattr(ReservedCache, "update", watched)
    tokens = generate(
        model, [[5, 6, 7]], None, pad_token_id=0, max_new_tokens=9, min_new_tokens=9,
        do_sample=False, read=cache_for(model, None, 3 + 9),
    )  # fmt: skip
    assert [len(row) for row in tokens] == [9]
    assert len(addresses) == 1


@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_equal_those_of_the_model_alone(family: str, beams: int) -> None:
    model = random_model(family)
    options = {"max_new_tokens": 7, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    (ours,) = generate(model, [[5, 6, 7, 8]], None, **options)
    theirs = model.generate(torch.tensor([[5, 6, 7, 8]]), **options)[0, 4:].tolist()
    assert ours == theirs[: len(ours)]
    assert set(theirs[len(ours) :]) <= {0}


def test_layers_with_a_window_keep_their_own_cache() -> None:
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    cache = cache_for(MistralForCausalLM(config), None, 20)
    assert not isinstance(cache, ReservedCache)
    assert all(layer.is_sliding for layer in cache.layers)
