"""Soft prompts and a client that sends them with each request, as vLLM's `prompt_embeds`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedModel

from ptkit.formats import atomic
from ptkit.hub.engines import Written
from ptkit.hub.soft_prompts import PROMPTS, Soft, embedding_scale, prompts_file, soft_prompts
from ptkit.runtime.base_model import Base

EMBEDDINGS = "prompt_embeds.safetensors"
CLIENT = "client.py"


def write(
    sources: Sequence[Path], out: Path, *, base: Base | None = None, replace_out: bool = False
) -> Written:
    """Write the soft prompts of `sources` and a client that sends them with each request.

    The client puts the embeddings of the text behind those of the adapter, in the form of vLLM's
    `prompt_embeds`. The server is a plain vLLM with `--enable-prompt-embeds`.
    """
    base, softs = soft_prompts(sources, base)
    with atomic.folder(out, replace=replace_out) as scratch:
        tensors = {soft.name: soft.embeddings.contiguous() for soft in softs}
        save_file(tensors, scratch / EMBEDDINGS, metadata={"format": "pt"})
        about = prompts_file(base, softs, {}) | {"lead": base.lead}
        about["embedding"] = {
            "tensor": _checkpoint_name(base.model),
            "scale": embedding_scale(base.model),
        }
        atomic.write_json(scratch / PROMPTS, about)
        client = package_files("ptkit.hub") / "prompt_embeds_client.py"
        atomic.write_text(scratch / CLIENT, client.read_text(encoding="utf-8"))
        atomic.write_text(scratch / "README.md", _readme(base, softs))
        size = sum(p.stat().st_size for p in scratch.iterdir())
    return Written(out, sum(len(soft.embeddings) for soft in softs), size)


def _checkpoint_name(model: PreTrainedModel) -> str:
    """Name of the embedding's tensor in the base's files."""
    table = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is table)


def _readme(base: Base, softs: Sequence[Soft]) -> str:
    names = ", ".join(f"`{soft.name}` ({len(soft.embeddings)} virtual tokens)" for soft in softs)
    first = softs[0]
    template = json.dumps(first.template or "{text}")
    return f"""# Soft prompts for {base.id}, to send with requests

Adapters: {names}.

    vllm serve {base.id} --enable-prompt-embeds
    python {CLIENT} {first.name} "The text"      # --base FOLDER for a base that is not on the Hub

`{CLIENT}` looks the text's embeddings up in the base's files, puts the adapter's before them and
sends both as `prompt_embeds`. `{first.name}` was trained on inputs written as {template}.

Written by `ptkit export --as prompt-embeds`.
"""
