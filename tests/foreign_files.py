"""Adapters that other libraries' own packages wrote, on tiny bases, with the logits they gave."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from conftest import word_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from ptkit.formats.adapter_files import AdapterFiles, read_adapter
from ptkit.methods import compile_files
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.forward import all_logits
from ptkit.runtime.runner import ModelRunner, Tokens

FOLDER = Path(__file__).parent / "files" / "foreign"
#: The folders of `FOLDER` that hold an adapter: LIBRARY-BASE-METHOD.
NAMES = sorted(p.name for p in FOLDER.iterdir() if p.name not in ("bases", "adapterhub-bert-mlp"))
#: Why those are refused that are no adapter of PEFT's or ptkit's.
REFUSED = {
    "adapterhub-gpt2-flat": "begin at position 0",
    "adapterhub-gpt2-mlp": "begin at position 0",
    "adapterhub-gpt2-gated": "has a gate",
    "adapterhub-llama-gated": "has a gate",
    "adapterhub-mistral-gated": "has a gate",
    "litgpt-llama": "second softmax",
    "opendelta-gpt2-prefix": "begin at position 0",
    "opendelta-gpt2-prefixmlp": "begin at position 0",
    "opendelta-t5-prefix": "none for what joins them",
    "opendelta-t5-prefixmlp": "none for what joins them",
    "openprompt-t5-prefix": "none for what joins them",
}
EXACT = [name for name in NAMES if name not in REFUSED]


@cache
def base_for(name: str) -> Base:
    """The tiny base that the adapter `name` was made on."""
    kind = next(part for part in name.split("-") if (FOLDER / "bases" / part).is_dir())
    folder = FOLDER / "bases" / kind
    cls = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = cls.from_pretrained(folder, dtype=torch.float32)
    return frozen_base(model, word_tokenizer(), f"org/tiny-{kind}")


def largest_difference(name: str, adapter: Path) -> float:
    """Between the logits of the library that wrote `name` and those with the imported `adapter`; of
    logits beyond 1, as a share of the largest."""
    return difference(name, read_adapter(adapter))


@torch.no_grad()
def difference(name: str, files: AdapterFiles) -> float:
    """As `largest_difference`, of an adapter in memory."""
    base, expected = base_for(name), load_file(FOLDER / name / "expected.safetensors")
    ids, wanted = expected["ids"], expected["logits"]
    mask = torch.ones_like(ids)
    compiled = compile_files(files, base)
    assert compiled is not None
    batch = compiled.for_rows(ids, mask)
    if base.encoder_decoder:
        tokens = Tokens(ids, mask, written=ids[:, : wanted.shape[1]])
        found = ModelRunner(base.model).forward(tokens, batch)
    else:
        found = all_logits(base.model, ids, mask, batch)
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
