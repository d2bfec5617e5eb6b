"""Adapters as old versions of PEFT save them; see case.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from case import WRITTEN, Cases, randomise
from peft import (
    LoraConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

SOFT: dict[str, Callable[..., Any]] = {
    "prefix": lambda **k: PrefixTuningConfig(num_virtual_tokens=5, **k),
    "prefixmlp": lambda **k: PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16, **k
    ),
    "prompt": lambda **k: PromptTuningConfig(num_virtual_tokens=5, **k),
    "prompt1": lambda **k: PromptTuningConfig(num_virtual_tokens=1, **k),
    "ptuning": lambda **k: PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16, **k),
    "lstm": lambda **k: PromptEncoderConfig(
        num_virtual_tokens=5, encoder_hidden_size=16, encoder_reparameterization_type="LSTM", **k
    ),
}
LOW_RANK: dict[str, Any] = {"r": 2, "lora_alpha": 3, "lora_dropout": 0.0}
LORA: dict[str, dict[str, Any]] = {
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "llama4": {"target_modules": ["q_proj", "v_proj"]},
    "t5": {"target_modules": ["q", "v"]},
}


@torch.no_grad()
def keep(cases: Cases, kind: str, setting: str, config: Any) -> None:
    auto = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    model = get_peft_model(cases.base(kind, auto), config).eval()
    randomise(p for p in model.parameters() if p.requires_grad)
    folder = cases.folder(kind, setting)
    model.save_pretrained(folder)
    call = {"input_ids": cases.ids, "attention_mask": torch.ones_like(cases.ids)}
    written = cases.ids[:, :WRITTEN]
    if kind == "t5" and config.peft_type in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
        # Versions before 0.4 take embeddings alone here.
        call["decoder_inputs_embeds"] = model.get_input_embeddings()(written)
    elif kind == "t5":
        call["decoder_input_ids"] = written
    if setting == "adaption":
        call["use_cache"] = False
    logits = model(**call).logits
    cases.keep(folder, logits[:, -WRITTEN:] if kind == "t5" else logits)


def main() -> None:
    cases = Cases(f"peft-{peft.__version__}")
    for kind, modules in LORA.items():
        task = "SEQ_2_SEQ_LM" if kind == "t5" else "CAUSAL_LM"
        for setting, config in SOFT.items():
            keep(cases, kind, setting, config(task_type=task))
        keep(cases, kind, "lora", LoraConfig(task_type=task, **LOW_RANK, **modules))
    if hasattr(peft, "AdaptionPromptConfig"):
        config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=5, adapter_layers=2)
        keep(cases, "llama4", "adaption", config)
    if hasattr(peft, "IA3Config"):
        keep(cases, "llama4", "ia3", peft.IA3Config(task_type="CAUSAL_LM"))


if __name__ == "__main__":
    main()
