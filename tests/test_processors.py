"""Logits processors and stopping criteria read what was said: no padding, no placeholder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import random_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_peft_parity import LEARNT, make_adapter, peft_twin, rows_of
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation import LogitsProcessor, StoppingCriteria

from ptkit import AdapterBank
from ptkit.errors import ModelError
from ptkit.families.kinds import DECODER, ENCODER_DECODER
from ptkit.families.model_under_test import small_model
from ptkit.families.shapes import FAMILIES, small
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.cache import prefilled_cache
from ptkit.runtime.generation import generate

PENALTIES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
LENGTHS = [4, 9, 6, 9]
NAMES = ["prefix", None, "prompt", ("prompt", "prefix")]


def bank_of(base: Base) -> AdapterBank:
    torch.manual_seed(2)
    bank = AdapterBank(base)
    for name, length in (("prefix", 5), ("prompt", 3)):
        bank.add(name, make_adapter(base, {**LEARNT[name], "num_virtual_tokens": length}))
    return bank


def small_base(family: str, kind=DECODER) -> Base:
    return small_model(family, small(FAMILIES[family].config), kind).base()


def answers(bank: AdapterBank, prompts, names, **options: Any) -> list[list[int]]:
    return generate(
        bank.base.model, prompts, bank.rows(names, prompts),
        **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": bank.base.pad_token_id,
           **options},
    )  # fmt: skip


@torch.no_grad()
def by_hand(bank: AdapterBank, prompt: list[int], name: Any, tokens: int) -> list[int]:
    """Greedy search in a loop of our own; transformers' processors are given the real ids."""
    model, said = bank.base.model, [*prompt]
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(2)]
    )
    while len(said) < len(prompt) + tokens:
        batch, ids = bank.rows([name]), torch.tensor([said])
        cache = prefilled_cache(model, batch, DynamicCache()) if batch.longest else None
        mask = torch.ones(1, batch.longest + len(said), dtype=torch.long)
        logits = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
        said.append(int(processors(ids, logits[:, -1].clone()).argmax()))
        if said[-1] == 0:
            return said[len(prompt) : -1]
    return said[len(prompt) :]


@pytest.mark.parametrize("said_in", ["the call", "the base"])
def test_penalties_count_what_was_said_whatever_the_prefix_and_the_padding(
    family: str, said_in: str
) -> None:
    bank = bank_of(random_base(family))
    prompts = rows_of(LENGTHS)
    options = dict(PENALTIES)
    if said_in == "the base":
        bank.base.model.generation_config.update(**options)
        options = {}
    expected = [by_hand(bank, p, n, 8) for p, n in zip(prompts, NAMES, strict=True)]
    # What stands for padding and for a prefix is a word that answers begin with.
    words = {row[0] for row, prompt in zip(expected, prompts, strict=True) if row[0] not in prompt}
    assert words
    for pad in words:
        said = {"pad_token_id": pad, **options}
        assert answers(bank, prompts, NAMES, **said) == expected
        assert answers(bank, prompts, NAMES, use_cache=False, **said) == expected
        assert answers(bank, prompts, NAMES, static_positions=40, **said) == expected


def test_a_penalised_prefix_answers_as_peft_does(family: str) -> None:
    torch.manual_seed(3)
    base = random_base(family)
    adapter = make_adapter(base, LEARNT["prefix"])
    theirs, _ = peft_twin(family, adapter)
    (prompt,) = rows_of([7])
    ids = torch.tensor([prompt])
    expected = theirs.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False,
        pad_token_id=0, eos_token_id=None, **PENALTIES,
    )  # fmt: skip
    (found,) = generate(
        base.model, [prompt], PrefixBatch.shared(adapter.compiled(), 1), pad_token_id=0,
        max_new_tokens=10, do_sample=False, eos_token_id=None, **PENALTIES,
    )  # fmt: skip
    assert found == expected[0, len(prompt) :].tolist()


