"""Buffers of fixed shape: right tokens after every swap, and not one recompilation."""

from __future__ import annotations

import gc
import sys
import threading

import pytest
import torch
from conftest import random_base
from test_peft_parity import LEARNT, make_adapter, rows_of
from torch._dynamo.utils import counters

from ptkit.bank import AdapterBank
from ptkit.errors import AdapterError, ModelError
from ptkit.runtime.facts import known
from ptkit.runtime.forward import all_logits
from ptkit.runtime.generation import generate

NAMES = [None, "a0", "a1", "a2", "a3", "a4", "a5"]


@pytest.fixture
def bank(family: str) -> AdapterBank:
    """Six prefixes of two to seven virtual tokens."""
    torch.manual_seed(5)
    bank = AdapterBank(random_base(family))
    for i in range(6):
        section = {**LEARNT["prefix"], "num_virtual_tokens": 2 + i}
        bank.add(f"a{i}", make_adapter(bank.base, section))
    return bank


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def test_a_hundred_swaps_recompile_nothing(bank: AdapterBank) -> None:
    """Fewer slots than adapters: swaps change indices and rewrite slots in turn."""
    table = bank.slots(3, slots=4, virtual_tokens=8)
    ids = torch.cat([torch.tensor([row]) for row in rows_of([6, 6, 6])])
    model = bank.base.model

    def logits(index: torch.Tensor) -> torch.Tensor:
        return all_logits(model, ids, torch.ones_like(ids), table.batch(index))

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(logits, backend="eager", dynamic=False, fullgraph=True)
    with torch.no_grad():
        compiled(table.index)
        assert graphs() == 1
        for swap in range(100):
            names = [NAMES[(swap * 3 + row * 2) % 7] for row in range(3)]
            for row, name in enumerate(names):
                table.assign(row, name)
            expected = all_logits(model, ids, torch.ones_like(ids), bank.rows(names))
            torch.testing.assert_close(compiled(table.index), expected, atol=1e-5, rtol=1e-4)
    assert graphs() == 1


def test_what_is_compiled_knows_of_no_other_model(bank: AdapterBank, family: str) -> None:
    """Models that come and go beside it neither recompile nor break it."""
    table = bank.slots(3, slots=4, virtual_tokens=8)
    ids = torch.cat([torch.tensor([row]) for row in rows_of([6, 6, 6])])

    def logits(index: torch.Tensor) -> torch.Tensor:
        return all_logits(bank.base.model, ids, torch.ones_like(ids), table.batch(index))

    def read_with(other: AdapterBank) -> None:
        other.add("a", bank.prefix("a0"))
        all_logits(other.base.model, ids, torch.ones_like(ids), other.rows(["a"] * 3))

    before = AdapterBank(random_base(family))
    read_with(before)
    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(logits, backend="eager", dynamic=False, fullgraph=True)
    with torch.no_grad():
        first = compiled(table.index)
        read_with(AdapterBank(random_base(family)))
        del before
        gc.collect()
        torch.testing.assert_close(compiled(table.index), first)
    assert graphs() == 1


def test_models_come_and_go_while_another_is_compiled() -> None:
    """torch.compile reads what is known of models while the collector forgets others."""
    model = torch.nn.Linear(2, 2)
    others = [torch.nn.Linear(1, 1) for _ in range(2000)]
    for each in (model, *others):
        known(each, _is_wide)

    def asked(values: torch.Tensor) -> torch.Tensor:
        return values + float(known(model, _is_wide))

    done = threading.Event()

    def come_and_go() -> None:
        while not done.is_set():
            known(torch.nn.Linear(1, 1), _is_wide)

    thread = threading.Thread(target=come_and_go)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for _ in range(5):
            torch.compiler.reset()
            compiled = torch.compile(asked, backend="eager", fullgraph=True)
            assert compiled(torch.zeros(1)).item() == 0
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)


def _is_wide(module: torch.nn.Linear) -> bool:
    return module.in_features > 4


def test_a_hundred_swaps_of_static_generation_recompile_nothing(
    bank: AdapterBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = bank.slots(2, slots=3, virtual_tokens=8)
    model, prompts = bank.base.model, rows_of([5, 3])
    options = {"pad_token_id": 0, "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    expected = {
        name: generate(model, [prompts[0]], bank.rows([name]), **options)[0] for name in NAMES
    }
    torch.compiler.reset()
    counters.clear()
    plain = model.forward
    compiled = torch.compile(plain, backend="eager", dynamic=False)
    monkeypatch.setattr(model, "forward", compiled)
    for swap in range(101):
        name = NAMES[swap % 7]
        table.assign(0, name)
        table.assign(1, NAMES[(swap + 3) % 7])
        found = generate(model, prompts, table.batch(), static_positions=24, **options)
        assert found[0] == expected[name]
        if swap == 0:
            warm = graphs()
            assert warm == 2  # reading the prompt, and one token more
    assert graphs() == warm


def test_a_row_keeps_the_version_it_started_with(bank: AdapterBank) -> None:
    table = bank.slots(2, slots=2, virtual_tokens=8)
    table.assign(0, "a1")
    before = table.batch().keys[0][0].clone()
    bank.add("a1", bank.prefix("a4"))  # a swap while row 0 is under way
    table.assign(1, "a1")
    now = table.batch()
    assert torch.equal(now.keys[0][0], before)
    assert torch.equal(now.keys[0][1, :, 2:], bank.prefix("a4").keys[0])
    table.assign(0, "a1")  # its next request
    assert torch.equal(table.batch().keys[0][0], table.batch().keys[0][1])


def test_what_does_not_fit_is_refused(bank: AdapterBank) -> None:
    table = bank.slots(2, slots=1, virtual_tokens=4)
    with pytest.raises(AdapterError, match="7 virtual tokens does not fit into slots of 4"):
        table.assign(0, "a5")
    table.assign(0, "a0")
    table.assign(1, "a0")
    with pytest.raises(AdapterError, match="all 1 slots are in use by other rows"):
        table.assign(1, "a1")
    with pytest.raises(ModelError, match="static cache"):
        generate(
            bank.base.model, rows_of([3]), None, pad_token_id=0, static_positions=9, num_beams=2
        )
