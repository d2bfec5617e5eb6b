"""`ptkit bench together`: several prefixes trained in one batch, beside one after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ptkit.bench.bases import ParityError, bench_base, random_prompts
from ptkit.bench.result import BenchResult, Figure
from ptkit.bench.timing import Timing, interleaved, ratio
from ptkit.data.encoded import EncodedExample
from ptkit.methods import Demonstrations
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.methods.prefix_tuning.settings import PrefixTuningSection
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.base_model import Base
from ptkit.training.adapter_trainer import Job
from ptkit.training.loop import fit
from ptkit.training.memory import PeakMemory


def bench_together(
    model: str,
    *,
    adapters: int = 8,
    batch_size: int = 2,
    virtual_tokens: int = 10,
    input_tokens: int = 40,
    target_tokens: int = 24,
    steps: int = 20,
    rounds: int = 5,
) -> BenchResult:
    """`adapters` prefixes with seeds of their own, `batch_size` rows each, `steps` steps.

    Both ways are checked to end with the same parameters.
    """
    base = bench_base(model)
    settings = TrainSection(
        steps=steps, batch_size=batch_size, warmup_steps=2, eval_every=steps, save_every=steps
    )
    lengths = [input_tokens - i % 8 for i in range(64)]
    rows = [
        EncodedExample(ids[:input_tokens][-length:], ids[input_tokens:])
        for ids, length in zip(
            random_prompts(base, 64, input_tokens + target_tokens), lengths, strict=True
        )
    ]
    ended: dict[str, list[torch.Tensor]] = {}
    memory: dict[str, list[int]] = {"alone": [], "together": []}

    def candidate(name: str, run: Callable[[list[Job]], object]) -> Callable[[], None]:
        def measured() -> None:
            with tempfile.TemporaryDirectory() as scratch:
                jobs = _jobs(base, rows, settings, adapters, virtual_tokens, Path(scratch))
                peak = PeakMemory(base.model.device)
                run(jobs)
                memory[name].append(peak.bytes())
                ended[name] = [_flat(job) for job in jobs]

        return measured

    timings: dict[str, Timing] = interleaved(
        {
            "alone": candidate("alone", lambda jobs: [fit([job]) for job in jobs]),
            "together": candidate("together", fit),
        },
        rounds=rounds,
    )
    difference = max(
        float((a - b).abs().max()) for a, b in zip(ended["alone"], ended["together"], strict=True)
    )
    if difference > 1e-3:
        raise ParityError(f"training together changed the parameters by {difference}")
    faster = ratio(timings["alone"], timings["together"])
    peaks = {name: sorted(values[1:])[len(values[1:]) // 2] for name, values in memory.items()}
    on_gpu = base.model.device.type == "cuda"
    return BenchResult(
        "together",
        {
            "model": model, "adapters": adapters, "batch_size": batch_size,
            "virtual_tokens": virtual_tokens, "steps": steps, "rounds": rounds,
        },
        f"the same parameters after {steps} steps (largest difference {difference:.1e})",
        [
            *(
                Figure(f"{adapters} prefixes {label}", timings[key].median, "s",
                       timings[key].quantile(0.25), timings[key].quantile(0.75))
                for key, label in (
                    ("alone", "one after the other"), ("together", "in one batch")
                )
            ),
            Figure("speed, together / one after the other", faster[0], "x", *faster[1:],
                   at_least=4.0 if on_gpu else 1.5),
            Figure("peak memory, one at a time", peaks["alone"], "bytes"),
            Figure("peak memory, together", peaks["together"], "bytes"),
            Figure("memory, together / one at a time", peaks["together"] / peaks["alone"], "x"),
        ],
    )  # fmt: skip


def _jobs(
    base: Base,
    rows: list[EncodedExample],
    settings: TrainSection,
    count: int,
    virtual_tokens: int,
    folder: Path,
) -> list[Job]:
    section = PrefixTuningSection(
        kind="prefix_tuning", num_virtual_tokens=virtual_tokens, start="vocabulary"
    )
    jobs = []
    for seed in range(count):
        torch.manual_seed(seed)
        adapter = PrefixTuning.create(section, base, Demonstrations((), seed))
        jobs.append(Job(adapter, rows, rows[:2], settings, 1e-2, seed, folder / str(seed)))
    return jobs


def _flat(job: Job) -> torch.Tensor:
    assert isinstance(job.adapter, PrefixTuning)
    return job.adapter.flat().detach().clone()
