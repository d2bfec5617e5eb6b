"""A prefix that takes no positions: the text behind it begins at position 0, in every way there is
to run it."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from ptkit.bank import AdapterBank
from ptkit.bank.conversation import Conversation
from ptkit.errors import AdapterError, ModelError, UserError
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.formats.adapter_info import AdapterInfo
from ptkit.hub.convert import as_prompt
from ptkit.hub.engines import writer
from ptkit.hub.verify import verify
from ptkit.loaded_adapter import LoadedAdapter
from ptkit.methods import compile_files
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import all_logits, pad_rows
from ptkit.runtime.gate import Gated
from ptkit.runtime.generation import generate
from ptkit.runtime.scoring import continuation_scores
from ptkit.serve.answer import Answer, RequestAdapter, Update
from ptkit.serve.answers import CompletionStream, RequestLimits
from ptkit.serve.engine import Engine
from ptkit.serve.library import Library
from ptkit.serve.protocol import CompletionRequest
from ptkit.serve.sampling import Sampling
from ptkit.training.provenance import base_info


@cache
def gpt2() -> Base:
    return random_base("gpt2")


def made(tokens: int, seed: int = 0, *, placeless: bool = True) -> KVPrefix:
    generator = torch.Generator().manual_seed(seed)

    def values(width: int, heads: int) -> Tensor:
        return torch.randn(heads, tokens, width, generator=generator)

    return KVPrefix(
        tuple(values(s.key_dim, s.kv_heads) for s in gpt2().layout),
        tuple(values(s.value_dim, s.kv_heads) for s in gpt2().layout),
        placeless=placeless,
    )


@torch.no_grad()
def expected(ids: list[int], prefix: KVPrefix | None) -> Tensor:
    """transformers' own logits `[tokens, vocab]`, the prefix as its cache, positions said."""
    cache = DynamicCache()
    virtual = 0 if prefix is None else prefix.virtual_tokens
    for layer, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True) if prefix else ()):
        cache.update(k[None], v[None], layer)
    first = 0 if prefix is None or prefix.placeless else virtual
    text = torch.tensor([ids])
    return gpt2().model(
        input_ids=text, past_key_values=cache,
        position_ids=torch.arange(first, first + len(ids))[None],
        attention_mask=torch.ones(1, virtual + len(ids), dtype=torch.long),
    ).logits[0]  # fmt: skip


def greedy(ids: list[int], prefix: KVPrefix | None, new: int) -> list[int]:
    written: list[int] = []
    for _ in range(new):
        written.append(int(expected([*ids, *written], prefix)[-1].argmax()))
        if written[-1] == 0:
            return written[:-1]
    return written


ROWS = [
    ([5, 9, 12, 40], made(4)),
    ([7, 8], made(3, 1, placeless=False)),
    ([11, 3, 60, 61, 62, 20], made(6, 2)),
    ([30, 31, 32], None),
]


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(range(len(ROWS))), left=st.booleans())
def test_rows_of_a_mixed_batch_are_read_from_their_own_positions(
    order: list[int], left: bool
) -> None:
    rows = [ROWS[i] for i in order]
    batch = PrefixBatch.gathered([prefix for _, prefix in rows], gpt2().layout)
    ids, mask = pad_rows([ids for ids, _ in rows], 0, left=left)
    with torch.no_grad():
        found = all_logits(gpt2().model, ids, mask, batch)
    for (own, prefix), logits, real in zip(rows, found, mask.bool(), strict=True):
        torch.testing.assert_close(logits[real], expected(own, prefix), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 1, "use_cache": False}, {"static_positions": 40}]
)
def test_a_mixed_batch_writes_what_each_row_writes_alone(options: dict) -> None:
    found = generate(
        gpt2().model, [ids for ids, _ in ROWS], [prefix for _, prefix in ROWS], pad_token_id=0,
        max_new_tokens=6, do_sample=False, **options,
    )  # fmt: skip
    assert found == [greedy(ids, prefix, 6) for ids, prefix in ROWS]


def test_beams_of_a_prefix_are_those_of_a_batch_of_it_alone() -> None:
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    ids, prefix = ROWS[0]
    together = generate(gpt2().model, [ids, ROWS[2][0]], [prefix, ROWS[2][1]], **options)
    assert together[0] == generate(gpt2().model, [ids], [prefix], **options)[0]


def test_continuations_are_scored_from_position_0() -> None:
    continuations = [[4], [9, 10, 11]]
    batch = PrefixBatch.gathered([prefix for _, prefix in ROWS], gpt2().layout)
    found = continuation_scores(
        gpt2().model, [ids for ids, _ in ROWS], continuations, batch, pad_token_id=0
    )
    for row, (ids, prefix) in enumerate(ROWS):
        for column, words in enumerate(continuations):
            said = expected([*ids, *words], prefix).log_softmax(-1)
            wanted = sum(said[len(ids) - 1 + i, word] for i, word in enumerate(words))
            torch.testing.assert_close(found[row, column], wanted, atol=1e-4, rtol=1e-4)


def test_a_text_may_fill_the_whole_table_of_positions() -> None:
    most = gpt2().model.config.n_positions
    ids, prefix = [5] * (most - 3), made(4)
    (found,) = generate(gpt2().model, [ids], [prefix], pad_token_id=0, max_new_tokens=4)
    assert found == greedy(ids, prefix, 4)
    placed = made(4, placeless=False)
    with pytest.raises(ModelError, match="positions"):
        generate(gpt2().model, [ids], [placed], pad_token_id=0, max_new_tokens=4)


