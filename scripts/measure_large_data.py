"""How memory and time grow with the rows of a file of conversations, up to a million.

    python scripts/measure_large_data.py 10000 1000000

For each number of rows, a process reads and tokenises a file, and trains a few steps of prefix
tuning on `tiny-en`. Another one does the same with what is on disk then. A third one is stopped
after the fifth step, and a fourth one goes on from its checkpoint, in the middle of an epoch. A
line of JSON tells of each. It has the memory before rows are read, after that, and at the last
step. `resident` is all memory of the process, pages of files included. `own` is what the system
cannot take back. Both are in megabytes. The last lines compare with what is promised.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RECIPE = """
name: large
model: {id: tiny-en}
task:
  kind: chat
  data: {files: {train: train.jsonl, validation: few.jsonl, test: few.jsonl}}
  chat_template: plain
  max_tokens: 128
  max_target_tokens: 16
  metrics: [chrf]
methods: [{kind: prefix_tuning, num_virtual_tokens: 8, start: vocabulary}]
train: {steps: 8, batch_size: 8, eval_every: 4, save_every: 4}
retention: null
"""
#: What the processes of one number of rows do, in turn; the last two share a run.
RUNS = {"first": "run-first", "again": "run-again", "stopped": "run-cut", "resumed": "run-cut"}
#: Steps before a run is stopped; its last checkpoint is of the step before.
STOP_AFTER = 5
WORDS = [*"abcdefghijklmnop", "the", "ship", "robot", "garden", "answer", "river", "was", "found"]


def write(path: Path, rows: int, seed: int) -> None:
    """Write `rows` conversations of one or two answers."""
    drawn = random.Random(seed)
    with path.open("w") as file:
        for number in range(rows):
            messages = []
            for _ in range(1 + number % 2):
                asked, said = (" ".join(drawn.choices(WORDS, k=12)) for _ in "ab")
                messages += [{"role": "user", "content": asked}]
                messages += [{"role": "assistant", "content": said}]
            file.write(json.dumps({"messages": messages, "id": number}) + "\n")


def megabytes() -> dict[str, int]:
    """Memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    names = {"resident": "VmRSS", "own": "RssAnon", "peak": "VmHWM"}
    return {name: int(told[key].split()[0]) // 1024 for name, key in names.items()}


class StoppedError(Exception):
    """Ends a run as a kill would, between two checkpoints."""


def run(folder: Path, rows: int, what: str) -> None:
    """Prepare and train in this process, and write down what it took."""
    os.environ["PTKIT_CACHE"] = str(folder / "cache")
    from ptkit.recipe.load import load_recipe
    from ptkit.runtime.base_model import load_base
    from ptkit.training.adapter_trainer import StepReport
    from ptkit.training.cell import Cell
    from ptkit.training.experiment import prepare
    from ptkit.training.observer import RunObserver
    from ptkit.training.run import run_cells

    loaded = load_recipe(folder / "large.yaml")
    base = load_base("tiny-en")
    before = megabytes()
    start = time.perf_counter()
    experiment = prepare(loaded, base)
    ready = time.perf_counter()
    prepared = megabytes()
    steps: list[float] = []
    losses: dict[int, float] = {}
    memory: dict[str, int] = {}

    class Watched(RunObserver):
        def stepped(self, report: StepReport) -> None:
            steps.append(time.perf_counter())
            losses[report.step] = report.loss
            memory.update(megabytes())
            if what == "stopped" and report.step == STOP_AFTER:
                raise StoppedError

    cell = Cell(loaded.recipe.methods[0], 0, folder / RUNS[what])
    with contextlib.suppress(StoppedError):
        run_cells(experiment, [cell], Watched())
    found = {
        "rows": rows, "run": what, "read_and_tokenised_s": round(ready - start, 1),
        "then_first_step_s": round(steps[0] - ready, 1), "before": before, "prepared": prepared,
        "training": memory, "losses": losses,
    }  # fmt: skip
    (folder / f"{what}.json").write_text(json.dumps(found))


def told(found: dict[int, dict[str, dict[str, Any]]]) -> None:
    """Print how the runs of the most rows compare with what is promised."""
    fewest, most = min(found), max(found)
    runs = found[most].values()
    print(f"{most:,} rows: first step after tokenising: at most "
          f"{max(run['then_first_step_s'] for run in runs)} s (promised: 60)")  # fmt: skip
    for name in ("resident", "own"):
        few, many = (found[n]["again"]["training"][name] for n in (fewest, most))
        print(f"{name} memory of {most:,} rows / {fewest:,} rows: {many / few:.2f}")
    whole, resumed = found[most]["again"]["losses"], found[most]["resumed"]["losses"]
    same = bool(resumed) and all(whole[step] == loss for step, loss in resumed.items())
    print(f"resumed before step {min(map(int, resumed))}: "
          f"{'the same losses' if same else 'OTHER LOSSES'} as without a stop")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int, nargs="+")
    spawn = multiprocessing.get_context("spawn")
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for rows in parser.parse_args().rows:
        found[rows] = {}
        with TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "large.yaml").write_text(RECIPE)
            write(folder / "train.jsonl", rows, 0)
            write(folder / "few.jsonl", 16, 1)
            for what in RUNS:
                process = spawn.Process(target=run, args=(folder, rows, what))
                process.start()
                process.join()
                found[rows][what] = json.loads((folder / f"{what}.json").read_text())
                print(json.dumps(found[rows][what]), flush=True)
    told(found)


if __name__ == "__main__":
    main()
