"""Rows that come and go between tokens get the tokens they get alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, random_base, random_model, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma4TextConfig,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from ptkit.errors import ModelError
from ptkit.prefix import KVPrefix
from ptkit.runtime.attention_choice import asked_attention
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.block_pool import BlockPool, NoBlocksError, position_bytes
from ptkit.runtime.generation import generate
from ptkit.runtime.paged_batch import PagedBatch, PagedSequence, SequenceInput
from ptkit.runtime.paged_support import longest_sequence

_SMALL = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SMALL, **_WIDE, "intermediate_size": 48, "num_key_value_heads": 2}
OTHERS: dict[str, Callable[[], PretrainedConfig]] = {
    "bloom": lambda: BloomConfig(**_SMALL, hidden_size=32, n_layer=2, n_head=4),
    "falcon": lambda: FalconConfig(**_SMALL, **_WIDE),
    "opt": lambda: OPTConfig(**_SMALL, **_WIDE, ffn_dim=48, word_embed_proj_dim=32),
    "gpt_neox": lambda: GPTNeoXConfig(**_SMALL, **_WIDE, intermediate_size=48),
    "gpt_bigcode": lambda: GPTBigCodeConfig(**_SMALL, n_embd=32, n_layer=2, n_head=4),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=64),
    "gemma2": lambda: Gemma2Config(**_LLAMA, head_dim=16, sliding_window=64),
    # One layer has fewer, wider heads than the other.
    "gemma4": lambda: Gemma4TextConfig(
        **_LLAMA,
        head_dim=8,
        global_head_dim=16,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        hidden_size_per_layer_input=0,
        sliding_window=64,
        max_position_embeddings=128,
        layer_types=["sliding_attention", "full_attention"],
    ),
}


def base_of_family(family: str) -> Base:
    if family in FAMILIES:
        return random_base(family)
    torch.manual_seed(0)
    config = OTHERS[family]()
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation=asked_attention(config, "auto", family)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return frozen_base(model.eval(), word_tokenizer(), f"random-{family}")


def random_prefix(base: Base, tokens: int, seed: int, infix: bool = False) -> KVPrefix:
    generator = torch.Generator().manual_seed(seed)

    def drawn(width: int, heads: int) -> torch.Tensor:
        return torch.randn(heads, tokens, width, generator=generator)

    return KVPrefix(
        tuple(drawn(s.key_dim, s.kv_heads) for s in base.layout),
        tuple(drawn(s.value_dim, s.kv_heads) for s in base.layout),
        infix,
    )


def paged(base: Base, **options: Any) -> PagedBatch:
    return PagedBatch(base.model, BlockPool(base.layout, **options))


def alone(base: Base, row: SequenceInput, new: int) -> list[int]:
    batch = None if row.prefix is None else row.prefix.alone
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None}
    return generate(base.model, [row.prompt], batch, pad_token_id=base.pad_token_id, **options)[0]


def read(batch: PagedBatch, inputs: Sequence[SequenceInput], tokens: int = 100) -> list:
    """The sequences of `inputs`, read to their ends."""
    sequences = [batch.begin(given) for given in inputs]
    while any(sequence.logits is None for sequence in sequences):
        batch.prefill(sequences, tokens)
    return sequences


def run(
    base: Base, inputs: list[SequenceInput], lengths: list[int], seed: int, **options: Any
) -> list[list[int]]:
    """Greedy tokens of sequences that begin and end at random, read in random groups and pieces."""
    draw = random.Random(seed)
    batch, lanes, waiting = paged(base, **options), [], [*range(len(inputs))]
    written: list[list[int]] = [[] for _ in inputs]
    sequences: dict[int, PagedSequence] = {}
    while waiting or lanes:
        if waiting and (not lanes or draw.random() < 0.5):
            count = draw.randint(1, 3)
            group, waiting = waiting[:count], waiting[count:]
            tokens = draw.choice([1, 3, 50])
            for i, sequence in zip(
                group, read(batch, [inputs[i] for i in group], tokens), strict=True
            ):
                sequences[i] = sequence
                written[i].append(int(sequence.logits.argmax()))
                lanes.append(i)
        for i in [*lanes]:
            if len(written[i]) == lengths[i]:
                batch.end(sequences.pop(i))
                lanes.remove(i)
        draw.shuffle(lanes)
        if lanes:
            logits = batch.decode([sequences[i] for i in lanes], [written[i][-1] for i in lanes])
            for i, token in zip(lanes, logits.argmax(-1).tolist(), strict=True):
                written[i].append(token)
    assert batch.pool.used == 0
    assert options.get("kept") or batch.pool.nbytes == 0, "an idle pool keeps no memory"
    return written


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_rows_that_come_and_go_get_their_own_tokens(family: str) -> None:
    base = base_of_family(family)
    draw = random.Random(5)
    prefixes = [None, *(random_prefix(base, n, n) for n in (1, 4, 7))]
    inputs = [
        SequenceInput(
            [draw.randrange(1, 96) for _ in range(draw.randint(1, 14))], draw.choice(prefixes)
        )
        for _ in range(10)
    ]
    lengths = [draw.randint(1, 9) for _ in inputs]
    expected = [alone(base, row, n) for row, n in zip(inputs, lengths, strict=True)]
    assert run(base, inputs, lengths, seed=1) == expected
    assert len({token for row in expected for token in row}) > 5


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 6), st.integers(1, 6)), min_size=1, max_size=7
    ),
    seed=st.integers(0, 2**16),
)
def test_any_order_of_any_lengths(rows: list[tuple[int, int, int]], seed: int) -> None:
    base = random_base("llama")
    draw = random.Random(seed)
    inputs = [
        SequenceInput(
            [draw.randrange(1, 96) for _ in range(prompt)],
            random_prefix(base, virtual, seed + i, infix=draw.random() < 0.3) if virtual else None,
        )
        for i, (prompt, virtual, _) in enumerate(rows)
    ]
    lengths = [new for _, _, new in rows]
    expected = [alone(base, row, n) for row, n in zip(inputs, lengths, strict=True)]
    assert run(base, inputs, lengths, seed) == expected


def test_a_bad_row_spoils_neither_its_neighbours_nor_its_successor() -> None:
    base = random_base("gpt2")
    bad = random_prefix(base, 5, 0).map(lambda t: t * float("nan"))
    good = SequenceInput([3, 4, 5], random_prefix(base, 2, 1))
    batch = paged(base)
    spoilt, sound = read(batch, [SequenceInput([1, 2, 9, 8, 7, 6], bad), good])
    tokens = [int(sound.logits.argmax())]
    for _ in range(3):
        logits = batch.decode([spoilt, sound], [0, tokens[-1]])
        assert not logits[0].isfinite().any()
        tokens.append(int(logits[1].argmax()))
    batch.end(spoilt)
    # Its blocks are the next ones to be written to.
    (successor,) = read(batch, [SequenceInput([7, 7], None)])
    for _ in range(4):
        logits = batch.decode([sound, successor], [tokens[-1], 5])
        assert logits.isfinite().all()
        tokens.append(int(logits[0].argmax()))
    assert tokens == alone(base, good, 8)


def test_unfit_models_are_refused_with_the_reason() -> None:
    hybrid = Qwen3NextConfig(
        **_LLAMA, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    with pytest.raises(ModelError, match="keep a state instead of keys and values"):
        longest_sequence(AutoModelForCausalLM.from_config(hybrid))
    bart = BartForConditionalGeneration(
        BartConfig(vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1)
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        longest_sequence(bart)
    assert longest_sequence(random_model("gpt2")) == 128
    assert longest_sequence(base_of_family("mistral").model) == 64, "rows stay within the window"


# Memory and what is shared


def held(base: Base, lengths: Sequence[int]) -> tuple[int, int]:
    """Bytes that sequences of these lengths hold, and bytes of so many positions."""
    batch = paged(base)
    sequences = read(batch, [SequenceInput([1 + n % 90] * n, None) for n in lengths], 4096)
    for _ in range(3):
        batch.decode(sequences, [5] * len(sequences))
    positions = sum(sequence.length for sequence in sequences)
    assert positions == sum(lengths) + 3 * len(lengths)
    return batch.pool.nbytes, positions * position_bytes(base.layout, base.model.dtype)


def test_a_long_row_makes_no_other_row_longer() -> None:
    """One of 4,096 tokens beside 31 of 64: 1.15 times the sum of their lengths at most, and an
    eighth of what a rectangle as wide as the longest holds."""
    torch.manual_seed(0)
    config = LlamaConfig(**{**_LLAMA, "hidden_size": 16, "max_position_embeddings": 8192})
    model = AutoModelForCausalLM.from_config(config).eval()
    base = frozen_base(model, word_tokenizer(), "long")
    # Inputs differ, so nothing is shared.
    nbytes, own = held(base, [4096, *range(49, 80)])
    assert nbytes <= 1.15 * own
    assert 8 * nbytes <= 32 * 4096 * position_bytes(base.layout, base.model.dtype)


def test_a_prefix_is_held_once_however_many_sequences_use_it() -> None:
    base = random_base("llama")
    batch, prefix = paged(base), random_prefix(base, 40, 1)
    sequences = read(batch, [SequenceInput([3 + n, 4], prefix) for n in range(8)])
    assert batch.pool.used == 3 + 8
    for sequence in sequences:
        batch.end(sequence)
    assert batch.pool.used == 0


def counted_tokens(base: Base, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tokens of every forward pass from now on."""
    counts: list[int] = []
    forward = base.model.forward

    def counting(*args: Any, **kw: Any) -> Any:
        counts.append(kw["input_ids"].numel())
        return forward(*args, **kw)

    monkeypatch.setattr(base.model, "forward", counting)
    return counts


