"""`ptkit bench train`: the same steps on the same rows, by ptkit and by PEFT with the Trainer."""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.utils.data import SequentialSampler
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ptkit.bench.result import BenchResult, Figure, times
from ptkit.bench.subjects import GPT2_SMALL, LARGE_VOCABULARY, ParityError, bench_base
from ptkit.bench.timing import Timing, ratio, timed
from ptkit.data import load_task
from ptkit.data.encode import EncodedExample, encode_examples, length_grouped_batches
from ptkit.errors import UserError, did_you_mean
from ptkit.methods import ADAPTERS, Adapter, Demonstrations, create_adapter
from ptkit.recipe import load_recipe
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.attention import prefix_attention
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import collate
from ptkit.runtime.fused import fused_activations
from ptkit.training.loop import fit
from ptkit.training.memory import PeakMemory
from ptkit.training.objective import Objective
from ptkit.training.trainee import Job

#: How far the losses of a step may be apart, relative: both sides take the same steps.
TOLERANCE = 5e-3
#: Rows and columns of the matrices whose product tells the machine's peak.
PEAK_SIZE = 2048


@dataclass(frozen=True)
class Contest:
    """A method's settings, and how many times faster than PEFT + Trainer it should be."""

    settings: dict[str, Any]
    at_least: float
    learning_rate: float

    def aim(self, model: str, supervised: float) -> tuple[float | None, float | None]:
        """At least so many times faster, at most this share of the memory, than PEFT + Trainer.

        supervised: positions with a label per row. The aims are for two shapes; a LoRA's or full
        fine-tuning's memory is that of its gradients.
        """
        prompt_method = self.settings["kind"] not in ("lora", "full")
        if model == GPT2_SMALL:
            return self.at_least, 0.6 if prompt_method else None
        if model == LARGE_VOCABULARY and self.settings["kind"] == "prefix_tuning":
            return 3.0 if supervised < 2 else 2.0, 0.5
        return None, None


