"""Benchmarks run, check their candidates against each other, and say what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from test_cli import ptkit
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ptkit.bench import (
    adapterhub,
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
    whole_run,
)
from ptkit.bench.bases import ParityError, in_memory
from ptkit.bench.result import BenchResult, Figure
from ptkit.bench.timing import Timing, interleaved, ratio
from ptkit.errors import PtkitError, UserError
from ptkit.runtime.base_model import load_base
from ptkit.runtime.model_names import TINY_EN


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine can reach is measured anew for every method."""
    monkeypatch.setattr(train, "PEAK_SIZE", 128)


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
    # The machine slowed down during the last round; both candidates met it.
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
    result = soak.bench_soak("tiny-en", minutes=0.04, threads=8)
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
    result = train.bench_train("tiny-en", list(train.METHODS), steps=3, batch_size=2, rounds=1)
    for name in train.METHODS:
        assert figure(result, f"{name}: a step, ptkit").value > 0
        assert figure(result, f"{name}: PEFT + Trainer / ptkit").value > 0
    assert result.settings["tokens_per_row"] > 10


def test_other_losses_than_the_peers_are_not_reported(monkeypatch) -> None:
    monkeypatch.setattr(peft_trainer.StepNotes, "on_log", lambda self, *_, logs=None, **kw: (
        self.clock.losses.append(9.0) if "loss" in logs else None))  # fmt: skip
    result = train.bench_train("tiny-en", ["prefix"], steps=3, batch_size=2, rounds=1)
    assert "[9.0, 9.0, 9.0] by PEFT + Trainer" in result.disagreed["prefix"]
    assert not result.figures


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--against", "adapters"], "--peer-python adapters-env/bin/python"),
        (["--against", "peft,adaptrs"], "did you mean `adapters`"),
        (["--peer-python", "python"], "--peer-python is for --against adapters"),
        (["--against", "adapters", "--peer-python", "no/python"], "no/python: cannot be run"),
    ],
)
def test_a_peer_that_cannot_be_had_is_a_users_error(options, said, tmp_path) -> None:
    error = ptkit("bench", "train", *options, cwd=tmp_path, code=2).stderr
    assert said in " ".join(error.split())


def test_an_environment_without_what_the_peer_needs_is_named(tmp_path) -> None:
    venv.create(tmp_path / "empty", with_pip=False)
    options = ["--against", "adapters", "--peer-python", tmp_path / "empty" / "bin" / "python"]
    error = ptkit("bench", "train", *options, cwd=tmp_path, code=2).stderr
    assert "ModuleNotFoundError: No module named 'accelerate'" in error
    assert "pip install torch==" in error


#: Stands in for the process of `adapters`: ready after some noise, then it answers as told.
STUB = """
import json, sys
print("a library greets"); print('{"ready": "adapters of sorts"}', flush=True)
for line in sys.stdin:
    answer = ANSWERS[json.loads(line)["do"]]
    if answer is None:
        sys.exit("fell over")
    print(json.dumps(answer), flush=True)
"""
STEPS = {"losses": [9.0] * 3, "ends": [1.0, 2.0, 3.0], "memory": 1}


