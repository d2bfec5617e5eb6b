"""Adapters that other libraries' own packages wrote, on tiny bases, with the logits they gave."""

from __future__ import annotations

import os
import sys
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

#: What `make setup-oracles` installs, a folder for each library.
ORACLES = Path(os.environ.get("PTKIT_ORACLES", sys.prefix))
FOLDER = Path(__file__).parent / "files" / "foreign"
#: The folders of `FOLDER` that hold an adapter: LIBRARY-BASE-METHOD.
NAMES = sorted(p.name for p in FOLDER.iterdir() if p.is_dir() and p.name != "bases")
#: Why those are refused that are no adapter of PEFT's or ptkit's.
REFUSED = {
    "adapterhub-bert-cls1": "which no classifier of transformers has",
    "adapterhub-bert-mlp": "has no head that classifies",
    "adapterhub-bert-qa": "its head is a `question_answering` of `bert`",
    "adapterhub-gpt2-gated": "has a gate",
    "adapterhub-llama-gated": "has a gate",
    "adapterhub-llama-leftout": "leaves out the layers 0",
    "adapterhub-mistral-gated": "has a gate",
    "litgpt-llama": "second softmax",
    "opendelta-t5-prefix": "none for what joins them",
    "opendelta-t5-prefixmlp": "none for what joins them",
    "openprompt-gpt2-ptuning": "stand where its text puts them",
    "openprompt-t5-prefix": "none for what joins them",
    "peft-0.2.0-gpt2-lora": "`enable_lora`",
    "peft-0.3.0-t5-prompt": "let the decoder read the second half",
    "peft-0.4.0-t5-prefix": "have the decoder's part only",
}
ENCODERS = ("bert", "roberta")
LABELS = ("LABEL_0", "LABEL_1", "LABEL_2")
EXACT = [name for name in NAMES if name not in REFUSED]


def base_for(name: str) -> Base:
    """The tiny base that the adapter `name` was made on."""
    kind = next(part for part in name.split("-") if (FOLDER / "bases" / part).is_dir())
    return _headed(kind, name) if kind in ENCODERS else _language_model(kind)


@cache
def _headed(kind: str, name: str) -> Base:
    """The encoder `kind` with a head as the adapter `name` brings one."""
    tags = name.endswith("-tag")
    auto = AutoModelForTokenClassification if tags else AutoModelForSequenceClassification
    model, found = auto.from_pretrained(
        FOLDER / "bases" / kind, num_labels=len(LABELS), dtype=torch.float32,
        output_loading_info=True, attn_implementation="eager",
    )  # fmt: skip
    labels = ("bad", "fine", "good") if name == "adapterhub-bert-seq2" else LABELS
    fresh = {*found["missing_keys"]}
    return headed_base(model, word_tokenizer(), f"org/tiny-{kind}", labels, fresh=fresh)


@cache
def _language_model(kind: str) -> Base:
    cls = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = cls.from_pretrained(FOLDER / "bases" / kind, dtype=torch.float32)
    return frozen_base(model, word_tokenizer(), f"org/tiny-{kind}")


def largest_difference(name: str, adapter: Path, made: Path | None = None) -> float:
    """Between the logits of the library that wrote `name` and those with the imported `adapter`; of
    logits beyond 1, as a share of the largest.

    made: the folder that the library wrote, where it is none of `FOLDER`
    """
    return difference(name, read_adapter(adapter), made)


@torch.no_grad()
def difference(name: str, files: AdapterFiles, made: Path | None = None) -> float:
    """As `largest_difference`, of an adapter in memory."""
    base, expected = base_for(name), load_file((made or FOLDER / name) / "expected.safetensors")
    ids, wanted = expected["ids"], expected["logits"]
    written = ids[:, : wanted.shape[1]] if base.encoder_decoder else None
    tokens = Tokens(ids, torch.ones_like(ids), written=written)
    compiled = compile_files(files, base)
    batch = None if compiled is None else compiled.for_rows(ids, tokens.mask)
    if compiled is None or base.head is not None:  # the base itself is changed
        adapter = adapter_from_files(files, base)
        found = ModelRunner(adapter.model).forward(tokens, batch)
        adapter.close()
    elif base.encoder_decoder:
        found = ModelRunner(base.model).forward(tokens, batch)
    else:
        found = all_logits(base.model, ids, tokens.mask, batch)
    return _apart(found, wanted)


def _apart(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1))
