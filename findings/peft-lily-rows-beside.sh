#!/usr/bin/env bash
# PEFT's Lily weighs its experts by the mean over all tokens of all rows of a batch. So the logits of a row depend on
# the rows beside it, on padding that its mask excludes, and on its own later tokens. A causal model with a Lily adapter
# is not causal: in training it sees what it is to predict, and with a cache it writes other tokens than without.
#
# Versions: PEFT 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11; a random Llama of three layers width 64, Lily
#       with PEFT's defaults on q_proj and v_proj, values drawn once (0.2); the same with LoRA.
# Seen: Lily moves the base's logits by up to 0.73. Those of one row move by up to 0.22 when another row is beside it, by
#       0.048 with four tokens of masked padding on the right, and by 0.042 at earlier positions when the last token is
#       another one. Ten greedy tokens with and without a cache: the logits are apart by 0.11. LoRA: at most 2e-7.
# Fails when Lily's logits stay where they are in any of these, or LoRA's move.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0
$pip install peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$work/probe.py" <<'PYTHON'
import torch
import transformers
from peft import LilyConfig, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
row, other = torch.arange(1, 10)[None], torch.arange(30, 39)[None]


def apart(one, another):
    return (one - another).abs().max().item()


@torch.no_grad()
def moved(config):
    """By how much the logits of `row` move when what is around it changes."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=96,
        )
    ).eval()
    plain = base(row).logits
    model = get_peft_model(base, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    alone = model(row).logits
    padded = torch.cat([row, torch.zeros(1, 4, dtype=torch.long)], dim=1)
    mask = torch.tensor([[1] * 9 + [0] * 4])
    changed = row.clone()
    changed[0, -1] = 50
    written = [
        torch.stack(
            model.generate(
                input_ids=row, attention_mask=torch.ones_like(row), use_cache=cached, max_new_tokens=10,
                do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0,
            ).logits
        )
        for cached in (True, False)
    ]
    steps = min(map(len, written))
    print(f"{type(config).__name__}: moves the base's logits by {apart(alone, plain):.2f}")
    return {
        "another row beside it": apart(model(torch.cat([row, other])).logits[:1], alone),
        "masked padding behind it": apart(model(padded, attention_mask=mask).logits[:, :9], alone),
        "another last token": apart(model(changed).logits[:, :8], alone[:, :8]),
        "no cache": apart(written[0][:steps], written[1][:steps]),
    }


targets = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
lily, lora = moved(LilyConfig(**targets)), moved(LoraConfig(**targets))
for what in lily:
    print(f"  {what}: Lily {lily[what]:.1e}, LoRA {lora[what]:.1e}")
assert min(lily.values()) > 1e-2, "Lily's logits stay where they are"
assert max(lora.values()) < 1e-5, "LoRA's logits move"
PYTHON
"$work/venv/bin/python" -W ignore "$work/probe.py"
echo "as described"
