"""More than one process, more than one machine, and processes that are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from accelerate import Accelerator, PartialState
from conftest import random_base
from safetensors.torch import load_file
from test_compare import recipe_file as recipe_file
from test_preference import texts

from ptkit.comparison.grid import run_grid
from ptkit.data.examples import FEWEST_ROWS
from ptkit.errors import UserError
from ptkit.evaluation.latency import measure_latency
from ptkit.evaluation.retention import measure_retention, probe_base
from ptkit.formats.adapter_folder import WEIGHTS
from ptkit.formats.cell_record import CellRecord
from ptkit.methods import Demonstrations, create_adapter
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import method_section
from ptkit.training.observer import RunObserver
from ptkit.training.processes import current, require_own

# accelerate's way to start several processes; without a GPU they run on the CPU.
TWO_PROCESSES = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m",
]  # fmt: skip
# A grid small enough to be killed at every file it writes.
SMALL = "methods=[{kind: base}, {kind: prefix_tuning, num_virtual_tokens: 4}]"
METHODS = (
    "methods=[{kind: base}, {kind: prefix_tuning, num_virtual_tokens: 4}, {kind: lora, rank: 2}]"
)


@pytest.fixture(scope="module")
def recipe_with_base(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The small recipe's file and the settings that make it load its base from a folder."""
    folder = tmp_path_factory.mktemp("base")
    base = random_base("llama")
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return [str(recipe_file), f"model.id={folder}", "model.device=cpu"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ptkit", *arguments]


def settings(*assignments: str) -> list[str]:
    return [word for assignment in assignments for word in ("--set", assignment)]


def test_two_processes_train_like_one(recipe_with_base: list[str], tmp_path: Path) -> None:
    """Two processes with a batch each take the steps of one that accumulates two batches."""
    recipe, *base = recipe_with_base
    train = ["train", recipe, "--method", "prefix_tuning", "--json", *settings(*base)]
    done = forked.run(
        [*TWO_PROCESSES, "ptkit", *train, "--out", "two"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # printed once
    alone = forked.run(
        command(*train, *settings("train.gradient_accumulation=2"), "--out", "one"),
        cwd=tmp_path, check=True, capture_output=True, text=True,
    )  # fmt: skip
    one = json.loads(alone.stdout)
    assert len(two["curve"]) == len(one["curve"]) == 2
    for a, b in zip(two["curve"], one["curve"], strict=True):
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-5)
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    assert two["metrics"] == one["metrics"]
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(
        p.name for p in (tmp_path / "one").iterdir()
    )


PAIRS = """
name: choices
model: {{id: {base}, device: cpu}}
task:
  kind: preference
  data: {{files: {{train: many.jsonl, validation: few.jsonl, test: few.jsonl}}}}
  metrics: [preference_accuracy, reward_margin]
methods: [{{kind: lora, rank: 2}}]
train: {{steps: 4, batch_size: 2, warmup_steps: 1, eval_every: 2, save_every: 2}}
retention: null
"""


def test_two_processes_learn_pairs_from_disk_like_one(
    recipe_with_base: list[str], tmp_path: Path
) -> None:
    """Each process asks the base about the pairs that it reads itself."""
    for name, count in (("many", FEWEST_ROWS), ("few", 7)):
        lines = [json.dumps(texts(20)[n % 20] | {"id": n}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    recipe, cache = tmp_path / "choices.yaml", tmp_path / "cache"
    recipe.write_text(PAIRS.format(base=recipe_with_base[1].removeprefix("model.id=")))
    train = ["train", str(recipe), "--method", "lora", "--json"]
    told: dict[str, Any] = {}
    for out, launch, more in (
        ("two", [*TWO_PROCESSES, "ptkit"], []),
        ("one", command(), settings("train.gradient_accumulation=2")),
    ):
        done = forked.run(
            [*launch, *train, *more, "--out", out], cwd=tmp_path, capture_output=True, text=True,
            timeout=300, env={**os.environ, "PTKIT_CACHE": str(cache)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        told[out] = json.loads(done.stdout)
    assert [*(cache / "tokens").iterdir()]  # they were read from there
    two, one = told["two"], told["one"]
    assert len(two["curve"]) == len(one["curve"]) == 2
    for a, b in zip(two["curve"], one["curve"], strict=True):
        assert a["validation_loss"] == pytest.approx(b["validation_loss"], abs=1e-5)
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-4)


#: `ptkit.train` in every process of a run, and what each of them did, one JSON file per process.
PROGRAM = """
import json, os, sys
import torch
import ptkit.evaluation.retention as retention
import ptkit.training.measure as measuring
import ptkit.training.run as run
from ptkit.training.loop import Objective

read = {"predicted": 0, "validated": 0, "general": 0, "base": 0}
retention.MAX_LOGITS = 97 * 40  # one window of general text at a time
measure = retention._read
predict, forward = measuring.predict, Objective.forward

def counted(adapter, examples, *rest):
    read["predicted"] += len(examples)
    return predict(adapter, examples, *rest)

def losses(self, active, rows, **tensors):
    read["validated"] += 0 if torch.is_grad_enabled() else sum(rows)
    if "random" not in read:
        read["random"] = torch.get_rng_state().sum().item()
        read["start"] = [p.double().sum().item() for p in self.adapters[0].trainable().values()]
    return forward(self, active, rows, **tensors)

def windows(model, part, *rest):
    read["general" if "predicted_all" in read else "base"] += len(part)
    return measure(model, part, *rest)

def adapter_begins(*given):
    read["predicted_all"] = True
    return measured(*given)

retention._read = windows
measured, run.measure_retention = run.measure_retention, adapter_begins
measuring.predict, Objective.forward = counted, losses
import ptkit
recipe, out, *overrides = sys.argv[1:]
done = ptkit.train(recipe, method="prefix_tuning", out=out, overrides=overrides)
group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
read |= {"wait": group.options._timeout.total_seconds(), "metrics": done.record.metrics,
         "forgotten": done.record.retention.model_dump()}
with open(f"{out}-{os.environ['RANK']}.json", "w") as file:
    json.dump(read, file)
"""


def test_processes_share_validation_and_evaluation_and_wait_for_each_other(
    recipe_with_base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python, too: each process reads its part of the rows, all get the same result."""
    recipe, *base = recipe_with_base
    (tmp_path / "program.py").write_text(PROGRAM)
    done = forked.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "program.py",
         recipe, "out", *base],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"out-{rank}.json").read_text()) for rank in (0, 1))
    assert (first["predicted"], second["predicted"]) == (4, 3)
    # Five rows, after two steps of four in the recipe and at the end.
    assert (first["validated"], second["validated"]) == (6, 4)
    assert first["metrics"] == second["metrics"]
    windows = first["forgotten"]["tokens"] // 31  # of 32 tokens, the first of them given
    assert first["general"] + second["general"] == windows
    assert abs(first["general"] - second["general"]) <= 1
    # So do they read what the base itself makes of the text.
    assert first["base"] + second["base"] == windows
    assert abs(first["base"] - second["base"]) <= 1
    assert first["forgotten"] == second["forgotten"]
    assert min(first["wait"], second["wait"]) > 6 * 3600
    # One start, and a dropout of each process's own.
    assert first["start"] == second["start"]
    assert first["random"] != second["random"]
    monkeypatch.setattr("ptkit.evaluation.retention.MAX_LOGITS", 97 * 40)
    alone = run_grid(load_recipe(recipe, [
        *base, "train.gradient_accumulation=2", "seeds=[0]",
        "methods=[{kind: prefix_tuning, num_virtual_tokens: 4}]",
    ]), tmp_path / "alone")[0]  # fmt: skip
    together = CellRecord.read(tmp_path / "out" / "record.json")
    assert together.metrics == alone.metrics
    rows = [
        (tmp_path / p / "predictions.jsonl").read_text()
        for p in ("out", f"alone/cells/{alone.cell}")
    ]
    assert rows[0] == rows[1]
    assert together.retention is not None
    assert alone.retention is not None
    for name in ("forgetting", "drift", "adapter_accuracy"):
        assert getattr(together.retention, name) == pytest.approx(
            getattr(alone.retention, name), abs=1e-5
        )
    for a, b in zip(together.curve, alone.curve, strict=True):
        assert a.validation_loss == pytest.approx(b.validation_loss, abs=1e-5)


@pytest.mark.parametrize(("patience", "calls"), [(60.0, 12), (0.0, 4)])
def test_processes_wait_for_one_round_of_a_slow_latency_measurement(
    patience: float, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round is two texts with the adapter on, and two with it off."""
    done: list[int] = []
    monkeypatch.setattr("ptkit.evaluation.latency.SECONDS", patience)
    monkeypatch.setattr("ptkit.evaluation.latency.generate", lambda *_, **__: done.append(1))
    section = method_section({"kind": "prompt_tuning", "num_virtual_tokens": 3})
    adapter = create_adapter(section, random_base("gpt2"), Demonstrations(("w1 w2",), 0))
    found = measure_latency(adapter, [1, 2, 3])
    assert len(done) == calls
    assert found.adapter is not None


#: Training that is not stopped, and the same stopped after a checkpoint and begun again.
STOPPED = """
import sys
import torch
from ptkit.training.adapter_trainer import AdapterTrainer
import ptkit
recipe, *overrides = sys.argv[1:]
overrides = [*overrides, "retention=null", "methods=[{kind: lora, rank: 2, dropout: 0.4}]"]

def train(out):
    ptkit.train(recipe, method="lora", out=out, overrides=overrides)

train("whole")
report = AdapterTrainer.report

def stop(self, loss):
    if self.progress.step == 2:
        raise KeyboardInterrupt

AdapterTrainer.report = stop
try:
    train("stopped")
except KeyboardInterrupt:
    pass
AdapterTrainer.report = report
torch.manual_seed(torch.distributed.get_rank())
train("stopped")
"""


def test_each_process_goes_on_with_its_own_random_numbers(
    recipe_with_base: list[str], tmp_path: Path
) -> None:
    """Dropout of rows of different lengths: after a step no two generators are alike."""
    recipe, *base = recipe_with_base
    (tmp_path / "program.py").write_text(STOPPED)
    done = forked.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "program.py",
         recipe, *base],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole, stopped = (
        load_file(tmp_path / out / "adapter" / WEIGHTS) for out in ("whole", "stopped")
    )
    assert whole.keys() == stopped.keys()
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("domains", [1, 3])
def test_forgetting_is_the_same_for_any_number_of_processes(
    domains: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptkit.evaluation.retention.MAX_LOGITS", 97 * 32 * 2)
    base = random_base("qwen3")
    texts = {f"t{n}": " ".join(f"w{(i * (n + 3)) % 90 + 1}" for i in range(300 + 100 * n))
             for n in range(domains)}  # fmt: skip
    probe = probe_base(base, texts, 512)
    section = method_section({"kind": "prompt_tuning", "num_virtual_tokens": 3})
    adapter = create_adapter(section, base, Demonstrations(("w1 w2 w3",), 0))
    alone = measure_retention(adapter, probe)
    for processes in (2, 3, 50):

        def share(units: Sequence[Any], work: Callable[..., Any], n: int = processes) -> list[Any]:
            done = [work(units[i::n]) for i in range(n)]
            return [done[i % n][i // n] for i in range(len(units))]

        assert measure_retention(adapter, probe, share) == alone
        assert probe_base(base, texts, 512, share).untouched == probe.untouched


def test_every_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from ptkit.runtime.devices import own_device

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device("cuda") == "cuda"
    for rank, device in ((0, "cuda:0"), (1, "cuda:1"), (2, "cuda:0"), (-1, "cuda")):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert own_device("cuda") == device
        assert [own_device(name) for name in ("cpu", "cuda:1")] == ["cpu", "cuda:1"]


def test_a_gpu_that_is_named_is_the_one_that_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate's `cuda` has no number with one process: it means the current GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert str(PartialState(cpu=True).default_device) == "cuda"
    entered: list[str] = []

    @contextmanager
    def device(named: torch.device) -> Iterator[None]:
        entered.append(str(named))
        yield
        entered.append("left")

    monkeypatch.setattr("torch.cuda.device", device)
    for name in ("cpu", "cuda", "mps", "cuda:1"):
        with current(torch.device(name)):
            pass
    assert entered == ["cuda:1", "left"]


def test_training_happens_on_the_device_of_its_base(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bool] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        assert device.type == "cpu"
        inside.append(True)
        yield
        inside.append(False)

    def made(*given: Any, **named: Any) -> Accelerator:
        assert inside == [True]
        return Accelerator(*given, **named)

    monkeypatch.setattr("ptkit.training.loop.current", on)
    monkeypatch.setattr("ptkit.training.loop.Accelerator", made)
    overrides = ["seeds=[0]", "retention=null", "train.steps=1",
                 "methods=[{kind: prompt_tuning, num_virtual_tokens: 2}]"]  # fmt: skip
    run_grid(load_recipe(recipe_file, overrides), tmp_path / "out", base=random_base("llama"))
    assert inside == [True, False]


@pytest.mark.parametrize(
    ("named", "processes", "refused"),
    [("cuda:1", 2, True), ("cuda:0", 2, False), ("cuda:1", 1, False), ("cpu", 2, False)],
)
def test_one_gpu_is_not_given_to_several_processes(
    named: str, processes: int, refused: bool
) -> None:
    own = torch.device("cuda:0") if processes > 1 else torch.device("cuda")
    state: Any = SimpleNamespace(num_processes=processes, process_index=0, device=own)
    told = pytest.raises(UserError, match="write `cuda`, which gives each process a GPU")
    with told if refused else nullcontext():
        require_own(torch.device(named), state)


def test_two_processes_compare_and_one_of_them_writes_and_speaks(
    recipe_with_base: list[str], tmp_path: Path
) -> None:
    recipe, *base = recipe_with_base
    compare = ["compare", recipe, *settings(*base, SMALL, "seeds=[0]"), "--out", "out", "--fresh"]
    done = forked.run(
        [*TWO_PROCESSES, "ptkit", *compare],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report.html") == 1
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["base", "prefix_tuning"]


def saved(folder: Path) -> set[str]:
    """Records and checkpoints below `folder`, which may change meanwhile."""
    walked = os.walk(folder)  # unlike rglob, it does not mind what vanishes
    return {
        os.path.join(where, name)
        for where, folders, files in walked
        for name in (*folders, *files)
        if name == "record.json" or name.startswith("checkpoint-")
    }


def test_killed_at_any_moment_a_comparison_ends_as_if_nothing_had_happened(
    recipe_with_base: list[str], tmp_path: Path
) -> None:
    """kill -9 after 1, 2, 3 ... finished cells or between, until nothing is left to do."""
    recipe, *base = recipe_with_base
    compare = command("compare", recipe, *settings(*base, SMALL), "--out", "out", "--quiet")
    kills = 0
    for _ in range(30):
        process = forked.Popen(
            compare, cwd=tmp_path, stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # as here: sums depend on it
        )  # fmt: skip
        seen = saved(tmp_path)
        while process.poll() is None:
            if saved(tmp_path) - seen:  # a cell's record, or a checkpoint of one under way
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        if process.wait() == 0:
            break
    assert process.returncode == 0
    assert kills >= 3
    loaded = load_recipe(recipe, [*base, SMALL])
    whole = {r.cell: r for r in run_grid(loaded, tmp_path / "whole")}
    for path in (tmp_path / "out").rglob("record.json"):
        record = CellRecord.read(path)
        assert record.metrics == whole[record.cell].metrics
        assert record.curve == whole[record.cell].curve
        assert record.retention == whole[record.cell].retention
    assert (tmp_path / "out" / "report.html").is_file()
    assert not [p for p in (tmp_path / "out").rglob("*") if p.name.endswith((".tmp", ".old"))]


def test_cells_of_a_lost_node_run_on_another(
    recipe_with_base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from ptkit.comparison.on_ray import run_on_ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    recipe, *base = recipe_with_base
    loaded = load_recipe(recipe, [*base, METHODS, "seeds=[0, 1, 2]"])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False)

        class Lose(RunObserver):
            """Takes a node away, with what runs on it, as soon as the first cell is done."""

            lost = False

            def cell_finished(self, record: CellRecord, reused: bool) -> None:
                if not self.lost:
                    self.lost = True
                    cluster.remove_node(nodes[0], allow_graceful=False)

        lose = Lose()
        records = run_on_ray(loaded, tmp_path / "ray", None, cpus=1, gpus=0, observer=lose)
        assert lose.lost
        deadline = time.monotonic() + 60  # the cluster takes a while to notice
        while all(node["Alive"] for node in ray.nodes()):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        ray.shutdown()
        cluster.shutdown()
    here = run_grid(loaded, tmp_path / "here")
    assert [r.cell for r in records] == [r.cell for r in here]
    for there, own in zip(records, here, strict=True):
        assert there.metrics == own.metrics
        for a, b in zip(there.curve, own.curve, strict=True):
            assert a.validation_loss == pytest.approx(b.validation_loss, abs=1e-5)


def test_wrong_address_of_a_cluster_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    from test_cli import ptkit

    message = ptkit("compare", recipe_file, "--on", "slurm", cwd=tmp_path, code=2).stderr
    assert "expected `ray`, or `ray://HOST:PORT`" in message
