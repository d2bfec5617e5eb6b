"""AdapterHub's `adapters` as a peer of `ptkit bench train`, in a process and an environment of its
own: it needs transformers 4, ptkit 5.

What it does is in `adapterhub_peer.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TextIO

import torch
from safetensors.torch import save_file

from ptkit.bench.peer_process import NotReadyError, PeerProcess
from ptkit.bench.peers import BenchMethod, Clock, Round, Trained, trainer_settings
from ptkit.errors import UserError
from ptkit.runtime.base_model import Base
from ptkit.runtime.progress import no_weights_bar
from ptkit.training import memory

#: What is run over there; no module of ptkit's can be imported there.
SCRIPT = Path(__file__).with_name("adapterhub_peer.py")
#: How it answers; copied beside it.
ANSWERS = Path(__file__).with_name("peer_answers.py")
#: Why methods other than prefix tuning are not compared.
NOT_COMPARED = {
    "prompt_tuning": "`adapters` has prompt tuning for encoders only, for no base that generates",
    "p_tuning": "`adapters` has no P-tuning",
    "lora": "LoRA in `adapters` has other parameters: query, key and value each have their own",
    "full": "`adapters` trains adapters; without one it would be the Trainer alone",
}


class AdapterHub:
    """`adapters` and its AdapterTrainer, run by `python`. A context: the process ends with it.

    python: the Python of an environment that has `adapters`. Raises UserError where it is missing,
    cannot be run or cannot import what it needs.
    """

    title: ClassVar[str] = "adapters + AdapterTrainer"

    def __init__(self, python: str | None) -> None:
        if python is None:
            raise UserError(
                "--against adapters: `adapters` needs transformers 4, ptkit has 5, so it needs an "
                f"environment of its own; make one and name its Python:\n{_recipe()}"
            )
        self.python = str(Path(python).expanduser())
        self._base: Base | None = None
        self._refused: str | None = None
        with ExitStack() as opened:  # closed again if it cannot be started
            self._folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
            log = opened.enter_context((self._folder / "log.txt").open("w+", encoding="utf-8"))
            for path in (SCRIPT, ANSWERS, Path(memory.__file__)):
                shutil.copy(path, self._folder)
            self._process = self._started(log)
            opened.callback(self._process.end)
            self.versions = self._ready()
            self._opened = opened.pop_all()

    def __enter__(self) -> AdapterHub:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    def lacks(self, base: Base, method: BenchMethod) -> str | None:
        if method.kind in NOT_COMPARED:
            return NOT_COMPARED[method.kind]
        if base is not self._base:
            self._refused, self._base = self._given(base), base
        return self._refused or self._process.asked("offer", **self._prefix(base, method, 0)).get(
            "lacks"
        )

    def aim(
        self, method: BenchMethod, model: str, supervised: float
    ) -> tuple[float | None, float | None]:
        return None, None

    def train(self, turn: Round) -> Trained:
        (self._folder / "rows.json").write_text(json.dumps(turn.labelled()), encoding="utf-8")
        done = self._process.asked(
            "train",
            **self._prefix(turn.base, turn.method, turn.seed),
            rows=str(self._folder / "rows.json"),
            pad=turn.base.pad_token_id,
            settings=trainer_settings(turn),
        )["done"]
        clock = Clock(done["ends"], done["losses"])
        return Trained(clock.losses, clock.per_step, done["memory"])

    def _given(self, base: Base) -> str | None:
        """Hand over the base; returns why it is of no use there, if it is not."""
        folder = self._folder / "base"
        with no_weights_bar():
            base.model.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(_of_transformers_4(json.loads(path.read_text()))))
        answer = self._process.asked(
            "base", folder=str(folder), device=str(base.model.device),
            dtype=str(base.model.dtype).removeprefix("torch."), threads=torch.get_num_threads(),
        )  # fmt: skip
        shutil.rmtree(folder)
        return answer.get("lacks")

    def _prefix(self, base: Base, method: BenchMethod, seed: int) -> dict[str, Any]:
        """The prefix of a method: its settings as `adapters` names them, and the file of the
        values it starts from."""
        adapter: Any = method.started(base, seed)
        start = self._folder / "start.safetensors"
        save_file(adapter.encoder.state_dict(), start)
        section = adapter.section
        adapter.close()
        prefix = {
            "prefix_length": section.num_virtual_tokens, "flat": not section.reparameterize,
            "bottleneck_size": section.encoder_hidden_size, "non_linearity": "tanh",
        }  # fmt: skip
        return {"prefix": prefix, "start": str(start)}

    def _started(self, log: TextIO) -> PeerProcess:
        # Its own environment is not to see this one's modules (-E, -s), nor the network; what it
        # leaves behind when it is ended goes with the folder.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(self._folder)}
        command = [self.python, "-E", "-s", str(self._folder / SCRIPT.name)]
        try:
            return PeerProcess("`adapters`", command, log, environment)
        except OSError as error:
            raise UserError(
                f"--peer-python {self.python}: cannot be run ({error.strerror}); give the `python` "
                f"in the `bin` of an environment that has `adapters`:\n{_recipe()}"
            ) from error

    def _ready(self) -> str:
        """Wait until it has imported everything; returns its versions."""
        try:
            return self._process.wait_until_ready()
        except NotReadyError as error:
            raise UserError(
                f"--peer-python {self.python}: this environment cannot run `adapters` "
                f"({error}); make one that can:\n{_recipe()}"
            ) from error


def _recipe() -> str:
    """Commands that make such an environment, with this one's torch."""
    torch_version = torch.__version__.partition("+")[0]
    return (
        "    python -m venv adapters-env\n"
        f"    adapters-env/bin/pip install torch=={torch_version} accelerate 'adapters>=1.3'\n"
        "    ptkit bench train --against adapters --peer-python adapters-env/bin/python"
    )


def _of_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A model's config of transformers 5, with its rotary positions where version 4 reads them."""
    rotary = dict(config.pop("rope_parameters", None) or {})
    if "rope_theta" in rotary:
        config["rope_theta"] = rotary.pop("rope_theta")
        config["rope_scaling"] = None if rotary.get("rope_type") == "default" else rotary
    return config
