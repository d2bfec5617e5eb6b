"""DPO with ptkit and with TRL's DPOTrainer: the same pairs, steps and start, peak memory and time.

    python scripts/dpo_beside_trl.py --model tiny-en --method lora

Each side runs in a process of its own, one after the other, in float32 without dropout. Memory is
the process's highest mark beyond what was in use before training. TRL is found as
`make setup-oracles` puts it, or where PTKIT_TRL says. TRL shuffles rows; every step reads all pairs
of a round, so that the losses of the steps can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ptkit.data.encoded import PairExample
from ptkit.data.pair_rows import PairEncoder
from ptkit.data.task import load_task
from ptkit.formats.adapter_files import write_adapter
from ptkit.methods import Demonstrations, create_adapter
from ptkit.methods.catalogue import method_section
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import TrainSection
from ptkit.recipe.tasks import PreferenceTask
from ptkit.runtime.base_model import Base, load_base
from ptkit.training.adapter_trainer import Job, StepReport
from ptkit.training.loop import fit
from ptkit.training.memory import PeakMemory
from ptkit.training.preference import preference_of

TRL = Path(os.environ.get("PTKIT_TRL", Path(sys.prefix) / "trl"))
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 8, "learning_rate": 1e-3},
    "prompt_tuning": {"kind": "prompt_tuning", "num_virtual_tokens": 32, "start": "random",
                      "learning_rate": 1e-3},
}  # fmt: skip


def pairs_of(base: Base, task: PreferenceTask, count: int) -> list[PairExample]:
    """The first pairs of the built-in set."""
    recipe = load_recipe("preference-tiny")
    examples = load_task(task, recipe.folder).train[:count]
    rows = PairEncoder(base.tokenizer, task).rows(examples).encoded
    return [row for row in rows if isinstance(row, PairExample)]


def task_of() -> PreferenceTask:
    task = load_recipe("preference-tiny").recipe.task
    assert isinstance(task, PreferenceTask)
    return task


def own(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """ptkit's side; writes the start of the adapter for the other side."""
    base = load_base(asked["model"], dtype="float32", device="cpu")
    base.model.save_pretrained(folder / "model")
    base.tokenizer.save_pretrained(folder / "model")
    task, section = task_of(), method_section(METHODS[asked["method"]])
    torch.manual_seed(0)
    adapter = create_adapter(section, base, Demonstrations((), 0))
    write_adapter(folder / "adapter", adapter.files(), replace=True)
    pairs = pairs_of(base, task, asked["pairs"])
    (folder / "rows.json").write_text(
        json.dumps([[p.input_ids, p.target_ids, p.rejected.target_ids] for p in pairs])
    )
    steps: list[StepReport] = []
    settings = TrainSection(
        steps=asked["steps"], batch_size=len(pairs), warmup_steps=0, schedule="constant",
        autocast="no", eval_every=asked["steps"], save_every=asked["steps"],
    )  # fmt: skip
    job = Job(
        adapter, pairs, pairs[:1], settings, METHODS[asked["method"]]["learning_rate"], 0,
        folder / "run", report=steps.append, preference=preference_of(task),
    )  # fmt: skip
    memory, clock = PeakMemory(base.model.device), time.perf_counter()
    fit([job])
    seconds = time.perf_counter() - clock
    return {
        "memory": memory.bytes(),
        "seconds": seconds,
        "losses": [step.loss for step in steps],
    }


def theirs(folder: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """TRL's side, on the token ids that ptkit reads."""
    from datasets import Dataset
    from peft import PeftConfig, set_peft_model_state_dict
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class Given(DPOTrainer):  # type: ignore[misc]
        """Rows that are token ids already."""

        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [dict(zip(names, row, strict=True)) for row in json.loads(
        (folder / "rows.json").read_text())]  # fmt: skip
    config = PeftConfig.from_pretrained(folder / "adapter")
    config.inference_mode = False
    arguments = DPOConfig(
        output_dir=str(folder / "out"), beta=task_of().beta, max_length=None, report_to=[],
        max_steps=asked["steps"], per_device_train_batch_size=len(rows), use_cpu=True, bf16=False,
        gradient_checkpointing=False, learning_rate=METHODS[asked["method"]]["learning_rate"],
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, logging_steps=1,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Given(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=arguments, train_dataset=Dataset.from_list(rows), peft_config=config,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    set_peft_model_state_dict(trainer.model, weights)
    memory, clock = PeakMemory(torch.device("cpu")), time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - clock
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {"memory": memory.bytes(), "seconds": seconds, "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny-en")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--side", choices=("ptkit", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    asked = {key: getattr(given, key) for key in ("model", "method", "pairs", "steps")}
    if given.side is not None:
        side = own if given.side == "ptkit" else theirs
        (given.folder / f"{given.side}.json").write_text(json.dumps(side(given.folder, asked)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for side in ("ptkit", "trl"):
            path = os.pathsep.join([str(TRL), os.environ.get("PYTHONPATH", "")])
            arguments = [f"--{key}={value}" for key, value in asked.items()]
            subprocess.run(
                [sys.executable, __file__, *arguments, f"--side={side}", f"--folder={scratch}"],
                check=True, env={**os.environ, "PYTHONPATH": path},
            )  # fmt: skip
            found[side] = json.loads((Path(scratch) / f"{side}.json").read_text())
    for side, values in found.items():
        losses = " ".join(f"{loss:.5f}" for loss in values["losses"])
        print(f"{side:6} {values['memory'] / 1e6:8.1f} MB {values['seconds']:7.2f} s  {losses}")
    print(f"memory, ptkit / TRL: {found['ptkit']['memory'] / found['trl']['memory']:.2f}")


if __name__ == "__main__":
    main()
