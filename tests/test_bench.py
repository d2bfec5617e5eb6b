"""Benchmarks run, check their contenders against each other, and say what they measured."""

from __future__ import annotations

import json

import pytest
from test_cli import ptkit

from ptkit.bench import mixed, soak, swap, together, traffic
from ptkit.bench.result import BenchResult, Figure
from ptkit.bench.subjects import ParityError
from ptkit.bench.timing import Timing, interleaved, ratio


def figure(result: BenchResult, start: str) -> Figure:
    return next(f for f in result.figures if f.what.startswith(start))


def test_rounds_are_interleaved_and_warm_up_is_not_counted() -> None:
    calls: list[str] = []
    timings = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warm_up=1
    )
    assert calls == ["a", "b"] * 4
    assert all(len(t.seconds) == 3 and t.median > 0 for t in timings.values())


def test_ratio_is_of_rounds_not_of_medians() -> None:
    # The machine slowed down during the last round; both contenders met it.
    value, low, high = ratio(Timing((2.0, 4.0, 40.0)), Timing((1.0, 2.0, 10.0)))
    assert (value, low, high) == (2.0, 2.0, 3.0)


def test_targets() -> None:
    assert Figure("x", 5.4, "x", at_least=5.5).met is False
    assert Figure("x", 5.5, "x", at_least=5.5).met is True
    assert Figure("x", 21, "us", at_most=20).met is False
    assert Figure("x", 21, "us").met is None


def test_swap_and_load_beside_peft() -> None:
    result = swap.bench_swap("tiny-en", rounds=3, virtual_tokens=2)
    assert figure(result, "PEFT / ptkit, swap").value > 1
    assert figure(result, "PEFT / ptkit, load").value > 1
    assert result.settings["file_bytes"] > 0


def test_mixed_batch_beside_peft() -> None:
    result = mixed.bench_mixed("tiny-en", adapters=3, new_tokens=4, rounds=1, virtual_tokens=3)
    assert figure(result, "PEFT / ptkit").value > 1
    assert "same greedy tokens" in result.parity


def test_a_contender_with_other_tokens_is_not_reported(monkeypatch) -> None:
    monkeypatch.setattr(mixed, "_peft_answer", lambda *args: [1, 2, 3, 4])
    with pytest.raises(ParityError):
        mixed.bench_mixed("tiny-en", adapters=2, new_tokens=4, rounds=1)


def test_traffic_keeps_its_budget(tmp_path) -> None:
    result = traffic.bench_traffic(
        "tiny-en", adapters=40, budget_adapters=8, virtual_tokens=2, requests=200, batch=4,
        new_tokens=3, rounds=2, folder=tmp_path,
    )  # fmt: skip
    resident = figure(result, "resident bytes")
    assert resident.met
    assert resident.value == resident.at_most, "the budget is used, not only kept"
    assert 20 < figure(result, "requests that found").value < 95
    assert figure(result, "fetch, 99th").value >= figure(result, "fetch, median").value
    assert not list(tmp_path.iterdir())


def test_training_together_reports_speed_and_memory() -> None:
    result = together.bench_together("tiny-en", adapters=2, steps=3, rounds=1)
    assert figure(result, "speed").value > 0.5
    assert figure(result, "peak memory, together").value > 0


def test_soak_finds_no_wrong_token() -> None:
    result = soak.bench_soak("tiny-en", minutes=0.08, threads=8)
    assert figure(result, "batches").value > 5
    assert figure(result, "failed").value == figure(result, "with a wrong token").value == 0
    assert figure(result, "bad files refused").value == figure(result, "swaps").value > 10


def test_command_prints_json_and_fails_where_a_target_is_missed(monkeypatch, tmp_path) -> None:
    missed = BenchResult("swap", {"model": "m"}, "equal", [Figure("w", 30.0, "us", at_most=20)])
    monkeypatch.setattr(swap, "bench_swap", lambda *args, **kw: missed)
    printed = json.loads(ptkit("bench", "swap", "--json", cwd=tmp_path, code=1).stdout)
    assert printed["figures"][0]["met"] is False
    assert {"hardware", "versions", "parity"} <= printed.keys()
    table = ptkit("bench", "swap", cwd=tmp_path, code=1).stdout
    assert "30.0 µs" in table
    assert "≤ 20.0 µs" in table
    assert "missed" in table
