"""Benchmarks run, check their contenders against each other, and say what they measured."""

from __future__ import annotations

import json

import pytest
from test_cli import ptkit

from ptkit.bench import (
    generate,
    growth,
    infix,
    mixed,
    peft_trainer,
    serve,
    soak,
    startup,
    swap,
    together,
    traffic,
    train,
)
from ptkit.bench.result import BenchResult, Figure
from ptkit.bench.subjects import ParityError
from ptkit.bench.timing import Timing, interleaved, ratio
from ptkit.errors import UserError


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


def test_training_takes_the_steps_of_peft_and_the_trainer() -> None:
    result = train.bench_train("tiny-en", list(train.CONTESTS), steps=3, batch_size=2, rounds=1)
    for name in train.CONTESTS:
        assert figure(result, f"{name}: a step, ptkit").value > 0
        assert figure(result, f"{name}: PEFT + Trainer / ptkit").value > 0
    assert result.settings["tokens_per_row"] > 10


def test_other_losses_than_the_peers_are_not_reported(monkeypatch) -> None:
    monkeypatch.setattr(peft_trainer._Noted, "on_log", lambda self, *_, logs=None, **kw: (
        self.clock.losses.append(9.0) if "loss" in logs else None))  # fmt: skip
    with pytest.raises(ParityError, match="by PEFT"):
        train.bench_train("tiny-en", ["prefix"], steps=3, batch_size=2, rounds=1)


def test_a_loaded_server_beside_peft_behind_fastapi() -> None:
    result = serve.bench_serve(
        "tiny-en", adapters=3, clients=6, seconds=4, new_tokens=6, virtual_tokens=3, rounds=2,
        against=["peft"],
    )  # fmt: skip
    found = {figure.what: figure.value for figure in result.figures}
    assert found["answers that failed or differ"] == 0
    assert found["over PEFT + set_adapter behind FastAPI"] > 0.3  # few clients, short answers
    assert 0 < found["first token, median"] <= found["latency, 95th percentile"]
    assert "(0 of the peers' differ)" in result.parity


def test_unknown_method_of_a_training_bench() -> None:
    with pytest.raises(UserError, match="did you mean `prefix`"):
        train.bench_train("tiny-en", ["prefx"])


def test_compiled_prompt_beside_peft() -> None:
    result = generate.bench_generate("tiny-en", virtual_tokens=20, rows=3, new_tokens=4, rounds=1)
    assert figure(result, "PEFT / ptkit").value > 0
    assert "same greedy tokens" in result.parity


def test_infix_step_is_faster_than_a_prefix_step() -> None:
    result = infix.bench_infix("tiny-en", input_tokens=200, target_tokens=8, rows=2, rounds=2)
    assert figure(result, "prefix / infix").value > 1.5
    assert figure(result, "kept for each row").value > 0


def test_startup_beside_peft() -> None:
    result = startup.bench_startup(rounds=1)
    assert figure(result, "import ptkit").value < figure(result, "import peft").value
    assert "same first answer" in result.parity


def test_cost_as_work_grows_is_measured_and_drawn(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(growth, "AXES", {"virtual": (2, 40), "rows": (1, 3)})
    result = growth.bench_memory(
        "tiny-en", axes=("virtual", "rows"), rounds=1, plot=tmp_path / "growth.png"
    )
    assert figure(result, "virtual 40: PEFT / ptkit").value > 1
    assert len(result.figures) == 4 * 4
    assert (tmp_path / "growth.png").stat().st_size > 10_000
