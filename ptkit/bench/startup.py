"""`ptkit bench startup`: from nothing to help, an import, and a first answer."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from ptkit.bench.bases import ParityError, random_prefixes
from ptkit.bench.result import BenchResult, Figure
from ptkit.bench.timing import Timing, interleaved, ratio
from ptkit.runtime.base_model import load_base
from ptkit.runtime.model_names import TINY_EN, TINY_EN_FOLDER

#: What a person would write to use an adapter with PEFT alone.
_WITH_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, adapter).eval()
inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
"""
TEXT = "kind[boat], name[Orwick]"


def bench_startup(*, rounds: int = 5) -> BenchResult:
    """Seconds of whole processes, started in turn, on the embedded base."""
    with tempfile.TemporaryDirectory() as scratch:
        base = load_base(TINY_EN, device="cpu")
        (adapter,) = random_prefixes(base, Path(scratch), 1, 4, torch.float32)

        def process(*words: str) -> Callable[[], str]:
            def run() -> str:
                done = subprocess.run(
                    [sys.executable, *words], check=True, capture_output=True, text=True
                )
                return done.stdout.strip()

            return run

        ours = process("-m", "ptkit", "generate", TEXT, "--raw", "-a", str(adapter),
                       "--max-new-tokens", "8")  # fmt: skip
        theirs = process("-c", _WITH_PEFT, str(TINY_EN_FOLDER), str(adapter), TEXT)
        if ours() != theirs():
            raise ParityError("the first answers of ptkit and PEFT differ")
        timings = interleaved(
            {
                "help": process("-m", "ptkit", "--help"),
                "import": process("-c", "import ptkit"),
                "import peft": process("-c", "import peft"),
                "answer": ours,
                "answer, PEFT": theirs,
            },
            rounds=rounds,
            warm_up=0,
        )
    faster = ratio(timings["answer, PEFT"], timings["answer"])

    def seconds(what: str, timing: Timing, **target: float) -> Figure:
        return Figure(
            what, timing.median, "s", timing.quantile(0.25), timing.quantile(0.75), **target
        )

    return BenchResult(
        "startup",
        {"model": TINY_EN, "rounds": rounds},
        "the same first answer with PEFT",
        [
            seconds("ptkit --help", timings["help"], at_most=0.5),
            seconds("import ptkit", timings["import"]),
            seconds("import peft", timings["import peft"]),
            seconds("first answer, ptkit generate", timings["answer"]),
            seconds("first answer, transformers and PEFT", timings["answer, PEFT"]),
            Figure("PEFT / ptkit, first answer", faster[0], "x", *faster[1:]),
        ],
    )