ENDS = {
    "min_length": {"min_length": 12, "eos_token_id": [*range(40)]},
    "min_new_tokens": {"min_new_tokens": 4, "eos_token_id": [*range(40)]},
    "max_length": {"max_length": 13, "max_new_tokens": None},
    "forced end": {"forced_eos_token_id": 5, "eos_token_id": None},
    "forced end by length": {
        "forced_eos_token_id": 5, "max_length": 13, "max_new_tokens": None, "eos_token_id": None,
    },
    "decay": {"exponential_decay_length_penalty": (2, 1.6)},
    "begin": {"begin_suppress_tokens": [*range(30)]},
    "bad words": {"bad_words_ids": [[i] for i in range(1, 30)]},
    "copied": {"encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2},
    "beams": {**PENALTIES, "num_beams": 3},
    "allowed": {"prefix_allowed_tokens_fn": lambda _, ids: [int(ids[0]), int(ids[-1]) // 2 + 1]},
}  # fmt: skip


@pytest.mark.parametrize("case", ENDS)
def test_what_depends_on_length_or_ids_is_in_a_batch_as_alone_in_transformers(case: str) -> None:
    bank = bank_of(random_base("llama"))
    prompts = rows_of(LENGTHS)
    options = ENDS[case]
    if case == "allowed":  # a row's number is that of the batch, the ids are its own
        given = options["prefix_allowed_tokens_fn"]

        def allowed(number: int, ids: torch.Tensor) -> list[int]:
            assert ids.tolist()[: len(prompts[number])] == prompts[number]
            return given(number, ids)

        options = {"prefix_allowed_tokens_fn": allowed}
    found = answers(bank, prompts, NAMES, **options)
    for i, (row, prompt, name) in enumerate(zip(found, prompts, NAMES, strict=True)):
        if case == "allowed":
            options = {"prefix_allowed_tokens_fn": lambda _, ids: given(0, ids)}
        ids = torch.tensor([prompt])
        if name is None:
            (whole,) = bank.base.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0,
                **{"max_new_tokens": 8, "do_sample": False, **options},
            ).tolist()  # fmt: skip
            ends = options.get("eos_token_id", 0)
            ends = ends if isinstance(ends, list) else [ends]
            new = whole[len(prompt) :]
            expected = new[: next((j for j, t in enumerate(new) if t in ends), len(new))]
        else:  # with the prefix in the attention there is no placeholder, and alone no padding
            (expected,) = answers(bank, [prompt], [name], use_cache=False, **options)
        assert row == expected, i


class Recorder(LogitsProcessor):
    """What processors are shown, and a choice that depends on nothing else."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen += input_ids.tolist()
        assert len(input_ids) == len(scores)
        return scores


class Stops(StoppingCriteria):
    """Ends a text when it has a multiple of five tokens."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kw: Any) -> torch.Tensor:
        self.seen += input_ids.tolist()
        return torch.full((len(input_ids),), input_ids.shape[1] % 5 == 0)


BANKS: dict[str, AdapterBank] = {}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "lfm2"])
@given(
    rows=st.lists(
        st.tuples(st.integers(1, 7), st.sampled_from([None, "prefix", "prompt"])),
        min_size=1, max_size=5,
    ),
    beams=st.sampled_from([1, 1, 2]),
    cached=st.booleans(),
)  # fmt: skip
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
def test_processors_and_criteria_see_each_rows_own_ids(family, rows, beams, cached) -> None:
    if family not in BANKS:
        BANKS[family] = bank_of(random_base("llama") if family == "llama" else small_base(family))
    bank = BANKS[family]
    prompts = [[i % 90 + 3 for i in row] for row in rows_of([length for length, _ in rows])]
    soft = family == "lfm2" and any(name == "prompt" for _, name in rows)
    beams = 1 if family == "lfm2" else beams  # transformers cannot reorder its states
    recorder, stops = Recorder(), Stops()
    found = answers(
        bank, prompts, [name for _, name in rows], num_beams=beams, eos_token_id=None,
        use_cache=cached or soft, logits_processor=LogitsProcessorList([recorder]),
        stopping_criteria=[stops], max_new_tokens=6,
    )  # fmt: skip
    for seen in (recorder.seen, stops.seen):
        assert all(any(ids[: len(p)] == p for p in prompts) for ids in seen)
    for prompt, answer in zip(prompts, found, strict=True):
        if beams == 1:
            ended = min(6, 5 - len(prompt) % 5)
            assert len(answer) == ended  # not a word after it, whatever the others still write
            assert all([*prompt, *answer[:i]] in recorder.seen for i in range(ended))


def test_an_encoders_input_is_read_without_padding_and_without_its_soft_prompt() -> None:
    bank = bank_of(small_base("t5", ENCODER_DECODER))
    prompts = [[i % 80 + 3 for i in row] for row in rows_of([3, 6, 6])]
    options = {"encoder_repetition_penalty": 1.8, "encoder_no_repeat_ngram_size": 2}
    names = ["prompt", None, "prefix"]
    together = answers(bank, prompts, names, **options)
    for row, prompt, name in zip(together, prompts, names, strict=True):
        assert answers(bank, [prompt], [name], **options) == [row]
    ids = torch.tensor([prompts[1]])
    (plain,) = bank.base.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
        **options,
    ).tolist()  # fmt: skip
    assert plain[1 : 1 + len(together[1])] == together[1]


def test_what_cannot_be_counted_is_refused_and_nothing_stays_on_the_model() -> None:
    bank = bank_of(random_base("llama"))
    prompts = rows_of([3, 12])
    with pytest.raises(ModelError, match="`max_length` is 12 and counts the prompt, which has 12"):
        answers(bank, prompts, [None, "prefix"], max_length=12, max_new_tokens=None)
    with pytest.raises(ModelError, match="`guidance_scale` reads with the model itself"):
        answers(bank, prompts, [None, "prefix"], guidance_scale=1.5)
    assert not {name for name in bank.base.model.__dict__ if name.startswith("_get_")}
