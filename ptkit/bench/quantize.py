"""`ptkit bench quantize`: the same steps on one model in several precisions, side by side.

Each precision trains in a process of its own, whose peak memory counts from before the model is
loaded. The processes take their steps in turns, one at a time, so that a busy or throttled machine
slows all of them alike.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ptkit.bench.result import BenchResult, Figure
from ptkit.data.encode import encode_examples
from ptkit.data.task import load_task
from ptkit.errors import PtkitError, UserError
from ptkit.methods import Demonstrations, create_adapter
from ptkit.methods.prefix_tuning.settings import PrefixTuningSection
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import ModelSection, TrainSection
from ptkit.runtime.base_model import load_base
from ptkit.training.adapter_trainer import Job
from ptkit.training.loop import fit
from ptkit.training.memory import PeakMemory

#: Of the memory of a float32 base, and of its time per step; and nats between their losses.
MEMORY, TIME, LOSS = 0.35, 1.6, 0.02
#: Learning rate of the prefix.
RATE = 0.1
#: Validation rows that the loss is of.
VALIDATION = 64


@dataclass(frozen=True)
class QuantizeSettings:
    """What every precision does. checkpointing: whether activations are computed again in the
    backward pass; device: of `model.device`."""

    model: str
    recipe: str
    steps: int
    batch_size: int
    virtual_tokens: int
    checkpointing: bool
    device: str


@dataclass(frozen=True)
class QuantizeRun:
    """seconds: of each step; loss: of the validation rows after the last, nats per token; loaded,
    peak: bytes beyond what the libraries take, after loading and at most."""

    seconds: list[float]
    loss: float
    loaded: int
    peak: int


def bench_quantize(
    trial: QuantizeSettings, precisions: Sequence[str] = ("float32", "blocks")
) -> BenchResult:
    """Train a prefix on `trial.model` in each of `precisions` (a `model.dtype` or a
    `model.quantize`) and compare each with the first.

    Raises UserError for fewer than two, and what a process raises.
    """
    for name in precisions:  # before anything is loaded
        ModelSection(id=trial.model).in_precision(name)
    if len({*precisions}) < 2:
        raise UserError("a comparison takes two precisions or more, such as float32,blocks")
    runs = _in_turns(trial, list(dict.fromkeys(precisions)))
    first, *others = runs
    figures: list[Figure] = []
    for name, run in runs.items():
        step = statistics.median(run.seconds)
        figures += [
            Figure(f"{name}: a step", step, "s"),
            Figure(f"{name}: loaded", run.loaded, "bytes"),
            Figure(f"{name}: peak memory", run.peak, "bytes"),
            Figure(f"{name}: validation loss", run.loss, "nats"),
        ]
    for name in others:
        run, plain = runs[name], runs[first]
        # Steps of one turn were taken one after the other.
        ratios = sorted(a / b for a, b in zip(run.seconds, plain.seconds, strict=True))
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        aimed = name in ("blocks", "nf4")
        figures += [
            Figure(f"{name} / {first}: time of a step", middle, "x", low, high,
                   at_most=TIME if aimed else None),
            Figure(f"{name} / {first}: peak memory", run.peak / plain.peak, "x",
                   at_most=MEMORY if aimed else None),
            Figure(f"{name} - {first}: validation loss, apart", abs(run.loss - plain.loss), "nats",
                   at_most=LOSS if aimed else None),
        ]  # fmt: skip
    return BenchResult(
        "quantize",
        {**vars(trial), "precisions": list(runs), "validation_rows": VALIDATION},
        "the same rows in the same order, from the same values; steps taken in turns",
        figures,
    )


def _in_turns(trial: QuantizeSettings, precisions: Sequence[str]) -> dict[str, QuantizeRun]:
    context = multiprocessing.get_context("spawn")
    processes, ends = {}, {}
    try:
        for name in precisions:
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(trial, name, theirs), daemon=True)
            process.start()
            theirs.close()
            processes[name], ends[name] = process, ours
            _received(name, ours)  # loaded: the next one loads alone, too
        seconds: dict[str, list[float]] = {name: [] for name in precisions}
        for _ in range(trial.steps):
            for name, end in ends.items():
                end.send("step")
                seconds[name].append(_received(name, end))
        runs = {}
        for name, end in ends.items():
            end.send("finish")
            loss, loaded, peak = _received(name, end)
            # The first steps of a process also allocate.
            runs[name] = QuantizeRun(seconds[name][2:] or seconds[name], loss, loaded, peak)
        return runs
    finally:
        for process in processes.values():
            process.terminate()
            process.join()


def _received(name: str, end: Connection) -> Any:
    try:
        found = end.recv()
    except EOFError as error:
        raise PtkitError(f"{name}: the process ended without an error (out of memory?)") from error
    if isinstance(found, _Failed):
        raise PtkitError(f"{name}: {found.error}\n{found.trace}")
    return found


@dataclass(frozen=True)
class _Failed:
    error: str
    trace: str


def _worker(trial: QuantizeSettings, precision: str, end: Connection) -> None:
    try:
        _train(trial, precision, end)
    except Exception as error:  # told to the process that asked
        end.send(_Failed(str(error), traceback.format_exc()))


def _train(trial: QuantizeSettings, precision: str, end: Connection) -> None:
    torch.manual_seed(0)
    load_base("tiny-en", device=trial.device)  # what loading imports
    import_module("torch._dynamo")  # what optimisers import
    section = ModelSection(id=trial.model, device=trial.device).in_precision(precision)
    memory = PeakMemory(torch.device("cpu" if trial.device == "auto" else trial.device))
    base = load_base(**section.model_dump())
    loaded = memory.bytes()
    recipe = load_recipe(trial.recipe)
    data = load_task(recipe.recipe.task, recipe.folder)
    rows = encode_examples(
        data.train[: trial.steps * trial.batch_size], base.tokenizer, recipe.recipe.task
    )
    judged = encode_examples(data.validation[:VALIDATION], base.tokenizer, recipe.recipe.task)
    settings = TrainSection(
        steps=trial.steps, batch_size=trial.batch_size, warmup_steps=trial.steps // 10,
        eval_every=trial.steps, save_every=trial.steps, autocast="no",
        gradient_checkpointing=trial.checkpointing, context_cache_mb=0,
    )  # fmt: skip
    prefix = PrefixTuningSection(
        kind="prefix_tuning", num_virtual_tokens=trial.virtual_tokens, start="task",
        learn_embeddings=False,
    )  # fmt: skip
    adapter = create_adapter(prefix, base, Demonstrations([], 0))
    end.send("loaded")
    begun = [0.0]

    def taken(_: Any) -> None:
        end.send(time.perf_counter() - begun[0])
        end.recv()
        begun[0] = time.perf_counter()

    end.recv()
    begun[0] = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(adapter, rows, judged, settings, RATE, 0, Path(scratch), taken)
        (progress,) = fit([job])
    end.send((progress.best_loss, loaded, memory.bytes()))
