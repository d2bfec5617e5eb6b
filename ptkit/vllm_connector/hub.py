"""Exported adapters on the Hugging Face Hub: `ptkit push` sends them, a server loads them."""

from __future__ import annotations

from pathlib import Path

from ptkit.errors import AdapterError
from ptkit.formats.hub_repository import HubId, downloaded, hub_files
from ptkit.vllm_connector.files import ABOUT, TENSORS

#: What marks a repository of an adapter in PEFT's layout.
_PEFT = "adapter_config.json"


def fetch_exported(hub_id: str) -> Path:
    """Download the exported adapter `user/repo[@revision]`; its folder in the Hub's cache.

    Raises AdapterError where the repository holds none, with what it holds instead, and as
    `downloaded` does.
    """
    source = HubId.read(hub_id)
    folder = downloaded(source, [ABOUT, TENSORS])
    if (folder / ABOUT).is_file():
        return folder
    if _PEFT in hub_files(source):
        raise AdapterError(
            f"{hub_id} holds an adapter in PEFT's layout, which this server does not compile; "
            "`ptkit pull` it, `ptkit export --as vllm`, and `ptkit push` the folder below adapters"
        )
    raise AdapterError(
        f"{hub_id} holds no adapter for vLLM ({ABOUT} is missing); `ptkit export --as vllm` "
        "writes one below adapters/NAME, and `ptkit push` sends it"
    )
