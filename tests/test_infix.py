"""Virtual tokens before the last token of the input, against the plain base as the oracle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, random_base, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_cli import QUICK, ptkit
from test_peft_parity import LEARNT, make_adapter, rows_of
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ptkit import AdapterBank, Conversation, load_adapter
from ptkit.data.encoded import EncodedExample
from ptkit.errors import AdapterError, ModelError
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.methods import adapter_from_files, compile_files
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.compile import compile_tokens
from ptkit.runtime.forward import (
    IGNORED,
    all_logits,
    collate,
    pad_rows,
    supervised_logits,
    token_losses,
)
from ptkit.runtime.generation import generate
from ptkit.runtime.scoring import continuation_scores
from ptkit.training.context_cache import ContextCache
from ptkit.training.objective import Objective

INFIX = {"kind": "prefix_tuning", "num_virtual_tokens": 5, "position": "infix"}


def infix_of(base: Base, tokens: int = 5, seed: int = 0) -> KVPrefix:
    torch.manual_seed(seed)
    adapter = make_adapter(base, {**INFIX, "num_virtual_tokens": tokens})
    return adapter.prefix().detach()


def one_layer(family: str, attention: str) -> Base:
    """A model whose only layer reads nothing but the words themselves and their positions."""
    shape = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "eos_token_id": 0,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    torch.manual_seed(4)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
        "wide": lambda: LlamaForCausalLM(LlamaConfig(**shape, head_dim=16)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16)),
    }[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    model.set_attn_implementation(attention)
    return frozen_base(model.eval(), word_tokenizer(), family)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "wide", "qwen3"])
@given(
    before=st.integers(0, 9), virtual=st.integers(1, 6), after=st.integers(2, 7),
    seed=st.integers(0, 50),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_real_tokens_as_an_infix_are_read_as_if_they_were_written_there(
    family: str, attention: str, before: int, virtual: int, after: int, seed: int
) -> None:
    """With one layer, keys and values are of single words: the base reading the whole text is
    exactly the base reading it with the middle as an infix."""
    base = one_layer(family, attention)
    (text,) = rows_of([before + virtual + after], seed)
    middle = torch.tensor(text[before : before + virtual])
    infix = replace(compile_tokens(base.model, middle), infix=True)
    left = torch.tensor([text[:before] + text[before + virtual :]])
    labels = left.clone()
    labels[:, : before + 1] = IGNORED  # the token after the infix is the input's last
    with torch.no_grad():
        whole = base.model(torch.tensor([text])).logits[0, before + virtual : -1]
        found, _ = supervised_logits(
            base.model, left, torch.ones_like(left), labels, PrefixBatch.shared(infix, 1)
        )
    torch.testing.assert_close(found, whole, atol=2e-4, rtol=1e-4)


def test_padded_rows_read_and_score_as_alone(family: str) -> None:
    base = random_base(family)
    infix, prefix = infix_of(base), make_adapter(base, LEARNT["prefix"]).prefix().detach()
    inputs, targets = rows_of([7, 1, 3, 5]), rows_of([4, 2, 5, 3], seed=2)
    own = [infix, infix, None, prefix]

    def nats(rows: list[int]) -> list[float]:
        ids, mask = pad_rows([inputs[i] + targets[i] for i in rows], 0, left=False)
        labels = ids.clone()
        for row, i in enumerate(rows):
            labels[row, : len(inputs[i])] = IGNORED
            labels[row, len(inputs[i]) + len(targets[i]) :] = IGNORED
        batch = PrefixBatch.gathered([own[i] for i in rows], base.layout)
        with torch.no_grad():
            losses = token_losses(*supervised_logits(base.model, ids, mask, labels, batch))
        return [float(part.sum()) for part in losses.split([len(targets[i]) for i in rows])]

    together = nats([0, 1, 2, 3])
    alone = [nats([i])[0] for i in range(4)]
    assert together == pytest.approx(alone, abs=1e-4)
    for i in range(4):
        batch = PrefixBatch.gathered(own, base.layout)
        scores = continuation_scores(base.model, inputs, [targets[i]], batch, pad_token_id=0)
        assert float(scores[i, 0]) == pytest.approx(-alone[i], abs=1e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_teacher_forced_reading_in_any_company(family: str, beams: int) -> None:
    base = random_base(family)
    infix, prefix = infix_of(base, 4), make_adapter(base, LEARNT["prompt"]).prefix().detach()
    inputs = rows_of([6, 1, 4, 3, 2])
    own = [infix, infix_of(base, 6, seed=9), None, prefix, infix]
    options = {"pad_token_id": 0, "max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    batch = PrefixBatch.gathered(own, base.layout)
    together = generate(base.model, inputs, batch, **options)
    for i, answer in enumerate(together):
        solo = PrefixBatch.gathered([own[i]], base.layout)
        assert answer == generate(base.model, [inputs[i]], solo, **options)[0]
        if beams > 1 or own[i] is None or not answer:
            continue
        ids = torch.tensor([inputs[i] + answer])
        labels = ids.clone()
        labels[:, : len(inputs[i])] = IGNORED
        with torch.no_grad():
            logits, _ = supervised_logits(base.model, ids, torch.ones_like(ids), labels, solo)
        assert logits.argmax(-1).tolist() == answer


def test_input_before_the_last_token_is_read_as_by_the_base(family: str) -> None:
    base = random_base(family)
    ids = torch.tensor(rows_of([9, 9]))
    mask = torch.ones_like(ids)
    batch = PrefixBatch.shared(infix_of(base), 2)
    with torch.no_grad():
        plain = base.model(ids).logits
        found = all_logits(base.model, ids, mask, batch)
    torch.testing.assert_close(found[:, :-1], plain[:, :-1], atol=1e-5, rtol=1e-5)
    assert (found[:, -1] - plain[:, -1]).abs().max() > 0.1


def test_gradients_reach_the_infix_alone_and_survive_checkpointing(family: str) -> None:
    def gradient(checkpointed: bool) -> torch.Tensor:
        torch.manual_seed(3)
        base = random_base(family)
        adapter = make_adapter(base, INFIX)
        if checkpointed:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
            base.model.train()
        ids = torch.tensor(rows_of([8, 8]))
        labels = ids.clone()
        labels[:, :4] = IGNORED
        batch = PrefixBatch.shared(adapter.prefix(), 2)
        loss = token_losses(
            *supervised_logits(base.model, ids, torch.ones_like(ids), labels, batch)
        ).mean()
        loss.backward()
        assert all(p.grad is None for p in base.model.parameters())
        return adapter.encoder.embedding.weight.grad

    plain, checkpointed = gradient(False), gradient(True)
    assert plain.abs().max() > 0
    torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-4)


def test_saved_infix_is_an_infix_again_and_peft_does_not_take_it(tmp_path: Path) -> None:
    base = random_base("llama")
    adapter = make_adapter(base, INFIX)
    write_adapter(tmp_path / "infix", adapter.files())
    files = read_adapter(tmp_path / "infix")
    assert compile_files(files, base).infix
    again = adapter_from_files(files, base)
    assert again.section.position == "infix"
    assert torch.equal(again.flat(), adapter.flat())
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(base.model, str(tmp_path / "infix"))
    bank = AdapterBank(base)
    bank.load(tmp_path / "infix")
    loaded = load_adapter(tmp_path / "infix", base)
    options = {"max_new_tokens": 5, "do_sample": False}
    texts = ["w1 w2 w3", "w9"]
    assert loaded.generate(texts, **options) == bank.generate(texts, ["infix"] * 2, **options)


def test_what_an_infix_cannot_do_is_refused(tmp_path: Path) -> None:
    base = random_base("llama")
    write_adapter(tmp_path / "infix", make_adapter(base, INFIX).files())
    write_adapter(tmp_path / "prefix", make_adapter(base, LEARNT["prefix"]).files())
    bank = AdapterBank(base)
    bank.load(tmp_path / "infix")
    bank.load(tmp_path / "prefix")
    with pytest.raises(AdapterError, match="prefix and an infix cannot be composed"):
        bank.rows([("infix", "prefix")])
    with pytest.raises(AdapterError, match="no fixed place"):
        bank.slots(rows=1, slots=2, virtual_tokens=8).assign(0, "infix")
    with pytest.raises(ModelError, match="belongs to one input"):
        Conversation(bank, adapter="infix").say("w1 w2", max_new_tokens=2)
    encoding = {"input_ids": torch.ones(1, 2, dtype=torch.long),
                "attention_mask": torch.ones(1, 2, dtype=torch.long)}  # fmt: skip
    with pytest.raises(AdapterError, match=r"model\.generate"):
        load_adapter(tmp_path / "infix", base).inputs(encoding)


def test_family_that_turns_keys_in_another_way_is_refused() -> None:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    model = CohereForCausalLM(
        CohereConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48,
                     num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     eos_token_id=0, pad_token_id=0)
    )  # fmt: skip
    base = frozen_base(model.eval(), word_tokenizer(), "cohere")
    with pytest.raises(ModelError, match="use `position: prefix`"):
        make_adapter(base, INFIX)


def test_trains_beside_a_prefix_in_a_sweep(tmp_path: Path) -> None:
    ptkit("compare", "prefix-position-tiny", *QUICK, "--set", "seeds=[0]", "--quiet", "--out",
          "out", cwd=tmp_path)  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert [row["sweep"] for row in rows] == [{"position": where} for where in ("prefix", "infix")]
    assert rows[0]["metrics"] != rows[1]["metrics"]
    assert all(row["adapter_off_exact"] for row in rows)


@pytest.mark.parametrize("budget", [0, 10**9])
def test_kept_contexts_change_nothing_but_the_time(family: str, budget: int) -> None:
    """Loss and gradient are those of reading every row from its first token."""

    def found(kept: bool) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(3)
        base = random_base(family)
        adapter = make_adapter(base, INFIX)
        rows = [EncodedExample(i, t) for i, t in
                zip(rows_of([9, 1, 5]), rows_of([4, 3, 2], seed=2), strict=True)]  # fmt: skip
        objective = Objective([adapter])
        if not kept:
            loss = objective([0], [3], **collate(rows, base))
        else:
            cache = ContextCache(base, budget)
            for _ in range(2):  # the second time from memory, where there is room
                contexts = cache.contexts(rows)
            assert (cache.nbytes > 0) == (budget > 0)
            loss = objective([0], [3], **collate(cache.shortened(rows), base), contexts=contexts)
        loss.sum().backward()
        return loss.detach(), adapter.encoder.embedding.weight.grad

    (loss, gradient), (own_loss, own_gradient) = found(True), found(False)
    torch.testing.assert_close(loss, own_loss, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(gradient, own_gradient, atol=1e-4, rtol=1e-3)


def test_budget_of_contexts_is_kept() -> None:
    base = random_base("gpt2")
    rows = [EncodedExample(i, [1]) for i in rows_of([20] * 6)]
    whole = ContextCache(base, 10**9)
    whole.contexts(rows)
    some = ContextCache(base, whole.nbytes // 2)
    some.contexts(rows)
    assert whole.nbytes // 3 <= some.nbytes <= whole.nbytes // 2
