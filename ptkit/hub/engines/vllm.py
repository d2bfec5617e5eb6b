"""Folders for vLLM's server, and the KV connector that it loads them with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from ptkit.data.chat_template import ChatTemplate
from ptkit.data.templates import filled
from ptkit.data.tokens import lead_ids
from ptkit.errors import AdapterError, DataError, UserError
from ptkit.formats import atomic
from ptkit.hub.engine_adapters import (
    EngineSource,
    engine_adapters,
    engine_prefix,
    inputs_told,
    prefix_tensors,
)
from ptkit.hub.engines import Written
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.named_models import source_of
from ptkit.vllm_connector.files import ABOUT, TENSORS, ChatRecord, PrefixRecord
from ptkit.vllm_connector.running import CONNECTOR, MODULE

#: Folders of the export: what is served, and what vLLM's Python finds it with.
ADAPTERS, CODE = "adapters", "connector"
#: What `CODE` holds of ptkit: all that the connector imports.
_MODULES = [
    "__init__.py", "errors.py", "formats/__init__.py", "formats/atomic.py",
    "formats/checkpoint.py", "formats/exchange.py", "formats/fingerprint.py",
    "formats/hub_repository.py", "formats/sizes.py", "playground", "vllm_connector",
]  # fmt: skip
_DTYPES = ("float32", "bfloat16", "float16")
#: Stands for the question where a template is taken apart; no template holds it.
_QUESTION = "\0question\0"


def write(
    sources: Sequence[Path],
    out: Path,
    *,
    base: Base | None = None,
    replace_out: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> Written:
    """Write `adapters/NAME` for each of `sources`, and `connector`, which vLLM's Python needs.

    dtype: of the stored keys and values; vLLM rounds them to that of its model

    Raises AdapterError for what a cache of keys and values cannot hold (see `engine_prefix`).
    """
    if dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype}: vLLM's adapters are stored in {', '.join(_DTYPES)}")
    tokens, written = 0, []
    with atomic.folder(out, replace=replace_out) as scratch:
        for source, adapter in engine_adapters(sources, base):
            base = adapter.base
            prefix = engine_prefix(source, adapter)
            write_prefix(source, prefix, base, scratch / ADAPTERS / source.name, dtype)
            tokens += prefix.virtual_tokens
            written.append(source)
        assert base is not None
        write_connector(scratch / CODE)
        atomic.write_text(scratch / "README.md", _readme(base, written))
        size = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    return Written(out, tokens, size)


def write_prefix(
    source: EngineSource, prefix: KVPrefix, base: Base, folder: Path, dtype: str = "float32"
) -> None:
    """Write the folder of one adapter. Raises AdapterError for layers of several shapes."""
    data = save(prefix_tensors(prefix, getattr(torch, dtype)))
    record = replace(
        record_of(prefix, base, dtype),
        sha256=hashlib.sha256(data).hexdigest(),
        chat=_chat(source, base),
        made_from={
            "name": source.name,
            "method": source.files.peft_type,
            "template": source.template,
            **source.files.info.figures,
        },
    )
    folder.mkdir(parents=True)
    atomic.write_bytes(folder / TENSORS, data)
    atomic.write_json(folder / ABOUT, record.as_json())


def record_of(prefix: KVPrefix, base: Base, dtype: str = "float32") -> PrefixRecord:
    """What `adapter.json` states of any prefix of this shape for `base`; its digest is not known.

    Raises AdapterError for layers of several shapes.
    """
    shapes = {tuple(states.shape) for states in (*prefix.keys, *prefix.values)}
    if len(shapes) > 1:
        raise AdapterError(
            f"layers of {base.id} have keys and values of several shapes ({sorted(shapes)}), which "
            "was not tried on vLLM; use `ptkit serve`"
        )
    (shape,) = shapes
    return PrefixRecord(
        virtual_tokens=prefix.virtual_tokens,
        layers=len(prefix.keys),
        kv_heads=shape[0],
        head_dim=shape[2],
        dtype=dtype,
        sha256="",
        base={
            "id": base.id,
            "fingerprint": base.identity.fingerprint,
            "sketch": base.identity.sketch,
            "precision": base.precision,
        },
        rope=_rope(base),
    )


def write_connector(folder: Path) -> None:
    """Write what vLLM's Python finds on its path: the connector, and the entry point of its plugin.

    It is part of ptkit, without what vLLM's environment does not have.
    """
    package = Path(__file__).parents[2]
    for name in _MODULES:
        place = folder / "ptkit" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if (package / name).is_dir():
            shutil.copytree(package / name, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(package / name, place)
    own = version("ptkit")
    facts = folder / f"ptkit-{own}.dist-info"
    facts.mkdir()
    atomic.write_text(facts / "METADATA", f"Metadata-Version: 2.1\nName: ptkit\nVersion: {own}\n")
    atomic.write_text(
        facts / "entry_points.txt",
        "[vllm.endpoint_plugins]\nptkit = ptkit.vllm_connector.plugin:PtkitAdapters\n",
    )


def transfer_config(adapters: Path | str, **settings: Any) -> str:
    """What `--kv-transfer-config` is given, as JSON.

    settings: further ones of the connector (docs/engines.md)
    """
    return json.dumps(
        {
            "kv_connector": CONNECTOR,
            "kv_connector_module_path": MODULE,
            "kv_role": "kv_consumer",
            "kv_connector_extra_config": {"adapters": str(adapters), **settings},
        }
    )


def _chat(source: EngineSource, base: Base) -> ChatRecord:
    """How `source` is asked in conversations: as `ptkit serve` asks it."""
    chat = source.files.info.chat
    template = ChatTemplate.of_record(base.tokenizer, chat)
    question = None if source.template is None else asked_as(source.template)
    return ChatRecord(
        template=None if chat is None else chat.template,
        system=None if chat is None else chat.system,
        question=question if chat is None else None,
        ends=tuple(sorted(template.ends)),
        lead=tuple(lead_ids(base.tokenizer)),
    )


def asked_as(template: str) -> str:
    """Jinja's text that puts the one question of a conversation into `template`.

    A template of several columns refuses it, with the reason.
    """
    try:
        pieces = filled(template, _QUESTION).split(_QUESTION)
    except DataError as error:
        reason = f"{error}; here that is `template: false`"
        return f"{{{{ raise_exception({reason!a}) }}}}"
    literals = [f"{{{{ {piece!a} }}}}" for piece in pieces]
    return "{{ messages[0]['content'] }}".join(literals)


def _rope(base: Base) -> dict[str, Any] | None:
    return getattr(base.model.config.get_text_config(), "rope_parameters", None)


def _readme(base: Base, sources: Sequence[EngineSource]) -> str:
    return f"""# Adapters of {base.id} for vLLM

{inputs_told(sources)}

    export PYTHONPATH=$PWD/{CODE} VLLM_PLUGINS=ptkit
    vllm serve {source_of(base.id)} --served-model-name {base.id} \\
        --kv-transfer-config '{transfer_config(ADAPTERS)}'
    curl localhost:8000/v1/completions -H 'content-type: application/json' \\
        -d '{{"model": "{sources[0].name}", "prompt": "The text", "temperature": 0}}'

`{CODE}` holds the connector. It needs nothing but vLLM. `{ADAPTERS}` is what is served, and the
`model` of a request names one of its folders, or `{base.id}`.

Written by `ptkit export --as vllm`.
"""
