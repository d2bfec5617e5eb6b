"""The decode loop over blocks writes what transformers' own loop writes, for every option."""

from __future__ import annotations

import io
import logging
import random
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
from conftest import random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from test_composition import save_lora
from test_paged_batch import OTHERS, base_of_family, counted_tokens, random_prefix
from test_peft_parity import rows_of
from transformers import GenerationConfig, TextStreamer, WatermarkingConfig

from ptkit import AdapterBank
from ptkit.errors import ModelError
from ptkit.prefix import KVPrefix, prefixes_of
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime import generation, processors
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.block_pool import BLOCK_SIZE, BlockPool, position_bytes
from ptkit.runtime.generation import generate
from ptkit.runtime.paged_batch import PagedBatch

LENGTHS = [4, 9, 6, 9, 17]
#: Options of `generate` that the loop over blocks takes.
TAKEN: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"do_sample": True, "temperature": 0.7},
    "no top-k": {"do_sample": True, "top_k": 0},
    "top-p": {"do_sample": True, "top_k": 0, "top_p": 0.6},
    "min-p": {"do_sample": True, "min_p": 0.1},
    "typical": {"do_sample": True, "typical_p": 0.7, "epsilon_cutoff": 1e-3},
    "answers": {"do_sample": True, "num_return_sequences": 3},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "ends": {"eos_token_id": [*range(0, 60, 2)]},
    "sampled ends": {"do_sample": True, "eos_token_id": [*range(0, 60, 2)]},
    "no end": {"eos_token_id": None, "do_sample": True},
    "at least": {"min_new_tokens": 5, "eos_token_id": [*range(60)]},
    "max_length": {"max_length": 20, "max_new_tokens": None},
    "default length": {"max_new_tokens": None},
    "bias": {"sequence_bias": [[[5], 8.0]], "suppress_tokens": [7, 9]},
    "bad words": {"bad_words_ids": [[i] for i in range(1, 40)]},
    "allowed": {"prefix_allowed_tokens_fn": lambda number, ids: [number + 1, int(ids[-1]) + 1]},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "renormalised": {"renormalize_logits": True, "remove_invalid_values": True},
    "in chunks": {"prefill_chunk_size": 3},
    "a config": {"generation_config": GenerationConfig(do_sample=True, top_k=5, max_new_tokens=7)},
}


def mixed(base: Base) -> list[KVPrefix | None]:
    """No prefix, two of different lengths, one of them twice, and an infix where there can be."""
    short, long = random_prefix(base, 3, 1), random_prefix(base, 18, 2)
    return [None, short, long, short, random_prefix(base, 4, 3)]


def in_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' own loop write everything."""
    monkeypatch.setattr(generation, "why_not_blocks", lambda *_: "a test compares with it")


