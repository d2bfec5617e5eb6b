"""Many adapters on one base: a row in a mixed batch gets exactly what it gets alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import random_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_peft_parity import LEARNT, make_adapter, rows_of

from ptkit.bank import AdapterBank
from ptkit.bank.conversation import Conversation
from ptkit.errors import AdapterError, UserError
from ptkit.formats.adapter_files import write_adapter
from ptkit.methods import ADAPTERS, Demonstrations
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.generation import generate
from ptkit.runtime.scoring import continuation_scores


def bank_of_many(family: str) -> AdapterBank:
    """A prefix, a soft prompt, a P-tuning prompt and a text prompt, of different lengths, and
    two that were saved in half precision."""
    torch.manual_seed(11)
    base = random_base(family)
    bank = AdapterBank(base, check_every=1e9)
    for name, length in (("prefix", 4), ("prompt", 7), ("p-tuning-mlp", 2)):
        bank.add(name, make_adapter(base, {**LEARNT[name], "num_virtual_tokens": length}))
    for name, dtype in (("prefix", torch.bfloat16), ("prompt", torch.float16)):
        adapter = make_adapter(base, {**LEARNT[name], "num_virtual_tokens": 3})
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adapter"
            write_adapter(path, adapter.files().to(dtype))
            # It leaves with its file: nothing of it may still be mapped.
            bank.load(path, f"{name}, {dtype}")
            bank.prefix(f"{name}, {dtype}")
    text = ADAPTERS["text_prompt"]
    demonstrations = Demonstrations(["w9 w8 w7", "w3 w4"], 0)
    bank.add("text", text.create(text.section_class(kind="text_prompt"), base, demonstrations))
    return bank


BANKS: dict[str, AdapterBank] = {}
NAMES = [
    None, "prefix", "prompt", "p-tuning-mlp", "text", "prefix, torch.bfloat16",
    "prompt, torch.float16", ("prefix", "prompt"),
]  # fmt: skip


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=9),
    lengths=st.lists(st.integers(1, 9), min_size=9, max_size=9),
    seed=st.integers(0, 1000),
    beams=st.sampled_from([1, 2]),
)
def test_row_in_mixed_batch_equals_solo_run(family, names, lengths, seed, beams) -> None:
    bank = BANKS.setdefault(family, bank_of_many(family))
    prompts = rows_of(lengths[: len(names)], seed)
    options = {"pad_token_id": 0, "max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    together = generate(bank.base.model, prompts, bank.rows(names), **options)
    for row, name, prompt in zip(together, names, prompts, strict=True):
        (alone,) = generate(bank.base.model, [prompt], bank.rows([name]), **options)
        assert row == alone


def test_no_row_sees_a_neighbour_full_of_nan(family: str) -> None:
    bank = bank_of_many(family)
    clean = bank.prefix("prefix")
    poison = bank.prefix("prompt").map(lambda t: torch.full_like(t, float("nan")))
    prompts = rows_of([5, 3])
    options = {"pad_token_id": 0, "max_new_tokens": 6, "do_sample": False}
    layout = bank.base.layout
    (alone,) = generate(
        bank.base.model, prompts[:1], PrefixBatch.gathered([clean], layout), **options
    )
    mixed = generate(
        bank.base.model, prompts, PrefixBatch.gathered([clean, poison], layout), **options
    )
    assert mixed[0] == alone


def test_label_scores_in_a_mixed_batch_equal_a_full_forward(family: str) -> None:
    bank = bank_of_many(family)
    model = bank.base.model
    contexts = rows_of([4, 7, 2])
    labels = [[3], [5, 6, 7], [8, 9]]
    names = ["prefix", None, "prompt"]
    scores = continuation_scores(model, contexts, labels, bank.rows(names), pad_token_id=0)
    for row, (context, name) in enumerate(zip(contexts, names, strict=True)):
        for column, label in enumerate(labels):
            from ptkit.runtime.forward import all_logits

            ids = torch.tensor([context + label])
            with torch.no_grad():
                logits = all_logits(model, ids, torch.ones_like(ids), bank.rows([name]))
            log_probs = logits[0].log_softmax(-1)
            expected = sum(log_probs[len(context) - 1 + i, token] for i, token in enumerate(label))
            torch.testing.assert_close(scores[row, column], expected, atol=1e-4, rtol=1e-5)


def test_gathered_gradients_reach_each_rows_own_prefix_only(family: str) -> None:
    bank = bank_of_many(family)
    parts = [
        bank.prefix(name).map(lambda t: t.clone().requires_grad_()) for name in ("prefix", "prompt")
    ]
    batch = PrefixBatch.gathered(parts, bank.base.layout)
    batch.keys[0][0].sum().backward()
    assert parts[0].keys[0].grad is not None
    assert parts[1].keys[0].grad is None or not parts[1].keys[0].grad.any()


@given(
    tokens=st.integers(1, 6), heads=st.integers(1, 3), dim=st.integers(1, 4), n=st.integers(1, 3)
)
@settings(max_examples=30, deadline=None)
def test_flat_layout_round_trips(tokens: int, heads: int, dim: int, n: int) -> None:
    prefix = KVPrefix(
        tuple(torch.randn(heads, tokens, dim) for _ in range(n)),
        tuple(torch.randn(heads, tokens, dim) for _ in range(n)),
    )
    again = KVPrefix.from_flat(prefix.flat(), prefix.layout)
    for ours, theirs in zip(prefix.keys + prefix.values, again.keys + again.values, strict=True):
        assert torch.equal(ours, theirs)


def test_a_bad_file_never_disturbs_the_adapter_in_use(tmp_path) -> None:
    bank = bank_of_many("llama")
    adapter = make_adapter(bank.base, LEARNT["prefix"])
    write_adapter(tmp_path / "good", adapter.files())
    assert bank.load(tmp_path / "good") == "good"
    held = bank.prefix("good")
    (tmp_path / "good" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(AdapterError):
        bank.swap("good", tmp_path / "good")
    assert bank.prefix("good") is held
    bank.unload("good")
    with pytest.raises(AdapterError, match="no adapter `good`"):
        bank.rows(["good"])


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", [None, "prefix", "prompt", "text"])
def test_a_row_without_tokens_is_refused_alone_and_beside_others(
    name: str | None, beams: int
) -> None:
    bank = bank_of_many("llama")
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    uses: list[Callable[[], object]] = [
        lambda: bank.generate([""], [name], **options),
        lambda: Conversation(bank).say("", **options),
        lambda: bank.classify([""], ["w1", "w2 w3"], [name]),
    ]
    for use in uses:
        with pytest.raises(UserError, match="the prompt is empty: it has no tokens"):
            use()
    beside: list[Callable[[], object]] = [
        lambda: bank.generate(["w1 w2", ""], [None, name], **options),
        lambda: bank.classify(["w1 w2", ""], ["w1", "w2 w3"], [name]),
    ]
    for use in beside:
        with pytest.raises(UserError, match="prompt 2 of 2 is empty"):
            use()
