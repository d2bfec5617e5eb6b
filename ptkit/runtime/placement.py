"""Where the layers of a base lie: on which device, and which of their heads this process has.

A base larger than one device is spread in one of two ways. With a `device_map` each layer lies on
one device of this process. With tensor parallelism (Shoeybi et al. 2019, section 3) each process
has a part of every layer: some of its attention heads, and the keys and values of those alone.

A `KVPrefix` is always whole, the same in every process: what is trained, saved and exchanged does
not depend on how the base is spread. A forward pass takes its part of it (`own_part`); what the
base computes for a text is put together again (`whole`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from ptkit.errors import ModelError
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.architecture import evaluating
from ptkit.runtime.attention_sites import attention_modules, layer_table
from ptkit.runtime.facts import known
from ptkit.runtime.locks import running
from ptkit.runtime.row_adapters import rows_run_with

#: Places of a device map whose weights are fetched for each pass, to the device that computes.
OFFLOADED = ("cpu", "disk")


def processes_of(model: PreTrainedModel) -> int:
    """Over how many processes each layer of `model` is split; 1: this one has all of it."""
    return getattr(model, "_tp_size", None) or 1


def is_spread(model: PreTrainedModel) -> bool:
    """Whether `model` lies on several devices, or keeps weights outside of the one it runs on."""
    places = {*(getattr(model, "hf_device_map", None) or {}).values()}
    return len(places) > 1 or "disk" in places


def is_whole(model: PreTrainedModel) -> bool:
    """Whether all weights of `model` are in this process, on one device."""
    return processes_of(model) == 1 and not is_spread(model)


@dataclass(frozen=True)
class Placement:
    """Where the keys and values of each layer are.

    devices: of each entry of the layout; None: the device of the model's input
    process, processes: of as many equal parts of the key/value heads, this process has this one
    """

    devices: tuple[torch.device, ...] | None = None
    process: int = 0
    processes: int = 1


def placement(model: PreTrainedModel) -> Placement:
    """The placement of `model`, found once. With tensor parallelism all processes ask together.

    Raises ModelError where the heads of a layer are not divided equally.
    """
    return known(model, _found)


def _found(model: PreTrainedModel) -> Placement:
    devices = layer_devices(model) if is_spread(model) else None
    processes = processes_of(model)
    if processes == 1 or not _heads_are_split(model, processes):
        return Placement(devices)
    return Placement(devices, dist.get_rank(_group(model)), processes)


def layer_devices(model: PreTrainedModel) -> tuple[torch.device, ...]:
    """The device that computes each entry of the layout of `model`, which has a device map."""
    places: Any = model.hf_device_map
    names = {module: name for name, module in model.named_modules()}
    main = _main_place(places)
    devices: dict[int, torch.device] = {}
    for module, layer in layer_table(attention_modules(model)).items():
        place = _place_of(names[module], places)
        devices.setdefault(layer, torch.device(main if place in OFFLOADED else place))
    return tuple(devices[layer] for layer in sorted(devices))


def _place_of(name: str, places: dict[str, Any]) -> Any:
    """Where a device map puts the module `name`: its own entry, or that of what it is part of."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        above = ".".join(parts[:end])
        if above in places:
            return places[above]
    raise ModelError(f"the device map gives no device for `{name}`")


def _main_place(places: dict[str, Any]) -> Any:
    """Where offloaded layers are computed: accelerate takes the first device of the map."""
    return next((place for place in places.values() if place not in OFFLOADED), "cpu")


def _group(model: PreTrainedModel) -> dist.ProcessGroup:
    manager: Any = model._mesh_manager
    group: dist.ProcessGroup = manager.get_mesh("tp").get_group()
    return group


