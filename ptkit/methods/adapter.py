"""What every method provides: an `Adapter`, one per file, known by its recipe `kind`."""

from __future__ import annotations

import logging
import random
import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptkit.errors import AdapterError, ModelError
from ptkit.formats.adapter_files import AdapterFiles, base_id, base_revision, read_adapter
from ptkit.formats.fingerprint import is_same_model
from ptkit.methods.base_names import hub_name, same_name
from ptkit.methods.gate_files import gate_of, with_gate, without_gate
from ptkit.methods.head import TASK_TYPES, TrainedHead, labels_of_files, without_head
from ptkit.methods.saved_modules import require_saved_modules
from ptkit.prefix import Compiled, KVPrefix
from ptkit.recipe.schema import MethodSection, ModelSection
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.gate import Gate, Gated

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Demonstrations:
    """What a method may start from: training rows as texts `input + target`, in the data's order,
    the words of a classification task's labels, those of its template around the columns, and the
    folder that paths of a recipe start at."""

    texts: Sequence[str]
    seed: int
    labels: Sequence[str] = ()
    frame: str = ""
    folder: Path = Path()

    def shuffled(self) -> list[str]:
        """The texts in an order that depends on the seed only."""
        texts = list(self.texts)
        random.Random(self.seed).shuffle(texts)
        return texts


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
    #: PEFT types whose files this method reads.
    peft_types: ClassVar[tuple[str, ...]] = ()
    #: Whether it works on encoder-decoders, too.
    encoder_decoder: ClassVar[bool] = False
    #: Whether the base's weights are others while it is on: its prefix, if any, is not all of it.
    changes_weights: ClassVar[bool] = False
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
        gate = self.input_gate
        return compiled if compiled is None or gate is None else Gated(compiled, gate)

    @property
    def virtual_tokens(self) -> int:
        """Positions the adapter takes from the base's budget."""
        return 0

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

    def behind(self, ids: list[int]) -> list[int]:
        """`ids`, those of a whole text, as the model reads them behind the virtual tokens."""
        return ids

    @property
    def answer_end(self) -> str | None:
        """Text at which a generated answer is over, for methods that never learnt to stop."""
        return None

    @property
    def has_off(self) -> bool:
        """Whether the base stays reachable, bit for bit, beside the adapter."""
        return True

    def off(self) -> AbstractContextManager[None]:
        """Within this context the base acts as if the adapter had never been made."""
        return nullcontext()

    def close(self) -> None:
        """Give the base back as it was. Only methods that touch the base need to do anything."""


#: kind -> adapter class, filled by `register`.
ADAPTERS: dict[str, type[Adapter]] = {}


def register(cls: type[Adapter]) -> type[Adapter]:
    """Class decorator: make an adapter class known under its section's `kind`."""
    kind = cls.section_class.model_fields["kind"].annotation.__args__[0]  # type: ignore[union-attr]
    ADAPTERS[kind] = cls
    return cls


def create_adapter(section: MethodSection, base: Base, demonstrations: Demonstrations) -> Adapter:
    """A fresh adapter of the method `section` describes.

    Raises ModelError on a kind of base it does not work on.
    """
    require_method_fits(section, base)
    return ADAPTERS[section.kind].create(section, base, demonstrations)


def require_method_fits(section: MethodSection, base: Base) -> None:
    """Raise ModelError when the method does not work on this kind of model."""
    cls = ADAPTERS[section.kind]
    if cls.needs_head and base.head is None:
        raise ModelError(
            f"`{section.title}` ({section.kind}) trains a classification head, which {base.id} as "
            "a language model has none of; give the recipe a task of `kind: "
            "sequence_classification` or `token_classification`"
        )
    if base.head is not None and not cls.works_with_head:
        raise ModelError(
            f"`{section.title}` ({section.kind}) shows the model texts with answers in words, and "
            f"{base.id} has a classification head here; leave it out, or use a task of `kind: "
            "classification`"
        )
    if base.encoder_decoder and not cls.encoder_decoder:
        able = ", ".join(kind for kind, cls in ADAPTERS.items() if cls.encoder_decoder)
        raise ModelError(
            f"`{section.title}` ({section.kind}) does not work on encoder-decoders such as "
            f"{base.id}: nothing its encoder reads can be compiled; write the text into the task's "
            f"`input`, or use {able}"
        )


