"""Adapters as AdapterHub's `adapters` saves them; see case.py."""

from __future__ import annotations

from typing import Any

import adapters
import torch
from adapters import AutoAdapterModel, LoRAConfig, PrefixTuningConfig, SeqBnConfig
from case import Cases, randomise
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

FLAT = PrefixTuningConfig(flat=True, prefix_length=5)
MLP = PrefixTuningConfig(prefix_length=5, bottleneck_size=16)
DECODERS = {
    "flat": FLAT,
    "flat1": PrefixTuningConfig(flat=True, prefix_length=1),
    "mlp": MLP,
    "mlp12": PrefixTuningConfig(prefix_length=12, bottleneck_size=7),
    "relu": PrefixTuningConfig(prefix_length=5, bottleneck_size=16, non_linearity="relu"),
    "leftout": PrefixTuningConfig(flat=True, prefix_length=5, leave_out=[0]),
    "gated": PrefixTuningConfig(flat=True, prefix_length=5, use_gating=True),
    "lora": LoRAConfig(r=2),
    "bottleneck": SeqBnConfig(reduction_factor=4),
}
#: Base and setting -> the prefix, and the head: its kind and its settings.
NAMED = {0: "bad", 1: "fine", 2: "good"}
HEADS: dict[tuple[str, str], tuple[Any, str, dict[str, Any]]] = {
    ("bert", "seq2"): (FLAT, "classification", {"id2label": NAMED}),
    ("bert", "seq2relu"): (FLAT, "classification", {"activation_function": "relu"}),
    ("bert", "cls1"): (FLAT, "classification", {"layers": 1}),
    ("bert", "seq1pool"): (MLP, "classification", {"layers": 1, "use_pooler": True}),
    ("bert", "tag"): (FLAT, "tagging", {}),
    ("bert", "qa"): (FLAT, "qa", {}),
    ("roberta", "seq2"): (FLAT, "classification", {}),
    ("roberta", "tag"): (MLP, "tagging", {}),
}
#: transformers' own classes of BERT, with their own heads.
OWN_CLASSES = {
    "mlp": (MLP, AutoModelForMaskedLM),
    "own-seq": (FLAT, AutoModelForSequenceClassification),
}


@torch.no_grad()
def keep(cases: Cases, kind: str, setting: str, model: Any) -> None:
    model.set_active_adapters("a")
    randomise(p for n, p in model.named_parameters() if _learnt(n))
    model.eval()
    folder = cases.folder(kind, setting)
    model.save_adapter(str(folder), "a")
    found = model(input_ids=cases.ids)
    cases.keep(folder, found.start_logits if setting == "qa" else found.logits)


def _learnt(name: str) -> bool:
    parts = ("prefix", "heads.", "lora_", "adapters.a", "classifier.", "cls.")
    return any(part in name for part in parts)


def main() -> None:
    cases = Cases("adapterhub")
    for kind in ("llama", "mistral", "gpt2"):
        for setting, config in DECODERS.items():
            model = cases.base(kind, AutoModelForCausalLM, attn_implementation="eager")
            adapters.init(model)
            model.add_adapter("a", config=config)
            keep(cases, kind, setting, model)
    for (kind, setting), (config, head, options) in HEADS.items():
        model = cases.base(kind, AutoAdapterModel, attn_implementation="eager")
        model.add_adapter("a", config=config)
        if head != "qa":
            options = {"num_labels": 3, **options}
        getattr(model, f"add_{head}_head")("a", **options)
        keep(cases, kind, setting, model)
    for setting, (config, auto) in OWN_CLASSES.items():
        options = {} if auto is AutoModelForMaskedLM else {"num_labels": 3}
        model = cases.base("bert", auto, attn_implementation="eager", **options)
        adapters.init(model)
        model.add_adapter("a", config=config)
        keep(cases, "bert", setting, model)


if __name__ == "__main__":
    main()
