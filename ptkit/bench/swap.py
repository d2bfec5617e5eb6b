"""`ptkit bench swap`: changing the adapter that the next request uses, beside PEFT."""

from __future__ import annotations

import tempfile
from itertools import cycle
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file

from ptkit.bank import AdapterBank
from ptkit.bench.bases import (
    ParityError,
    bench_base,
    load_beside_peft,
    random_prefixes,
    random_prompts,
)
from ptkit.bench.result import BenchResult, Figure
from ptkit.bench.timing import interleaved, ratio
from ptkit.formats.adapter_folder import WEIGHTS
from ptkit.runtime.forward import all_logits


def bench_swap(model: str, *, virtual_tokens: int = 10, rounds: int = 200) -> BenchResult:
    """Swap to a resident adapter, and load one from disk and make it active.

    ptkit: `bank.rows([name])`, the batch the next forward takes, and `bank.load` before it. PEFT:
    `set_adapter`, and `load_adapter` before it (the previous one is deleted outside the clock).
    """
    base = bench_base(model)
    with tempfile.TemporaryDirectory() as scratch:
        paths = random_prefixes(base, Path(scratch), 16, virtual_tokens)
        bank = AdapterBank(base)
        peft = load_beside_peft(bank, paths)
        difference = _parity(bank, peft)
        ours, theirs, files = (cycle(range(len(paths))) for _ in range(3))

        def load_peft() -> None:
            peft.load_adapter(paths[next(files)], adapter_name="new")
            peft.set_adapter("new")

        def load_ptkit() -> None:
            bank.load(paths[next(files)], "new")
            bank.rows(["new"])

        def forget_peft() -> None:
            peft.set_adapter("0")  # PEFT warns of deleting the active one
            peft.delete_adapter("new")

        swaps = interleaved(
            {
                "ptkit": lambda: bank.rows([str(next(ours))]),
                "peft": lambda: peft.set_adapter(str(next(theirs))),
            },
            rounds=rounds * 5,
            warm_up=20,
        )
        loads = interleaved(
            {
                "ptkit": load_ptkit,
                "peft": load_peft,
                # Copied: reading maps the file, and its bytes are not fetched until they are used.
                "read": lambda: [
                    t.clone() for t in load_file(paths[next(files)] / WEIGHTS).values()
                ],
                "forget": forget_peft,
            },
            rounds=rounds,
            warm_up=5,
        )
        size = (paths[0] / WEIGHTS).stat().st_size
    swap_ratio, load_ratio = (ratio(t["peft"], t["ptkit"]) for t in (swaps, loads))

    def micro(what: str, which: str, share: float = 0.5, at_most: float | None = None) -> Figure:
        return Figure(what, swaps[which].quantile(share) * 1e6, "us", at_most=at_most)

    def milli(what: str, which: str, at_most: float | None = None) -> Figure:
        t = loads[which]
        low, high = t.quantile(0.25) * 1e3, t.quantile(0.75) * 1e3
        return Figure(what, t.median * 1e3, "ms", low, high, at_most=at_most)

    return BenchResult(
        "swap",
        {"model": model, "virtual_tokens": virtual_tokens, "rounds": rounds, "file_bytes": size},
        f"same logits as PEFT for all 16 adapters (largest difference {difference:.1e})",
        [
            micro("swap to a resident adapter, ptkit", "ptkit", at_most=20),
            micro("the same, 99th percentile", "ptkit", 0.99),
            micro("swap to a resident adapter, PEFT set_adapter", "peft"),
            Figure("PEFT / ptkit, swap", swap_ratio[0], "x", *swap_ratio[1:]),
            milli("load from disk and activate, ptkit", "ptkit", at_most=0.6),
            milli("load from disk and activate, PEFT", "peft"),
            milli("read the safetensors file, nothing else", "read"),
            Figure("PEFT / ptkit, load", load_ratio[0], "x", *load_ratio[1:]),
        ],
    )


@torch.no_grad()
def _parity(bank: AdapterBank, peft: PeftModel) -> float:
    """Largest difference between ptkit's and PEFT's logits over all adapters."""
    ids = torch.tensor(random_prompts(bank.base, 1, 12)).to(bank.base.model.device)
    worst = 0.0
    for name in bank.list():
        peft.set_adapter(name)
        theirs = peft(input_ids=ids).logits[:, -ids.shape[1] :]
        ours = all_logits(bank.base.model, ids, torch.ones_like(ids), bank.rows([name]))
        worst = max(worst, float((ours - theirs).abs().max()))
    if worst > 1e-3:
        raise ParityError(f"ptkit and PEFT disagree on the logits by {worst}")
    return worst