def seeded(base: Base, prefixes: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    torch.manual_seed(7)
    options = {"max_new_tokens": 8, "do_sample": False, **options}
    if "generation_config" in options:
        del options["max_new_tokens"], options["do_sample"]
    return generate(base.model, prompts, prefixes, pad_token_id=base.pad_token_id, **options)


@pytest.mark.parametrize("case", TAKEN)
def test_every_option_gives_the_tokens_of_transformers_loop(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_base("llama")
    prompts, prefixes = rows_of(LENGTHS), mixed(base)
    passes: list[int] = []
    step = PagedBatch.step
    monkeypatch.setattr(
        PagedBatch, "step", lambda self, *args: (passes.append(len(args[0])), step(self, *args))[1]
    )
    found = seeded(base, prefixes, prompts, **TAKEN[case])
    assert passes, "blocks were used"
    with monkeypatch.context() as patch:
        in_cache(patch)
        count = len(passes)
        options = dict(TAKEN[case])
        if not processors.CHUNKS_COUNT_THE_CACHE:  # refused: see the next test
            options.pop("prefill_chunk_size", None)
        expected = seeded(base, prefixes, prompts, **options)
        assert len(passes) == count
    assert found == expected
    lengths = {len(row) for row in found}
    if "ends" in case:
        assert len(lengths) > 1
        assert passes[-1] < len(found), "rows that are done leave the batch"


def test_beams_behind_a_prefix_read_in_chunks_or_say_why_not() -> None:
    base = random_base("llama")
    prefix = random_prefix(base, 3, 1)

    def beams(prefixes: list[KVPrefix | None], **options: Any) -> list[list[int]]:
        return seeded(base, prefixes, rows_of(LENGTHS), num_beams=2, **options)

    plain: list[KVPrefix | None] = [None] * len(LENGTHS)
    assert beams(plain, prefill_chunk_size=3) == beams(plain)
    behind: list[KVPrefix | None] = [prefix] * len(LENGTHS)
    if processors.CHUNKS_COUNT_THE_CACHE:
        assert beams(behind, prefill_chunk_size=3) == beams(behind)
    else:
        with pytest.raises(ModelError, match="leave out `prefill_chunk_size`"):
            beams(behind, prefill_chunk_size=3)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", *OTHERS])
@pytest.mark.parametrize("sampled", [False, True])
def test_families_that_are_paged_write_the_tokens_of_transformers_loop(
    family: str, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of_family(family)
    prompts, prefixes = rows_of(LENGTHS), mixed(base)
    asked = generation._Asked(base.model, prompts, prefixes, 0, {"max_new_tokens": 6})
    assert generation.why_not_blocks(asked) is None
    options = {"max_new_tokens": 6, "do_sample": sampled, "top_k": 0, "temperature": 0.8}
    options |= {} if sampled else {"top_k": None, "temperature": None}
    found = seeded(base, prefixes, prompts, **options)
    in_cache(monkeypatch)
    assert found == seeded(base, prefixes, prompts, **options)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 20), st.sampled_from([0, 2, 5, 17]), st.booleans()),
        min_size=1, max_size=6,
    ),
    sampled=st.booleans(), ends=st.integers(1, 60), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_rows_write_the_tokens_of_transformers_loop(
    rows: list[tuple[int, int, bool]], sampled: bool, ends: int, seed: int
) -> None:
    base = random_base("llama")
    draw = random.Random(seed)
    prefixes = [
        random_prefix(base, length, length, infix) if length else None for _, length, infix in rows
    ]
    prompts = [[draw.randrange(1, 96) for _ in range(length)] for length, _, _ in rows]
    options = {"do_sample": sampled, "eos_token_id": [*range(ends)], "repetition_penalty": 1.2}
    found = seeded(base, prefixes, prompts, **options)
    with pytest.MonkeyPatch.context() as patch:
        in_cache(patch)
        assert found == seeded(base, prefixes, prompts, **options)


REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam_search"),
    "sampled beams": ({"num_beams": 2, "do_sample": True}, "beam_sample"),
    "drafts": ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "their cache": ({"cache_implementation": "static"}, "cache_implementation"),
    "model's inputs": ({"output_attentions": True}, "output_attentions"),
    "beams in a config": ({"generation_config": GenerationConfig(num_beams=2)}, "beam_search"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_the_loop_does_not_do_goes_to_transformers_with_a_reason(case: str) -> None:
    options, named = REASONS[case]
    base = random_base("llama")
    asked = generation._Asked(base.model, [[3, 4]], None, 0, options)
    reason = generation.why_not_blocks(asked)
    assert reason is not None
    assert named in reason


def test_rows_longer_than_a_window_go_to_transformers(caplog: pytest.LogCaptureFixture) -> None:
    base = base_of_family("mistral")
    (prompt,) = rows_of([50])
    asked = generation._Asked(base.model, [prompt], None, 0, {"max_new_tokens": 14})
    assert generation.why_not_blocks(asked) is None
    with caplog.at_level(logging.DEBUG, logger=generation.__name__):
        seeded(base, [random_prefix(base, 1, 1)], [prompt], max_new_tokens=14)
    assert "longer than the window of 64 tokens" in caplog.text


def test_stop_strings_and_streams_are_those_of_transformers_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = load_base("tiny-en")
    (prompt,) = base.encode(["Once upon a time"])
    prefixes = [random_prefix(base, 4, 1)]
    whole = seeded(base, prefixes, [prompt], max_new_tokens=12)
    stop = base.tokenizer.decode(whole[0][:5])[-3:]
    options = {"stop_strings": [stop], "tokenizer": base.tokenizer, "max_new_tokens": 12}

    def said() -> tuple[str, list[list[int]]]:
        heard = io.StringIO()
        with redirect_stdout(heard):
            streamer = TextStreamer(base.tokenizer, skip_prompt=True)
            found = seeded(base, prefixes, [prompt], max_new_tokens=12, streamer=streamer)
        return heard.getvalue(), found

    found = said(), seeded(base, prefixes, [prompt], **options)
    in_cache(monkeypatch)
    assert found == (said(), seeded(base, prefixes, [prompt], **options))
    assert found[0][1] == whole
    assert len(found[1][0]) < len(whole[0])


def test_rows_of_one_batch_run_with_their_own_lora_and_prefix(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = random_base("llama")
    bank = AdapterBank(base)
    for seed in (1, 2):
        save_lora("llama", tmp_path / f"lora{seed}", seed=seed)
        bank.load(tmp_path / f"lora{seed}", f"lora{seed}")
    bank.add("prefix", random_prefix(base, 5, 1))
    names = [None, "lora1", "prefix", ("lora2", "prefix"), "lora1"]
    prompts = rows_of(LENGTHS)
    options = {"max_new_tokens": 8, "num_return_sequences": 2, "do_sample": True, "top_k": 0}

    def written() -> list[list[int]]:
        torch.manual_seed(1)
        return bank.generate_ids(prompts, names, **options)

    found = written()
    in_cache(monkeypatch)
    assert found == written()


def test_rows_hold_their_own_positions_and_each_prefix_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No rectangle as wide as the longest row, and memory is taken once."""
    base = random_base("llama")
    pools: list[BlockPool] = []
    addresses = set()
    write = BlockPool.write

    def watched(self: BlockPool, layer: int, *args: Any) -> None:
        write(self, layer, *args)
        if layer == 0:
            assert self._keys[0] is not None
            addresses.add(self._keys[0].data_ptr())
        pools.append(self)

    monkeypatch.setattr(BlockPool, "write", watched)
    prefix = random_prefix(base, 33, 1)
    prompts = [[1 + row, *[2] * 5] for row in range(15)] + [[90] * 70]
    seeded(base, [prefix] * 16, prompts, eos_token_id=None, max_new_tokens=10)
    blocks = 3 + 15 * 1 + 5
    held = blocks * BLOCK_SIZE * position_bytes(base.layout, base.model.dtype)
    assert {pool.nbytes for pool in pools} == {held}
    assert len(addresses) == 1
    rectangle = 16 * (33 + 70 + 10) * position_bytes(base.layout, base.model.dtype)
    assert 4 * held < rectangle


def test_a_batch_gives_back_the_prefixes_of_its_rows() -> None:
    base = random_base("gpt2")
    prefixes = [None, random_prefix(base, 3, 1), random_prefix(base, 5, 2, infix=True)]
    for given_, found in zip(
        prefixes, prefixes_of(PrefixBatch.gathered(prefixes, base.layout)), strict=True
    ):
        if given_ is None:
            assert found is None
            continue
        assert found is not None
        assert found.infix == given_.infix
        assert all(map(torch.equal, found.tensors, given_.tensors))
    one, other = prefixes_of(PrefixBatch.shared(prefixes[1], 2))
    assert one is other


def test_rows_with_the_same_adapters_have_one_prefix() -> None:
    base = random_base("gpt2")
    bank = AdapterBank(base)
    bank.add("a", random_prefix(base, 3, 1))
    bank.add("b", random_prefix(base, 4, 2))
    found = bank.prefixes(["a", ("a", "b"), None, "a", ("a", "b"), ("b", "a")])
    assert found[2] is None
    assert found[0] is found[3] is bank.prefix("a")
    assert found[1] is found[4]
    assert found[1] is not found[5]


def test_equal_rows_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = random_base("llama")
    counts = counted_tokens(base, monkeypatch)
    (prompt,) = rows_of([9])
    prefix = random_prefix(base, 3, 1)
    seeded(base, [prefix] * 3, [prompt] * 3, num_return_sequences=2, do_sample=True, top_k=0)
    assert counts[0] == 9
    assert max(counts[1:]) == 6


def test_answers_beyond_a_table_of_positions_are_refused_before_anything_is_written() -> None:
    base = random_base("gpt2")
    (ids,) = base.encode(["w1 w2 w3"])
    prefix = random_prefix(base, 5, 1)
    most = base.model.config.max_position_embeddings
    room = most - prefix.virtual_tokens - len(ids) + 1
    rows = [None, prefix]
    options = {"pad_token_id": 0, "do_sample": False, "eos_token_id": None}
    written = generate(base.model, [ids, ids], rows, max_new_tokens=room, **options)
    assert [len(row) for row in written] == [room, room]
    with pytest.raises(ModelError, match=rf"text 2 has 3 tokens .* the model has {most} positions"):
        generate(base.model, [ids, ids], rows, max_new_tokens=room + 1, **options)
