"""How the processes of a run were started, as accelerate and torchrun say it in the environment."""

from __future__ import annotations

import os

from ptkit.errors import UserError

_INSTEAD = (
    "start it with `torchrun --nproc-per-node N -m ptkit ...` and `model.tp_plan: auto`, which "
    "splits the base over the processes, or in one process with `model.device_map: auto`"
)
#: What accelerate sets -> what it stands for. All of them take parameters apart in their own way,
#: and what an adapter is put into is then no module of the base any more.
_REFUSED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM (pipeline parallelism)",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's ParallelismConfig",
}


def require_supported_launch() -> None:
    """Raise UserError where the processes were started for a kind of parallelism that ptkit does
    not train with."""
    for variable, name in _REFUSED.items():
        if os.environ.get(variable, "false").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise UserError(
                f"ptkit does not work with {name}, which `{variable}` asks for; {_INSTEAD}"
            )


def world_size() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process of the run that writes and speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0
