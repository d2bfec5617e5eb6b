"""`ptkit bench run`: whole training runs on the same rows, each side as it comes.

`ptkit bench train` gives both sides the same batches in the same order and checks every step. Here
each reads the rows as its users' runs do. The Trainer draws them at random and pads a batch to its
longest row. ptkit puts rows of similar length together. So the steps differ, and their result has
to agree: the loss on rows that neither trained on.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from ptkit.bench.bases import ParityError, bench_base, in_memory, without_dropout
from ptkit.bench.peers import METHODS, Round
from ptkit.bench.peft_trainer import PeftTrainer, arguments_of, model_of
from ptkit.bench.result import BenchResult, Figure, times
from ptkit.bench.timing import Timing, ratio
from ptkit.data.encode import encode_examples, length_grouped_batches
from ptkit.data.encoded import EncodedExample
from ptkit.data.task import load_task
from ptkit.errors import UserError, did_you_mean
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.forward import collate
from ptkit.runtime.progress import no_weights_bar
from ptkit.training.adapter_trainer import Job
from ptkit.training.loop import fit
from ptkit.training.memory import PeakMemory

#: How far the two sides' losses may be apart, relative, where the seeds say nothing about it.
TOLERANCE = 0.01


@dataclass(frozen=True)
class WholeRun:
    """One run: seconds from rows to a saved result, and peak bytes beyond what was in use before.
    It has the loss per target token on the validation rows, in nats."""

    seconds: float
    memory: int
    loss: float


def bench_run(
    model: str,
    methods: Sequence[str] = ("prefix", "prompt-20"),
    *,
    recipe: str = "table-to-text",
    rows: int = 640,
    validation: int = 64,
    steps: int = 24,
    batch_size: int = 8,
    rounds: int = 3,
    autocast: str = "no",
    peer_autocast: str | None = None,
) -> BenchResult:
    """Train each of `methods` (of `METHODS`) for `steps` by ptkit and by PEFT with the Trainer.
    Each of `rounds` has another seed; both sides validate and save at the end.

    rows, validation: how many of the recipe's rows are trained and judged on
    peer_autocast: the Trainer's mixed precision, where it is not to be ptkit's `autocast`.

    Both start from the same values, with the same optimiser. A method is reported only where their
    losses on the validation rows agree. They may differ by as much as those of different seeds, or
    by `TOLERANCE`.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise UserError(f"no method `{unknown[0]}` here; {did_you_mean(unknown[0], METHODS)}")
    base = in_memory(without_dropout(bench_base(model)))
    loaded = load_recipe(recipe)
    data = load_task(loaded.recipe.task, loaded.folder)
    train, judged = (
        encode_examples(part, base.tokenizer, loaded.recipe.task)
        for part in (data.train[:rows], data.validation[:validation])
    )
    settings = TrainSection(
        steps=steps, batch_size=batch_size, warmup_steps=0, schedule="constant",
        eval_every=steps, save_every=steps, autocast=autocast,  # type: ignore[arg-type]
    )  # fmt: skip
    other = peer_autocast or autocast
    peers = settings.model_copy(update={"autocast": other})
    figures: list[Figure] = []
    apart: list[str] = []
    disagreed: dict[str, str] = {}
    for name in methods:
        method = METHODS[name]
        ours, theirs = [], []
        for seed in range(rounds):
            turn = Round(base, method, train, settings, seed)
            ours.append(_with_ptkit(turn, judged))
            theirs.append(_with_trainer(replace(turn, settings=peers), judged))
        try:
            apart.append(_agreement(name, ours, theirs))
        except ParityError as error:  # the other methods took minutes, and agree
            disagreed[name] = str(error)
            continue
        supervised = statistics.mean(row.supervised for row in train)
        figures += _figures(name, ours, theirs, method.aim(model, supervised))
    grouped = islice(length_grouped_batches([*map(len, train)], batch_size, 0), steps)
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    figures += [
        Figure("padding in ptkit's batches", 100 * _padding(train, grouped), "%"),
        Figure("padding in the Trainer's", 100 * _padding(train, _parts(drawn, batch_size)), "%"),
    ]
    return BenchResult(
        "run",
        {
            "model": model, "recipe": recipe, "rows": len(train), "validation": len(judged),
            "steps": steps, "batch_size": batch_size, "rounds": rounds, "autocast": autocast,
            "peer_autocast": other,
            "tokens_per_row": statistics.mean(map(len, train)), "against": PeftTrainer().versions,
        },
        "the loss on the validation rows: " + (", ".join(apart) or "no method agrees"),
        figures,
        disagreed=disagreed,
    )  # fmt: skip


