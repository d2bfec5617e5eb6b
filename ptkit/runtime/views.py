"""Views of a model: a few of its modules replaced, for one forward pass.

A pass may differ from the model: its head reads some positions only, or an encoder reads a soft
prompt. The difference is in a view of the model. The model itself stays as it is. So passes of
other threads never see it, and a checkpointed layer is recomputed as it was computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any, TypeVar

from torch import nn

from ptkit.errors import ModelError

Viewed = TypeVar("Viewed", bound=nn.Module)


class StandIn(nn.Module):
    """A module that runs in place of `inner`; what else is asked of it is asked of `inner`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def around(self, inner: nn.Module) -> StandIn:
        """The same for `inner`."""
        made = _made(type(self), {**self.__dict__, "_modules": dict(self._modules)})
        made.inner = inner
        return made


def viewed(module: Viewed, replaced: Mapping[str, nn.Module]) -> Viewed:
    """`module` with the modules of these dotted names replaced; itself where there are none.

    A module and a part of it may both be replaced, the module then by a `Stand`.

    Everything else is shared. Raises ModelError for a model whose forward was replaced from
    outside, which would not look into the view.
    """
    if not replaced:
        return module
    view = _copied(module)
    below: dict[str, dict[str, nn.Module]] = {}
    for name, other in replaced.items():
        first, _, rest = name.partition(".")
        if not rest:
            view._modules[first] = other
        else:
            below.setdefault(first, {})[rest] = other
    for first, others in below.items():
        child = module._modules[first]
        assert child is not None
        inside, stand = viewed(child, others), replaced.get(first)
        if stand is None:
            view._modules[first] = inside
        else:  # it stands for the module with those parts replaced
            assert isinstance(stand, StandIn)
            view._modules[first] = stand.around(inside)
    return view


def looks_into_views(module: nn.Module) -> bool:
    """Whether `module` runs its class's forward, which a view of it does too. A forward that was
    set on the module itself runs the module."""
    return "forward" not in module.__dict__ or "_hf_hook" in module.__dict__


def _copied(module: Viewed) -> Viewed:
    held = {**module.__dict__, "_modules": dict(module._modules)}
    if not looks_into_views(module):
        raise ModelError(
            f"the forward of {type(module).__name__} was replaced from outside (as by "
            "`model.forward = torch.compile(model.forward)`), so a prefix cannot be put into "
            "it; leave the model as it was loaded"
        )
    hooked = held.pop("forward", None)
    made = _made(type(module), held)
    if hooked is not None:
        # accelerate's, which moves what is read to the module's device and fetches its weights.
        made.__dict__["_old_forward"] = MethodType(type(module).forward, made)
        made.__dict__["forward"] = partial(hooked.func, made)
    return made


def twin(module: Viewed) -> Viewed:
    """An object that shares everything with `module`; what is set on it is set on it alone."""
    return _made(type(module), module.__dict__)


def _made(kind: type[Viewed], held: Mapping[str, Any]) -> Viewed:
    made = object.__new__(kind)
    made.__dict__.update(held)
    return made


def name_of(module: nn.Module, part: nn.Module) -> str:
    """The dotted name that `part` has in `module`."""
    for name, child in module.named_children():  # where it mostly is
        if child is part:
            return name
    return next(name for name, child in module.named_modules() if child is part)
