"""`ptkit bench mixed`: one request for each of many adapters, in one batch, beside PEFT."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

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
from ptkit.runtime.generation import generate


def bench_mixed(
    model: str,
    *,
    adapters: int = 16,
    virtual_tokens: int = 10,
    input_tokens: int = 32,
    new_tokens: int = 24,
    rounds: int = 5,
) -> BenchResult:
    """`adapters` requests, each for its own adapter, `new_tokens` greedy tokens each.

    Candidates: the base alone on the same batch; ptkit's mixed batch; PEFT's loop of set_adapter
        and generate. PEFT has no other way (`adapter_names=` is ignored for prompt methods).
    """
    base = bench_base(model)
    prompts = random_prompts(base, adapters, input_tokens)
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
    }
    pad = base.pad_token_id
    with tempfile.TemporaryDirectory() as scratch:
        paths = random_prefixes(base, Path(scratch), adapters, virtual_tokens)
        bank = AdapterBank(base, check_every=math.inf)  # the files go when all are loaded
        peft = load_beside_peft(bank, paths)
    names = bank.list()

    def with_ptkit() -> list[list[int]]:
        return generate(base.model, prompts, bank.prefixes(names), pad_token_id=pad, **options)

    def with_base() -> list[list[int]]:
        return generate(base.model, prompts, None, pad_token_id=pad, **options)

    def with_peft() -> list[list[int]]:
        return [
            _peft_answer(peft, name, prompt, pad, options)
            for name, prompt in zip(names, prompts, strict=True)
        ]

    solo = [
        generate(base.model, [prompt], bank.prefixes([name]), pad_token_id=pad, **options)[0]
        for name, prompt in zip(names, prompts, strict=True)
    ]
    mixed = with_ptkit()
    if mixed != solo or with_peft() != solo:
        raise ParityError("the mixed batch, the solo runs and PEFT gave different tokens")
    timings = interleaved(
        {"base": with_base, "ptkit": with_ptkit, "peft": with_peft}, rounds=rounds, warm_up=0
    )
    against_peft = ratio(timings["peft"], timings["ptkit"])
    over_base = ratio(timings["ptkit"], timings["base"])
    target = adapters == 16
    return BenchResult(
        "mixed",
        {
            "model": model, "adapters": adapters, "virtual_tokens": virtual_tokens,
            "input_tokens": input_tokens, "new_tokens": new_tokens, "rounds": rounds,
        },
        "the same greedy tokens in the mixed batch, alone, and with PEFT",
        [
            *(
                Figure(
                    f"{adapters} requests, {label}", timings[key].median, "s",
                    timings[key].quantile(0.25), timings[key].quantile(0.75),
                )
                for key, label in (
                    ("base", "the base alone"), ("ptkit", "ptkit, one mixed batch"),
                    ("peft", "PEFT, set_adapter in a loop"),
                )
            ),
            Figure("PEFT / ptkit", against_peft[0], "x", *against_peft[1:],
                   at_least=5.5 if target else None),
            Figure("ptkit / base", over_base[0], "x", *over_base[1:],
                   at_most=1.05 if target else None),
        ],
    )  # fmt: skip


@torch.no_grad()
def _peft_answer(
    peft: PeftModel, name: str, prompt: list[int], pad: int, options: dict[str, Any]
) -> list[int]:
    peft.set_adapter(name)
    ids = torch.tensor([prompt], device=peft.device)
    output = peft.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=pad, **options
    )
    return output[0, len(prompt) :].tolist()
