"""The grid of docs/smollm2.md on SmolLM2: tasks, methods and seeds, in the order of their worth.

python scripts/real_model_grid.py                       # all of it; the same command goes on
python scripts/real_model_grid.py --part few-50 --share 1/2 --minutes 90
python scripts/real_model_grid.py --tables              # of what is finished

Each job is one `ptkit compare`: all methods of a part on one task with one seed. All of a task's
jobs with one seed come before those with the next, so whatever is finished can be read. `--share
1/2` takes every second job, for two machines or cores that share `--out`. The public data of
docs/real-data.md is needed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare_defaults import METHODS, methods_of

from ptkit.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "tests" / "recipes"
DATA = ROOT.parent / "shared" / "data"
TASKS = ("trec", "sst2", "e2e", "webnlg")
SEEDS = range(5)
#: The rate with the lowest validation loss on each task (docs/smollm2.md).
BEST_RATES: Mapping[str, Mapping[str, float]] = {
    "prefix_tuning": {"routing": 0.1, "persona": 0.03, "sst2": 0.01, "trec": 0.03, "e2e": 0.03,
                      "webnlg": 0.03, "summary": 0.1},
    "prompt_tuning": {"routing": 0.7, "persona": 6, "sst2": 2, "trec": 6, "e2e": 6, "webnlg": 2,
                      "summary": 2},
    "lora": {"routing": 6e-3, "persona": 2e-3, "sst2": 2e-3, "trec": 6e-3, "e2e": 6e-3,
             "webnlg": 2e-3, "summary": 2e-3},
    "full": {"routing": 3e-4, "persona": 3e-4, "sst2": 1e-4, "trec": 3e-4, "webnlg": 3e-4,
             "summary": 3e-4},
}  # fmt: skip


def rate(kind: str, task: str) -> float:
    """The rate of `kind` on `task`: the one that was best on most of the other tasks, of several
    the lowest."""
    counts = Counter(best for other, best in BEST_RATES[kind].items() if other != task)
    most = max(counts.values())
    return min(best for best, count in counts.items() if count == most)


def _method(kind: str, task: str, **settings: Any) -> dict[str, Any]:
    return {"kind": kind, **settings, "learning_rate": rate(kind, task)}


def _main(task: str) -> list[dict[str, Any]]:
    return [
        {"kind": "base"},
        _method("prefix_tuning", task, num_virtual_tokens=20, start="task"),
        _method("lora", task, rank=8),
        _method("full", task),
    ]


def _others(task: str) -> list[dict[str, Any]]:
    prefix = rate("prefix_tuning", task)
    return [
        {"kind": "text_prompt", "examples": 4},
        _method("prompt_tuning", task, num_virtual_tokens=20, start="task"),
        {"kind": "p_tuning", "num_virtual_tokens": 20, "start": "task"},
        {**_method("prefix_tuning", task, num_virtual_tokens=20, start="task"),
         "label": "infix", "position": "infix"},
        {"kind": "prefix_lora", "num_virtual_tokens": 20, "rank": 1, "learning_rate": prefix,
         "lora_learning_rate": rate("lora", task)},
    ]  # fmt: skip


def _defaults(_: str) -> list[dict[str, Any]]:
    return methods_of(load_recipe(METHODS).recipe, "auto")


def _prefix(task: str) -> list[dict[str, Any]]:
    return _main(task)[1:2]


_TRAIN = {"steps": 150, "batch_size": 8, "eval_every": 25, "save_every": 1000}
_SHORT = {**_TRAIN, "steps": 100, "eval_every": "auto"}
_ROWS = {"task.data.limits.train": 500}


def _few(rows: int) -> dict[str, Any]:
    return {
        "task.data.limits.train": rows, "task.data.limits.validation": 50,
        "task.data.draw": "seed", "train": _SHORT, "retention": None,
    }  # fmt: skip


@dataclass(frozen=True)
class Part:
    """methods: of a task; settings: of its recipe, by key; tasks: that it is for"""

    methods: Any
    settings: Mapping[str, Any]
    tasks: Sequence[str] = TASKS


PARTS: Mapping[str, Part] = {
    "way": Part(_main, {**_ROWS, "train": _TRAIN}),
    "few-50": Part(_main, _few(50)),
    "few-100": Part(_main, _few(100)),
    "unseen": Part(_main, {**_ROWS, "train": _TRAIN, "retention": None}, ("webnlg",)),
    "others": Part(_others, {**_ROWS, "train": _TRAIN}),
    "gate": Part(_prefix, {**_ROWS, "train": {**_TRAIN, "retain": {"by": "gate"}}}),
    "target": Part(_prefix, {**_ROWS, "train": {**_TRAIN, "retain": {"target": 0.05}}}),
    "defaults": Part(_defaults, {**_ROWS, "train": _TRAIN, "retention": None}),
}


@dataclass(frozen=True)
class Job:
    """One `ptkit compare`."""

    part: str
    task: str
    seed: int

    @property
    def recipe(self) -> Path:
        """The task's recipe."""
        return RECIPES / f"{self.task}-smollm2.yaml"

    def folder(self, out: Path) -> Path:
        """Where its results are."""
        return out / self.part / self.task / f"seed{self.seed}"

    def overrides(self, out: Path) -> list[str]:
        """What is changed in the recipe, each as `KEY=VALUE`."""
        part = PARTS[self.part]
        settings = {**part.settings, "methods": part.methods(self.task), "seeds": [self.seed]}
        if self.part == "unseen":
            settings["task.data.files"] = {
                split: str((out / "unseen" / "data" / f"{split}.jsonl").resolve())
                for split in ("train", "validation", "test")
            }
        return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def jobs(parts: Sequence[str]) -> Iterator[Job]:
    """All of them, in order."""
    for part in parts:
        for seed in SEEDS:
            for task in PARTS[part].tasks:
                yield Job(part, task, seed)


