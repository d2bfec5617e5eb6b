"""How a base larger than one device is loaded: over several devices, or over several processes.

`ptkit.runtime.placement` says what runs on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from ptkit.errors import ModelError, did_you_mean, nearest
from ptkit.launched import world_size
from ptkit.options import DeviceMap
from ptkit.runtime.placement import OFFLOADED, placement

#: What makes queries, keys and values, each head its own.
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value")
#: Told where a base cannot be split.
_MAP = "use `model.device_map: auto` in one process"


@dataclass(frozen=True)
class Spread:
    """Where a base is to lie; the keys of a recipe's `model`. Nothing set: on one device."""

    device_map: str | Mapping[str, int | str] | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload_folder: str | None = None
    tp_plan: str | Mapping[str, str] | None = None

    @property
    def over_processes(self) -> bool:
        """Whether every layer is split over the processes of the run."""
        return self.tp_plan is not None

    @property
    def elsewhere(self) -> bool:
        """Whether transformers places the weights, while it loads them."""
        return self.device_map is not None or self.over_processes

    def require_possible(self, *, device: str, plain: bool) -> None:
        """Raise ModelError for what cannot be loaded so, before anything is read.

        device: as `model.device`
        plain: whether it is a language model of a checkpoint whose values are floating-point
        """
        if self.device_map is None and (self.max_memory or self.offload_folder):
            raise ModelError("`max_memory` and `offload_folder` need `device_map`")
        if self.device_map is not None and self.over_processes:
            raise ModelError("`device_map` is for one process, `tp_plan` for several: keep one")
        if self.device_map is not None:
            self._require_devices(device)
        if self.over_processes:
            self._require_processes(device, plain)

    def _require_devices(self, device: str) -> None:
        if device != "auto":
            raise ModelError("`device` and `device_map` both say where the base lies: keep one")
        if world_size() > 1:
            raise ModelError(
                f"`device_map` spreads the base over the devices of one process, and this run has "
                f"{world_size()}; start one, or use `tp_plan: auto`"
            )
        if isinstance(self.device_map, str):
            words = get_args(DeviceMap)
            if self.device_map not in words:
                raise ModelError(
                    f"no `device_map` {self.device_map!r}; {did_you_mean(self.device_map, words)}"
                )
            return
        assert self.device_map is not None
        if not self.device_map:
            raise ModelError("`device_map` is empty; write `auto`, or a device for each module")
        for place in self.device_map.values():
            if place not in OFFLOADED:
                _require_device(place)

    def _require_processes(self, device: str, plain: bool) -> None:
        if isinstance(self.tp_plan, str) and self.tp_plan != "auto":
            raise ModelError(
                f"no `tp_plan` {self.tp_plan!r}: write `auto`, or module -> style (pipeline "
                f"parallelism is not supported; {_MAP})"
            )
        if world_size() == 1:
            raise ModelError(
                "`tp_plan` splits the base over the processes of a run, and this run has one; "
                "start it with `torchrun --nproc-per-node N -m ptkit ...`, or leave `tp_plan` out"
            )
        if not plain:
            raise ModelError(
                "`tp_plan` works for language models in float32, bfloat16 or float16: no "
                f"classification head, no `quantize`, no GGUF file; {_MAP}"
            )
        accelerator = torch.accelerator.current_accelerator()
        own = "cpu" if accelerator is None else accelerator.type
        if device not in ("auto", own):
            raise ModelError(
                f"`tp_plan` takes `{own}` on this machine, a device for each process; leave "
                f"`device: {device}` out"
            )

    def require_plan(self, config: PreTrainedConfig, kind: Any, id: str) -> None:
        """Raise ModelError where a model cannot be split over the processes.

        config: the model's; kind: transformers' auto class that loads it
        """
        if not self.over_processes:
            return
        cls: Any = kind._model_mapping.get(type(config), None)
        if config.is_encoder_decoder or cls is None:
            raise ModelError(f"`tp_plan` works for decoders alone, and {id} is none; {_MAP}")
        text, processes = config.get_text_config(), world_size()
        if isinstance(self.tp_plan, str) and not getattr(text, "base_model_tp_plan", None):
            raise ModelError(
                f"{id} is a {config.model_type}, for which transformers has no tensor-parallel "
                f"plan; {_MAP}"
            )
        styles = self._attention_styles(text)
        if len({*styles.values()}) > 1:
            raise ModelError(
                f"`tp_plan` has different styles for parts of one attention of {id} ({styles}), so "
                "its queries would not find their keys; give them the same"
            )
        heads = text.num_attention_heads
        for what, count in (
            ("attention", heads),
            ("key/value", getattr(text, "num_key_value_heads", None) or heads),
        ):
            if "colwise" in styles.values() and count % processes:
                raise ModelError(
                    f"{id} has {count} {what} heads, which {processes} processes cannot share "
                    f"equally; start as many processes as divide it, or {_MAP}"
                )

    def _attention_styles(self, config: Any) -> dict[str, str]:
        """What the plan says of the projections that make queries, keys and values."""
        plan: dict[str, str] = dict(getattr(config, "base_model_tp_plan", None) or {})
        if not isinstance(self.tp_plan, str):
            plan |= self.tp_plan or {}
        said = {name.rsplit(".", 1)[-1]: style for name, style in plan.items()}
        return {name: style for name, style in said.items() if name in _PROJECTIONS}

    def options(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`."""
        if self.over_processes:
            plan: Any = self.tp_plan if isinstance(self.tp_plan, str) else dict(self.tp_plan or {})
            return {"distributed_config": DistributedConfig(tp_size=world_size(), tp_plan=plan)}
        if self.device_map is None:
            return {}
        places: Any = self.device_map
        return {
            "device_map": places if isinstance(places, str) else dict(places),
            "max_memory": None if self.max_memory is None else dict(self.max_memory),
            "offload_folder": self.offload_folder,
        }

    def require_runs(self, model: PreTrainedModel, id: str) -> None:
        """Raise ModelError where the loaded `model` lies so that nothing can be read with it."""
        if isinstance(self.device_map, Mapping):
            names = {name for name, _ in model.named_modules()} | {
                name for name, _ in model.named_parameters()
            }
            for name in self.device_map:
                if name not in names:
                    close = nearest(name, names)
                    raise ModelError(
                        f"`device_map` names `{name}`, which {id} does not have"
                        + (f"; did you mean `{close}`?" if close else "")
                    )
        if self.device_map is not None and model.device.type == "meta":
            raise ModelError(
                f"`device_map` offloads the input embeddings of {id}, where every text enters; "
                "give them a device, or more memory"
            )
        if self.elsewhere:
            placement(model)


def _require_device(place: int | str) -> None:
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"`device_map`: device `{place}` is not available ({error})") from error


def require_known_parallelism(model: PreTrainedModel) -> None:
    """Raise ModelError for a model that was loaded elsewhere, in a way adapters cannot run on."""
    config: Any = getattr(model.config, "distributed_config", None)
    for name, told in (("fsdp_size", "FSDP"), ("pp_size", "pipeline parallelism"),
                       ("ep_size", "expert parallelism")):  # fmt: skip
        if getattr(config, name, None) not in (None, 1):
            raise ModelError(
                f"{type(model).__name__} was loaded with {told}, which ptkit does not work with; "
                "load it with a `tp_plan` or a `device_map`"
            )
