"""TRL's SFTTrainer as a peer of `ptkit bench train`, in a process of its own.

It runs on this environment's torch, transformers and PEFT, so that only the trainers differ. What
the process does is in `trl_trainer_peer.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from safetensors.torch import save_file

from ptkit.bench.peer_process import SeparatePeer
from ptkit.bench.peers import BenchMethod, Round, Trained
from ptkit.bench.peft_trainer import start_of
from ptkit.runtime.base_model import Base

#: What the process runs.
MODULE = "ptkit.bench.trl_trainer_peer"
#: The base that the targets are about.
SMOLLM2 = "smollm2-135m"
#: At least so many times the tokens per second, and at most this share of the memory.
AIMS = {"prefix_tuning": (1.6, 0.5), "prompt_tuning": (2.0, 0.5), "lora": (1.1, 0.5)}


class TrlTrainer(SeparatePeer):
    """TRL's SFTTrainer. Gradient checkpointing, packing and mixed precision are as on ptkit's side.

    Raises UserError where TRL cannot be imported.
    """

    title: ClassVar[str] = "TRL SFTTrainer"
    library = "TRL"

    def lacks(self, base: Base, method: BenchMethod) -> str | None:
        return None

    def aim(
        self, method: BenchMethod, model: str, supervised: float
    ) -> tuple[float | None, float | None]:
        return AIMS.get(method.kind, (None, None)) if model == SMOLLM2 else (None, None)

    def train(self, turn: Round) -> Trained:
        if turn.base is not self._base:
            self._hand_over(turn.base)
        config, values = start_of(turn)
        adapter, start = self._folder / "adapter", self._folder / "start"
        if config is not None:
            config.save_pretrained(str(adapter))
        save_file({k: v.contiguous() for k, v in values.items()}, start)
        named = None if config is None else str(adapter)
        return self._train(turn, adapter=named, start=str(start))

    def _command(self) -> list[str]:
        return [sys.executable, "-P", "-m", MODULE]

    def _save(self, base: Base, folder: Path) -> None:
        super()._save(base, folder)
        base.tokenizer.save_pretrained(folder)

    def _unusable(self, reason: str) -> str:
        return (
            f"--against trl: {reason}; install it into this environment, or apart, which changes "
            "no other package:\n"
            "    pip install --no-deps --target trl-apart trl==1.16.0\n"
            "    PYTHONPATH=trl-apart ptkit bench train --against trl"
        )
