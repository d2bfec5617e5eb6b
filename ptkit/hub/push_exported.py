"""What `ptkit export --as vllm` wrote below `adapters/NAME`, as the Hub gets it."""

from __future__ import annotations

import json
from pathlib import Path

from ptkit.formats.adapter_folder import CARD
from ptkit.formats.hub_repository import HubId
from ptkit.hub.published import public_base
from ptkit.methods.base_names import hub_name, is_here
from ptkit.vllm_connector.files import ABOUT, TENSORS, PrefixRecord, read_checked, read_record


def is_exported(folder: Path) -> bool:
    """Whether `folder` holds an adapter as vLLM's server reads it."""
    return (folder / ABOUT).is_file() and (folder / TENSORS).is_file()


def exported_contents(
    folder: Path, target: HubId, base_model: str | None
) -> dict[str, Path | bytes]:
    """Name -> what is uploaded of `folder`, with a card, to the repository `target`.

    base_model: the base's id on the Hub, where the adapter names a place on this machine

    Raises AdapterError for files that are damaged, UserError where others could not find the base.
    """
    record = read_record(folder)
    read_checked(folder, record)
    named = record.base.get("id")
    base = public_base(named if isinstance(named, str) else None, base_model, str(folder))
    told = record.as_json()
    told["base"] = {**told["base"], "id": base}
    about = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
    return {
        ABOUT: about.encode(),
        TENSORS: folder / TENSORS,
        CARD: _card(record, base, target).encode(),
    }


def _card(record: PrefixRecord, base: str | None, target: HubId) -> str:
    from huggingface_hub import ModelCardData

    # ptkit's own names are none on the Hub.
    on_hub = base is not None and "/" in base and not is_here(hub_name(base))
    metadata = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=["ptkit", "kv-prefix", *([f"base_model:adapter:{base}"] if on_hub else [])],
    ).to_yaml()
    load = json.dumps({"name": target.name, "hub": target.repository})
    return f"""---
{metadata}
---

# {target.name}

The keys and values of an adapter of `{base}`, for vLLM's server: {record.virtual_tokens} virtual
tokens in {record.layers} layers.

A server that ptkit's connector lets load from the Hub serves it after this request:

    curl http://HOST:PORT/v1/load_adapter -H 'content-type: application/json' -d '{load}'

`ptkit serve --engine vllm --allow-hub` starts such a server. PEFT does not read these files.

Written by `ptkit push`.
"""
