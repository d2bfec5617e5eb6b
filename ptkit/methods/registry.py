"""Every method's adapter class, and adapters made anew or from files, whatever their method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache

from ptkit.errors import AdapterError, ModelError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import REGISTERED, Adapter, Demonstrations
from ptkit.methods.catalogue import import_part, method_of_files, method_packages, method_sections
from ptkit.methods.gate_files import gate_of, without_gate
from ptkit.methods.head import TASK_TYPES, with_saved_head, without_head
from ptkit.methods.saved_modules import require_saved_modules
from ptkit.prefix import Compiled
from ptkit.runtime.base_model import Base
from ptkit.runtime.gate import Gated
from ptkit.section import MethodSection


@cache
def _classes() -> dict[str, type[Adapter]]:
    """Imported by name, and late: a method may itself start from adapters of any other."""
    for package in method_packages():
        import_part(package, "adapter")
    return {kind: REGISTERED[kind] for kind in method_sections()}


class _Adapters(Mapping[str, type[Adapter]]):
    """kind -> adapter class. One is imported when it is first asked for, without the others: much
    of PEFT is loaded by those that change weights."""

    def __getitem__(self, kind: str) -> type[Adapter]:
        package = method_sections()[kind].__module__.rpartition(".")[0]
        if package in method_packages():
            import_part(package, "adapter")
        return REGISTERED[kind] if kind in REGISTERED else _classes()[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(_classes())

    def __len__(self) -> int:
        return len(_classes())


ADAPTERS: Mapping[str, type[Adapter]] = _Adapters()


def create_adapter(section: MethodSection, base: Base, demonstrations: Demonstrations) -> Adapter:
    """A fresh adapter of the method `section` describes.

    Raises ModelError on a kind of base it does not work on.
    """
    require_method_fits(section, base)
    return ADAPTERS[section.kind].create(section, base, demonstrations)


def require_method_fits(section: MethodSection, base: Base) -> None:
    """Raise ModelError when the method does not work on this kind of model."""
    cls = ADAPTERS[section.kind]
    _require_reachable(section, base)
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
    cls.require_fits(section, base)


def _require_reachable(section: MethodSection, base: Base) -> None:
    """Raise ModelError where the method cannot work on a base that lies as this one does."""
    if base.processes > 1 and not section.on_split_base:
        raise ModelError(not_on_split_base(section))
    if ADAPTERS[section.kind].changes_weights and base.offloaded:
        raise ModelError(
            f"`{section.title}` ({section.kind}) changes layers of {base.id} whose weights "
            "`model.device_map` offloads; give every layer a device, or use a method that leaves "
            "the layers alone, as prefix_tuning"
        )


def not_on_split_base(section: MethodSection) -> str:
    """Why the method of `section` is refused on a base that several processes hold together."""
    able = ", ".join(kind for kind, own in method_sections().items() if own.on_split_base)
    return (
        f"`{section.title}` ({section.kind}) does not work on a base that `model.tp_plan` splits "
        f"over several processes; use {able}, or `model.device_map: auto` in one process"
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
    _require_reachable(section, base)
    base = with_saved_head(base, files)
    gate, own = gate_of(files, base), without_gate(files)
    if base.head is not None:
        own = without_head(own, base)
    adapter = cls.from_files(own, section, base)
    adapter.input_gate = gate
    if adapter.head is not None:
        adapter.head.load(files)
    return adapter


def compile_files(files: AdapterFiles, base: Base) -> Compiled | None:
    """The adapter that `files` hold as a KV prefix, or as what makes one for each row, detached. It
    is None if it has none (LoRA) and the files fit the base.

    Raises AdapterError for PEFT types no method of ptkit reads.
    """
    cls, section = _method_of(files, base)
    _require_reachable(section, base)
    base = with_saved_head(base, files)
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


def mixes_in_batch(peft_type: str) -> bool:
    """Whether rows of one batch may have different adapters of this type in the base's layers."""
    cls = _reader_of(peft_type)
    return cls is not None and cls.mixes_in_batch


def _reader_of(peft_type: str) -> type[Adapter] | None:
    section = method_of_files(peft_type)
    return None if section is None else ADAPTERS[section.own_kind()]


def _method_of(files: AdapterFiles, base: Base) -> tuple[type[Adapter], MethodSection]:
    require_saved_modules(files, base)
    task = files.config.get("task_type")
    headed = {name: kind for kind, name in TASK_TYPES.items()}.get(str(task))
    if headed != (None if base.head is None else base.head.kind):
        made = f"for a {headed} classifier" if headed else "for a language model"
        here = "a language model" if base.head is None else f"a {base.head.kind} classifier"
        raise AdapterError(f"the adapter was made {made}, and `{base.id}` is loaded as {here}")
    trained_here = files.peft_type.startswith("PTKIT_")
    if headed and base.encoder and not (trained_here or changes_weights(files.peft_type)):
        raise AdapterError(
            f"PEFT's {files.peft_type} for encoders gives positions of the input to its virtual "
            "tokens; ptkit reads those it trained itself, and what changes weights, as LoRA"
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
    # Without ptkit's record of the method, the first one that reads this PEFT type.
    own = method_of_files(files.peft_type, files.info.method_kind)
    if own is not None:
        return ADAPTERS[own.own_kind()], own.of_files(files.peft_type)
    known = {t for cls in ADAPTERS.values() for t in cls.peft_types}
    raise AdapterError(
        f"adapters of PEFT type `{files.peft_type}` cannot be loaded: ptkit reads "
        f"{', '.join(sorted(known))}"
    )
