"""`ptkit bench train`: the same steps on the same rows, by ptkit and by its peers in turn."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ptkit.bench.adapterhub import AdapterHub
from ptkit.bench.bases import GPT2_SMALL, ParityError, bench_base, in_memory, without_dropout
from ptkit.bench.peers import METHODS, BenchMethod, Clock, Peer, Round, Trained
from ptkit.bench.peft_trainer import PeftTrainer
from ptkit.bench.result import BenchResult, Figure, times
from ptkit.bench.timing import Timing, ratio, timed
from ptkit.bench.trl_trainer import TrlTrainer
from ptkit.data.chat_rows import ChatEncoder
from ptkit.data.encode import encode_examples
from ptkit.data.encoded import EncodedExample
from ptkit.data.examples import Example
from ptkit.data.task import load_task
from ptkit.errors import UserError, did_you_mean
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import TrainSection
from ptkit.recipe.tasks import ChatTask, PreferenceTask, Task
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import collate
from ptkit.runtime.fused import fused_activations
from ptkit.training.adapter_trainer import Job
from ptkit.training.loop import fit
from ptkit.training.memory import PeakMemory
from ptkit.training.objective import Objective

#: How far the losses of a step may be apart, relative, by precision: all take the same steps.
TOLERANCES = {"no": 1e-4, "bf16": 5e-3}
#: Rows and columns of the matrices whose product tells the machine's peak.
PEAK_SIZE = 2048

#: Who ptkit can be measured beside; each is made of the python of an environment of its own, which
#: one that lives in this process has no use for.
PEERS: Mapping[str, Callable[[str | None], AbstractContextManager[Peer]]] = {
    "peft": lambda python: nullcontext(PeftTrainer()),
    "adapters": AdapterHub,
    "trl": lambda python: TrlTrainer(),
}


def bench_train(
    model: str,
    methods: Sequence[str] = ("prefix", "prompt-20"),
    *,
    recipe: str = "table-to-text",
    steps: int = 6,
    batch_size: int = 8,
    rounds: int = 3,
    autocast: str = "no",
    against: Sequence[str] = ("peft",),
    peer_python: str | None = None,
) -> BenchResult:
    """Train each of `methods` (of `METHODS`) for `steps`, `rounds` times in turn with its peers.

    recipe: whose data is trained on; against: the peers, of `PEERS`; peer_python: the Python of the
    environment of a peer that needs its own.

    All start from the same values and read the same batches in the same order. The loss of every
    step must agree before a time is reported. The first step of each run is not timed. What a peer
    does not have is left out and reported, and so is a method whose losses differ. Raises UserError
    for unknown methods and peers, and for an environment that is none.
    """
    for what, names, known in (("method", methods, METHODS), ("peer", against, PEERS)):
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"no {what} `{unknown[0]}` here; {did_you_mean(unknown[0], known)}")
    with ExitStack() as environments:
        peers = [
            environments.enter_context(PEERS[name](peer_python)) for name in dict.fromkeys(against)
        ]
        base = in_memory(without_dropout(bench_base(model)))
        loaded = load_recipe(recipe)
        data = load_task(loaded.recipe.task, loaded.folder)
        count = max(steps * batch_size, 64)
        rows = _encoded(data.train[:count], base, loaded.recipe.task)[:count]
        settings = TrainSection(
            steps=steps, batch_size=batch_size, warmup_steps=0, schedule="constant",
            eval_every=steps, save_every=steps, autocast=autocast,  # type: ignore[arg-type]
        )  # fmt: skip
        figures: list[Figure] = []
        left_out: dict[str, str] = {}
        apart: dict[str, float] = {}
        disagreed: dict[str, str] = {}
        for name in methods:
            method = METHODS[name]
            lacking = {peer.title: peer.lacks(base, method) for peer in peers}
            taking_part = [peer for peer in peers if lacking[peer.title] is None]
            left_out |= {f"{name}: {title}": why for title, why in lacking.items() if why}
            if not taking_part:
                continue
            ours: list[Trained] = []
            theirs: dict[str, list[Trained]] = {peer.title: [] for peer in taking_part}
            worst = dict.fromkeys(theirs, 0.0)
            try:
                for seed in range(rounds):
                    turn = Round(base, method, rows, settings, seed)
                    ours.append(_with_ptkit(turn))
                    for peer in taking_part:
                        theirs[peer.title].append(peer.train(turn))
                        found = _difference(ours[-1], peer.title, theirs[peer.title][-1], autocast)
                        worst[peer.title] = max(worst[peer.title], found)
            except ParityError as error:  # the other methods may agree
                disagreed[name] = str(error)
                continue
            apart = {t: max(apart.get(t, 0.0), worst.get(t, 0.0)) for t in {**apart, **worst}}
            supervised = statistics.mean(row.supervised for row in rows)
            aims = {peer.title: peer.aim(method, model, supervised) for peer in taking_part}
            tokens = batch_size * statistics.mean(map(len, rows))
            figures += _figures(name, ours, theirs, aims, tokens)
            figures.append(_share_of_peak(name, base, method, rows[:batch_size], ours, autocast))
        versions = "; ".join(peer.versions for peer in peers)
    return BenchResult(
        "train",
        {
            "model": model, "recipe": recipe, "rows": len(rows), "steps": steps,
            "batch_size": batch_size, "rounds": rounds, "autocast": autocast,
            "tokens_per_row": statistics.mean(map(len, rows)),
            "learnt_per_row": statistics.mean(row.supervised for row in rows), "against": versions,
        },
        _parity(apart),
        figures,
        left_out,
        disagreed,
    )  # fmt: skip


def _encoded(examples: Sequence[Example], base: Base, task: Task) -> list[EncodedExample]:
    """The rows that training reads: of a conversation all that is learnt of it. Raises UserError
    for pairs of answers."""
    if isinstance(task, PreferenceTask):
        raise UserError("`bench train` has no pairs of answers; name a recipe of another task")
    if isinstance(task, ChatTask):
        return [*ChatEncoder(base.tokenizer, task).rows(examples).encoded]
    return encode_examples(examples, base.tokenizer, task)


def _with_ptkit(turn: Round) -> Trained:
    clock = Clock()

    def note(report: Any) -> None:
        clock.ends.append(time.perf_counter())
        clock.losses.append(report.loss)

    adapter = turn.started()
    try:
        with tempfile.TemporaryDirectory() as scratch:
            job = Job(
                adapter, turn.rows, turn.rows[:1], turn.settings, turn.method.learning_rate,
                turn.seed, Path(scratch), note,
            )  # fmt: skip
            memory = PeakMemory(turn.base.model.device)
            fit([job])
            peak = memory.bytes()
    finally:
        adapter.close()
    return Trained(clock.losses, clock.per_step, peak)


def _difference(ours: Trained, title: str, theirs: Trained, autocast: str) -> float:
    """The largest relative difference of a step's loss. Raises ParityError above TOLERANCES."""
    if len(ours.losses) != len(theirs.losses):
        raise ParityError(f"{len(ours.losses)} steps here, {len(theirs.losses)} by {title}")
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True))
    if not worst <= TOLERANCES[autocast]:  # a loss that is no number is no agreement either
        raise ParityError(f"losses {ours.losses} here, {theirs.losses} by {title}")
    return worst