def adapter_from_files(files: AdapterFiles, base: Base) -> Adapter:
    """The adapter that `files` hold, whatever its method; its start settings are not known.

    Raises AdapterError for PEFT types no method of ptkit reads.
    """
    cls, section = _method_of(files, base)
    return restored(cls, files, section, base)


def restored(
    cls: type[Adapter], files: AdapterFiles, section: MethodSection, base: Base
) -> Adapter:
    """The adapter of method `cls` that `files` hold, head and gate included."""
    gate, own = gate_of(files, base), without_gate(files)
    if base.head is not None:
        own = without_head(own, base)
    adapter = cls.from_files(own, section, base)
    adapter.input_gate = gate
    if adapter.head is not None:
        adapter.head.load(files)
    return adapter


def compile_files(files: AdapterFiles, base: Base) -> Compiled | None:
    """The adapter that `files` hold as a KV prefix, or as what makes one for each row, detached;
    None if it has none (LoRA).

    Raises AdapterError for PEFT types no method of ptkit reads.
    """
    cls, section = _method_of(files, base)
    gate, own = gate_of(files, base), without_gate(files)
    if base.head is not None:
        own = without_head(own, base)
    compiled = cls.prefix_from_files(own, section, base)
    return compiled if compiled is None or gate is None else Gated(compiled, gate)


def parts_of(files: AdapterFiles) -> list[AdapterFiles]:
    """The adapters of PEFT's types that `files` hold together; `files` alone where it is one.

    Raises AdapterError when they are damaged.
    """
    cls = _reader_of(files.peft_type)
    return [files] if cls is None else cls.parts(files)


def changes_weights(peft_type: str) -> bool:
    """Whether adapters of this type change the base's weights while they are on."""
    cls = _reader_of(peft_type)
    return cls is not None and cls.changes_weights


def _reader_of(peft_type: str) -> type[Adapter] | None:
    return next((cls for cls in ADAPTERS.values() if peft_type in cls.peft_types), None)


def _method_of(files: AdapterFiles, base: Base) -> tuple[type[Adapter], MethodSection]:
    require_saved_modules(files, base)
    task = files.config.get("task_type")
    headed = {name: kind for kind, name in TASK_TYPES.items()}.get(str(task))
    if headed != (None if base.head is None else base.head.kind):
        made = f"for a {headed} classifier" if headed else "for a language model"
        here = "a language model" if base.head is None else f"a {base.head.kind} classifier"
        raise AdapterError(f"the adapter was made {made}, and `{base.id}` is loaded as {here}")
    own = files.peft_type.startswith("PTKIT_") or files.peft_type == "LORA"
    if headed and base.encoder and not own:
        raise AdapterError(
            f"PEFT's {files.peft_type} for encoders gives positions of the input to its virtual "
            "tokens; ptkit reads those it trained itself, and LoRA"
        )
    if task == "SEQ_2_SEQ_LM" and files.peft_type in ("PREFIX_TUNING", "CARTRIDGE"):
        raise AdapterError(
            "PEFT's prefixes for encoder-decoders have the decoder's part only; ptkit reads those "
            "it trained itself, PEFT's soft prompts, and LoRA"
        )
    if headed is None and task not in (None, "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"):
        raise AdapterError(
            f"the adapter was made for {task}; ptkit reads adapters of language models and of "
            "sequence and token classifiers"
        )
    for kind, cls in ADAPTERS.items():
        if files.peft_type in cls.peft_types:
            # Without ptkit's record of the method, the first one that reads this PEFT type.
            recorded = files.info.get("method", {}).get("kind", kind)
            named = ADAPTERS.get(recorded) if isinstance(recorded, str) else None
            if named is not None and files.peft_type in named.peft_types:
                kind, cls = recorded, named
            return cls, cls.section_class(kind=kind)
    known = {t for cls in ADAPTERS.values() for t in cls.peft_types}
    raise AdapterError(
        f"adapters of PEFT type `{files.peft_type}` cannot be loaded: ptkit reads "
        f"{', '.join(sorted(known))}"
    )