def test_a_served_request_has_the_room_of_the_whole_table() -> None:
    bank, most = AdapterBank(gpt2()), gpt2().model.config.n_positions
    bank.add("placeless", made(4))
    bank.add("placed", made(4, placeless=False))
    engine, loop = Engine(bank, max_rows=2, max_waiting=8), asyncio.new_event_loop()

    def asked(name: str) -> Answer:
        """An answer to all but ten positions, as long as there is room for."""
        library = Library(engine, None, base_name="gpt2")
        request = CompletionRequest(model=name, prompt=" ".join(["w5"] * (most - 10)))
        limits = RequestLimits(max_tokens=2 * most)
        return CompletionStream(library, limits, request, loop).answers[0]

    def told(name: str, prompt: int, new: int) -> list[int]:
        ended, ids = threading.Event(), []

        def tell(update: Update) -> None:
            ids.extend(token.id for token in update.tokens)
            if update.last:
                ended.set()

        adapters = (RequestAdapter(name, *bank.parts(name)),)
        sampling = Sampling(max_tokens=new, ignore_eos=True)
        engine.submit([Answer([5] * prompt, adapters, sampling, tell)])
        assert ended.wait(60)
        return ids

    try:
        assert [asked(name).positions for name in ("placeless", "placed")] == [most, most]
        assert told("placeless", most - 3, 3)[:2] == greedy([5] * (most - 3), made(4), 2)
        with pytest.raises(UserError, match=r"\(adapter 0, prompt"):
            told("placeless", most - 3, 4)
        with pytest.raises(UserError, match=r"\(adapter 4, prompt"):
            told("placed", most - 3, 3)
    finally:
        engine.close()
        loop.close()
    gated: Any = Gated(made(4), SimpleNamespace())  # type: ignore[arg-type]
    assert RequestAdapter("gated", gated).positions == 0


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    files = PrefixTuning.from_prefix(made(4), gpt2()).files()
    files = dataclasses.replace(files, info=AdapterInfo(base=base_info(gpt2())))
    write_adapter(tmp_path / "mine", files)
    return tmp_path / "mine"


def test_files_of_it_are_read_as_what_they_are(saved: Path) -> None:
    files = read_adapter(saved)
    compiled = compile_files(files, gpt2())
    assert isinstance(compiled, KVPrefix)
    assert compiled.placeless
    assert compiled.positions == 0
    assert all(torch.equal(a, b) for a, b in zip(compiled.keys, made(4).keys, strict=True))
    assert verify(saved, base=gpt2()).passed
    again = PrefixTuning.from_prefix(compiled, gpt2())
    assert again.prefix().placeless
    assert again.files().peft_type == files.peft_type == "PTKIT_PLACELESS_PREFIX"
    assert (again.virtual_tokens, again.positions) == (4, 0)


def test_nothing_that_counts_virtual_tokens_takes_it(saved: Path, tmp_path: Path) -> None:
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(gpt2().model, saved)
    for engine in ("vllm", "transformers"):
        with pytest.raises(AdapterError, match="its texts begin at position 0"):
            writer(engine)([saved], tmp_path / engine, base=gpt2())
    with pytest.raises(AdapterError, match="takes no positions"):
        as_prompt(read_adapter(saved), gpt2())
    loaded = LoadedAdapter(saved, gpt2(), made(4), AdapterInfo())
    with pytest.raises(AdapterError, match="takes no positions"):
        loaded.inputs(gpt2().tokenizer(["w5 w6"], return_tensors="pt"))
    llama = random_base("llama")
    shape = llama.layout.widest
    flat = torch.zeros(2, len(llama.layout) * 2 * shape.kv_heads * shape.key_dim)
    turning = dataclasses.replace(KVPrefix.from_flat(flat, llama.layout), placeless=True)
    with pytest.raises(AdapterError, match="models with a table of positions"):
        PrefixTuning.from_prefix(turning, llama)
    with pytest.raises(AdapterError, match="begin at different positions"):
        KVPrefix.concatenated([made(2), made(2, placeless=False)])


def test_a_bank_mixes_it_with_others_and_talks_with_it(saved: Path) -> None:
    bank = AdapterBank(gpt2())
    bank.load(saved, "mine")
    bank.add("other", made(3, 1, placeless=False))
    texts = ["w5 w9 w12", "w5 w9 w12", "w7"]
    names = ["mine", "other", None]
    found = bank.generate_ids([[5, 9, 12], [5, 9, 12], [7]], names, max_new_tokens=5)
    prefixes = [made(4), made(3, 1, placeless=False), None]
    ids = [[5, 9, 12], [5, 9, 12], [7]]
    assert found == [greedy(i, p, 5) for i, p in zip(ids, prefixes, strict=True)]
    table = bank.slots(3, slots=2, virtual_tokens=5)
    for row, name in enumerate(names):
        table.assign(row, name)
    read, mask = pad_rows(ids, 0, left=True)
    with torch.no_grad():
        slotted = all_logits(gpt2().model, read, mask, table.batch())
    for own, prefix, logits in zip(ids, prefixes, slotted, strict=True):
        torch.testing.assert_close(logits[-len(own) :], expected(own, prefix), atol=1e-4, rtol=1e-4)
    talk = Conversation(bank, adapter="mine")
    first = talk.say(texts[0], max_new_tokens=3)
    assert talk.exchanges[0].answer_ids == greedy([5, 9, 12], made(4), 3)
    talk.say("w7", max_new_tokens=3)
    fresh = Conversation(bank, adapter="mine")
    assert fresh.say(texts[0], max_new_tokens=3) == first
    assert fresh.say("w7", max_new_tokens=3) == talk.exchanges[1].answer
