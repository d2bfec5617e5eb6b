"""Where adapters are kept: budgets, changes on disk, bad files, and many threads at once."""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_peft_parity import LEARNT, make_adapter, rows_of

from ptkit.bank import AdapterBank
from ptkit.bank.cache import PrefixCache
from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import write_adapter
from ptkit.formats.adapter_folder import WEIGHTS
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.generation import generate

KINDS = ["prefix", "prompt", "p-tuning-mlp"]


@pytest.fixture(scope="module")
def llama() -> Base:
    return random_base("llama")


@pytest.fixture(scope="module")
def folder(llama: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve adapters of three methods and several lengths, `a0` to `a11`."""
    torch.manual_seed(2)
    root = tmp_path_factory.mktemp("adapters")
    for i in range(12):
        section = {**LEARNT[KINDS[i % 3]], "num_virtual_tokens": 2 + i % 4}
        write_adapter(root / f"a{i}", make_adapter(llama, section).files())
    return root


def size_of(tokens: int, base: Base) -> int:
    return sum(s.kv_heads * (s.key_dim + s.value_dim) * tokens * 4 for s in base.layout)


def test_registered_adapters_are_read_when_first_used(llama: Base, folder: Path) -> None:
    bank = AdapterBank(llama)
    assert bank.register_all(folder) == sorted(f"a{i}" for i in range(12))
    assert bank.status("a3").tier == "disk"
    assert bank.status("a3").virtual_tokens is None
    assert bank.resident_bytes == 0
    bank.rows(["a3", None])
    status = bank.status("a3")
    assert (status.tier, status.version, status.virtual_tokens) == ("resident", 1, 5)
    assert status.nbytes == bank.resident_bytes == size_of(5, llama)
    with pytest.raises(AdapterError, match="already"):
        bank.register(folder / "a3")
    with pytest.raises(AdapterError, match="missing"):
        bank.register(folder / "nothing")


def test_the_least_recently_used_go_down_the_tiers(llama: Base, folder: Path) -> None:
    budget = size_of(5 + 4, llama)
    bank = AdapterBank(llama, budget=budget, host_budget=size_of(5, llama))
    bank.register_all(folder)
    for name in ("a3", "a2", "a7"):  # 5, 4 and 5 virtual tokens
        bank.prefix(name)
    tiers = [bank.status(name).tier for name in ("a3", "a2", "a7")]
    assert tiers == ["host", "resident", "resident"]
    bank.prefix("a2")
    bank.prefix("a3")  # back from host memory; a7 is now the least recently used
    assert bank.counts.from_host == 1
    assert bank.status("a7").tier == "host"
    bank.prefix("a10")  # 4 virtual tokens
    assert [bank.status(n).tier for n in ("a7", "a2", "a3")] == ["disk", "host", "resident"]
    assert bank.resident_bytes <= budget
    assert bank.host_bytes <= size_of(5, llama)
    assert torch.equal(bank.prefix("a7").flat(), prefix_alone(llama, folder, "a7").flat())


def prefix_alone(base: Base, folder: Path, name: str) -> KVPrefix:
    """The prefix of one adapter in a bank of its own."""
    bank = AdapterBank(base)
    return bank.prefix(bank.load(folder / name))


def test_pinned_and_unsaved_adapters_stay(llama: Base, folder: Path) -> None:
    bank = AdapterBank(llama, budget=size_of(5, llama), host_budget=0)
    bank.register_all(folder)
    bank.prefix("a0")
    bank.pin("a0")
    bank.add("made here", make_adapter(llama, {**LEARNT["prefix"], "num_virtual_tokens": 3}))
    made = bank.prefix("made here")
    for name in ("a3", "a7", "a11", "a5"):
        bank.prefix(name)
    assert bank.status("a0").tier == "resident"
    assert bank.status("a3").tier == "disk"
    assert bank.status("made here").tier == "host"
    assert torch.equal(bank.prefix("made here").flat(), made.flat())
    bank.unpin("a0")
    bank.prefix("a3")
    assert bank.status("a0").tier == "disk"


def test_an_adapter_larger_than_the_budget_is_refused(llama: Base, folder: Path) -> None:
    bank = AdapterBank(llama, budget=size_of(3, llama))
    bank.load(folder / "a0")
    with pytest.raises(AdapterError, match="more than the bank's budget"):
        bank.load(folder / "a3")
    assert bank.list() == ["a0"]


def _total(order: list[int]) -> int:
    return sum(1 + n % 3 for n in order)


@given(
    uses=st.lists(st.integers(0, 5), max_size=40),
    budget=st.integers(3, 12),
    pinned=st.sets(st.integers(0, 5), max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_cache_keeps_its_budget_and_the_latest(
    uses: list[int], budget: int, pinned: set[int]
) -> None:
    """Against the definition of least-recently-used, spelt out on a list."""

    def prefix(number: int) -> KVPrefix:
        tensor = torch.zeros(1, 1 + number % 3, 1, dtype=torch.uint8)
        return KVPrefix((tensor,), (tensor[:, :0],))

    cache = PrefixCache(budget)
    order: list[int] = []
    staying = {str(n) for n in pinned}
    for number in uses:
        arrives = cache.get(str(number)) is None
        if arrives:
            cache.put(str(number), prefix(number))
            list(cache.overflow({*staying, str(number)}))
        order = [n for n in order if n != number] + [number]
        while arrives and _total(order) > budget:
            victim = next((n for n in order if n not in pinned and n != number), None)
            if victim is None:
                break
            order.remove(victim)
        assert cache.names() == [str(n) for n in order]
        assert cache.bytes == _total(order)


def test_a_changed_file_is_noticed_and_a_bad_one_is_not_taken(
    llama: Base, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "a0", tmp_path / "x")
    bank = AdapterBank(llama, check_every=0.0)
    bank.load(tmp_path / "x")
    first = bank.prefix("x")
    tensors = load_file(tmp_path / "x" / WEIGHTS)
    save_file({n: t + 1 for n, t in tensors.items()}, tmp_path / "x" / WEIGHTS)
    second = bank.prefix("x")
    torch.testing.assert_close(second.flat(), first.flat() + 1)
    assert bank.status("x").version == 2
    weights = tmp_path / "x" / WEIGHTS
    for bad in (b"", b"broken", weights.read_bytes()[:-7]):
        weights.write_bytes(bad)
        assert bank.prefix("x") is second
        assert "damaged" in bank.status("x").fault
    save_file({n: t * float("nan") for n, t in tensors.items()}, weights)
    assert bank.prefix("x") is second
    assert "not finite" in bank.status("x").fault
    refusals = bank.counts.refusals
    bank.prefix("x")
    assert bank.counts.refusals == refusals == 4, "a bad file is read once, not at every use"
    save_file(tensors, weights)
    assert torch.equal(bank.prefix("x").flat(), first.flat())
    assert bank.status("x").fault is None
    shutil.rmtree(tmp_path / "x")
    assert torch.equal(bank.prefix("x").flat(), first.flat())


def test_a_faulty_file_keeps_its_good_version_from_being_evicted(
    llama: Base, folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "a3", tmp_path / "x")
    bank = AdapterBank(llama, budget=size_of(5, llama), host_budget=0)
    bank.load(tmp_path / "x")
    held = bank.prefix("x").flat()
    (tmp_path / "x" / WEIGHTS).write_bytes(b"broken")
    bank.load(folder / "a7")  # takes the whole budget
    assert bank.status("x").tier == "host"
    assert torch.equal(bank.prefix("x").flat(), held)


def test_rows_under_way_keep_the_version_they_started_with(llama: Base, folder: Path) -> None:
    bank = AdapterBank(llama)
    bank.load(folder / "a0", "x")
    options = {"pad_token_id": 0, "max_new_tokens": 6, "do_sample": False}
    prompts = rows_of([4])
    started = bank.rows(["x"])
    expected = generate(llama.model, prompts, started, **options)
    bank.swap("x", folder / "a3")
    assert generate(llama.model, prompts, started, **options) == expected
    assert generate(llama.model, prompts, bank.rows(["x"]), **options) != expected
    with pytest.raises(AdapterError, match="no adapter `y`"):
        bank.swap("y", folder / "a3")


def test_many_threads_swap_load_and_generate_at_once(
    llama: Base, folder: Path, tmp_path: Path
) -> None:
    """Every answer is that of a version its adapter had while the request ran."""
    bank = AdapterBank(llama, budget=size_of(12, llama), host_budget=0, check_every=0.0)
    bank.register_all(folder)
    prompt = rows_of([5])[0]
    options = {"pad_token_id": 0, "max_new_tokens": 4, "do_sample": False}

    def answer(batch) -> list[int]:
        return generate(llama.model, [prompt], batch, **options)[0]

    solo = {f"a{i}": answer(prefix_alone(llama, folder, f"a{i}").alone) for i in range(12)}
    bank.load(folder / "a0", "moving")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    (tmp_path / "bad" / WEIGHTS).write_bytes(b"no tensors here")
    stop = threading.Event()

    def swap() -> int:
        swaps = 0
        while not stop.is_set():
            bank.swap("moving", folder / f"a{swaps % 3}")
            with pytest.raises(AdapterError):
                bank.swap("moving", tmp_path / "bad")
            swaps += 1
        return swaps

    def ask(thread: int) -> None:
        for done in range(12):  # every adapter once
            name = f"a{(done * 5 + thread) % 12}"
            batch = bank.rows([name, "moving"])
            rows = generate(llama.model, [prompt, prompt], batch, **options)
            assert rows[0] == solo[name]
            assert rows[1] in (solo["a0"], solo["a1"], solo["a2"])

    with ThreadPoolExecutor(8) as pool:
        swapping = [pool.submit(swap) for _ in range(2)]
        asking = [pool.submit(ask, i) for i in range(6)]
        try:
            for future in asking:
                future.result()
        finally:
            stop.set()
        assert all(future.result() > 3 for future in swapping)
    assert bank.counts.evictions > 0
    assert bank.resident_bytes <= size_of(12, llama)
