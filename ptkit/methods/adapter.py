"""What every method provides: an `Adapter`, one per file, known by its recipe `kind`."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.gate_files import with_gate
from ptkit.methods.head import TrainedHead
from ptkit.prefix import Compiled, KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.gate import Gate, Gated
from ptkit.runtime.placement import gradients_summed
from ptkit.section import MethodSection

if TYPE_CHECKING:  # PEFT is loaded by what is trained, and by what changes weights
    from peft import PeftConfig


@dataclass(frozen=True)
class Demonstrations:
    """What a method may start from: training rows as texts `input + target`, in the data's order.

    Of a classification task it has the words of the labels, and those of the template around the
    columns. Paths of a recipe start at its folder."""

    texts: Sequence[str]
    seed: int
    labels: Sequence[str] = ()
    frame: str = ""
    folder: Path = Path()

    def shuffled(self) -> Iterator[str]:
        """The texts in an order that depends on the seed only, made as they are asked for."""
        order = list(range(len(self.texts)))
        random.Random(self.seed).shuffle(order)
        return (self.texts[number] for number in order)


@dataclass(frozen=True)
class OwnRate:
    """Parameters and what AdamW is told of them.

    learning_rate: peak, or None: `factor` times the method's own
    beta2: decay of the squared gradients; None: the method's own
    """

    parameters: list[nn.Parameter]
    learning_rate: float | None = None
    beta2: float | None = 0.999
    factor: float = 1.0


class Adapter(nn.Module):
    """One method on one base model: what is learnt, and how it acts on the base.

    Parameters that require gradients are what is trained, saved for resuming and counted.
    """

    #: Settings class, whose `kind` names the method in recipes.
    section_class: ClassVar[type[MethodSection]]
    #: PEFT types whose files this method reads: those that its settings class states.
    peft_types: ClassVar[tuple[str, ...]] = ()
    #: Whether it works on encoder-decoders, too.
    encoder_decoder: ClassVar[bool] = False
    #: Whether the base's weights are others while it is on: its prefix, if any, is not all of it.
    changes_weights: ClassVar[bool] = False
    #: Whether the base stays reachable, bit for bit, beside the adapter.
    has_off: ClassVar[bool] = True
    #: Whether PEFT's layers can give each row of a batch an adapter of its own, or none.
    mixes_in_batch: ClassVar[bool] = False
    #: Whether a row's prefix depends on the row's input, so that there is no one `prefix`.
    depends_on_input: ClassVar[bool] = False

    #: Whether it needs a model with a classification head, and whether it works on one.
    needs_head: ClassVar[bool] = False
    works_with_head: ClassVar[bool] = True

    def __init__(self, section: MethodSection, base: Base) -> None:
        super().__init__()
        self.section = section
        # In a tuple, so that the frozen base is not registered as a child of the adapter.
        self._base = (base,)
        self.head = None if base.head is None else TrainedHead(base)
        #: Which inputs are given the adapter; None: all.
        self.input_gate: Gate | None = None

    @property
    def base(self) -> Base:
        """The base model the adapter was made for."""
        return self._base[0]

    @property
    def model(self) -> PreTrainedModel:
        """The model to run: the base itself, with the adapter's head if it has one, unless the
        method changes weights."""
        return self.base.model if self.head is None else self.head.view

    @classmethod
    def require_fits(cls, section: Any, base: Base) -> None:
        """Raise ModelError or UserError where `create` would, as far as can be told before."""

    @classmethod
    @abstractmethod
    def create(cls, section: Any, base: Base, demonstrations: Demonstrations) -> Adapter:
        """A fresh adapter, started as `section` says; random parts use torch's global seed."""

    @classmethod
    def from_files(cls, files: AdapterFiles, section: Any, base: Base) -> Adapter:
        """The adapter that `files` hold, ready to be used and to be trained further."""
        raise AdapterError(f"{section.kind} adapters cannot be loaded from files")

    @classmethod
    def prefix_from_files(cls, files: AdapterFiles, section: Any, base: Base) -> Compiled | None:
        """The compiled form of what `files` hold, without what only training needs."""
        compiled = cls.from_files(files, section, base).own_compiled()
        return None if compiled is None else compiled.detach()

    @classmethod
    def parts(cls, files: AdapterFiles) -> list[AdapterFiles]:
        """The adapters, each of a type of PEFT's, that `files` hold; mostly just the one."""
        return [files]

    def prefix(self) -> KVPrefix | None:
        """The compiled adapter, differentiable in its parameters; None without virtual tokens.

        Raises AdapterError where it `depends_on_input`.
        """
        return None

    def own_compiled(self) -> Compiled | None:
        """`compiled` without the gate. Mostly its one `prefix`."""
        return self.prefix()

    def compiled(self) -> Compiled | None:
        """What gives the rows of a batch their prefixes, differentiable in the adapter's
        parameters; None without virtual tokens."""
        compiled = self.own_compiled()
        if isinstance(compiled, KVPrefix):
            compiled = gradients_summed(self.base.model, compiled)
        gate = self.input_gate
        return compiled if compiled is None or gate is None else Gated(compiled, gate)

    @property
    def virtual_tokens(self) -> int:
        """Number of its virtual tokens."""
        return 0

    @property
    def positions(self) -> int:
        """Positions the adapter takes from the base's budget."""
        return self.virtual_tokens

    @property
    def infix(self) -> bool:
        """Whether its virtual tokens stand within the input (see `KVPrefix.infix`)."""
        return False

    @abstractmethod
    def own_files(self) -> AdapterFiles:
        """`files` without the head and the gate."""

    def files(self) -> AdapterFiles:
        """The adapter in PEFT's layout, reparameterisation folded in, head and gate beside it.
        Raises AdapterError when there is nothing PEFT could load."""
        files = with_gate(self.own_files(), self.input_gate)
        return files if self.head is None else self.head.added_to(files, self.base)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of all that is trained."""
        return {n: p for n, p in self.named_parameters() if p.requires_grad}

    def own_rates(self) -> list[OwnRate]:
        """Trained parameters that do not learn at the rate of the method's `learning_rate`."""
        return []

    @property
    def trainable_parameters(self) -> int:
        """Number of trained values, the gate's included."""
        gate = 0 if self.input_gate is None else self.input_gate.parameters
        return gate + sum(p.numel() for p in self.trainable().values())

    def load_trainable(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `trainable` held. Raises AdapterError naming every tensor that differs."""
        own = self.trainable()
        faults = [f"`{n}` is missing" for n in own.keys() - tensors.keys()]
        faults += [f"`{n}` is unexpected" for n in tensors.keys() - own.keys()]
        faults += [
            f"`{n}` has shape {list(tensors[n].shape)}, expected {list(own[n].shape)}"
            for n in own.keys() & tensors.keys()
            if tensors[n].shape != own[n].shape
        ]
        if faults:
            raise AdapterError("the saved parameters do not fit: " + "; ".join(sorted(faults)))
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def for_tasks(self, tasks: Sequence[int]) -> PrefixBatch:
        """Prefixes of a batch whose rows belong to `tasks`. Raises AdapterError where it has no
        part of its own for each."""
        raise AdapterError(f"`{self.section.title}` has no part of its own for each task")

    def behind(self, ids: list[int]) -> list[int]:
        """`ids`, those of a whole text, as the model reads them behind the virtual tokens."""
        return ids

    @property
    def answer_end(self) -> str | None:
        """Text at which a generated answer is over, for methods that never learnt to stop."""
        return None

    def off(self) -> AbstractContextManager[None]:
        """Within this context the base acts as if the adapter had never been made."""
        return nullcontext()

    def close(self) -> None:
        """Give the base back as it was. Only methods that touch the base need to do anything."""


#: kind -> adapter class, filled by `register` as the adapters of methods are imported.
REGISTERED: dict[str, type[Adapter]] = {}


def register(cls: type[Adapter]) -> type[Adapter]:
    """Class decorator: make an adapter class known under its section's `kind`."""
    cls.peft_types = tuple(cls.section_class.file_types)
    REGISTERED[cls.section_class.own_kind()] = cls
    return cls


def peft_config_dict(config: PeftConfig, base: Base) -> dict[str, Any]:
    """`config` as PEFT writes it to `adapter_config.json` for inference on `base`."""
    config.base_model_name_or_path = base.id
    config.revision = base.revision
    config.inference_mode = True
    values = {k: v.value if isinstance(v, Enum) else v for k, v in config.to_dict().items()}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
