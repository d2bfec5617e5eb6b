#!/usr/bin/env bash
# litgpt's adapter (v1, LLaMA-Adapter) computes its prompt's keys and values once and keeps them: a forward pass without
# gradients, as the validation that `litgpt finetune_adapter` makes before training, leaves the prompt without a
# gradient for all that follows. Only the gate learns. The keys and values are also cut from the wrong rows of the joined
# projection: the model keeps all queries, then all keys, then all values, and the adapter reads them head by head.
#
# Versions: litgpt 0.5.13, torch 2.13.0; a random model of one layer with four heads of 8.
# Seen: after such a pass `adapter_wte.weight.grad` is None, and another prompt changes no logit. The adapter's keys are
#       up to 3.6 from what the key projection gives for the prompt; they are rows 24 h + 8 to 24 h + 16 of the joined one.
# Fails when the prompt gets a gradient, or its keys are those of the key projection.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0
$pip install litgpt==0.5.13
"$work/venv/bin/python" - <<'PYTHON'
import torch
from litgpt.adapter import GPT, Config

torch.manual_seed(0)
model = GPT(
    Config(
        name="tiny", n_layer=1, n_head=4, n_embd=32, vocab_size=100, padded_vocab_size=100,
        block_size=64, adapter_prompt_length=5, adapter_start_layer=0, rotary_percentage=1.0,
        bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=48,
    )
)
attention = model.transformer.h[0].attn
attention.gating_factor.data.fill_(1.0)
ids = torch.randint(0, 100, (1, 7))

# A validation pass before training, as `litgpt finetune_adapter` makes one.
with torch.no_grad():
    before = model(ids)
model(ids).square().mean().backward()
prompt = attention.adapter_wte.weight
print("gradient of the prompt:", prompt.grad)
prompt.data.add_(1.0)
with torch.no_grad():
    after = model(ids)
print("largest change of the logits for another prompt:", (after - before).abs().max().item())
assert prompt.grad is None
assert torch.equal(after, before)

# Rows of the joined projection: all queries, then all keys, then all values.
attention.adapter_kv_cache = None
with torch.no_grad():
    model(ids)
    keys, values = attention.adapter_kv_cache
    q, k, v = attention.qkv(prompt).split((32, 32, 32), dim=-1)
own = k.view(5, 4, 8).transpose(0, 1)[None]
print("largest difference of the prompt's keys from its key projection:",
      (keys - own).abs().max().item())
assert not torch.allclose(keys, own, atol=1e-3)
for head in range(4):
    wrong = attention.qkv(prompt)[:, 24 * head + 8 : 24 * head + 16]
    assert torch.allclose(keys[0, head], wrong, atol=1e-6)
PYTHON
echo "as described"
