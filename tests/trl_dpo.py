"""Run apart by test_preference.py, with TRL on the path: losses and gradients of its DPOTrainer.

    python trl_dpo.py FOLDER

FOLDER holds `model/` (with its tokenizer), `adapter/` (PEFT's layout) and `asked.json`: the rows
and the losses wanted of them. Written are `rows.json`, token ids as TRL makes them, and for each
loss NAME.safetensors: `loss`, and the gradient of every trained tensor under PEFT's name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer


def trainer_of(folder: Path, loss_type: str, asked: dict) -> DPOTrainer:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    config = PeftConfig.from_pretrained(folder / "adapter")
    config.inference_mode = False
    arguments = DPOConfig(
        output_dir=str(folder / "out"), beta=asked["beta"], loss_type=loss_type,
        per_device_train_batch_size=len(asked["rows"]), max_length=asked["max_length"],
        report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(asked["rows"]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"), peft_config=config,
    )  # fmt: skip
    weights = load_file(folder / "adapter" / "adapter_model.safetensors")
    set_peft_model_state_dict(trainer.model, weights)
    return trainer


def main(folder: Path) -> None:
    asked = json.loads((folder / "asked.json").read_text())
    for loss_type in asked["losses"]:
        trainer = trainer_of(folder, loss_type, asked)
        rows = list(trainer.train_dataset)
        ids = [[r["prompt_ids"], r["chosen_ids"], r["rejected_ids"]] for r in rows]
        (folder / "rows.json").write_text(json.dumps(ids))
        batch = trainer.data_collator(rows)
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found = {
            name: parameter.grad.contiguous().clone()
            for name, parameter in trainer.model.named_parameters()
            if parameter.grad is not None
        }
        save_file({"loss": loss.detach()[None], **found}, folder / f"{loss_type}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