@torch.no_grad()
def _heads_are_split(model: PreTrainedModel, processes: int) -> bool:
    """Whether each process has a part of the key/value heads; they may also be in all of them.

    Asked of the model: plans differ in what they split.
    """
    config = model.config.get_text_config()
    whole = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = DynamicCache()
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with running(model), evaluating(model), rows_run_with(()):
        model.base_model(input_ids=token, past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    heads = {layer.keys.shape[1] for layer in layers}
    if heads == {whole}:
        return False
    if {own * processes for own in heads} == {whole}:
        return True
    raise ModelError(
        f"{type(model).__name__}: the tensor-parallel plan leaves {sorted(heads)} key/value heads "
        f"of {whole} in each of {processes} processes, which cannot be put together to a prefix; "
        "use `device_map`"
    )


def own_part(model: PreTrainedModel, batch: PrefixBatch) -> PrefixBatch:
    """`batch` as the layers of `model` read it: this process's heads, on each layer's device."""
    here = placement(model)
    if here == Placement() or not batch.keys:
        return batch

    def moved(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        parts = [
            t.chunk(here.processes, dim=1)[here.process] if here.processes > 1 else t
            for t in tensors
        ]
        if here.devices is None:
            return tuple(parts)
        return tuple(part.to(device) for part, device in zip(parts, here.devices, strict=True))

    return replace(batch, keys=moved(batch.keys), values=moved(batch.values))


def whole(model: PreTrainedModel, prefix: KVPrefix) -> KVPrefix:
    """`prefix`, as this process's layers made it, with the heads of all processes, on one device;
    differentiable."""
    here = placement(model)
    if here.devices is not None:
        prefix = prefix.map(lambda t: t.to(model.device))
    if here.processes == 1:
        return prefix
    tensors = prefix.tensors
    parts = _Gathered.apply(torch.cat([t.flatten() for t in tensors]), _group(model))
    pieces = parts.split([t.numel() for t in tensors], dim=1)
    # [processes, own heads * tokens * dim] -> [heads, tokens, dim]
    together = [p.reshape(-1, *t.shape[1:]) for p, t in zip(pieces, tensors, strict=True)]
    layers = len(prefix.keys)
    return replace(prefix, keys=tuple(together[:layers]), values=tuple(together[layers:]))


def gradients_summed(model: PreTrainedModel, prefix: KVPrefix) -> KVPrefix:
    """`prefix` itself. Its gradient is the sum over all processes: each has that of its own heads.

    Called once for a prefix that is learnt, before rows share it.
    """
    tensors = prefix.tensors
    if placement(model).processes == 1 or not any(t.requires_grad for t in tensors):
        return prefix
    same = _SummedGradients.apply(_group(model), *tensors)
    layers = len(prefix.keys)
    return replace(prefix, keys=tuple(same[:layers]), values=tuple(same[layers:]))


class _Gathered(torch.autograd.Function):
    """The tensors `[n]` of all processes, `[processes, n]`; the gradient of each is its row's."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.row = dist.get_rank(group)
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own.contiguous(), group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0][ctx.row], None


class _SummedGradients(torch.autograd.Function):
    """Tensors as they are, whose gradients are summed over the processes, in one transfer."""

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat = torch.cat([gradient.flatten() for gradient in upstream])
        dist.all_reduce(flat, group=ctx.group)
        pieces = flat.split([gradient.numel() for gradient in upstream])
        return None, *(p.view_as(g) for p, g in zip(pieces, upstream, strict=True))


def plain_weight(module: nn.Module) -> bool:
    """Whether the weight of `module` is all here: not a part of one, and not fetched when the
    module runs."""
    weight: Any = module.weight
    return not hasattr(weight, "placements") and weight.device.type != "meta"


def full_weight(module: nn.Module, what: str) -> Tensor:
    """The whole weight of `module`; with tensor parallelism all processes ask together.

    Raises ModelError, which names `what`, where it is offloaded.
    """
    weight: Any = module.weight
    if hasattr(weight, "placements"):
        weight = weight.full_tensor()
    if weight.device.type == "meta":
        raise ModelError(
            f"{what} are offloaded and cannot be looked into; give them a device in `device_map`"
        )
    return weight.detach()
