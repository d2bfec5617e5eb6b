"""Adapters that other libraries' own packages wrote, on tiny bases, with the logits they gave."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from conftest import word_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ptkit.formats.adapter_files import AdapterFiles, read_adapter
from ptkit.methods import adapter_from_files, compile_files
from ptkit.runtime.base_model import Base, frozen_base, headed_base
from ptkit.runtime.forward import all_logits
from ptkit.runtime.runner import ModelRunner, Tokens

FOLDER = Path(__file__).parent / "files" / "foreign"
#: The folders of `FOLDER` that hold an adapter: LIBRARY-BASE-METHOD.
NAMES = sorted(p.name for p in FOLDER.iterdir() if p.name != "bases")
#: Why those are refused that are no adapter of PEFT's or ptkit's.
REFUSED = {
    "adapterhub-bert-cls1": "which no classifier of transformers has",
    "adapterhub-bert-mlp": "has no head that classifies",
    "adapterhub-gpt2-gated": "has a gate",
    "adapterhub-llama-gated": "has a gate",
    "adapterhub-mistral-gated": "has a gate",
    "litgpt-llama": "second softmax",
    "opendelta-t5-prefix": "none for what joins them",
    "opendelta-t5-prefixmlp": "none for what joins them",
    "openprompt-t5-prefix": "none for what joins them",
}
ENCODERS = ("bert", "roberta")
LABELS = ("LABEL_0", "LABEL_1", "LABEL_2")
EXACT = [name for name in NAMES if name not in REFUSED]


@cache
def base_for(name: str) -> Base:
    """The tiny base that the adapter `name` was made on."""
    kind = next(part for part in name.split("-") if (FOLDER / "bases" / part).is_dir())
    folder = FOLDER / "bases" / kind
    if kind in ENCODERS:
        auto = AutoModelForTokenClassification if name.endswith("-tag") else (
            AutoModelForSequenceClassification
        )  # fmt: skip
        model, found = auto.from_pretrained(
            folder, num_labels=len(LABELS), dtype=torch.float32, output_loading_info=True,
            attn_implementation="eager",
        )  # fmt: skip
        labels = ("bad", "fine", "good") if name == "adapterhub-bert-seq2" else LABELS
        fresh = {*found["missing_keys"]}
        return headed_base(model, word_tokenizer(), f"org/tiny-{kind}", labels, fresh=fresh)
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
    if files.peft_type == "ADAPTION_PROMPT":
        adapter = adapter_from_files(files, base)
        found = ModelRunner(adapter.model).forward(Tokens(ids, mask))
        adapter.close()
        return _apart(found, wanted)
    compiled = compile_files(files, base)
    assert compiled is not None
    batch = compiled.for_rows(ids, mask)
    if base.head is not None:
        adapter = adapter_from_files(files, base)
        found = ModelRunner(adapter.model).forward(Tokens(ids, mask), batch)
    elif base.encoder_decoder:
        tokens = Tokens(ids, mask, written=ids[:, : wanted.shape[1]])
        found = ModelRunner(base.model).forward(tokens, batch)
    else:
        found = all_logits(base.model, ids, mask, batch)
    return _apart(found, wanted)


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