def require_same_base(files: AdapterFiles, base: Base, where: str, *, chosen: bool = False) -> None:
    """Raise AdapterError when `files` were made for another base than `base`.

    chosen: the user named this base for this adapter; that settles it where the adapter has no
        fingerprint, and a warning names both

    ptkit's own files carry a fingerprint of the weights; for files of plain PEFT the name of
    the base is all there is (its last part is compared: `gpt2` is `openai-community/gpt2`). The
    same model in another precision is warned of, once.
    """
    made_for = files.info.get("base", {})
    name = files.base_id
    if made_for.get("fingerprint"):
        if not _is_made_for(made_for, base):
            detail = f" (weights {made_for['fingerprint']}, here {base.fingerprint})"
            raise AdapterError(
                f"{where} was made for the base model `{name}`, not for `{base.id}`{detail}; "
                f"load it on `{name}`"
            )
        trained_in = made_for.get("precision", base.precision)
        if trained_in != base.precision:
            warnings.warn(
                f"trained on `{name}` in {trained_in}, used on `{base.id}` in {base.precision}: "
                "the same model, whose answers differ a little",
                stacklevel=2,
            )
        return
    if not name or same_name(name, base):
        return
    if not chosen:
        raise AdapterError(
            f"{where} was made for the base model `{name}`, not for `{base.id}`; load it on "
            f"`{hub_name(name)}`, or choose the base for it with --model where that is the same "
            "model by another name"
        )
    logger.warning(
        "%s names the base model `%s`; it is used on `%s`, as chosen: it has no fingerprint to "
        "tell whether they are the same", where, name, base.id
    )  # fmt: skip


def _is_made_for(made_for: dict[str, Any], base: Base) -> bool:
    """Whether an adapter's record of its base is of the model `base` is, in whatever precision."""
    if made_for["fingerprint"] == base.fingerprint:
        return True
    if "sketch" not in made_for:  # an earlier version's
        return bool(made_for["fingerprint"] == base.legacy_fingerprint)
    return is_same_model(
        str(made_for["sketch"]), str(made_for.get("precision", "")),
        base.identity.sketch, base.precision,
    )  # fmt: skip


def base_of(files: AdapterFiles, model: str | None, where: str) -> Base:
    """Load the base `model`, or the one `files` name, in the revision they were made on.

    where: what the files are called. Raises AdapterError when neither names one.
    """
    labels = labels_of_files(files)
    if model is not None:
        return load_base(ModelSection(id=model), labels)
    if files.base_id is None:
        raise AdapterError(f"{where} names no base model; give it (--model)")
    revision = base_revision(files.config, files.info)
    id = files.base_id if Path(files.base_id).is_dir() else hub_name(files.base_id)
    return load_base(ModelSection(id=id, revision=revision), labels)


def revision_named(
    id: str, adapters: Mapping[str, tuple[dict[str, Any], dict[str, Any]]]
) -> str | None:
    """The revision of the base `id` that `adapters` were made on; None where none of them says.

    adapters: what they are called -> their settings and ptkit's record (`read_config`, `read_info`)

    Raises AdapterError where they were made on different ones: one base is loaded for all.
    """
    named = {
        where: base_revision(config, info)
        for where, (config, info) in adapters.items()
        if hub_name(base_id(config, info) or "") == id
    }
    if len({*named.values()}) > 1:
        told = ", ".join(f"{where} on {revision or 'main'}" for where, revision in named.items())
        raise AdapterError(
            f"these adapters were made on different revisions of `{id}` ({told}); use them one "
            "at a time"
        )
    return next(iter(named.values()), None)


def load_adapter(path: Path, base: Base, *, chosen: bool = False) -> Adapter:
    """The adapter in the folder `path`, checked against `base` (chosen: see `require_same_base`).

    Raises AdapterError when it is damaged, unsafe, of an unknown type or for another base.
    """
    files = read_adapter(path)
    require_same_base(files, base, str(path), chosen=chosen)
    return adapter_from_files(files, base)


def peft_config_dict(config: PeftConfig, base: Base) -> dict[str, Any]:
    """`config` as PEFT writes it to `adapter_config.json` for inference on `base`."""
    config.base_model_name_or_path = base.id
    config.revision = base.revision
    config.inference_mode = True
    values = {k: v.value if isinstance(v, Enum) else v for k, v in config.to_dict().items()}
    return {k: sorted(v) if isinstance(v, set) else v for k, v in values.items()}
