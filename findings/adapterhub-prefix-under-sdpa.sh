#!/usr/bin/env bash
# AdapterHub's `adapters` computes a decoder's prefix tuning in another way under transformers' default attention
# (`sdpa`) than under `eager`, with no warning. Without padding, sdpa aligns its causal mask at the first key, which is
# the prefix's, so a word sees later words' places taken by virtual tokens and misses words before it. With padding at
# the left, the prefix is masked: the answer is the base's own.
#
# Versions: adapters 1.3.0 (transformers 4.57.6), torch 2.13.0; a random Llama of one layer width 32.
# Seen: logits of the last word, two rows: sdpa and eager apart by 1.5 without padding. With padding at the left sdpa
#       is 6e-7 from the base without any adapter, eager 1.7.
# Fails when both attentions agree.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0
$pip install adapters==1.3.0 transformers==4.57.6
"$work/venv/bin/python" - <<'PYTHON'
import adapters
import torch
from adapters import PrefixTuningConfig
from transformers import AutoModelForCausalLM, LlamaConfig


def last_logits(attention, ids, mask):
    """With the prefix and without, of each row's last word."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    adapters.init(model)
    model.add_adapter("a", config=PrefixTuningConfig(flat=True, prefix_length=5, dropout=0.0))
    model.set_active_adapters("a")
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.eval()
    with torch.no_grad():
        on = model(input_ids=ids, attention_mask=mask).logits[:, -1]
        model.set_active_adapters(None)
        off = model(input_ids=ids, attention_mask=mask).logits[:, -1]
    return on, off


def apart(one, other):
    return (one - other).abs().max().item()


ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(2))
eager, base = last_logits("eager", ids, None)
sdpa, sdpa_base = last_logits("sdpa", ids, None)
print("no padding: sdpa from eager", apart(sdpa, eager), "without the prefix", apart(sdpa_base, base))
assert apart(sdpa_base, base) < 1e-4
assert apart(sdpa, eager) > 0.1, "both attentions agree now"

mask = torch.ones_like(ids)
mask[:, :3] = 0
eager, base = last_logits("eager", ids, mask)
sdpa, sdpa_base = last_logits("sdpa", ids, mask)
print("padding at the left: from the base, sdpa", apart(sdpa, sdpa_base), "eager", apart(eager, base))
assert apart(sdpa, sdpa_base) < 1e-4, "the prefix is read now"
assert apart(eager, base) > 0.1
PYTHON
echo "as described"
