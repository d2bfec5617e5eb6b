"""TRL's SFTTrainer as a peer of `ptkit bench train`, in a process of its own.

It runs on this environment's torch, transformers and PEFT, so that only the trainers differ. What
the process does is in `trl_trainer_peer.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import torch
from safetensors.torch import save_file

from ptkit.bench.peer_process import NotReadyError, PeerProcess
from ptkit.bench.peers import BenchMethod, Clock, Round, Trained, trainer_settings
from ptkit.bench.peft_trainer import start_of
from ptkit.errors import UserError
from ptkit.runtime.base_model import Base
from ptkit.runtime.progress import no_weights_bar

#: What the process runs.
MODULE = "ptkit.bench.trl_trainer_peer"
#: The base that the targets are about.
SMOLLM2 = "smollm2-135m"
#: At least so many times the tokens per second, and at most this share of the memory.
AIMS = {"prefix_tuning": (1.6, 0.5), "prompt_tuning": (2.0, 0.5), "lora": (1.1, 0.5)}


class TrlTrainer:
    """TRL's SFTTrainer. A context: its process ends with it.

    Gradient checkpointing, packing and mixed precision are as on ptkit's side. Raises UserError
    where TRL cannot be imported.
    """

    title: ClassVar[str] = "TRL SFTTrainer"

    def __init__(self) -> None:
        self._base: Base | None = None
        with ExitStack() as opened:  # closed again if it cannot be started
            self._folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
            log = opened.enter_context((self._folder / "log.txt").open("w+", encoding="utf-8"))
            # What it leaves behind when it is ended goes with the folder.
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(self._folder)}
            command = [sys.executable, "-P", "-m", MODULE]
            self._process = PeerProcess("TRL", command, log, environment)
            opened.callback(self._process.end)
            self.versions = self._ready()
            self._opened = opened.pop_all()

    def __enter__(self) -> TrlTrainer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    def lacks(self, base: Base, method: BenchMethod) -> str | None:
        return None

    def aim(
        self, method: BenchMethod, model: str, supervised: float
    ) -> tuple[float | None, float | None]:
        return AIMS.get(method.kind, (None, None)) if model == SMOLLM2 else (None, None)

    def train(self, turn: Round) -> Trained:
        if turn.base is not self._base:
            self._give(turn.base)
        config, values = start_of(turn)
        if config is not None:
            config.save_pretrained(str(self._folder / "adapter"))
        save_file({k: v.contiguous() for k, v in values.items()}, self._folder / "start")
        (self._folder / "rows.json").write_text(json.dumps(turn.labelled()), encoding="utf-8")
        done = self._process.asked(
            "train",
            adapter=None if config is None else str(self._folder / "adapter"),
            start=str(self._folder / "start"),
            rows=str(self._folder / "rows.json"),
            settings=trainer_settings(turn),
        )["done"]
        clock = Clock(done["ends"], done["losses"])
        return Trained(clock.losses, clock.per_step, done["memory"])

    def _give(self, base: Base) -> None:
        """Hand over the base with its tokenizer."""
        folder = self._folder / "base"
        with no_weights_bar():
            base.model.save_pretrained(folder)
        base.tokenizer.save_pretrained(folder)
        self._process.asked(
            "base", folder=str(folder), device=str(base.model.device),
            dtype=str(base.model.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
        )  # fmt: skip
        shutil.rmtree(folder)
        self._base = base

    def _ready(self) -> str:
        """Wait until it has imported everything; returns its versions."""
        try:
            return self._process.wait_until_ready()
        except NotReadyError as error:
            raise UserError(
                f"--against trl: TRL cannot be imported here ({error}); install it into this "
                "environment, or apart, which changes no other package:\n"
                "    pip install --no-deps --target trl-apart trl==1.16.0\n"
                "    PYTHONPATH=trl-apart ptkit bench train --against trl"
            ) from error
