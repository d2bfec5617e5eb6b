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
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from ptkit.errors import ModelError
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.block_pool import BlockPool
from ptkit.runtime.generation import generate
from ptkit.runtime.paged_batch import (
    PagedBatch,
    PagedSequence,
    SequenceInput,
    longest_sequence,
)

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
    model: PreTrainedModel = AutoModelForCausalLM.from_config(OTHERS[family]())
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
