"""A kept cache answers like a fresh full reading, and reads new tokens only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import random_base
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_peft_parity import LEARNT, make_adapter

from ptkit.bank import AdapterBank, Conversation
from ptkit.errors import AdapterError, ModelError, UserError
from ptkit.runtime.generation import generate

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ 'w1 ' if m.role == 'user' else 'w2 ' }}{{ m.content }} w3 "
    "{% endfor %}{% if add_generation_prompt %}w2 {% endif %}"
)
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def make_bank(family: str, *, template: bool = False) -> AdapterBank:
    torch.manual_seed(5)
    base = random_base(family)
    base.tokenizer.chat_template = CHAT_TEMPLATE if template else None
    bank = AdapterBank(base)
    for name, length in (("prefix", 4), ("prompt", 7)):
        bank.add(name, make_adapter(base, {**LEARNT[name], "num_virtual_tokens": length}))
    return bank


@contextmanager
def tokens_read(bank: AdapterBank) -> Iterator[list[int]]:
    """How many tokens each forward pass read while the context lasts."""
    counts: list[int] = []
    hook = bank.base.embedding.register_forward_pre_hook(
        lambda _, args: counts.append(args[0].shape[-1])
    )
    try:
        yield counts
    finally:
        hook.remove()


words = st.lists(st.integers(4, 60), min_size=1, max_size=4).map(
    lambda ids: " ".join(f"w{i}" for i in ids)
)


@given(
    turns=st.lists(
        st.tuples(st.sampled_from([None, "prefix", "prompt", ("prefix", "prompt")]), words),
        min_size=1, max_size=5,
    ),
    template=st.booleans(),
    system=st.sampled_from([None, "w70 w71"]),
)  # fmt: skip
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_kept_cache_answers_like_a_fresh_reading(family: str, turns, template, system) -> None:
    bank = make_bank(family, template=template)
    conversation = Conversation(bank, system=system)
    for speaker, text in turns:
        conversation.use(speaker)
        fresh = Conversation(bank, adapter=speaker, system=system)
        fresh.exchanges.extend(conversation.exchanges)
        assert conversation.say(text, **GREEDY) == fresh.say(text, **GREEDY)
    assert [exchange.text for exchange in conversation.exchanges] == [text for _, text in turns]


def test_turn_reads_only_its_own_tokens(family: str) -> None:
    bank = make_bank(family)
    conversation = Conversation(bank, adapter="prefix")
    conversation.say("w10 w11 w12 w13 w14 w15 w16", **GREEDY)
    said = len(conversation.exchanges[0].answer_ids)
    with tokens_read(bank) as counts:
        conversation.say("w20 w21", **GREEDY)
    # Its two words and the answer's last token, which nobody had read yet (an end was not said).
    assert counts[0] == 2 + (said == GREEDY["max_new_tokens"])
    assert set(counts[1:]) <= {1}

    conversation.use(None)
    with tokens_read(bank) as counts:
        conversation.say("w30", **GREEDY)
    assert counts[0] > 10  # the base has not read any of it
    conversation.use("prefix")
    with tokens_read(bank) as counts:
        conversation.say("w31", **GREEDY)
    assert counts[0] < 10  # it remembers all but the last turn


def test_first_answer_is_that_of_a_plain_generation(family: str) -> None:
    bank = make_bank(family)
    pieces: list[str] = []
    answer = Conversation(bank, adapter="prompt").say("w10 w11", on_text=pieces.append, **GREEDY)
    (ids,) = generate(bank.base.model, [[10, 11]], bank.rows(["prompt"]), pad_token_id=0, **GREEDY)
    assert answer == bank.base.tokenizer.decode(ids)  # `<unk>` is something the model wrote, too
    assert "".join(pieces).split() == answer.split()
    assert len(pieces) > 1


def test_template_sees_every_message_in_its_role() -> None:
    bank = make_bank("llama", template=True)
    conversation = Conversation(bank, adapter="prefix", system="w70")
    first = conversation.say("w10", **GREEDY)
    with tokens_read(bank) as counts:
        conversation.say("w11", **GREEDY)
    prompt = f"w2 w70 w3 w1 w10 w3 w2 {first} w3 w1 w11 w3 w2"
    ids = bank.base.tokenizer(prompt)["input_ids"]
    (expected,) = generate(bank.base.model, [ids], bank.rows(["prefix"]), pad_token_id=0, **GREEDY)
    assert conversation.exchanges[-1].answer_ids == expected
    assert counts[0] < len(ids)


def test_comparison_equals_each_one_alone_and_changes_nothing(family: str) -> None:
    bank = make_bank(family)
    conversation = Conversation(bank, adapter="prefix")
    conversation.say("w10 w11", **GREEDY)
    before = list(conversation.exchanges)
    names = ["prefix", None, "prompt"]
    after = conversation.compare(["w20", "w20", "w21 w22"], names, **GREEDY)
    instead = conversation.compare(["w10 w11"] * 3, names, instead=True, **GREEDY)
    assert conversation.exchanges == before
    assert instead[0] == before[0].answer
    for name, text, answer in zip(names, ["w20", "w20", "w21 w22"], after, strict=True):
        alone = Conversation(bank, adapter=name)
        alone.exchanges.extend(before)
        assert alone.say(text, **GREEDY) == answer


def test_changed_adapter_reads_again() -> None:
    bank = make_bank("llama")
    conversation = Conversation(bank, adapter="prefix")
    conversation.say("w10 w11", **GREEDY)
    torch.manual_seed(99)
    bank.add("prefix", make_adapter(bank.base, {**LEARNT["prefix"], "num_virtual_tokens": 3}))
    fresh = Conversation(bank, adapter="prefix")
    fresh.exchanges.extend(conversation.exchanges)
    assert conversation.say("w12", **GREEDY) == fresh.say("w12", **GREEDY)


def test_interrupted_turn_leaves_the_conversation_as_it_was() -> None:
    bank = make_bank("llama")
    conversation, untouched = (Conversation(bank, adapter="prefix") for _ in range(2))
    for each in (conversation, untouched):
        each.say("w10 w11", **GREEDY)

    def interrupt(_piece: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.say("w12 w13", on_text=interrupt, **GREEDY)
    assert conversation.exchanges == untouched.exchanges
    assert conversation.say("w14", **GREEDY) == untouched.say("w14", **GREEDY)


def test_too_long_a_conversation_is_refused_and_unknown_names_too() -> None:
    bank = make_bank("llama")
    conversation = Conversation(bank, adapter="prefix")
    with pytest.raises(ModelError, match="too long: random-llama-0 has 128 positions"):
        conversation.say("w10 " * 124, **GREEDY)
    assert conversation.exchanges == []
    conversation.say("w10 " * 121, **GREEDY)
    assert len(conversation.exchanges[0].answer_ids) <= 3  # all that was left
    conversation.reset()
    with pytest.raises(AdapterError, match="did you mean `prefix`"):
        conversation.use("prefx")
    assert conversation.adapter == "prefix"
    conversation.say("w10", **GREEDY)
    conversation.reset()
    with tokens_read(bank) as counts:
        conversation.say("w10", **GREEDY)
    assert counts[0] == 1


@pytest.mark.parametrize("speaker", [None, "prefix", ("prompt", "prefix")])
@pytest.mark.parametrize("ends", [None, [*range(12)]], ids=["no end", "some ends"])
def test_turns_with_beams_answer_like_a_fresh_reading(family: str, speaker, ends) -> None:
    bank = make_bank(family)
    options = {**GREEDY, "num_beams": 3, "eos_token_id": ends, "length_penalty": -0.5}
    conversation = Conversation(bank, adapter=speaker)
    for i, text in enumerate(("w10 w11", "w20", "w30 w31 w32", "w40")):
        fresh = Conversation(bank, adapter=speaker)
        fresh.exchanges.extend(conversation.exchanges)
        chosen = GREEDY if i == 2 else options  # a turn without beams goes on, too
        with tokens_read(bank) as counts:
            said = conversation.say(text, **chosen)
        assert said == fresh.say(text, **chosen)
        if i:  # the prompt of the turn before is not read again: its answer is, and the new words
            assert counts[0] <= 5 + 4
    (alone,) = generate(
        bank.base.model, [conversation._prompt("w40", conversation.exchanges[:-1], speaker)],
        bank.rows([speaker]), pad_token_id=0, **options,
    )  # fmt: skip
    assert conversation.exchanges[-1].answer_ids == alone


def test_a_turn_has_one_answer() -> None:
    conversation = Conversation(make_bank("llama"), adapter="prefix")
    with pytest.raises(UserError, match="a conversation goes on from one answer"):
        conversation.say("w10", num_beams=2, num_return_sequences=2, **GREEDY)
    assert conversation.exchanges == []
