"""The loop behind the server: every answer is its own, whoever shares the batch."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from test_composition import save_lora
from test_paged_batch import random_prefix
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from ptkit.bank import AdapterBank
from ptkit.errors import PtkitError, UserError
from ptkit.runtime.base_model import load_base
from ptkit.runtime.block_pool import BlockTable, position_bytes
from ptkit.runtime.model_names import TINY_EN
from ptkit.serve.answer import (
    Answer,
    DrainingError,
    InUseError,
    NoMemoryError,
    QueueFullError,
    RequestAdapter,
    TimedOutError,
    Update,
)
from ptkit.serve.engine import Engine
from ptkit.serve.sampling import NotFiniteError, SamplerState, Sampling, sample
from ptkit.serve.scheduler import BlockBudget
from ptkit.serve.text import TextStream


class Asked:
    """An answer and what was told of it."""

    def __init__(
        self, bank: AdapterBank, names: list[str | None], prompt: list[int], **options: object
    ) -> None:
        deadline = options.pop("deadline", None)
        self.updates: list[Update] = []
        self.times: list[float] = []
        self.ended = threading.Event()
        adapters = tuple(
            RequestAdapter(name or "base", *(bank.parts(name) if name else (None, None)))
            for name in names
        )
        sampling = Sampling(**{"max_tokens": 8, "ignore_eos": True, **options})
        self.answer = Answer(prompt, adapters, sampling, self._tell, deadline=deadline)

    def _tell(self, update: Update) -> None:
        self.updates.append(update)
        self.times.append(time.monotonic())
        if update.last:
            self.ended.set()

    @property
    def ids(self) -> list[int]:
        assert self.ended.wait(60)
        return [token.id for update in self.updates for token in update.tokens]

    @property
    def error(self) -> PtkitError | None:
        assert self.ended.wait(60)
        return self.updates[-1].error


@pytest.fixture
def bank() -> AdapterBank:
    base = random_base("qwen3")
    bank = AdapterBank(base)
    for number in range(6):
        bank.add(f"a{number}", random_prefix(base, number + 1, number))
    bank.add("infix", random_prefix(base, 3, 77, infix=True))
    return bank


@pytest.fixture
def engine(bank: AdapterBank) -> Iterator[Engine]:
    engine = Engine(bank, max_rows=8, max_waiting=64, piece=16)
    yield engine
    engine.close()


def settled(engine: Engine) -> bool:
    """Whether the engine has nothing left to do; the last word is told before its row is free."""
    end = time.monotonic() + 10
    while not engine.idle and time.monotonic() < end:
        time.sleep(0.005)
    return engine.idle


def prompt(draw: random.Random, most: int = 20) -> list[int]:
    return [draw.randrange(1, 96) for _ in range(draw.randint(1, most))]


def test_every_answer_is_its_solo_greedy_run(bank: AdapterBank, engine: Engine) -> None:
    """More answers than rows, inputs longer and shorter than a piece, infixes, the plain base."""
    draw = random.Random(0)
    asked = [
        Asked(bank, [draw.choice([None, *bank.list()])], prompt(draw, 40),
              max_tokens=draw.randint(1, 12))
        for _ in range(60)
    ]  # fmt: skip
    for part in (asked[:25], asked[25:]):
        engine.submit([a.answer for a in part])
        time.sleep(0.05)
    for a in asked:
        name = a.answer.adapters[0].name
        (expected,) = bank.generate_ids(
            [a.answer.prompt], [None if name == "base" else name],
            max_new_tokens=a.answer.sampling.max_tokens, do_sample=False, eos_token_id=None,
        )  # fmt: skip
        assert a.ids == expected
        assert a.updates[-1].finish == "length"
    assert settled(engine)


def test_several_adapters_answer_together_as_the_banks_ensemble(
    bank: AdapterBank, engine: Engine
) -> None:
    names = ["a0", "a3", "a5"]
    beside = [Asked(bank, ["a1"], [4, 5, 6], max_tokens=10) for _ in range(3)]
    together = Asked(bank, [*names], [1, 2, 3, 4], max_tokens=10)
    engine.submit([beside[0].answer, together.answer, *(a.answer for a in beside[1:])])
    text = bank.base.tokenizer.decode([1, 2, 3, 4])
    (expected,) = bank.ensemble(
        [text], names, by="average", max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    assert bank.base.tokenizer.decode(together.ids, skip_special_tokens=True) == expected


def test_a_seed_gives_the_same_answer_whatever_runs_beside_it(
    bank: AdapterBank, engine: Engine
) -> None:
    options = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "max_tokens": 12}
    first = Asked(bank, ["a2"], [5, 6, 7], **options)
    engine.submit([first.answer])
    alone = first.ids
    crowd = [Asked(bank, [f"a{i % 6}"], [9, 8], temperature=1.0) for i in range(7)]
    again = Asked(bank, ["a2"], [5, 6, 7], **options)
    other = Asked(bank, ["a2"], [5, 6, 7], **{**options, "seed": 8})
    engine.submit([*(a.answer for a in crowd), again.answer, other.answer])
    assert again.ids == alone
    assert other.ids != alone


def test_logprobs_are_the_models_own(bank: AdapterBank, engine: Engine) -> None:
    asked = Asked(bank, ["a1"], [5, 6, 7], logprobs=3, temperature=0.7, seed=1)
    engine.submit([asked.answer])
    ids = asked.ids
    tokens = [token for update in asked.updates for token in update.tokens]
    from ptkit.runtime.forward import all_logits

    whole = torch.tensor([[5, 6, 7, *ids]])
    logits = all_logits(bank.base.model, whole, torch.ones_like(whole), bank.rows(["a1"]))
    logprobs = logits[0].log_softmax(-1)
    for at, token in enumerate(tokens):
        row = logprobs[2 + at]
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [i for i, _ in token.top] == row.topk(3).indices.tolist()


def test_penalties_are_taken_from_what_was_said() -> None:
    logits = torch.tensor([0.0, 2.0, 1.9])
    sampling = Sampling(9, frequency_penalty=0.08, presence_penalty=0.05)
    state = SamplerState(sampling)
    # 2.0 | 1.87 < 1.9 | 1.87 > 1.77 | 1.79 > 1.77
    assert [sample(logits[None], [state])[0].id for _ in range(4)] == [1, 2, 1, 1]


def test_a_long_input_does_not_hold_short_answers_back(bank: AdapterBank) -> None:
    """While an input of many pieces is read, a short request joins, is written and leaves."""
    engine = Engine(bank, max_rows=4, piece=2)
    try:
        long = Asked(bank, ["a0"], [3] * 100, max_tokens=1)
        engine.submit([long.answer])
        short = Asked(bank, ["a1"], [5, 6], max_tokens=5)
        engine.submit([short.answer])
        assert short.ids
        assert short.times[-1] < (long.ids and long.times[0])
    finally:
        engine.close()


def test_one_adapters_crowd_does_not_keep_anothers_out(bank: AdapterBank) -> None:
    engine = Engine(bank, max_rows=2, max_waiting=64)
    try:
        crowd = [Asked(bank, ["a0"], [5, 6], max_tokens=20) for _ in range(20)]
        engine.submit([a.answer for a in crowd])
        lone = Asked(bank, ["a1"], [5, 6], max_tokens=20)
        engine.submit([lone.answer])
        assert lone.ids
        assert sum(a.ended.is_set() for a in crowd) <= 6
        assert all(a.ids for a in crowd)
    finally:
        engine.close()


def test_who_asks_too_much_is_told_at_once(bank: AdapterBank) -> None:
    engine = Engine(bank, max_rows=2, max_waiting=3)
    try:
        with pytest.raises(UserError, match=r"needs 134 positions \(adapter 6, prompt 100"):
            engine.submit([Asked(bank, ["a5"], [1] * 100, max_tokens=28).answer])
        with pytest.raises(UserError, match="at most 2 can"):
            engine.submit([Asked(bank, ["a0", "a1", "a2"], [1]).answer])
        with pytest.raises(UserError, match="4 answers, of which at most 3 may wait"):
            engine.submit([Asked(bank, ["a0"], [1]).answer for _ in range(4)])
        assert engine.idle, "all or none"
    finally:
        engine.close()


def test_cancelled_and_late_answers_free_their_rows(bank: AdapterBank) -> None:
    engine = Engine(bank, max_rows=2, piece=4)
    try:
        cancelled = [Asked(bank, ["a0"], [3] * n, max_tokens=60) for n in (2, 60, 3)]
        engine.submit([a.answer for a in cancelled])
        late = Asked(bank, ["a1"], [4], max_tokens=60, deadline=time.monotonic())
        time.sleep(0.02)
        engine.submit([late.answer])
        assert isinstance(late.error, TimedOutError)
        engine.cancel([a.answer for a in cancelled])
        after = Asked(bank, ["a2"], [4, 5])
        engine.submit([after.answer])
        (expected,) = bank.generate_ids(
            [[4, 5]], ["a2"], max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert after.ids == expected
        assert settled(engine)
        assert not any(a.ended.is_set() for a in cancelled)
    finally:
        engine.close()


def test_an_adapter_that_makes_no_sense_fails_alone(bank: AdapterBank, engine: Engine) -> None:
    bank.add("bad", random_prefix(bank.base, 4, 3).map(lambda t: t * float("nan")))
    bad = [Asked(bank, ["bad"], [5, 6]), Asked(bank, ["bad"], [5], temperature=1.0)]
    good = [Asked(bank, [f"a{i}"], [5, 6]) for i in range(4)]
    engine.submit([good[0].answer, bad[0].answer, *(a.answer for a in good[1:]), bad[1].answer])
    assert all(isinstance(a.error, NotFiniteError) for a in bad)
    for number, a in enumerate(good):
        (expected,) = bank.generate_ids(
            [[5, 6]], [f"a{number}"], max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert a.ids == expected


def test_a_prefix_swapped_under_way_changes_the_next_answer_only(
    bank: AdapterBank, engine: Engine
) -> None:
    before = Asked(bank, ["a3"], [7, 8, 9], max_tokens=60)
    (expected,) = bank.generate_ids(
        [[7, 8, 9]], ["a3"], max_new_tokens=60, do_sample=False, eos_token_id=None
    )
    engine.submit([before.answer])
    bank.add("a3", random_prefix(bank.base, 5, 99))
    after = Asked(bank, ["a3"], [7, 8, 9], max_tokens=60)
    engine.submit([after.answer])
    assert before.ids == expected
    assert after.ids != expected


def test_lora_rows_beside_prefixes_and_no_change_while_in_use(tmp_path: Path) -> None:
    base = random_base("llama")
    bank = AdapterBank(base)
    save_lora("llama", tmp_path / "lora", seed=1)
    bank.load(tmp_path / "lora", "lora")
    bank.add("prefix", random_prefix(base, 3, 1))
    engine = Engine(bank, max_rows=4)
    try:
        asked = [Asked(bank, [name], [7, 8, 9], max_tokens=40) for name in ("lora", "prefix", None)]
        engine.submit([a.answer for a in asked])
        with pytest.raises(InUseError, match="in use"), engine.changing("lora"):
            pass
        for a, name in zip(asked, ("lora", "prefix", None), strict=True):
            ids = a.ids
            (expected,) = bank.generate_ids(
                [[7, 8, 9]], [name], max_new_tokens=40, do_sample=False, eos_token_id=None
            )
            assert ids == expected
        assert asked[0].ids != asked[2].ids
        with engine.changing("lora"):
            with pytest.raises(InUseError, match="being changed"):
                engine.submit([Asked(bank, ["lora"], [1]).answer])
            bank.unload("lora")
    finally:
        engine.close()


def test_draining_finishes_what_is_there(bank: AdapterBank, engine: Engine) -> None:
    asked = [Asked(bank, [f"a{i % 6}"], [5, 6], max_tokens=30) for i in range(20)]
    engine.submit([a.answer for a in asked])
    engine.drain()
    with pytest.raises(DrainingError):
        engine.submit([Asked(bank, ["a0"], [1]).answer])
    assert all(len(a.ids) == 30 for a in asked)


def test_closing_tells_everybody(bank: AdapterBank) -> None:
    engine = Engine(bank, max_rows=1)
    asked = [Asked(bank, ["a0"], [5, 6], max_tokens=100) for _ in range(3)]
    engine.submit([a.answer for a in asked])
    engine.close()
    assert all(isinstance(a.error, DrainingError) for a in asked)
    assert not engine.alive


def test_a_failing_step_ends_its_answers_and_not_the_loop(
    bank: AdapterBank, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bank.base.model
    forward = model.forward

    def broken(*args: object, **kw: object) -> object:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", broken)
    asked = Asked(bank, ["a0"], [5, 6])
    engine.submit([asked.answer])
    assert "out of memory" in str(asked.error)
    monkeypatch.setattr(model, "forward", forward)
    again = Asked(bank, ["a0"], [5, 6])
    engine.submit([again.answer])
    assert len(again.ids) == 8


def test_an_answer_that_cannot_be_begun_fails_alone_and_is_told(
    bank: AdapterBank, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read together with others, or by itself: whatever is raised, nobody is forgotten."""

    class Bad(Exception):
        pass

    class BadPrefix:
        virtual_tokens, positions, infix = 1, 1, False

        def for_input(self, ids: object) -> object:
            raise Bad("a bad prefix")

    good = [Asked(bank, [name], [5, 6]) for name in ("a0", "a1")]
    bad = Asked(bank, [None], [7, 8])
    bad.answer.adapters = (RequestAdapter("bad", BadPrefix()),)  # type: ignore[arg-type]
    alone = Asked(bank, [None], [7] * 30)
    alone.answer.adapters = bad.answer.adapters
    unsampled = Asked(bank, ["a2"], [9], seed=["no number"])
    engine.submit([a.answer for a in (good[0], bad, unsampled, alone, good[1])])
    for a in good:
        (expected,) = bank.generate_ids(
            [[5, 6]], [a.answer.name], max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        assert a.ids == expected
    assert "a bad prefix" in str(bad.error)
    assert "a bad prefix" in str(alone.error)
    assert "could not be begun" in str(unsampled.error)
    assert settled(engine)


def out_of_memory() -> RuntimeError:
    return RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("where", ["reading", "beginning", "writing"])
def test_memory_that_lasts_for_some_serves_those(
    where: str, bank: AdapterBank, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest of three answers is what memory does not hold."""

    def at_most(tokens: int, real):
        def limited(*args, **kw):
            if len(kw["input_ids"]) > tokens:
                raise out_of_memory()
            return real(*args, **kw)

        return limited

    model = bank.base.model
    if where == "reading":
        monkeypatch.setattr(model, "forward", at_most(10, model.forward))
    else:
        extend = BlockTable.extend
        most = 13 if where == "beginning" else 18

        def extended(self, positions):
            if self.length + positions > most:
                raise out_of_memory()
            return extend(self, positions)

        monkeypatch.setattr(BlockTable, "extend", extended)
    short = [Asked(bank, ["a0"], [5, 6]), Asked(bank, [None], [9, 9, 9])]
    long = Asked(bank, ["a2"], [*range(1, 12)], max_tokens=40)
    engine.submit([short[0].answer, long.answer, short[1].answer])
    assert [len(a.ids) for a in short] == [8, 8]
    assert isinstance(long.error, NoMemoryError | UserError)
    monkeypatch.undo()
    again = Asked(bank, ["a0"], [5, 6])
    engine.submit([again.answer])
    assert again.ids == short[0].ids
    assert settled(engine)


def test_what_does_not_fit_into_memory_by_itself_is_not_told_to_come_again(
    bank: AdapterBank, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kw: object) -> object:
        raise out_of_memory()

    monkeypatch.setattr(bank.base.model, "forward", full)
    asked = Asked(bank, ["a0"], [5, 6])
    engine.submit([asked.answer])
    assert isinstance(asked.error, UserError)
    assert "lower max_tokens" in str(asked.error)


def test_a_full_queue_says_come_again_and_a_request_that_never_fits_does_not(
    bank: AdapterBank, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.scheduler, "admitted", lambda *_: [])  # nobody is begun
    engine.submit([Asked(bank, ["a0"], [5, 6]).answer for _ in range(63)])
    with pytest.raises(QueueFullError, match="63 answers are waiting, of at most 64"):
        engine.submit([Asked(bank, ["a0"], [5, 6]).answer for _ in range(2)])
    with pytest.raises(UserError, match="65 answers, of which at most 64"):
        engine.submit([Asked(bank, ["a0"], [5, 6]).answer for _ in range(65)])


def test_asking_does_not_wait_for_inputs_to_be_begun(
    bank: AdapterBank, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()

    class SlowPrefix:
        virtual_tokens, positions, infix = 1, 1, False

        def for_input(self, ids: object) -> object:
            begun.set()
            assert go_on.wait(20)
            raise RuntimeError("slow")

    slow = Asked(bank, [None], [7, 8])
    slow.answer.adapters = (RequestAdapter("slow", SlowPrefix()),)  # type: ignore[arg-type]
    engine.submit([slow.answer])
    assert begun.wait(20)
    asked = Asked(bank, ["a0"], [5, 6])
    submitted = threading.Thread(target=engine.submit, args=([asked.answer],), daemon=True)
    submitted.start()
    submitted.join(5)
    blocked = submitted.is_alive()
    go_on.set()
    assert not blocked
    assert len(asked.ids) == 8
    assert "slow" in str(slow.error)


def test_a_loop_that_ends_by_whatever_leaves_nobody_waiting(
    bank: AdapterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(bank, max_rows=2)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def ends() -> None:
        raise SystemExit

    monkeypatch.setattr(engine.executor, "step", ends)
    asked = Asked(bank, ["a0"], [5, 6])
    engine.submit([asked.answer])
    assert isinstance(asked.error, DrainingError)
    engine.close()
    with pytest.raises(DrainingError):
        engine.submit([Asked(bank, ["a0"], [5, 6]).answer])


# Memory


def test_an_answer_waits_until_its_memory_is_free_and_none_ends_for_want_of_it(
    bank: AdapterBank,
) -> None:
    """Memory for two answers at a time, whatever they share; many ask, with room for all rows."""
    base = bank.base
    block = 16 * position_bytes(base.layout, base.model.dtype)
    # 20 tokens read and 44 written are 4 blocks, and a prefix is one.
    engine = Engine(bank, max_rows=8, kv_bytes=9 * block)
    most: list[tuple[int, int]] = []
    step = engine.executor.step

    def watched() -> None:
        step()
        most.append((engine.running, engine.executor.kv_bytes))

    engine.executor.step = watched  # type: ignore[method-assign]
    try:
        draw = random.Random(3)
        asked = [
            Asked(bank, [f"a{n % 2}"], [draw.randrange(1, 96) for _ in range(20)], max_tokens=44)
            for n in range(6)
        ]
        engine.submit([a.answer for a in asked])
        for number, a in enumerate(asked):
            (expected,) = bank.generate_ids(
                [a.answer.prompt], [f"a{number % 2}"], max_new_tokens=44, do_sample=False,
                eos_token_id=None,
            )  # fmt: skip
            assert a.ids == expected
        assert max(rows for rows, _ in most) == 1, "two with their prefixes are ten blocks"
        assert 0 < max(held for _, held in most) <= 9 * block
        longest = Asked(bank, ["a0"], [1] * 100, max_tokens=27)
        engine.submit([longest.answer])  # 8 blocks and the prefix
        assert len(longest.ids) == 27
        with pytest.raises(UserError, match=r"may need .* this server has .* lower max_tokens"):
            engine.submit([Asked(bank, ["a0", "a1"], [1] * 100, max_tokens=4).answer])
    finally:
        engine.close()


def test_a_prefix_is_promised_once_and_one_that_depends_on_the_input_to_each(
    bank: AdapterBank,
) -> None:
    class OfInput:
        virtual_tokens, infix = 20, False

    budget = BlockBudget(12)
    shared = Asked(bank, ["a5"], [1] * 20, max_tokens=12).answer  # 2 blocks, and 1 of the prefix
    own = Asked(bank, [None], [1] * 20, max_tokens=12).answer
    own.adapters = (RequestAdapter("own", OfInput()),)  # type: ignore[arg-type]
    infix = Asked(bank, ["infix"], [1] * 20, max_tokens=12).answer
    assert [budget.needed(answer) for answer in (shared, own, infix)] == [3, 4, 3]
    budget.take(shared)
    budget.take(shared)  # 5 in all
    budget.take(own)  # 9
    assert budget.fits(infix)
    budget.take(infix)  # 12
    assert not budget.fits(shared)
    budget.give_back(shared)
    assert budget.fits(shared), "its prefix is still there"
    budget.give_back(shared)
    budget.take(infix)  # 10, and its prefix is gone
    assert not budget.fits(shared)


def test_several_answers_of_one_request_are_read_once(
    bank: AdapterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(bank, max_rows=8)
    counts: list[int] = []
    forward = bank.base.model.forward

    def counting(*args: object, **kw: object) -> object:
        counts.append(len(kw["input_ids"]))
        return forward(*args, **kw)

    monkeypatch.setattr(bank.base.model, "forward", counting)
    try:
        asked = [
            Asked(bank, ["a1"], [4, 5, 6] * 11, temperature=1.0, seed=n, max_tokens=1)
            for n in range(6)
        ]
        engine.submit([a.answer for a in asked])
        ids = [a.ids for a in asked]
        assert sum(counts) == 33
        assert len({tuple(one) for one in ids}) > 1, "each has its own random numbers"
    finally:
        engine.close()


# Sampling


@settings(max_examples=30, deadline=None)
@given(
    vocabulary=st.sampled_from([3, 12]), temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_p=st.sampled_from([0.01, 0.4, 0.9, 1.0]), seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.1, 3.0]),
)  # fmt: skip
def test_tokens_are_drawn_with_the_probabilities_of_transformers_warpers(
    vocabulary: int, temperature: float, top_p: float, seed: int, spread: float
) -> None:
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    warped = TemperatureLogitsWarper(temperature)(None, logits.clone())
    if top_p < 1:
        warped = TopPLogitsWarper(top_p)(None, warped)
    expected = warped.softmax(-1)[0].double()
    count = 4000
    states = [
        SamplerState(Sampling(1, temperature=temperature, top_p=top_p, seed=seed + n))
        for n in range(count)
    ]
    found = [token.id for token in sample(logits.expand(count, -1), states)]
    shares = torch.bincount(torch.tensor(found), minlength=vocabulary) / count
    deviation = (expected * (1 - expected) / count).sqrt()
    assert ((shares - expected).abs() <= 5.5 * deviation + 1e-9).all()


def test_rows_of_all_kinds_are_sampled_in_one_go_as_alone() -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)) * 2
    logits[4] = float("nan")
    kinds = [
        Sampling(4), Sampling(4, temperature=0.9, seed=1),
        Sampling(4, temperature=0.9, top_p=0.5, seed=2),
        Sampling(4, presence_penalty=1.5, logprobs=2), Sampling(4, temperature=1.0, seed=3),
        Sampling(4, temperature=1.3, top_p=0.99, frequency_penalty=0.7, seed=5, logprobs=0),
    ]  # fmt: skip
    together = [SamplerState(kind) for kind in kinds]
    apart = [SamplerState(kind) for kind in kinds]
    for _ in range(4):
        alone = [sample(row[None], [state])[0] for row, state in zip(logits, apart, strict=True)]
        assert sample(logits, together) == alone
    assert alone[4] is None
    assert len(alone[3].top) == 2
    assert alone[5].logprob is not None
    assert alone[5].top == ()


# Text


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return load_base(TINY_EN, device="cpu").tokenizer


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("ab é😀世\n .{}x"), max_size=30),
    stop=st.lists(st.text(st.sampled_from("ab é😀世 ."), min_size=1, max_size=4), max_size=3),
)
def test_pieces_join_to_the_text_before_the_first_stop(
    tokenizer: object, text: str, stop: list[str]
) -> None:
    stream = TextStream(tokenizer, stop)
    ids = tokenizer(text)["input_ids"]
    written, stopped = "", False
    for token in ids:
        piece = stream.push(token)
        written += piece.text
        assert not any(s in written for s in stop), "a stop text was let out"
        if piece.stopped:
            stopped = True
            break
    if not stopped:
        written += stream.finish()
    found = [at for s in stop if (at := text.find(s)) >= 0]
    # With several stops, the first that is whole ends the answer, as with any streaming server.
    if not found:
        assert written == text
    elif len(stop) == 1:
        assert (written, stopped) == (text[: found[0]], True)
    else:
        assert stopped
        assert text.startswith(written)


@given(ids=st.lists(st.integers(2, 8191), max_size=25))
@settings(max_examples=100, deadline=None)
def test_pieces_of_any_tokens_join_to_what_the_tokenizer_writes(
    tokenizer: object, ids: list[int]
) -> None:
    stream = TextStream(tokenizer)
    written = "".join(stream.push(token).text for token in ids) + stream.finish()
    assert written == tokenizer.decode(ids, skip_special_tokens=True)
