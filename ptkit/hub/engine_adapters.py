"""The adapters that are written for an engine: read, checked and named alike for all of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ptkit.bank.source import name_of
from ptkit.errors import AdapterError, UserError
from ptkit.formats.adapter_files import AdapterFiles, read_adapter
from ptkit.formats.places import find_adapter
from ptkit.methods import Adapter, adapter_from_files, base_of, require_same_base
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.cache import has_state, sees_everything, shares_keys


@dataclass(frozen=True)
class EngineSource:
    """An adapter to write. name: no other one's, without slashes; template: of its inputs."""

    path: Path
    name: str
    files: AdapterFiles
    template: str | None


def engine_adapters(
    sources: Sequence[Path], base: Base | None, *, classifiers: bool = False
) -> Iterator[tuple[EngineSource, Adapter]]:
    """Each of `sources` (runs or adapter folders) on their one base, which is loaded unless given.

    classifiers: whether they may be of models with a classification head

    An adapter is closed when the next one is asked for. Raises AdapterError for adapters of
    encoders, encoder-decoders and other bases, UserError when two have one name or the base's
    weights are in blocks.
    """
    names: set[str] = set()
    for source in sources:
        path = find_adapter(source)
        files = read_adapter(path)
        if base is None:
            base = base_of(files, None, str(source))
        require_same_base(files, base, str(source))
        if base.encoder_decoder or (base.head is not None and not classifiers):
            raise AdapterError(f"{source}: only adapters of causal models can be exported so")
        if base.quantized:
            raise UserError(
                f"`{base.id}` is loaded in {base.precision}; engines are given "
                "floating-point weights: leave `quantize` out"
            )
        name = name_of(path).replace("/", "--")
        if name in names:
            raise UserError(f"two adapters are called `{name}`; export one from a renamed folder")
        names.add(name)
        adapter = adapter_from_files(files, base)
        try:
            yield (
                EngineSource(source, name, files, files.info.template),
                adapter,
            )
        finally:
            adapter.close()


def engine_prefix(source: EngineSource, adapter: Adapter, *, placeless: bool = False) -> KVPrefix:
    """The keys and values that an engine's cache begins with; nothing else is left of `adapter`.

    placeless: whether it may be one whose texts begin at position 0

    Raises AdapterError where there is more to it, with what that is, and for bases whose layers do
    not keep every key.
    """
    model, encoder = adapter.base.model, adapter.base.encoder
    if not encoder and (has_state(model) or shares_keys(model) or not sees_everything(model)):
        raise AdapterError(
            f"layers of {adapter.base.id} see a window, share keys or keep a state; an engine "
            "keeps more for them than a plain cache of keys and values; use `ptkit serve`"
        )
    why = _more_than_a_prefix(adapter)
    prefix = None if why else adapter.prefix()
    if prefix is not None and prefix.infix:
        why = "its virtual tokens stand before the last word of each input, not at the front"
    if prefix is not None and prefix.placeless and not placeless:
        why = "its texts begin at position 0, and an engine's begin after what its cache holds"
    if why is None and prefix is None:
        why = "it has no virtual tokens"
    if why is not None or prefix is None:
        raise AdapterError(
            f"{source.path} is a {source.files.peft_type} adapter: {why}, so no engine's cache can "
            "hold it; serve it with `ptkit serve`"
        )
    return prefix.detach()


def prefix_tensors(prefix: KVPrefix, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """`keys.LAYER` and `values.LAYER`, `[kv_heads, virtual_tokens, head_dim]`, on the CPU."""
    return {
        f"{part}.{layer}": states.to("cpu", dtype).contiguous()
        for part, layers in (("keys", prefix.keys), ("values", prefix.values))
        for layer, states in enumerate(layers)
    }


def _more_than_a_prefix(adapter: Adapter) -> str | None:
    if adapter.changes_weights:
        return "it changes the base's weights"
    if adapter.input_gate is not None:
        return "a gate sets its strength for each input"
    if adapter.depends_on_input:
        return "its keys and values depend on the input"
    return None


def inputs_told(sources: Sequence[EngineSource]) -> str:
    """A line for each adapter of a README: how the inputs it was trained on are written."""

    def told(source: EngineSource) -> str:
        if source.files.info.chat is not None:
            return "trained on conversations, in the chat template of its `ptkit.json`"
        return f"trained on inputs written as {json.dumps(source.template or '{text}')}"

    return "\n".join(f"- `{source.name}`: {told(source)}" for source in sources)
