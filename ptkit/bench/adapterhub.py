"""AdapterHub's `adapters` as a peer of `ptkit bench train`, in a process and an environment of its
own: it needs transformers 4, ptkit 5.

What it does is in `adapterhub_peer.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file

from ptkit.bench.peer_process import SeparatePeer
from ptkit.bench.peers import BenchMethod, Round, Trained
from ptkit.errors import UserError
from ptkit.runtime.base_model import Base
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


class AdapterHub(SeparatePeer):
    """`adapters` and its AdapterTrainer, run by `python`.

    python: the Python of an environment that has `adapters`. Raises UserError where it is missing,
    cannot be run or cannot import what it needs.
    """

    title: ClassVar[str] = "adapters + AdapterTrainer"
    library = "`adapters`"

    def __init__(self, python: str | None) -> None:
        if python is None:
            raise UserError(
                "--against adapters: `adapters` needs transformers 4, ptkit has 5, so it needs an "
                f"environment of its own; make one and name its Python:\n{_recipe()}"
            )
        self.python = str(Path(python).expanduser())
        self._refused: str | None = None
        super().__init__()

    def lacks(self, base: Base, method: BenchMethod) -> str | None:
        if method.kind in NOT_COMPARED:
            return NOT_COMPARED[method.kind]
        if base is not self._base:
            self._refused = self._hand_over(base).get("lacks")
        return self._refused or self._process.asked("offer", **self._prefix(base, method, 0)).get(
            "lacks"
        )

    def aim(
        self, method: BenchMethod, model: str, supervised: float
    ) -> tuple[float | None, float | None]:
        return None, None

    def train(self, turn: Round) -> Trained:
        start = self._prefix(turn.base, turn.method, turn.seed)
        return self._train(turn, pad=turn.base.pad_token_id, **start)

    def _save(self, base: Base, folder: Path) -> None:
        super()._save(base, folder)
        path = folder / "config.json"
        path.write_text(json.dumps(_of_transformers_4(json.loads(path.read_text()))))

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

    def _command(self) -> list[str]:
        for path in (SCRIPT, ANSWERS, Path(memory.__file__)):
            shutil.copy(path, self._folder)
        # Its own environment is not to see this one's modules (-E, -s).
        return [self.python, "-E", "-s", str(self._folder / SCRIPT.name)]

    def _unusable(self, reason: str) -> str:
        return (
            f"--peer-python {self.python}: {reason}; give the `python` in the `bin` of an "
            f"environment that has `adapters`:\n{_recipe()}"
        )


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