def hold_out(out: Path) -> None:
    """Write WebNLG without two categories, and those two as its test rows. The folder appears
    whole, because another share may look for it."""
    folder, data = out / "unseen" / "data", DATA / "webnlg"
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        words: list[str | Path] = [
            ROOT / "scripts" / "hold_out.py", "category=Astronaut,University",
            "--train", data / "train.jsonl", "--validation", data / "validation.jsonl",
            "--test", data / "test_seen.jsonl", "--out", Path(scratch, "data"),
        ]  # fmt: skip
        if run(words):
            sys.exit("the data of unseen categories could not be written")
        try:
            Path(scratch, "data").rename(folder)
        except OSError:  # the other share was first
            if not folder.is_dir():
                raise


def run(words: Sequence[str | Path]) -> int:
    """Run Python with `words`; its exit code."""
    return subprocess.run([sys.executable, *map(str, words)], check=False).returncode


def tables(parts: Sequence[str], out: Path) -> None:
    """Merge what is finished of each task, and write each part's overview."""
    for part in parts:
        merged = []
        for task in PARTS[part].tasks:
            done = sorted((out / part / task).glob("seed*/cells"))
            if done:
                merged.append(out / part / task / "all")
                folders = [path.parent for path in done]
                run(["-m", "ptkit", "report", *folders, "--out", merged[-1]])
        if len(merged) > 1:
            run(["-m", "ptkit", "report", *merged, "--overview", f"SmolLM2: {part}",
                 "--out", out / part / "overview"])  # fmt: skip


def main() -> int:
    """Read the arguments, and do what they say; the exit code."""
    parser = argparse.ArgumentParser(
        description=str(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "comparisons" / "smollm2-grid")
    parser.add_argument("--part", choices=[*PARTS], action="append", help="default: all, in order")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="every Nth job, from the Ith")
    parser.add_argument("--minutes", type=float, help="begin no job after so many")
    parser.add_argument("--list", action="store_true", help="name the jobs and run none")
    parser.add_argument("--tables", action="store_true", help="merge and report what is finished")
    given = parser.parse_args()
    parts = given.part or [*PARTS]
    if given.tables:
        tables(parts, given.out)
        return 0
    first, _, every = given.share.partition("/")
    begun, failed = time.monotonic(), 0
    for job in [*jobs(parts)][int(first) - 1 :: int(every)]:
        folder = job.folder(given.out)
        if given.list:
            print(folder)
            continue
        if given.minutes is not None and time.monotonic() - begun > 60 * given.minutes:
            break
        if job.part == "unseen":
            hold_out(given.out)
        words = [word for override in job.overrides(given.out) for word in ("--set", override)]
        failed += run(["-m", "ptkit", "compare", job.recipe, "--out", folder, *words]) != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
