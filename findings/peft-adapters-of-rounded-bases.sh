#!/usr/bin/env bash
# Saved adapters of three methods of PEFT (AdaMSS, FRoD, PSOFT) lose what they learnt when the same base is loaded in
# another precision: trained in float32, say, and served in bfloat16. Their files hold what was learnt, but not what it is
# about: groups of rows, or vectors of a decomposition. PEFT computes those from the base's weights at each load, and
# rounded weights give other groups and vectors. Nothing is said. For LoRA the difference is rounding.
#
# Versions: PEFT 0.21.2, transformers 5.23.0, torch 2.13.0, scikit-learn 1.9.1, Python 3.11; a random Llama of two layers
#       width 512, PEFT's defaults on q_proj and v_proj, trained in float32 for 30 steps on four rows.
# Seen: the loss on those rows is 4.70 without an adapter. In float32, trained and loaded: AdaMSS 2.33, FRoD 0.56, PSOFT
#       2.43, LoRA 0.84. Loaded in bfloat16: AdaMSS 4.65, FRoD 4.54, PSOFT 3.35, LoRA 0.84. FRoD in float32, loaded with
#       two threads where one had trained it: 4.66 (shown and not asked for: it is the linear algebra of one machine).
#       On a real model of 135 M parameters PSOFT goes from 0.99 to 1.45 in bfloat16 (base 3.96, 12 steps); LoRA stays.
# Fails when one of the three loses less than three tenths of what it learnt, or LoRA a hundredth, or when PEFT warns.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0
$pip install peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 scikit-learn==1.9.1
cat > "$work/probe.py" <<'PYTHON'
import sys

import torch
import transformers
from peft import AdamssConfig, FrodConfig, LoraConfig, PeftModel, PsoftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
torch.manual_seed(3)
rows = torch.randint(1, 90, (4, 16))
targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
methods = {
    "AdaMSS": (AdamssConfig(**targets), 0.1),
    "FRoD": (FrodConfig(**targets), 0.1),
    "PSOFT": (PsoftConfig(**targets), 0.1),
    "LoRA": (LoraConfig(**targets), 0.01),
}


def base(dtype=torch.float32):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=96,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def loss(model):
    return model(input_ids=rows, labels=rows).loss.item()


plain, lost = loss(base()), {}
print(f"without an adapter: {plain:.2f}")
for name, (config, rate) in methods.items():
    model = get_peft_model(base(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(30):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = f"{sys.argv[1]}/{name}"
    model.eval().save_pretrained(folder)
    same = loss(PeftModel.from_pretrained(base(), folder).eval())
    rounded = loss(PeftModel.from_pretrained(base(torch.bfloat16), folder).eval())
    torch.set_num_threads(2)
    model_of_two = PeftModel.from_pretrained(base(), folder).eval()
    torch.set_num_threads(1)
    print(
        f"{name}: trained {loss(model):.2f}, loaded {same:.2f}, in bfloat16 {rounded:.2f}, "
        f"with two threads {loss(model_of_two):.2f}"
    )
    assert abs(same - loss(model)) < 1e-4, name
    lost[name] = (rounded - same) / (plain - same)
print("share of what was learnt that bfloat16 loses:", {k: round(v, 3) for k, v in lost.items()})
assert abs(lost.pop("LoRA")) < 0.01, "LoRA loses something"
assert min(lost.values()) > 0.3, "one of them keeps most of what it learnt"
PYTHON
"$work/venv/bin/python" -W ignore "$work/probe.py" "$work" 2> "$work/said" || { cat "$work/said" && exit 1; }
if grep -iE "precision|dtype|decompos.*differ|cluster" "$work/said"; then
  echo "PEFT speaks of it now" && exit 1
fi
echo "as described"
