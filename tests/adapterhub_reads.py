"""Run where AdapterHub's `adapters` is: how far what ptkit exported is from what the library gave.

Called as `adapterhub_reads.py EXPORTED KEPT BASES`, folders that are named alike in the first two.
Prints the largest difference of logits of each, as JSON; of logits beyond 1 as a share.
"""

import json
import sys
from pathlib import Path

import adapters
import torch
from adapters import AutoAdapterModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

exported, kept, bases = map(Path, sys.argv[1:])
found = {}
for folder in sorted(exported.iterdir()):
    kind = folder.name.split("-")[1]
    expected = load_file(kept / folder.name / "expected.safetensors")
    headed = kind in ("bert", "roberta")
    auto = AutoAdapterModel if headed else AutoModelForCausalLM
    model = auto.from_pretrained(bases / kind, attn_implementation="eager")
    if not headed:
        adapters.init(model)
    model.load_adapter(str(folder), use_safetensors=True, set_active=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=expected["ids"]).logits
    largest = max(1.0, float(expected["logits"].abs().max()))
    found[folder.name] = float((logits - expected["logits"]).abs().max()) / largest
print(json.dumps(found))