_MLP = {"encoder_hidden_size": 512}
CONTESTS = {
    "prefix": Contest({"kind": "prefix_tuning", "num_virtual_tokens": 10}, 1.6, 1e-2),
    "prefix-mlp": Contest(
        {"kind": "prefix_tuning", "num_virtual_tokens": 10, "reparameterize": True, **_MLP},
        1.7, 1e-3,
    ),
    "prompt-20": Contest({"kind": "prompt_tuning", "num_virtual_tokens": 20}, 2.2, 1e-2),
    "prompt-100": Contest({"kind": "prompt_tuning", "num_virtual_tokens": 100}, 3.5, 1e-2),
    "p-tuning": Contest({"kind": "p_tuning", "num_virtual_tokens": 20, **_MLP}, 2.2, 1e-3),
    "lora": Contest({"kind": "lora", "rank": 8}, 1.0, 1e-3),
    "full": Contest({"kind": "full"}, 1.0, 1e-4),
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What one contender did: the loss of every step, seconds per step, and peak memory beyond
    what was in use when training began."""

    losses: list[float]
    seconds: float
    memory: int


def bench_train(
    model: str,
    methods: Sequence[str] = ("prefix", "prompt-20"),
    *,
    recipe: str = "table-to-text",
    steps: int = 6,
    batch_size: int = 8,
    rounds: int = 3,
    autocast: str = "no",
) -> BenchResult:
    """Train each of `methods` (of `CONTESTS`) for `steps`, `rounds` times in turn with its peer.

    recipe: whose data is trained on. Both sides start from the same values and read the same
    batches in the same order; the loss of every step must agree before a time is reported. The
    first step of each run is not timed. Raises ParityError when losses differ.
    """
    unknown = [name for name in methods if name not in CONTESTS]
    if unknown:
        raise UserError(f"no method `{unknown[0]}` here; {did_you_mean(unknown[0], CONTESTS)}")
    base = _without_dropout(bench_base(model))
    loaded = load_recipe(recipe)
    data = load_task(loaded.recipe.task, loaded.folder)
    count = max(steps * batch_size, 64)
    rows = encode_examples(data.train[:count], base.tokenizer, loaded.recipe.task)
    figures: list[Figure] = []
    worst = 0.0
    for name in methods:
        contest = CONTESTS[name]
        ours, theirs = [], []
        for turn in range(rounds):
            settings = TrainSection(
                steps=steps, batch_size=batch_size, warmup_steps=0, schedule="constant",
                eval_every=steps, save_every=steps, autocast=autocast,  # type: ignore[arg-type]
            )  # fmt: skip
            ours.append(_with_ptkit(base, contest, rows, settings, turn))
            theirs.append(_with_trainer(base, contest, rows, settings, turn))
            worst = max(worst, _difference(name, ours[-1], theirs[-1]))
        supervised = statistics.mean(len(row.target_ids) for row in rows)
        figures += _figures(name, ours, theirs, contest.aim(model, supervised))
        figures.append(_share_of_peak(name, base, contest, rows[:batch_size], ours, autocast))
    return BenchResult(
        "train",
        {
            "model": model, "recipe": recipe, "rows": len(rows), "steps": steps,
            "batch_size": batch_size, "rounds": rounds, "autocast": autocast,
            "tokens_per_row": statistics.mean(map(len, rows)),
        },
        f"the loss of every step, at most {worst:.1e} apart (relative)",
        figures,
    )  # fmt: skip


def _without_dropout(base: Base) -> Base:
    """Two sides cannot draw the same dropout; without it they can be compared step by step."""
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


def _started(base: Base, contest: Contest, seed: int) -> Adapter:
    """A fresh adapter; without a start of real tokens, which PEFT's encoders have no place for."""
    section_class = ADAPTERS[contest.settings["kind"]].section_class
    start = {"start": "random"} if "start" in section_class.model_fields else {}
    torch.manual_seed(seed)
    return create_adapter(
        section_class(**contest.settings, **start), base, Demonstrations((), seed)
    )


class _Clock:
    """Notes when steps end and what they lost."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    @property
    def per_step(self) -> float:
        """Median seconds from one step's end to the next's. The last step's end is left out: some
        work follows it that is not the step's."""
        gaps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(gaps[:-1] or gaps)


def _with_ptkit(
    base: Base, contest: Contest, rows: list[EncodedExample], settings: TrainSection, seed: int
) -> Trained:
    clock = _Clock()

    def note(report: Any) -> None:
        clock.ends.append(time.perf_counter())
        clock.losses.append(report.loss)

    adapter = _started(base, contest, seed)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            job = Job(
                adapter, rows, rows[:1], settings, contest.learning_rate, seed, Path(scratch), note
            )
            memory = PeakMemory(base.model.device)
            fit([job])
            peak = memory.bytes()
    finally:
        adapter.close()
    return Trained(clock.losses, clock.per_step, peak)


class _Peer(Trainer):
    """transformers' Trainer, reading the rows in the order they come."""

    def _get_train_sampler(self, *args: Any, **kw: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class _Noted(TrainerCallback):
    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kw: Any) -> None:
        self.clock.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        if logs and "loss" in logs:
            self.clock.losses.append(float(logs["loss"]))


def _with_trainer(
    base: Base, contest: Contest, rows: list[EncodedExample], settings: TrainSection, seed: int
) -> Trained:
    order = length_grouped_batches([len(r) for r in rows], settings.batch_size, seed)
    ordered = [rows[i] for batch in islice(order, settings.steps) for i in batch]
    peer = _peer_of(base, contest, seed)
    clock = _Clock()
    on_cpu = base.model.device.type == "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
            learning_rate=contest.learning_rate, lr_scheduler_type="constant", weight_decay=0.0,
            max_grad_norm=settings.max_grad_norm, logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=on_cpu, remove_unused_columns=False,
            bf16=settings.autocast == "bf16", fp16=settings.autocast == "fp16",
        )  # fmt: skip
        trainer = _Peer(
            peer, arguments, data_collator=lambda batch: collate(batch, base),
            train_dataset=ordered, callbacks=[_Noted(clock)],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        memory = PeakMemory(base.model.device)
        trainer.train()
        peak = memory.bytes()
    base.model.eval()
    return Trained(clock.losses, clock.per_step, peak)


def _peer_of(base: Base, contest: Contest, seed: int) -> Any:
    """PEFT's model of the same method with the same values to start from, on a base of its own."""
    adapter: Any = _started(base, contest, seed)
    kind = contest.settings["kind"]
    try:
        if kind == "full":
            return adapter.model
        config = (
            copy.deepcopy(adapter.peft_model.peft_config["default"]) if kind == "lora" else None
        )
        state = dict(get_peft_model_state_dict(adapter.peft_model)) if kind == "lora" else {}
    finally:
        adapter.close()
    own: Any = copy.deepcopy(base.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about GPT-2's Conv1D
        peer: Any = get_peft_model(own, config or copy.deepcopy(adapter.config))
    if kind == "lora":
        set_peft_model_state_dict(peer, state)
    else:
        peer.prompt_encoder["default"].load_state_dict(adapter.encoder.state_dict())
    return peer


def _difference(name: str, ours: Trained, theirs: Trained) -> float:
    """The largest relative difference of a step's loss. Raises ParityError above TOLERANCE."""
    if len(ours.losses) != len(theirs.losses):
        raise ParityError(f"{name}: {len(ours.losses)} steps here, {len(theirs.losses)} there")
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    if worst > TOLERANCE:
        raise ParityError(f"{name}: losses {ours.losses} here, {theirs.losses} by PEFT + Trainer")
    return worst


def _share_of_peak(
    name: str,
    base: Base,
    contest: Contest,
    rows: list[EncodedExample],
    ours: Sequence[Trained],
    autocast: str,
) -> Figure:
    """Operations of a step's matrix products per second, as a share of what one product of two
    large matrices reaches here, in this run. Nothing else counts as useful."""
    adapter = _started(base, contest, 0)
    device = base.model.device.type
    precision = torch.bfloat16 if autocast == "bf16" else torch.float16
    try:
        objective = Objective([adapter])
        tensors = collate(rows, base)
        with (
            prefix_attention(base.model),
            fused_activations(base.model),
            torch.autocast(device, precision, enabled=autocast != "no"),
            FlopCounterMode(display=False) as counter,
        ):
            objective([0], [len(rows)], **tensors).sum().backward()
    finally:
        adapter.close()
    dtype = torch.float32 if autocast == "no" else precision
    one, other = (torch.randn(PEAK_SIZE, PEAK_SIZE, device=device).to(dtype) for _ in range(2))
    seconds = min(timed(lambda: one @ other) for _ in range(5))
    peak = 2 * PEAK_SIZE**3 / seconds
    step = statistics.median(run.seconds for run in ours)
    share = counter.get_total_flops() / step / peak
    what = f"{name}: share of this machine's matmul peak ({peak / 1e9:,.0f} GFLOP/s)"
    aim = 70.0 if name == "prefix" and base.id == GPT2_SMALL else None
    return Figure(what, share * 100, "%", at_least=aim)


def _figures(
    name: str,
    ours: Sequence[Trained],
    theirs: Sequence[Trained],
    aims: tuple[float | None, float | None],
) -> list[Figure]:
    def timing(runs: Sequence[Trained]) -> Timing:
        return Timing(tuple(run.seconds for run in runs))

    faster = ratio(timing(theirs), timing(ours))
    memory = statistics.median(run.memory for run in ours)
    their_memory = statistics.median(run.memory for run in theirs)
    target, aim = aims
    return [
        Figure(f"{name}: a step, ptkit", timing(ours).median, "s"),
        Figure(f"{name}: a step, PEFT + Trainer", timing(theirs).median, "s"),
        Figure(f"{name}: PEFT + Trainer / ptkit", *times(faster), at_least=target),
        Figure(f"{name}: peak memory, ptkit", memory, "bytes"),
        Figure(f"{name}: peak memory, PEFT + Trainer", their_memory, "bytes"),
        Figure(
            f"{name}: memory, ptkit / PEFT + Trainer", memory / their_memory, "x",
            at_most=aim,
        ),
    ]  # fmt: skip
