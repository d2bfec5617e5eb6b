"""`ptkit bench infix`: what reading long inputs once, for all epochs, saves in training."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ptkit.bench.bases import GPT2_SMALL, ParityError, bench_base, random_prompts
from ptkit.bench.result import BenchResult, Figure
from ptkit.bench.timing import interleaved, ratio
from ptkit.data.encoded import EncodedExample
from ptkit.methods import Adapter, Demonstrations
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.methods.prefix_tuning.settings import PrefixTuningSection
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import collate
from ptkit.training.context_cache import ContextCache
from ptkit.training.objective import Objective


def bench_infix(
    model: str,
    *,
    virtual_tokens: int = 10,
    input_tokens: int = 400,
    target_tokens: int = 30,
    rows: int = 8,
    rounds: int = 5,
) -> BenchResult:
    """A training step of a prefix and of an infix whose inputs were read in an earlier epoch."""
    base = bench_base(model)
    inputs = random_prompts(base, rows, input_tokens)
    targets = random_prompts(base, rows, target_tokens, seed=1)
    examples = [EncodedExample(i, t) for i, t in zip(inputs, targets, strict=True)]
    base.model.eval()  # without dropout the two ways of reading an input can be compared
    prefix, infix = (_adapter(base, virtual_tokens, where) for where in ("prefix", "infix"))
    cache = ContextCache(base, budget=2 * 10**9)

    def kept() -> float:
        known = cache.contexts(examples)
        tensors = collate(cache.shortened(examples), base)
        return _step(infix, lambda o: o([0], [rows], **tensors, contexts=known))

    def read_again() -> float:
        return _step(infix, lambda o: o([0], [rows], **collate(examples, base)))

    def with_prefix() -> float:
        return _step(prefix, lambda o: o([0], [rows], **collate(examples, base)))

    first, whole = kept(), read_again()
    if abs(first - whole) > 1e-4 * abs(whole):
        raise ParityError(f"the loss is {first} with kept contexts, {whole} without")
    timings = interleaved(
        {"prefix": with_prefix, "infix": kept, "infix, inputs read": read_again},
        rounds=rounds,
    )
    faster = ratio(timings["prefix"], timings["infix"])
    aimed = model == GPT2_SMALL and (input_tokens, target_tokens) == (400, 30)
    return BenchResult(
        "infix",
        {
            "model": model, "virtual_tokens": virtual_tokens, "input_tokens": input_tokens,
            "target_tokens": target_tokens, "rows": rows, "rounds": rounds,
        },
        "the loss with kept contexts and with inputs read from their first token",
        [
            *(
                Figure(f"a step, {label}", timings[key].median, "s", timings[key].quantile(0.25),
                       timings[key].quantile(0.75))
                for key, label in (
                    ("prefix", "prefix"), ("infix", "infix, from the second epoch on"),
                    ("infix, inputs read", "infix, inputs read again"),
                )
            ),
            Figure("kept for each row", cache.nbytes / rows, "bytes"),
            Figure("prefix / infix", faster[0], "x", *faster[1:], at_least=6 if aimed else None),
        ],
    )  # fmt: skip


def _adapter(base: Base, virtual_tokens: int, position: str) -> PrefixTuning:
    torch.manual_seed(0)
    section = PrefixTuningSection(
        kind="prefix_tuning", num_virtual_tokens=virtual_tokens, start="vocabulary",
        position=position,  # type: ignore[arg-type]
    )  # fmt: skip
    return PrefixTuning.create(section, base, Demonstrations((), 0))


def _step(adapter: Adapter, losses: Callable[[Objective], torch.Tensor]) -> float:
    """Forward and backward; the values stay, so that every round does the same work."""
    loss = losses(Objective([adapter])).sum()
    loss.backward()
    for parameter in adapter.trainable().values():
        parameter.grad = None
    return float(loss.detach())
