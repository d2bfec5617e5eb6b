#!/usr/bin/env bash
# PEFT's P-tuning saves what its encoder makes of the virtual tokens, not the encoder. It lets the encoder run as the model
# stands. While a model trains, an LSTM's dropout is on, so that a checkpoint of a Trainer holds one draw of it: two saves
# of the same model differ, and the model that is loaded is not the one that was validated. Saved after `eval()`, it is.
#
# Versions: PEFT 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11; a random Llama of three layers of width 64;
#       PromptEncoderConfig with an LSTM of two layers and a dropout of 0.3, trained for 100 steps on three rows.
# Seen: the adapter moves the base's logits by up to 1.46. Two saves in training differ by up to 0.18 in a value of the
#       virtual tokens, which are up to 1.96. Loaded again, the logits of the Trainer's checkpoint are off by up to 0.19,
#       those of one saved in training by 0.04, and those of the one saved after `eval()` by 0.0.
# Fails when saves in training agree, or when the one after `eval()` does not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0
$pip install peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
cat > "$work/probe.py" <<'PYTHON'
import sys

import torch
import transformers
from peft import PeftModel, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

transformers.logging.set_verbosity_error()
out = sys.argv[1]
torch.manual_seed(1)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(1, 97, (3, 12))]
ids = rows[0]["input_ids"][None]


def base():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=96,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model.eval()(ids).logits[:, -ids.shape[1] :]


def saved(folder):
    return load_file(f"{folder}/adapter_model.safetensors")["prompt_embeddings"]


def apart(one, another):
    return (one - another).abs().max().item()


config = PromptEncoderConfig(
    task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_reparameterization_type="LSTM",
    encoder_num_layers=2, encoder_dropout=0.3, encoder_hidden_size=64,
)
model = get_peft_model(base(), config)
settings = TrainingArguments(
    out, max_steps=100, learning_rate=1e-3, per_device_train_batch_size=3, report_to="none", use_cpu=True,
    save_steps=100, disable_tqdm=True, logging_strategy="no",
)
Trainer(model, settings, train_dataset=rows).train()
for name in ("a", "b"):
    model.train()
    model.save_pretrained(f"{out}/{name}")
trained = logits(model)
model.save_pretrained(f"{out}/eval")
with model.disable_adapter():
    print(f"the adapter moves the base's logits by {apart(logits(model), trained):.2f}")
between = apart(saved(f"{out}/a"), saved(f"{out}/b"))
print(f"two saves in training differ by {between:.2f} of {saved(f'{out}/a').abs().max().item():.2f}")
off = {
    name: apart(logits(PeftModel.from_pretrained(base(), f"{out}/{name}")), trained)
    for name in ("a", "eval", "checkpoint-100")
}
print("logits after loading are off by", {name: round(value, 5) for name, value in off.items()})
assert between > 0.01, "saves in training agree"
assert off["a"] > 0.01 and off["checkpoint-100"] > 0.01, "what was saved in training is what was trained"
assert off["eval"] < 1e-5, "what was saved after eval() is not what was trained"
PYTHON
"$work/venv/bin/python" -W ignore "$work/probe.py" "$work/out"
echo "as described"
