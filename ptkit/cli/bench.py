"""`ptkit bench`: measurements beside PEFT, on this machine, in one run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ptkit.cli.bench_table import printed, show
from ptkit.cli.options import JsonOutput
from ptkit.errors import UserError, did_you_mean

if TYPE_CHECKING:
    pass

app = typer.Typer(
    help="Measure ptkit beside PEFT on this machine; results are checked against each other first.",
    no_args_is_help=True,
)

BenchModel = Annotated[
    str,
    typer.Option(
        "--model",
        help="`gpt2-small`, `large-vocabulary` (shapes, random weights), `tiny-en`, a hub id or "
        "folder.",
    ),
]
VirtualTokens = Annotated[int, typer.Option(min=1, help="Virtual tokens of every adapter.")]
Rounds = Annotated[int, typer.Option(min=1, help="Interleaved rounds.")]


class Autocast(StrEnum):
    """Mixed precision of both sides."""

    no = "no"
    bf16 = "bf16"


Methods = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads annotations at run time)
    typer.Option(
        "--method",
        "-m",
        help="prefix, prefix-20, prefix-mlp, prompt-20, prompt-32, prompt-100, p-tuning, lora, "
        "full; default: all but prefix-20 and prompt-32.",
    ),
]
TrainedOn = Annotated[str, typer.Option(help="Whose data is trained on.")]
Steps = Annotated[int, typer.Option(min=3, help="Steps of a run.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per step.")]
BothAutocast = Annotated[Autocast, typer.Option(help="Mixed precision, on both sides.")]


@app.command()
def train(
    model: BenchModel = "gpt2-small",
    method: Methods = None,
    recipe: TrainedOn = "table-to-text",
    steps: Steps = 6,
    batch_size: BatchSize = 8,
    rounds: Rounds = 3,
    autocast: BothAutocast = Autocast.no,
    against: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="peft, adapters, trl; several with commas; default: peft."),
    ] = None,
    peer_python: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Python of an environment that has `adapters`, for --against adapters."),
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """The same training steps by ptkit and by PEFT + Trainer, AdapterHub's `adapters` or TRL's
    SFTTrainer: time and memory of a step."""
    from ptkit.bench.peers import USUAL
    from ptkit.bench.train import bench_train

    peers = _named(against) or ["peft"]
    if peer_python is not None and "adapters" not in peers:
        raise UserError("--peer-python is for --against adapters; add that, or leave it out")
    result = bench_train(
        model, method or list(USUAL), recipe=recipe, steps=steps, batch_size=batch_size,
        rounds=rounds, autocast=autocast.value, against=peers,
        peer_python=peer_python,
    )  # fmt: skip
    show(result, json_output)


@app.command()
def quantize(
    model: Annotated[
        str, typer.Option(help="A model by name, hub id, folder or GGUF file.")
    ] = "smollm2-135m",
    precision: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="float32, bfloat16, float16, blocks, nf4, int8; several, with commas or repeated. "
            "The first is what the others are compared with; default: float32,blocks."
        ),
    ] = None,
    recipe: TrainedOn = "table-to-text",
    steps: Steps = 50,
    batch_size: BatchSize = 8,
    virtual_tokens: VirtualTokens = 20,
    checkpointing: Annotated[
        bool, typer.Option(help="Compute activations again in the backward pass.")
    ] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, mps or auto.")] = "cpu",
    json_output: JsonOutput = False,
) -> None:
    """A prefix trained on one model in several precisions: memory, time and loss side by side."""
    from ptkit.bench.quantize import QuantizeSettings, bench_quantize

    trial = QuantizeSettings(
        model, recipe, steps, batch_size, virtual_tokens, checkpointing, device
    )
    show(bench_quantize(trial, _named(precision) or ["float32", "blocks"]), json_output)


@app.command()
def run(
    model: BenchModel = "gpt2-small",
    method: Methods = None,
    recipe: TrainedOn = "table-to-text",
    rows: Annotated[int, typer.Option(min=2, help="Training rows.")] = 640,
    validation: Annotated[int, typer.Option(min=1, help="Validation rows.")] = 64,
    steps: Steps = 24,
    batch_size: BatchSize = 8,
    rounds: Rounds = 3,
    autocast: BothAutocast = Autocast.no,
    peer_autocast: Annotated[
        Optional[Autocast],  # noqa: UP045
        typer.Option(help="Mixed precision of PEFT + Trainer, where it is not to be the same."),
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """Whole training runs by ptkit and by PEFT + Trainer, each with batches of its own making."""
    from ptkit.bench.peers import USUAL
    from ptkit.bench.whole_run import bench_run

    result = bench_run(
        model, method or list(USUAL), recipe=recipe, rows=rows, validation=validation,
        steps=steps, batch_size=batch_size, rounds=rounds, autocast=autocast.value,
        peer_autocast=peer_autocast.value if peer_autocast else None,
    )  # fmt: skip
    show(result, json_output)


@app.command()
def generate(
    model: BenchModel = "gpt2-small",
    virtual_tokens: VirtualTokens = 100,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 16,
    input_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated per row.")] = 24,
    rounds: Rounds = 5,
    json_output: JsonOutput = False,
) -> None:
    """One batch with one long soft prompt, which PEFT reads in every row."""
    from ptkit.bench.generate import bench_generate

    result = bench_generate(
        model, virtual_tokens=virtual_tokens, rows=rows, input_tokens=input_tokens,
        new_tokens=new_tokens, rounds=rounds,
    )  # fmt: skip
    show(result, json_output)


@app.command()
def infix(
    model: BenchModel = "gpt2-small",
    virtual_tokens: VirtualTokens = 10,
    input_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each input.")] = 400,
    target_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each target.")] = 30,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the batch.")] = 8,
    rounds: Rounds = 5,
    json_output: JsonOutput = False,
) -> None:
    """A training step of an infix, whose inputs are read once for all epochs, and of a prefix."""
    from ptkit.bench.infix import bench_infix

    result = bench_infix(
        model, virtual_tokens=virtual_tokens, input_tokens=input_tokens,
        target_tokens=target_tokens, rows=rows, rounds=rounds,
    )  # fmt: skip
    show(result, json_output)


@app.command()
def startup(rounds: Rounds = 5, json_output: JsonOutput = False) -> None:
    """Whole processes: help, an import, and the first answer of an adapter."""
    from ptkit.bench.startup import bench_startup

    show(bench_startup(rounds=rounds), json_output)


class PromptMethod(StrEnum):
    """Methods whose cost grows with their prompt."""

    prompt_tuning = "prompt_tuning"
    prefix_tuning = "prefix_tuning"
    p_tuning = "p_tuning"


@app.command()
def memory(
    model: BenchModel = "gpt2-small",
    method: Annotated[PromptMethod, typer.Option("--method", "-m", help="What is trained.")] = (
        PromptMethod.prompt_tuning
    ),
    rounds: Rounds = 3,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Draw the curves to this PNG or SVG file."),
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """Time and memory of a training step as virtual tokens, inputs and rows grow."""
    from ptkit.bench.growth import bench_memory

    show(bench_memory(model, method=method.value, rounds=rounds, plot=plot), json_output)


@app.command()
def swap(
    model: BenchModel = "gpt2-small",
    virtual_tokens: VirtualTokens = 10,
    rounds: Rounds = 200,
    json_output: JsonOutput = False,
) -> None:
    """Swap to a resident adapter; load one from disk and activate it."""
    from ptkit.bench.swap import bench_swap

    show(bench_swap(model, virtual_tokens=virtual_tokens, rounds=rounds), json_output)


@app.command()
def mixed(
    model: BenchModel = "gpt2-small",
    adapters: Annotated[int, typer.Option(min=1, help="Adapters, one request each.")] = 16,
    virtual_tokens: VirtualTokens = 10,
    input_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated per request.")] = 24,
    rounds: Rounds = 5,
    json_output: JsonOutput = False,
) -> None:
    """One request for each of many adapters in one batch; PEFT takes them in a loop."""
    from ptkit.bench.mixed import bench_mixed

    result = bench_mixed(
        model,
        adapters=adapters,
        virtual_tokens=virtual_tokens,
        input_tokens=input_tokens,
        new_tokens=new_tokens,
        rounds=rounds,
    )
    show(result, json_output)


@app.command()
def traffic(
    model: BenchModel = "gpt2-small",
    adapters: Annotated[int, typer.Option(min=2, help="Registered adapters.")] = 10_000,
    budget: Annotated[int, typer.Option(min=1, help="Adapters the budget holds.")] = 500,
    virtual_tokens: VirtualTokens = 10,
    requests: Annotated[int, typer.Option(min=1, help="Timed fetches.")] = 20_000,
    rounds: Rounds = 10,
    folder: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option(help="Where the adapters' files go for the time being (3.7 GB by default)."),
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """Thousands of adapters on disk, memory for few, requests with Zipf's frequencies."""
    from ptkit.bench.traffic import bench_traffic

    result = bench_traffic(
        model,
        adapters=adapters,
        budget_adapters=budget,
        virtual_tokens=virtual_tokens,
        requests=requests,
        rounds=rounds,
        folder=folder,
    )
    show(result, json_output)


