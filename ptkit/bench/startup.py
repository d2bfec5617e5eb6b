"""`ptkit bench startup`: from nothing to help, an import, a first answer, and a first step."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from ptkit.bench.bases import ParityError, random_prefixes
from ptkit.bench.result import BenchResult, Figure
from ptkit.bench.timing import Timing, interleaved, ratio
from ptkit.data.sources import BUILTIN
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
#: The same with the base alone: what no tool can be quicker than.
_BARE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
base, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
model.generate(**inputs, min_new_tokens=8, max_new_tokens=8, do_sample=False)
"""
#: A training loop as a person would write it for PEFT, until its first step.
_BARE_STEP = """
import json, sys, torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
base, file = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=10)
model = get_peft_model(model, settings)
with open(file, encoding="utf-8") as lines:
    rows = [json.loads(line) for line in lines]
inputs = [tokenizer(f"Facts: {row['facts']}\\nText:")["input_ids"] for row in rows]
targets = [tokenizer(f" {row['text']}")["input_ids"] + [tokenizer.eos_token_id] for row in rows]
pairs = [*zip(inputs, targets)][:16]
width = max(len(a) + len(b) for a, b in pairs)
padding = [width - len(a) - len(b) for a, b in pairs]
ids = torch.tensor([a + b + [0] * n for (a, b), n in zip(pairs, padding)])
mask = torch.tensor([[1] * (width - n) + [0] * n for n in padding])
labels = [[-100] * len(a) + b + [-100] * n for (a, b), n in zip(pairs, padding)]
learnt = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(learnt, lr=0.1)
model(input_ids=ids, attention_mask=mask, labels=torch.tensor(labels)).loss.backward()
optimizer.step()
"""
#: `ptkit train` until its first step: the command's own function, told to stop there.
_FIRST_STEP = """
import os, sys
from ptkit.cli.display import LiveDisplay
LiveDisplay.stepped = lambda self, report: os._exit(0)
from ptkit.cli.main import run
sys.argv = ["ptkit", "train", *sys.argv[1:]]
run()
"""
TEXT = "kind[boat], name[Orwick]"
_ROWS = BUILTIN / "facts-to-text" / "train.jsonl"
#: A recipe that ships, its prefix of ten tokens started without trying starts.
_TRAIN = [
    "table-to-text", "--method", "prefix_tuning", "--set", "retention=null",
    "--set", "methods=[{kind: prefix_tuning, start: task}]",
]  # fmt: skip


def bench_startup(*, rounds: int = 5) -> BenchResult:
    """Seconds of whole processes, started in turn, on the embedded base."""
    with tempfile.TemporaryDirectory() as scratch:
        base = load_base(TINY_EN, device="cpu")
        (adapter,) = random_prefixes(base, Path(scratch), 1, 4, torch.float32)
        runs = count()

        def process(*words: str) -> Callable[[], str]:
            def run() -> str:
                done = subprocess.run(
                    [sys.executable, *words], check=True, capture_output=True, text=True
                )
                return done.stdout.strip()

            return run

        def first_step() -> str:
            return process("-c", _FIRST_STEP, *_TRAIN, "-o", f"{scratch}/run{next(runs)}")()

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
                "answer, bare": process("-c", _BARE, str(TINY_EN_FOLDER), TEXT),
                "step": first_step,
                "step, bare": process("-c", _BARE_STEP, str(TINY_EN_FOLDER), str(_ROWS)),
            },
            rounds=rounds,
            warm_up=0,
        )
    faster = ratio(timings["answer, PEFT"], timings["answer"])
    answer = ratio(timings["answer"], timings["answer, bare"])
    step = ratio(timings["step"], timings["step, bare"])

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
            seconds("as many tokens, transformers alone", timings["answer, bare"]),
            seconds("first step, ptkit train", timings["step"]),
            seconds("first step, a loop with PEFT", timings["step, bare"]),
            Figure("PEFT / ptkit, first answer", faster[0], "x", *faster[1:]),
            Figure("ptkit / transformers alone", answer[0], "x", *answer[1:], at_most=1.2),
            Figure("ptkit / a loop, first step", step[0], "x", *step[1:], at_most=1.2),
        ],
    )
