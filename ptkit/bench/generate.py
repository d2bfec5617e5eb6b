"""`ptkit bench generate`: one soft prompt, one batch: PEFT reads it in every row, ptkit in none."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from ptkit.bench.bases import GPT2_SMALL, ParityError, bench_base, random_prompts
from ptkit.bench.result import BenchResult, Figure
from ptkit.bench.timing import interleaved, ratio
from ptkit.formats.adapter_files import write_adapter
from ptkit.methods import ADAPTERS, Demonstrations, compile_files, create_adapter
from ptkit.runtime.forward import rows_for
from ptkit.runtime.generation import generate


def bench_generate(
    model: str,
    *,
    virtual_tokens: int = 100,
    rows: int = 16,
    input_tokens: int = 32,
    new_tokens: int = 24,
    rounds: int = 5,
) -> BenchResult:
    """`rows` prompts answered with one soft prompt of `virtual_tokens`, greedily.

    Candidates: the base alone; ptkit with the prompt compiled once, before; PEFT.
    """
    base = bench_base(model)
    prompts = random_prompts(base, rows, input_tokens)
    section = ADAPTERS["prompt_tuning"].section_class(
        kind="prompt_tuning", num_virtual_tokens=virtual_tokens, start="vocabulary"  # type: ignore[call-arg]
    )  # fmt: skip
    torch.manual_seed(0)
    files = create_adapter(section, base, Demonstrations((), 0)).files()
    prefix = compile_files(files, base)
    assert prefix is not None
    with tempfile.TemporaryDirectory() as scratch:
        write_adapter(Path(scratch) / "adapter", files)
        peft = PeftModel.from_pretrained(base.model, str(Path(scratch) / "adapter")).eval()
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False,
    }  # fmt: skip
    pad = base.pad_token_id
    ids = torch.tensor(prompts, device=base.model.device)

    def with_base() -> list[list[int]]:
        return generate(base.model, prompts, None, pad_token_id=pad, **options)

    def with_ptkit() -> list[list[int]]:
        batch = rows_for(prefix, prompts)
        return generate(base.model, prompts, batch, pad_token_id=pad, **options)

    @torch.no_grad()
    def with_peft() -> list[list[int]]:
        with warnings.catch_warnings():  # that it drops position ids, which are right here anyway
            warnings.simplefilter("ignore", UserWarning)
            output = peft.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=pad, **options
            )
        return output[:, -new_tokens:].tolist()

    if with_ptkit() != with_peft():
        raise ParityError("ptkit and PEFT gave different tokens")
    timings = interleaved(
        {"base": with_base, "ptkit": with_ptkit, "peft": with_peft}, rounds=rounds, warm_up=0
    )
    aimed = model == GPT2_SMALL and virtual_tokens == 100 and rows == 16
    faster, over = (
        ratio(timings["peft"], timings["ptkit"]),
        ratio(timings["ptkit"], timings["base"]),
    )
    return BenchResult(
        "generate",
        {
            "model": model, "virtual_tokens": virtual_tokens, "rows": rows,
            "input_tokens": input_tokens, "new_tokens": new_tokens, "rounds": rounds,
        },
        "the same greedy tokens with PEFT",
        [
            *(
                Figure(label, timings[key].median, "s", timings[key].quantile(0.25),
                       timings[key].quantile(0.75))
                for key, label in (
                    ("base", "the base alone"), ("ptkit", "ptkit, compiled"), ("peft", "PEFT"),
                )
            ),
            Figure("PEFT / ptkit", faster[0], "x", *faster[1:], at_least=1.3 if aimed else None),
            Figure("ptkit / base", over[0], "x", *over[1:], at_most=1.05 if aimed else None),
        ],
    )  # fmt: skip