@app.command()
def together(
    model: BenchModel = "tiny-en",
    adapters: Annotated[int, typer.Option(min=2, help="Adapters trained.")] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of each per step.")] = 2,
    virtual_tokens: VirtualTokens = 10,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps per round.")] = 20,
    rounds: Rounds = 5,
    json_output: JsonOutput = False,
) -> None:
    """Train several prefixes in one batch; the peer is ptkit, one after the other."""
    from ptkit.bench.together import bench_together

    result = bench_together(
        model,
        adapters=adapters,
        batch_size=batch_size,
        virtual_tokens=virtual_tokens,
        steps=steps,
        rounds=rounds,
    )
    show(result, json_output)


@app.command()
def soak(
    model: BenchModel = "tiny-en",
    minutes: Annotated[float, typer.Option(min=0.01, help="How long.")] = 10.0,
    threads: Annotated[int, typer.Option(min=2, help="A quarter of them change adapters.")] = 8,
    json_output: JsonOutput = False,
) -> None:
    """Swaps, loads, bad files and generation from many threads at once; every answer checked."""
    from ptkit.bench.soak import bench_soak

    show(bench_soak(model, minutes=minutes, threads=threads), json_output)


@app.command()
def serve(
    model: BenchModel = "tiny-en",
    adapters: Annotated[int, typer.Option(min=1, help="Adapters asked for.")] = 32,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="Of load, in all rounds together.")] = 180.0,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 24,
    rounds: Rounds = 6,
    against: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="peft, transformers, or both with a comma between; default: both."),
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """A server under load, beside PEFT behind FastAPI and `transformers serve`."""
    from ptkit.bench.serve import PEERS, bench_serve

    peers = _named(against) or PEERS
    unknown = sorted({*peers} - {*PEERS})
    if unknown:
        raise UserError(f"--against {unknown[0]}: {did_you_mean(unknown[0], PEERS)}")
    result = bench_serve(
        model, adapters=adapters, clients=clients, seconds=seconds, new_tokens=new_tokens,
        rounds=rounds, against=peers,
    )  # fmt: skip
    show(result, json_output)