@pytest.mark.parametrize(
    ("answers", "error", "said"),
    [
        ({"train": {"failed": "Traceback: oh"}}, PtkitError, "failed .adapters of sorts.*\n.*oh"),
        ({"offer": None}, PtkitError, "ended: fell over"),
    ],
)
def test_a_peers_process_that_goes_wrong_is_an_error(
    answers, error, said, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(adapterhub, "SCRIPT", stub(tmp_path, answers))
    with pytest.raises(error, match=said):
        train.bench_train(
            "tiny-en", ["prefix"], steps=3, batch_size=2, rounds=1, against=["adapters"],
            peer_python=sys.executable,
        )  # fmt: skip


def test_a_peer_that_disagrees_is_not_reported(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(adapterhub, "SCRIPT", stub(tmp_path, {"train": {"done": STEPS}}))
    command = ["bench", "train", "--model", "tiny-en", "-m", "prefix", "--steps", "3"]
    command += ["--against", "adapters", "--peer-python", sys.executable]
    told = ptkit(*command, cwd=tmp_path, code=1).stdout
    assert "prefix: not reported: losses" in " ".join(told.split())
    assert "9.0] by adapters + AdapterTrainer" in " ".join(told.split())


def test_what_a_peer_has_not_is_said(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(adapterhub, "SCRIPT", stub(tmp_path, {"base": {"lacks": "too new"}}))
    command = ["bench", "train", "--model", "tiny-en", "-m", "prefix", "-m", "p-tuning"]
    command += ["--against", "adapters", "--peer-python", sys.executable]
    printed = json.loads(ptkit(*command, "--json", cwd=tmp_path).stdout)
    assert printed["left_out"] == {
        "prefix: adapters + AdapterTrainer": "too new",
        "p-tuning: adapters + AdapterTrainer": "`adapters` has no P-tuning",
    }
    assert not printed["figures"]
    assert printed["settings"]["against"] == "adapters of sorts"
    assert ptkit(*command, cwd=tmp_path).stdout.count("not available: ") == 2


#: Where `make setup-oracles` puts TRL, unless it is elsewhere.
TRL = Path(os.environ.get("PTKIT_TRL", Path(sys.prefix) / "trl"))
CHATS = """
name: chats
model: {id: tiny-en}
task:
  kind: chat
  data: {builtin: persona-chat}
  chat_template: plain
  max_tokens: 256
  max_target_tokens: 16
  metrics: [chrf]
methods: [{kind: lora}]
retention: null
"""


def test_training_on_chats_takes_the_steps_of_trls_sft_trainer(tmp_path, monkeypatch) -> None:
    if not (TRL / "trl").is_dir():
        pytest.skip("TRL is not here: make setup-oracles")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TRL), os.environ.get("PYTHONPATH", "")]))
    recipe = tmp_path / "chats.yaml"
    recipe.write_text(CHATS)
    methods = ["prefix-20", "prompt-32", "lora", "full"]
    result = train.bench_train(
        "tiny-en", methods, recipe=str(recipe), steps=3, batch_size=2, rounds=1, against=["trl"]
    )
    assert not result.disagreed
    for name in methods:
        assert figure(result, f"{name}: TRL SFTTrainer / ptkit").value > 0
        assert figure(result, f"{name}: tokens per second, TRL").value > 0
        assert figure(result, f"{name}: peak memory, TRL").value > 0
    assert float(result.parity.split(" (TRL")[0].split()[-1]) < 1e-5
    # A conversation is read in one pass, and of its tokens the answers' alone are learnt.
    learnt, whole = (result.settings[name] for name in ("learnt_per_row", "tokens_per_row"))
    assert 0 < learnt < 0.6 * whole


def test_weights_of_a_file_are_no_part_of_what_training_takes() -> None:
    base = load_base(TINY_EN, device="cpu")
    head, embedding = base.model.get_output_embeddings(), base.embedding
    before, at = embedding.weight.clone(), embedding.weight.data_ptr()
    tied = head.weight is embedding.weight
    assert in_memory(base) is base
    assert embedding.weight.data_ptr() != at
    assert torch.equal(embedding.weight, before)
    assert (head.weight is embedding.weight) == tied


def test_pairs_of_answers_are_not_benched() -> None:
    with pytest.raises(UserError, match="no pairs of answers"):
        train.bench_train("tiny-en", ["lora"], recipe="preference-tiny")


