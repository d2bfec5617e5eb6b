"""TRL's SFTTrainer in a process of its own, run by `ptkit bench train --against trl`
(`ptkit.bench.trl_trainer`). `peer_answers.py` says how requests are answered."""

from __future__ import annotations

import copy
import json
import platform
import tempfile
import warnings
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftConfig
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from ptkit.bench.peer_answers import answer_requests
from ptkit.bench.peers import Clock
from ptkit.bench.peft_trainer import InOrder, StepNotes, load_start
from ptkit.training.memory import PeakMemory


class _OrderedSft(InOrder, SFTTrainer):
    """SFTTrainer, reading the rows in the order they come."""


class Sft:
    """The base, and what is done with it on request; one method per request."""

    model: Any
    tokenizer: Any

    def base(self, folder: str, device: str, dtype: str, threads: int) -> None:
        """Load the base in `folder`, to run on `threads` threads."""
        torch.set_num_threads(threads)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        loader: Any = AutoModelForCausalLM
        # PyTorch's fused attention, as on ptkit's side.
        self.model = loader.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
        self.model.to(device)
        for parameter in self.model.parameters():
            # Weights that are a view of the file would be counted as what training takes.
            parameter.data = parameter.data.clone()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    def train(
        self, adapter: str | None, start: str, rows: str, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Train on the rows in file `rows`, `[[token ids, labels], ...]`, as they come.

        adapter: folder of PEFT's settings; None trains the base. start: file of the values it
        starts from. settings: arguments of transformers' TrainingArguments. Returns the loss and
        the end (seconds) of every step, and peak memory in bytes.
        """
        with open(rows, encoding="utf-8") as file:
            ids, labels = zip(*json.load(file), strict=True)
        config = None if adapter is None else PeftConfig.from_pretrained(adapter)
        if config is not None:
            config.inference_mode = False
        clock = Clock()
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about GPT-2's Conv1D
            arguments = SFTConfig(
                scratch, max_length=None, packing=False, gradient_checkpointing=False,
                logging_steps=1, save_strategy="no", **settings,
            )  # fmt: skip
            trainer = _OrderedSft(
                copy.deepcopy(self.model), arguments, processing_class=self.tokenizer,
                train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
                peft_config=config, callbacks=[StepNotes(clock)],
            )  # fmt: skip
            if config is not None:
                load_start(trainer.model, load_file(start))
            trainer.remove_callback(PrinterCallback)
            memory = PeakMemory(self.model.device)
            trainer.train()
            peak = memory.bytes()
        return {"losses": clock.losses, "ends": clock.ends, "memory": peak}


def main() -> None:
    """Answer requests until stdin ends."""
    answer_requests(
        Sft(),
        f"TRL {trl.__version__} (PEFT {peft.__version__}, transformers "
        f"{transformers.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()})",
    )


if __name__ == "__main__":
    main()