def _named(peers: list[str] | None) -> list[str]:
    """The peers of options that may be given several times, or several names with commas."""
    return [name.strip() for given in peers or () for name in given.split(",") if name.strip()]


@app.command("all")
def every(model: BenchModel = "gpt2-small", json_output: JsonOutput = False) -> None:
    """Every benchmark but the soak, with its defaults, one after the other (about an hour)."""
    from ptkit.bench.generate import bench_generate
    from ptkit.bench.growth import bench_memory
    from ptkit.bench.infix import bench_infix
    from ptkit.bench.mixed import bench_mixed
    from ptkit.bench.peers import USUAL
    from ptkit.bench.serve import bench_serve
    from ptkit.bench.startup import bench_startup
    from ptkit.bench.swap import bench_swap
    from ptkit.bench.together import bench_together
    from ptkit.bench.traffic import bench_traffic
    from ptkit.bench.train import bench_train
    from ptkit.bench.whole_run import bench_run

    benches = (
        lambda: bench_train(model, list(USUAL)),
        lambda: bench_run(model, list(USUAL)),
        lambda: bench_infix(model),
        lambda: bench_together(model),
        lambda: bench_generate(model),
        lambda: bench_mixed(model),
        lambda: bench_swap(model),
        lambda: bench_traffic(model),
        lambda: bench_memory(model),
        bench_serve,
        bench_startup,
    )
    missed = [printed(run(), json_output) for run in benches]
    if any(missed):
        raise typer.Exit(1)
