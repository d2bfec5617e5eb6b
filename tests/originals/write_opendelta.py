"""Deltas as OpenDelta saves them; see case.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from case import WRITTEN, Cases, StandIns, randomise
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

# For uploading, and for choosing modules in a browser.
sys.meta_path.insert(0, StandIns("DeltaCenter", "web"))
from opendelta import LoraModel, PrefixModel, SoftPromptModel  # noqa: E402

DELTAS: dict[str, Callable[[Any], Any]] = {
    "prefix": lambda m: PrefixModel(m, prefix_token_num=5, reparameterize=False),
    "prefix1": lambda m: PrefixModel(m, prefix_token_num=1, reparameterize=False),
    "prefixmlp": lambda m: PrefixModel(m, prefix_token_num=5, embed_dim=16, mid_dim=12),
    "soft": lambda m: SoftPromptModel(m, soft_token_num=5),
    "soft11": lambda m: SoftPromptModel(m, soft_token_num=11, token_init=False),
    "lora": lambda m: LoraModel(m, lora_r=2),
}


@torch.no_grad()
def keep(cases: Cases, kind: str, setting: str) -> None:
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = cases.base(kind, auto)
    delta = DELTAS[setting](model)
    call = {"input_ids": cases.ids, "attention_mask": torch.ones_like(cases.ids)}
    if kind == "t5":
        call["decoder_input_ids"] = cases.ids[:, :WRITTEN]
    model(**call)  # parameters are made by the first pass
    delta.freeze_module(exclude=["deltas"], set_state_dict=True)
    randomise(p for p in model.parameters() if p.requires_grad)
    model.eval()
    call = {name: value.clone() for name, value in call.items()}  # masks are widened in place
    folder = cases.folder(kind, setting)
    delta.save_finetuned(str(folder))
    cases.keep(folder, model(**call).logits)


def main() -> None:
    cases = Cases("opendelta")
    for kind in ("gpt2", "t5"):
        for setting in DELTAS:
            keep(cases, kind, setting)


if __name__ == "__main__":
    main()
