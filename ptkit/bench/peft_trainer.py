"""PEFT's model of a method, trained by transformers' Trainer: the first peer of
`ptkit bench train`."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from typing import Any, ClassVar

import peft
import torch
import transformers
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ptkit.bench.peers import BenchMethod, Clock, Round, Trained
from ptkit.methods.full.adapter import Full
from ptkit.methods.peft_layers import PeftLayers
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import collate
from ptkit.training.memory import PeakMemory


class PeftTrainer:
    """PEFT and the Trainer, in this process."""

    title: ClassVar[str] = "PEFT + Trainer"
    aimed_at: ClassVar[bool] = True

    @property
    def versions(self) -> str:
        return (
            f"PEFT {peft.__version__} (transformers {transformers.__version__}, "
            f"torch {torch.__version__})"
        )

    def lacks(self, base: Base, method: BenchMethod) -> str | None:
        return None

    def train(self, turn: Round) -> Trained:
        base = turn.base
        model = model_of(turn)
        clock = Clock()
        with tempfile.TemporaryDirectory() as scratch:
            arguments = arguments_of(turn, scratch, logging_steps=1, save_strategy="no")
            trainer = _InOrder(
                model, arguments, data_collator=lambda batch: collate(batch, base),
                train_dataset=turn.ordered(), callbacks=[_Noted(clock)],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            memory = PeakMemory(base.model.device)
            trainer.train()
            peak = memory.bytes()
        base.model.eval()
        return Trained(clock.losses, clock.per_step, peak)


class _InOrder(Trainer):
    """transformers' Trainer, reading the rows in the order they come."""

    def _get_train_sampler(self, *args: Any, **kw: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


class _Noted(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kw: Any) -> None:
        self.clock.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        if logs and "loss" in logs:
            self.clock.losses.append(float(logs["loss"]))


def arguments_of(turn: Round, folder: str, **own: Any) -> TrainingArguments:
    """The Trainer's settings for what ptkit does in `turn`; `own`: what only the caller wants."""
    settings = turn.settings
    return TrainingArguments(
        folder, max_steps=settings.steps, per_device_train_batch_size=settings.batch_size,
        learning_rate=turn.method.learning_rate, lr_scheduler_type="constant", weight_decay=0.0,
        max_grad_norm=settings.max_grad_norm, report_to=[], disable_tqdm=True,
        use_cpu=turn.base.model.device.type == "cpu", remove_unused_columns=False,
        bf16=settings.autocast == "bf16", fp16=settings.autocast == "fp16", **own,
    )  # fmt: skip


def model_of(turn: Round) -> Any:
    """PEFT's model of the same method with the same values to start from, on a base of its own."""
    adapter: Any = turn.started()
    try:
        if isinstance(adapter, Full):
            return adapter.model
        in_layers = isinstance(adapter, PeftLayers)
        config = copy.deepcopy(adapter.peft_model.peft_config["default"]) if in_layers else None
        state = dict(get_peft_model_state_dict(adapter.peft_model)) if in_layers else {}
    finally:
        adapter.close()
    own: Any = copy.deepcopy(turn.base.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about GPT-2's Conv1D
        model: Any = get_peft_model(own, config or copy.deepcopy(adapter.config))
    if in_layers:
        set_peft_model_state_dict(model, state)
    else:
        model.prompt_encoder["default"].load_state_dict(adapter.encoder.state_dict())
    return model
