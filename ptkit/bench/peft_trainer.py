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
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ptkit.bench.peers import BenchMethod, Clock, Round, Trained, trainer_settings
from ptkit.methods.full.adapter import Full
from ptkit.methods.peft_layers import PeftLayers
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import collate
from ptkit.training.memory import PeakMemory


class PeftTrainer:
    """PEFT and the Trainer, in this process."""

    title: ClassVar[str] = "PEFT + Trainer"

    @property
    def versions(self) -> str:
        return (
            f"PEFT {peft.__version__} (transformers {transformers.__version__}, "
            f"torch {torch.__version__})"
        )

    def lacks(self, base: Base, method: BenchMethod) -> str | None:
        return None

    def aim(
        self, method: BenchMethod, model: str, supervised: float
    ) -> tuple[float | None, float | None]:
        return method.aim(model, supervised)

    def train(self, turn: Round) -> Trained:
        base = turn.base
        model = model_of(turn)
        clock = Clock()
        with tempfile.TemporaryDirectory() as scratch:
            arguments = arguments_of(turn, scratch, logging_steps=1, save_strategy="no")
            trainer = _OrderedTrainer(
                model, arguments, data_collator=lambda batch: collate(batch, base),
                train_dataset=turn.ordered(), callbacks=[StepNotes(clock)],
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            memory = PeakMemory(base.model.device)
            trainer.train()
            peak = memory.bytes()
        base.model.eval()
        return Trained(clock.losses, clock.per_step, peak)


class InOrder:
    """What makes a Trainer read the rows in the order they come."""

    train_dataset: Any

    def _get_train_sampler(self, *args: Any, **kw: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class _OrderedTrainer(InOrder, Trainer):
    """transformers' Trainer, reading the rows in the order they come."""


class StepNotes(TrainerCallback):
    """Notes when steps end and what they lost."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *args: Any, **kw: Any) -> None:
        self.clock.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        if logs and "loss" in logs:
            self.clock.losses.append(float(logs["loss"]))


def arguments_of(turn: Round, folder: str, **own: Any) -> TrainingArguments:
    """The Trainer's settings for what ptkit does in `turn`; `own`: what only the caller wants."""
    return TrainingArguments(folder, remove_unused_columns=False, **trainer_settings(turn), **own)


def start_of(turn: Round) -> tuple[PeftConfig | None, dict[str, Tensor]]:
    """PEFT's settings of the method, and the values it starts from, as PEFT names them. No settings
    where the base itself is trained."""
    adapter: Any = turn.started()
    try:
        if isinstance(adapter, Full):
            return None, {}
        if isinstance(adapter, PeftLayers):
            model = adapter.peft_model
            config = copy.deepcopy(model.peft_config["default"])
            return config, dict(get_peft_model_state_dict(model))
        return copy.deepcopy(adapter.config), adapter.encoder.state_dict()
    finally:
        adapter.close()


def load_start(model: PeftModel, values: dict[str, Tensor]) -> None:
    """Let PEFT's model start from `values` (see `start_of`)."""
    if model.peft_config["default"].is_prompt_learning:
        model.prompt_encoder["default"].load_state_dict(values)
    else:
        set_peft_model_state_dict(model, values)


def model_of(turn: Round) -> Any:
    """PEFT's model of the same method with the same values to start from, on a base of its own."""
    config, values = start_of(turn)
    own: Any = copy.deepcopy(turn.base.model)
    if config is None:
        return own.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about GPT-2's Conv1D
        model: Any = get_peft_model(own, config)
    load_start(model, values)
    return model