def test_an_environment_without_trl_is_named(tmp_path, monkeypatch) -> None:
    (tmp_path / "trl.py").write_text("raise ModuleNotFoundError('no trl')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(UserError, match=r"no trl[\s\S]*pip install --no-deps"):
        train.bench_train("tiny-en", ["prefix"], against=["trl"])


def stub(folder: Path, answers: dict[str, object]) -> Path:
    """A script that answers requests with `answers`, and those not in it with `done`."""
    answers = {"base": {"done": None}, "offer": {"done": None}, **answers}
    path = folder / "stub.py"
    path.write_text(STUB.replace("ANSWERS", repr(answers)))
    return path


def small_base(family: str, folder: Path) -> str:
    """A base of few weights in `folder`: of GPT-2's shape, or of Llama's with fewer key heads than
    heads, a head of its own and another rotary base than the default."""
    tokenizer = load_base(TINY_EN, device="cpu").tokenizer
    words = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": None}
    if family == "gpt2":
        shape = GPT2Config(n_layer=2, n_head=4, n_embd=64, n_positions=512, **words)
        GPT2LMHeadModel(shape).save_pretrained(folder)
    else:
        rotary = {"rope_type": "default", "rope_theta": 500.0}
        config = LlamaConfig(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64,
            intermediate_size=96, rope_parameters=rotary, tie_word_embeddings=False, **words,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapters_python() -> str:
    """The Python of an environment with `adapters`, which cannot be this one."""
    python = os.environ.get("PTKIT_ADAPTERS_PYTHON")
    if not python:
        pytest.skip("PTKIT_ADAPTERS_PYTHON names no Python that has `adapters`")
    return python


@pytest.mark.parametrize(
    ("family", "autocast", "lacking"),
    [
        ("gpt2", "no", {"prompt-20": "encoders only"}),
        ("gpt2", "bf16", {"prompt-20": "encoders only"}),
        # Its MLP makes as many values as the hidden states have, not as the key heads have.
        ("llama", "no", {"prefix-mlp": "other parameters", "prompt-20": "encoders only"}),
    ],
)
def test_training_takes_the_steps_of_adapters(
    family, autocast, lacking, adapters_python, tmp_path
) -> None:
    methods = ["prefix", "prefix-mlp", "prompt-20"]
    result = train.bench_train(
        small_base(family, tmp_path), methods, steps=4, batch_size=3, rounds=2,
        autocast=autocast, against=["peft", "adapters"], peer_python=adapters_python,
    )  # fmt: skip
    title = "adapters + AdapterTrainer"
    assert result.left_out.keys() == {f"{name}: {title}" for name in lacking}
    for name, why in lacking.items():
        assert why in result.left_out[f"{name}: {title}"]
    for name in methods:
        assert figure(result, f"{name}: PEFT + Trainer / ptkit").value > 0
        if name not in lacking:
            assert figure(result, f"{name}: {title} / ptkit").value > 0
            assert figure(result, f"{name}: peak memory, {title}").value > 0
    apart = float(result.parity.split(f" ({title})")[0].split()[-1])
    assert apart < (1e-5 if autocast == "no" else train.TOLERANCES[autocast])


def test_a_base_that_adapters_has_no_prefix_for(adapters_python) -> None:
    result = train.bench_train(
        "tiny-en", ["prefix"], against=["adapters"], peer_python=adapters_python
    )
    (why,) = result.left_out.values()
    assert "no prefix tuning for qwen3" in why
    assert "nothing was compared" in result.parity


def test_a_server_without_time_for_an_answer_is_named() -> None:
    answered, without = serve.Load(tokens=6, seconds=1.0), serve.Load(seconds=1.0)
    serve._require_answers({"mixed": [answered]})
    with pytest.raises(UserError, match=r"`base` had no answer .*--seconds"):
        serve._require_answers({"mixed": [answered], "base": [answered, without]})


def test_a_loaded_server_beside_peft_behind_fastapi(monkeypatch) -> None:
    monkeypatch.setattr(serve.subprocess, "Popen", forked.Popen)
    result = serve.bench_serve(
        "tiny-en", adapters=3, clients=6, seconds=2, new_tokens=6, virtual_tokens=3, rounds=1,
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


def test_startup_beside_peft(monkeypatch) -> None:
    def process(words: list[str], **options: Any) -> Any:
        """Answers and steps, whose times are not judged here, begin with the libraries loaded."""
        works = "generate" in words or any(w in words[2] for w in ("generate(", ".step", "stepped"))
        plain = {**os.environ, forked.WITHOUT_PTKIT: "" if "ptkit" in "".join(words[1:3]) else "1"}
        return forked.run(words, env=plain, **options) if works else run(words, **options)

    run = subprocess.run
    monkeypatch.setattr(startup.subprocess, "run", process)
    result = startup.bench_startup(rounds=1)
    assert figure(result, "import ptkit").value < figure(result, "import peft").value
    assert "same first answer" in result.parity
    assert figure(result, "first step, a loop").value > 0
    assert figure(result, "ptkit / a loop, first step").at_most == 1.2


def test_cost_as_work_grows_is_measured_and_drawn(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(growth, "AXES", {"virtual": (2, 40), "rows": (1, 3)})
    result = growth.bench_memory(
        "tiny-en", axes=("virtual", "rows"), rounds=1, plot=tmp_path / "growth.png"
    )
    assert figure(result, "virtual 40: PEFT / ptkit").value > 1
    assert len(result.figures) == 4 * 4
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_whole_runs_end_at_the_same_loss() -> None:
    sizes = {"rows": 48, "validation": 8, "steps": 4, "batch_size": 4, "rounds": 2}
    result = whole_run.bench_run("tiny-en", ["prefix", "full"], **sizes)
    for name in ("prefix", "full"):
        ours, theirs = (
            figure(result, f"{name}: loss, {who}").value for who in ("ptkit", "PEFT + Trainer")
        )
        assert ours == pytest.approx(theirs, rel=0.1)
        assert figure(result, f"{name}: PEFT + Trainer / ptkit").value > 0
        assert figure(result, f"{name}: memory").value > 0
    ours, theirs = (figure(result, f"padding in {who}").value for who in ("ptkit's", "the Trainer"))
    assert 0 <= ours < theirs, "rows of similar length are together"


def test_the_peer_may_keep_its_own_precision(monkeypatch) -> None:
    seen = []
    arguments = whole_run.arguments_of
    monkeypatch.setattr(whole_run, "arguments_of", lambda turn, *args, **kw: (
        seen.append(turn.settings.autocast), arguments(turn, *args, **kw))[1])  # fmt: skip
    sizes = {"rows": 16, "validation": 4, "steps": 3, "batch_size": 2, "rounds": 1}
    result = whole_run.bench_run(
        "tiny-en", ["prefix"], **sizes, autocast="bf16", peer_autocast="no"
    )
    assert seen == ["no"]
    assert (result.settings["autocast"], result.settings["peer_autocast"]) == ("bf16", "no")


def test_one_method_that_ends_elsewhere_costs_no_other_its_figures(monkeypatch) -> None:
    with_trainer = whole_run._with_trainer

    def elsewhere(turn, judged):
        run = with_trainer(turn, judged)
        return replace(run, loss=99.0) if turn.method is whole_run.METHODS["prefix"] else run

    monkeypatch.setattr(whole_run, "_with_trainer", elsewhere)
    sizes = {"rows": 16, "validation": 4, "steps": 3, "batch_size": 2, "rounds": 1}
    result = whole_run.bench_run("tiny-en", ["prefix", "prompt-20"], **sizes)
    assert "[99.0] by PEFT" in result.disagreed["prefix"]
    assert not any(f.what.startswith("prefix:") for f in result.figures)
    assert figure(result, "prompt-20: PEFT + Trainer / ptkit").value > 0


def test_a_run_that_ends_elsewhere_is_not_reported() -> None:
    def runs(*losses: float) -> list[whole_run.WholeRun]:
        return [whole_run.WholeRun(1.0, 1, loss) for loss in losses]

    assert "apart" in whole_run._agreement("prefix", runs(2.0, 2.2), runs(2.1, 2.3))
    for theirs in (runs(2.5, 2.6), runs(float("nan"), 2.1)):
        with pytest.raises(ParityError, match="validation losses"):
            whole_run._agreement("prefix", runs(2.0, 2.1), theirs)