def _parts(order: Sequence[int], size: int) -> Iterable[Sequence[int]]:
    return (order[i : i + size] for i in range(0, len(order) - size + 1, size))


def _padding(rows: Sequence[EncodedExample], batches: Iterable[Sequence[int]]) -> float:
    """The share of the positions in `batches` of indices that hold no token."""
    lengths = [[len(rows[i]) for i in batch] for batch in batches]
    return 1 - sum(map(sum, lengths)) / sum(max(own) * len(own) for own in lengths)


def _with_ptkit(turn: Round, judged: Sequence[EncodedExample]) -> WholeRun:
    memory = PeakMemory(turn.base.model.device)
    started = time.perf_counter()
    adapter = turn.started()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            (progress,) = fit(
                [
                    Job(
                        adapter, turn.rows, judged, turn.settings, turn.method.learning_rate,
                        turn.seed, Path(scratch),
                    )
                ]
            )  # fmt: skip
            seconds = time.perf_counter() - started
        return WholeRun(seconds, memory.bytes(), progress.curve[-1]["validation_loss"])
    finally:
        adapter.close()


def _with_trainer(turn: Round, judged: Sequence[EncodedExample]) -> WholeRun:
    base, settings = turn.base, turn.settings
    own: Any = model_of(turn)  # a copy of the base is the bench's doing, not the run's
    memory = PeakMemory(base.model.device)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = arguments_of(
            turn, scratch, seed=turn.seed, per_device_eval_batch_size=2 * settings.batch_size,
            eval_strategy="steps", eval_steps=settings.steps, prediction_loss_only=True,
            save_strategy="steps", save_steps=settings.steps,
        )  # fmt: skip
        trainer = Trainer(
            own, arguments, data_collator=lambda batch: collate(batch, base),
            train_dataset=turn.rows, eval_dataset=list(judged),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        with no_weights_bar():
            trainer.train()
        seconds = time.perf_counter() - started
    peak = memory.bytes()
    own.eval()
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(judged), settings.batch_size):
            part = judged[start : start + settings.batch_size]
            tokens = sum(row.supervised for row in part)
            total += float(own(**collate(part, base)).loss) * tokens
    base.model.eval()
    return WholeRun(seconds, peak, total / sum(row.supervised for row in judged))


def _agreement(name: str, ours: Sequence[WholeRun], theirs: Sequence[WholeRun]) -> str:
    """How far the losses are apart. Raises ParityError when it is more than seeds are."""
    mine, other = ([run.loss for run in side] for side in (ours, theirs))
    apart = abs(statistics.mean(mine) - statistics.mean(other))
    seeds = max(max(side) - min(side) for side in (mine, other))
    allowed = max(seeds, TOLERANCE * statistics.mean(other))
    if not apart <= allowed:
        raise ParityError(f"validation losses {mine} here, {other} by PEFT + Trainer")
    return f"{name} {apart:.4f} apart (seeds {seeds:.4f})"


def _figures(
    name: str,
    ours: Sequence[WholeRun],
    theirs: Sequence[WholeRun],
    aims: tuple[float | None, float | None],
) -> list[Figure]:
    def timing(runs: Sequence[WholeRun]) -> Timing:
        return Timing(tuple(run.seconds for run in runs))

    memory, other = (statistics.median(run.memory for run in side) for side in (ours, theirs))
    title = PeftTrainer.title
    return [
        Figure(f"{name}: a run, ptkit", timing(ours).median, "s"),
        Figure(f"{name}: a run, {title}", timing(theirs).median, "s"),
        Figure(f"{name}: {title} / ptkit", *times(ratio(timing(theirs), timing(ours))),
               at_least=aims[0]),
        Figure(f"{name}: loss, ptkit", statistics.mean(run.loss for run in ours), "nats"),
        Figure(f"{name}: loss, {title}", statistics.mean(run.loss for run in theirs), "nats"),
        Figure(f"{name}: memory, ptkit / {title}", memory / other, "x", at_most=aims[1]),
    ]  # fmt: skip