def test_what_inputs_begin_with_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_base("llama")
    system, prefix = [7, 3, 9, 1] * 10, random_prefix(base, 5, 1)
    equal = [SequenceInput([*system, 8, 8], prefix)] * 4
    other = [SequenceInput([*system, 6 + n], prefix) for n in range(3)]
    foreign = SequenceInput([*system, 6], random_prefix(base, 5, 2))
    inputs = [*equal, *other, foreign]
    expected = [alone(base, given, 6) for given in inputs]
    counts = counted_tokens(base, monkeypatch)
    batch = paged(base, kept=8)
    sequences = read(batch, inputs)
    # 42 tokens once; of 41 those behind the two blocks of 16; all where the prefix is another's.
    assert sum(counts) == 42 + 3 * (41 - 32) + 41
    written = [[int(s.logits.argmax())] for s in sequences]
    for _ in range(5):
        logits = batch.decode(sequences, [row[-1] for row in written])
        for row, token in zip(written, logits.argmax(-1).tolist(), strict=True):
            row.append(token)
    assert written == expected
    for sequence in sequences:
        batch.end(sequence)
    counts.clear()
    (again,) = read(batch, [equal[0]])
    assert sum(counts) == 42 - 32, "what was read is kept for the next request"
    assert int(again.logits.argmax()) == expected[0][0]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 30), st.integers(0, 2), st.integers(1, 5)),
        min_size=1, max_size=8,
    ),
    size=st.sampled_from([1, 3, 4, 16]), kept=st.sampled_from([0, 3, 50]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_shared_blocks_change_no_token(
    rows: list[tuple[int, int, int, int]], size: int, kept: int, seed: int
) -> None:
    """Inputs with few different beginnings, behind few different prefixes, infixes among them."""
    base = random_base("llama")
    prefixes = [None, random_prefix(base, 4, seed), random_prefix(base, 3, seed, infix=True)]
    inputs = [
        SequenceInput([11 + text, *[5, 6, 7, 8] * 8][:length], prefixes[which])
        for text, length, which, _ in rows
    ]
    lengths = [new for *_, new in rows]
    expected = [alone(base, row, n) for row, n in zip(inputs, lengths, strict=True)]
    assert run(base, inputs, lengths, seed, block_size=size, kept=kept) == expected


def test_a_failed_pass_leaves_sequences_and_blocks_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = random_base("llama")
    prefix = random_prefix(base, 4, 1)
    given = [SequenceInput([3, 4, 5] * 7, prefix), SequenceInput([3, 4, 5] * 8, prefix)]
    expected = [alone(base, row, 2) for row in given]
    batch = paged(base, kept=4)
    sequences = [batch.begin(row) for row in given]
    before = batch.pool.used
    with monkeypatch.context() as patch:
        patch.setattr(base.model, "forward", lambda **_: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                batch.prefill(sequences, 100)
    assert batch.pool.used == before
    batch.prefill(sequences, 100)
    first = [int(s.logits.argmax()) for s in sequences]
    used = batch.pool.used
    with monkeypatch.context() as patch:
        patch.setattr(base.model, "forward", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batch.decode(sequences, first)
    assert batch.pool.used == used
    second = batch.decode(sequences, first).argmax(-1).tolist()
    assert [[*pair] for pair in zip(first, second, strict=True)] == expected


def test_no_more_blocks_are_used_than_there_may_be() -> None:
    base = random_base("llama")
    batch = paged(base, most=4, kept=2)
    (first,) = read(batch, [SequenceInput([1] * 40, None)])
    with pytest.raises(NoBlocksError, match="2 blocks of 16 positions are needed"):
        read(batch, [SequenceInput([2] * 20, None)])
    batch.end(first)
    (second,) = read(batch, [SequenceInput([2] * 64, None)])  # in place of what was kept
    assert second.length == 64
    assert batch.pool.nbytes == 64 * position_bytes(base.layout, base.model.dtype)
