"""What ptkit and its peers train alike in `ptkit bench train`, and what a peer is.

All candidates get the same base, the same values to start from, and the same rows in the same
order. They have the same optimiser settings, and report the loss of every step. So a candidate that
computes something else is found before a time is reported.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Protocol

import torch

from ptkit.bench.bases import GPT2_SMALL, LARGE_VOCABULARY
from ptkit.data.encode import length_grouped_batches
from ptkit.data.encoded import IGNORED, EncodedExample
from ptkit.methods import ADAPTERS, Adapter, Demonstrations, create_adapter
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.base_model import Base


@dataclass(frozen=True)
class BenchMethod:
    """A method's settings, and how many times faster than PEFT + Trainer it should be, where
    there is a target for that."""

    settings: dict[str, Any]
    at_least: float | None
    learning_rate: float

    @property
    def kind(self) -> str:
        """The method, as a recipe names it."""
        return str(self.settings["kind"])

    def aim(self, model: str, supervised: float) -> tuple[float | None, float | None]:
        """At least so many times faster, at most this share of the memory, than PEFT + Trainer.

        supervised: positions with a label per row. The aims are for two shapes; a LoRA's or full
        fine-tuning's memory is that of its gradients.
        """
        prompt_method = not ADAPTERS[self.kind].changes_weights
        if model == GPT2_SMALL:
            return self.at_least, 0.6 if prompt_method else None
        if model == LARGE_VOCABULARY and self.kind == "prefix_tuning":
            return 3.0 if supervised < 2 else 2.0, 0.5
        return None, None

    def started(self, base: Base, seed: int) -> Adapter:
        """A fresh adapter; without a start of real tokens, which PEFT's encoders have no place
        for."""
        section_class = ADAPTERS[self.kind].section_class
        start = {"start": "random"} if "start" in section_class.model_fields else {}
        torch.manual_seed(seed)
        return create_adapter(
            section_class(**self.settings, **start), base, Demonstrations((), seed)
        )


_MLP = {"encoder_hidden_size": 512}
METHODS = {
    "prefix": BenchMethod({"kind": "prefix_tuning", "num_virtual_tokens": 10}, 1.6, 1e-2),
    "prefix-mlp": BenchMethod(
        {"kind": "prefix_tuning", "num_virtual_tokens": 10, "reparameterize": True, **_MLP},
        1.7, 1e-3,
    ),
    "prompt-20": BenchMethod({"kind": "prompt_tuning", "num_virtual_tokens": 20}, 2.2, 1e-2),
    "prompt-100": BenchMethod({"kind": "prompt_tuning", "num_virtual_tokens": 100}, 3.5, 1e-2),
    "p-tuning": BenchMethod({"kind": "p_tuning", "num_virtual_tokens": 20, **_MLP}, 2.2, 1e-3),
    "lora": BenchMethod({"kind": "lora", "rank": 8}, 1.0, 2e-4),
    "full": BenchMethod({"kind": "full"}, 1.0, 1e-4),
    "prefix-20": BenchMethod({"kind": "prefix_tuning", "num_virtual_tokens": 20}, None, 1e-3),
    "prompt-32": BenchMethod({"kind": "prompt_tuning", "num_virtual_tokens": 32}, None, 1e-3),
}  # fmt: skip
#: Those that are trained where none are named.
USUAL = ("prefix", "prefix-mlp", "prompt-20", "prompt-100", "p-tuning", "lora", "full")


@dataclass(frozen=True)
class Round:
    """One training run, to be taken by ptkit and by every peer in turn.

    seed: of the values to start from and of the order of the rows
    """

    base: Base
    method: BenchMethod
    rows: list[EncodedExample]
    settings: TrainSection
    seed: int

    def ordered(self) -> list[EncodedExample]:
        """The rows as the steps read them, batch after batch."""
        order = length_grouped_batches(
            [len(row) for row in self.rows], self.settings.batch_size, self.seed
        )
        return [self.rows[i] for batch in islice(order, self.settings.steps) for i in batch]

    def labelled(self) -> list[tuple[list[int], list[int]]]:
        """Token ids and labels of the rows as the steps read them, `IGNORED` where nothing is
        learnt."""
        return [
            (row.input_ids + row.target_ids, [IGNORED] * len(row.input_ids) + row.labels)
            for row in self.ordered()
        ]

    def started(self) -> Adapter:
        """The adapter this round starts from."""
        return self.method.started(self.base, self.seed)


def trainer_settings(turn: Round) -> dict[str, Any]:
    """Arguments of transformers' TrainingArguments for what ptkit does in `turn`."""
    settings = turn.settings
    return {
        "max_steps": settings.steps, "per_device_train_batch_size": settings.batch_size,
        "learning_rate": turn.method.learning_rate, "max_grad_norm": settings.max_grad_norm,
        "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "use_cpu": turn.base.model.device.type == "cpu",
        "bf16": settings.autocast == "bf16", "fp16": settings.autocast == "fp16",
        "report_to": [], "disable_tqdm": True,
    }  # fmt: skip


@dataclass
class Clock:
    """Notes when steps end (seconds, from any beginning) and what they lost."""

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def per_step(self) -> float:
        """Median seconds from one step's end to the next's. The last step's end is left out: some
        work follows it that is not the step's."""
        gaps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(gaps[:-1] or gaps)


@dataclass(frozen=True)
class Trained:
    """What one candidate did: the loss of every step, seconds per step, and peak memory beyond
    what was in use when training began."""

    losses: list[float]
    seconds: float
    memory: int


class Peer(Protocol):
    """Somebody else's library, trained by somebody else's loop."""

    title: ClassVar[str]
    """Its name in the figures."""

    @property
    def versions(self) -> str:
        """The library's version, and those of what it runs on."""

    def lacks(self, base: Base, method: BenchMethod) -> str | None:
        """Why it cannot take part in `method`; None where it can."""

    def aim(
        self, method: BenchMethod, model: str, supervised: float
    ) -> tuple[float | None, float | None]:
        """At least so many times its speed, at most this share of its memory; None: no target.

        supervised: positions with a label per row
        """

    def train(self, turn: Round) -> Trained:
        """Take the steps of `turn`."""
