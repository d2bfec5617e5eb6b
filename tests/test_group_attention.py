"""Groups of a pass over blocks: a beginning that sequences share is read once, and rows that are
evenly apart are read where they are. Neither changes a token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from test_paged_batch import base_of_family, paged, random_prefix, read, run
from test_paged_generation import in_cache, seeded
from torch.nn.functional import scaled_dot_product_attention

from ptkit.prefix import LayerShape
from ptkit.runtime import paged_attention, paged_groups
from ptkit.runtime.attention_choice import attention_of, set_attention
from ptkit.runtime.block_pool import BlockPool, BlockTable
from ptkit.runtime.group_attention import attended_in_parts, can_share, decoded
from ptkit.runtime.paged_attention import ApartPass
from ptkit.runtime.paged_batch import SequenceInput
from ptkit.runtime.paged_groups import Chunk, TokenGroup, grouped_by_beginning
from ptkit.runtime.parted_attention import is_plain


def model_like(dtype: torch.dtype) -> Any:
    """What a `TokenGroup` asks of a model."""
    config = SimpleNamespace(_attn_implementation="sdpa")
    return SimpleNamespace(device=torch.device("cpu"), dtype=dtype, config=config)


def tables(pool: BlockPool, shared: int, own: list[int], scattered: bool) -> list[BlockTable]:
    """Tables with `shared` positions in the same blocks, and `own` ones after them."""
    size, made = pool.block_size, []
    blocks = pool.allocate(pool.blocks_for(shared))
    for number, positions in enumerate(own):
        table = BlockTable(pool)
        for index, block in enumerate(blocks):
            held = block if number == 0 else pool.share(block)
            table.take_over(held, min(size, shared - index * size))
        if not scattered:
            table.reserve(positions)
        made.append(table)
    left = [*own]
    while any(left):  # one position of each in turn: their blocks are not together
        for number, table in enumerate(made):
            step = min(left[number], 1 if scattered else left[number])
            table.extend(step)
            left[number] -= step
    return made


@settings(max_examples=60, deadline=None)
@given(
    shared=st.integers(1, 40), own=st.lists(st.integers(0, 20), min_size=2, max_size=5),
    queries=st.lists(st.integers(1, 6), min_size=5, max_size=5), kv_heads=st.integers(1, 3),
    times=st.integers(1, 3), size=st.sampled_from([1, 4, 16]), scattered=st.booleans(),
    scale=st.sampled_from([None, 0.3]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    single=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_attention_in_parts_is_attention_to_the_whole(
    shared: int, own: list[int], queries: list[int], kv_heads: int, times: int, size: int,
    scattered: bool, scale: float | None, dtype: torch.dtype, single: bool, seed: int,
) -> None:  # fmt: skip
    """Any lengths, numbers of new tokens, heads and slots; one new token each if `single`."""
    torch.manual_seed(seed)
    dim, new = 8, [1 if single else count for count in queries[: len(own)]]
    pool = BlockPool((LayerShape(kv_heads, dim, dim),), block_size=size)
    held = tables(pool, shared, [n + q for n, q in zip(own, new, strict=True)], scattered)
    for table in held:
        slots = torch.from_numpy(table.slots.copy())
        drawn = torch.randn(2, len(slots), kv_heads, dim).to(dtype)
        pool.write(0, slots, drawn[0], drawn[1])
    chunks = [Chunk(i, [5] * q, t) for i, (q, t) in enumerate(zip(new, held, strict=True))]
    group = TokenGroup(chunks, 0, model_like(dtype), shared)
    query = torch.randn(len(own), kv_heads * times, max(new), dim).to(dtype)
    found = attended_in_parts(group, query, pool, 0, scale)
    whole = None
    if single:
        whole = decoded(group.whole(), query, pool, 0, scale)
    for row, chunk in enumerate(chunks):
        keys, values = pool.read(0, torch.from_numpy(chunk.slots.copy()), 1)
        keys, values = (x.repeat_interleave(times, dim=1).float() for x in (keys, values))
        count, positions = len(chunk.ids), chunk.table.length
        mask = torch.ones(count, positions, dtype=torch.bool).tril(positions - count)
        expected = scaled_dot_product_attention(
            query[row : row + 1, :, :count].float(), keys, values, attn_mask=mask, scale=scale
        ).transpose(1, 2)[0]
        near = {"atol": 2e-5, "rtol": 1e-4} if dtype is torch.float32 else {"atol": 0.03, "rtol": 0}
        torch.testing.assert_close(found[row, :count].float(), expected, **near)
        if whole is not None:
            torch.testing.assert_close(whole[row, :count].float(), expected, **near)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(0, 3), st.integers(1, 5)),
        min_size=2, max_size=8,
    ),
    family=st.sampled_from(["llama", "gpt2", "qwen3", "mistral"]),
    size=st.sampled_from([1, 3, 16]), kept=st.sampled_from([0, 50]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_a_beginning_that_is_read_once_changes_no_token(
    rows: list[tuple[int, int, int, int]], family: str, size: int, kept: int, seed: int
) -> None:
    """Sequences begin and end at random and are read in pieces; all they share is read once."""
    base = base_of_family(family)
    prefixes = [
        None, random_prefix(base, 4, seed), random_prefix(base, 19, seed),
        random_prefix(base, 3, seed, infix=True),
    ]  # fmt: skip
    inputs = [
        SequenceInput([11 + text, *[5, 6, 7, 8] * 8][:length], prefixes[which])
        for text, length, which, _ in rows
    ]
    lengths = [new for *_, new in rows]
    with pytest.MonkeyPatch.context() as patch:
        in_cache(patch)
        options = {"max_new_tokens": 5, "eos_token_id": None}
        written = seeded(base, [i.prefix for i in inputs], [i.prompt for i in inputs], **options)
    expected = [row[:new] for row, new in zip(written, lengths, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paged_groups, "WORTH_SHARING", 1)
        assert run(base, inputs, lengths, seed, block_size=size, kept=kept) == expected


def test_a_prefix_of_many_rows_is_read_once_and_nothing_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = random_base("llama")
    seen: list[tuple[int, int]] = []
    copied: list[int] = []
    view, copy = BlockPool.seen, BlockPool.read

    def seeing(self: BlockPool, layer: int, *place: int) -> Any:
        seen.append(place[2:])
        return view(self, layer, *place)

    def copying(self: BlockPool, layer: int, slots: torch.Tensor, *args: Any) -> Any:
        copied.append(len(slots))
        return copy(self, layer, slots, *args)

    monkeypatch.setattr(BlockPool, "seen", seeing)
    monkeypatch.setattr(BlockPool, "read", copying)
    prefix, rows = random_prefix(base, 90, 1), 9
    prompts = [[row + 1, 2, 3, 4] for row in range(rows)]
    found = seeded(base, [prefix] * rows, prompts, eos_token_id=None, max_new_tokens=6)
    assert not copied
    assert {place for place in seen if place[0] == 1} == {(1, 90)}
    assert {place for place in seen if place[0] > 1} == {(rows, 4 + n) for n in range(6)}
    in_cache(monkeypatch)
    assert found == seeded(base, [prefix] * rows, prompts, eos_token_id=None, max_new_tokens=6)


def chunks_of(*slots: list[int]) -> list[Chunk]:
    """Decoded tokens of sequences with these slots."""
    made = []
    for number, own in enumerate(slots):
        table = BlockTable(BlockPool((LayerShape(1, 4, 4),)))
        table._append(np.array([*own, 10_000 + number]))
        made.append(Chunk(number, [5], table))
    return made


def test_only_beginnings_that_are_worth_it_are_read_once() -> None:
    worth = paged_groups.WORTH_SHARING
    few = chunks_of(*[[*range(worth - 1)]] * 2)
    assert grouped_by_beginning(few) == [(few, 0)]
    enough = chunks_of(*[[*range(worth)]] * 2)
    assert grouped_by_beginning(enough) == [(enough, worth)]
    alone = chunks_of([*range(5 * worth)])
    assert grouped_by_beginning(alone) == [(alone, 0)]


def test_a_row_that_shares_little_does_not_shorten_what_others_share() -> None:
    system = [*range(200)]
    groups = grouped_by_beginning(
        chunks_of(*[system] * 6, [*system[:16], *range(900, 1084)], *[[*range(500, 700)]] * 5)
    )
    found = {tuple(sorted(chunk.number for chunk in group)): shared for group, shared in groups}
    assert found == {(0, 1, 2, 3, 4, 5): 200, (7, 8, 9, 10, 11): 200, (6,): 0}


def test_attention_of_another_kind_is_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`eager` has scores of its own, and so has a bias of positions."""
    assert is_plain({"scaling": 0.1, "dropout": 0.0, "position_bias": None, "sliding_window": 8})
    for changed in ({"position_bias": torch.zeros(1)}, {"softcap": 30.0}, {"dropout": 0.1}):
        assert not is_plain(changed)
    uneven = BlockPool((LayerShape(1, 8, 4),))
    assert not can_share(uneven, torch.device("cpu"))
    monkeypatch.setattr(paged_groups, "WORTH_SHARING", 1)
    base = random_base("llama")
    prefix = random_prefix(base, 6, 1)
    inputs = [SequenceInput([4, 5, n], prefix) for n in range(3)]

    def logits() -> torch.Tensor:
        batch = paged(base)
        return batch.decode(read(batch, inputs), [7, 8, 9])

    plain = logits()
    with monkeypatch.context() as patch:
        patch.setattr(paged_attention, "is_plain", lambda _: False)
        torch.testing.assert_close(logits(), plain, atol=1e-4, rtol=1e-4)
    own = base.model.config._attn_implementation
    set_attention(base.model, "eager")
    try:
        assert attention_of(base.model) == "eager"
        torch.testing.assert_close(logits(), plain, atol=1e-4, rtol=1e-4)
    finally:
        set_attention(base.model, own)


def test_decoded_rows_stay_in_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    begin = ApartPass.__init__
    monkeypatch.setattr(
        ApartPass, "__init__", lambda self, *args: (made.append(1), begin(self, *args))[1]
    )
    base = random_base("llama")
    batch = paged(base)
    sequences = read(batch, [SequenceInput([3, 4, n], None) for n in range(3)])
    made.clear()
    for _ in range(2 * paged_groups.GROUPED_FOR + 2):
        batch.decode(sequences, [5, 6, 7])
    assert len(made) == 2
    batch.decode(sequences[:2], [5, 6])
    assert len(made) == 3, "other rows"


def test_reserved_blocks_are_given_back() -> None:
    pool = BlockPool((LayerShape(1, 4, 4),), block_size=4)
    table = BlockTable(pool)
    table.reserve(10)
    assert pool.used == 3
    table.extend(6)
    mark = table.mark
    table.extend(12)
    assert pool.used == 5
    table.back_to(mark)
    table.extend(1)
    table.release()
    assert pool.used == 0