def _parity(apart: Mapping[str, float]) -> str:
    """What was checked, and how well it agreed with each peer."""
    if not apart:
        return "nothing was compared: no peer has any of these methods, or none agrees"
    worst = ", ".join(f"{value:.1e} ({title})" for title, value in apart.items())
    return f"the loss of every step, at most {worst} apart (relative)"


def _share_of_peak(
    name: str,
    base: Base,
    method: BenchMethod,
    rows: list[EncodedExample],
    ours: Sequence[Trained],
    autocast: str,
) -> Figure:
    """Operations of a step's matrix products per second, as a share of what one product of two
    large matrices reaches here, in this run. Nothing else counts as useful."""
    adapter = method.started(base, 0)
    device = base.model.device.type
    precision = torch.bfloat16 if autocast == "bf16" else torch.float16
    try:
        objective = Objective([adapter])
        tensors = collate(rows, base)
        with (
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
    theirs: Mapping[str, Sequence[Trained]],
    aims: Mapping[str, tuple[float | None, float | None]],
    tokens: float,
) -> list[Figure]:
    """Times, then memory, of ptkit and of every peer.

    aims: the targets beside each peer; tokens: of a batch, padding left out
    """

    def timing(runs: Sequence[Trained]) -> Timing:
        return Timing(tuple(run.seconds for run in runs))

    def peak(runs: Sequence[Trained]) -> float:
        return statistics.median(run.memory for run in runs)

    figures = [
        Figure(f"{name}: a step, ptkit", timing(ours).median, "s"),
        Figure(f"{name}: tokens per second, ptkit", tokens / timing(ours).median),
    ]
    for title, runs in theirs.items():
        faster = times(ratio(timing(runs), timing(ours)))
        figures += [
            Figure(f"{name}: a step, {title}", timing(runs).median, "s"),
            Figure(f"{name}: tokens per second, {title}", tokens / timing(runs).median),
            Figure(f"{name}: {title} / ptkit", *faster, at_least=aims[title][0]),
        ]
    figures.append(Figure(f"{name}: peak memory, ptkit", peak(ours), "bytes"))
    for title, runs in theirs.items():
        share = peak(ours) / peak(runs)
        figures += [
            Figure(f"{name}: peak memory, {title}", peak(runs), "bytes"),
            Figure(f"{name}: memory, ptkit / {title}", share, "x", at_most=aims[title][1]),
        ]
    return figures
