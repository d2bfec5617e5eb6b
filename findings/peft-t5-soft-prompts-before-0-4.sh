#!/usr/bin/env bash
# PEFT before 0.4 put a T5's soft prompt (PromptTuningConfig, SEQ_2_SEQ_LM) in two places. Of its `[2 n, hidden]` values
# the first half went before the encoder's input and the second half before the decoder's. Later versions load the
# same folder without a word and read the first half only, in the encoder. So logits and loss differ. New prompts
# still have `2 n` rows, so the size does not tell the two apart. Their second half gets no gradient.
#
# Versions: PEFT 0.3.0 and 0.4.0 (transformers 4.34.1), PEFT 0.21.2 (transformers 5.23.0), torch 2.13.0, Python 3.11;
#       a random T5 of two layers width 32, and 5 virtual tokens.
# Seen: for 4 tokens of the decoder 0.3.0 gives logits for 9 positions, 0.4.0 and 0.21.2 for 4. At those 4 they are
#       apart by up to 1.29. The whole adapter moves the base's logits by up to 0.77 in 0.4.0 and 0.21.2. With the
#       tokens as labels, the loss is 4.7073 in 0.3.0 and 4.6185 in the others. The base alone agrees to 2e-6 in all
#       three. With both halves put there by hand, the later versions' base gives 0.3.0's logits to 2e-6.
# Fails when a later PEFT gives 0.3.0's positions or logits, reads the second half, or says something of it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0
$pip install peft==0.21.2 transformers==5.23.0 accelerate==1.15.0
$pip install --no-deps --target "$work/old" transformers==4.34.1 huggingface_hub==0.19.4 \
  tokenizers==0.14.1 accelerate==0.25.0 requests==2.34.2 urllib3==2.8.0 charset_normalizer==3.5.3 certifi==2026.10.18
for version in 0.3.0 0.4.0; do
  $pip install --no-deps --target "$work/peft-$version" peft==$version
done
cat >"$work/probe.py" <<'PYTHON'
import sys
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel, PromptTuningConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration

transformers.logging.disable_progress_bar()
role, folder = sys.argv[1], Path(sys.argv[2])
prompt = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
torch.manual_seed(0)
ids, written = torch.randint(5, 100, (2, 9)), torch.randint(5, 100, (2, 4))
call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def outputs(model):
    """Logits for the decoder's tokens, as embeddings, and the loss for them as labels."""
    embedded = model.get_input_embeddings()(written)
    logits = model(**call, decoder_inputs_embeds=embedded).logits
    return logits, model(**call, labels=written).loss.item()


def by_hand(base, in_encoder, in_decoder):
    """The base's logits with these values before the encoder's and the decoder's input."""

    def joined(values, tokens):
        embedded = base.get_input_embeddings()(tokens)
        return torch.cat([values.expand(len(tokens), -1, -1), embedded], dim=1)

    return base(
        inputs_embeds=joined(in_encoder, ids), decoder_inputs_embeds=joined(in_decoder, written)
    ).logits


def apart(one, other):
    return (one - other).abs().max().item()


def show(values, logits, loss):
    print(f"PEFT {peft.__version__}, transformers {transformers.__version__}:", end=" ")
    print(f"values {[*values.shape]}, logits {[*logits.shape]}, loss {loss:.4f}")


@torch.no_grad()
def write():
    config = T5Config(
        vocab_size=100, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        pad_token_id=0, decoder_start_token_id=0,
    )
    base = T5ForConditionalGeneration(config).eval()
    for parameter in base.parameters():
        parameter.normal_(0, 0.5)
    base.save_pretrained(folder / "base", safe_serialization=True)
    plain, _ = outputs(base)
    model = get_peft_model(base, prompt).eval()
    values = model.prompt_encoder["default"].embedding.weight.normal_(0, 0.5)
    model.save_pretrained(folder / "adapter")
    logits, loss = outputs(model)
    show(values, logits, loss)
    assert values.shape == (10, 32) and logits.shape == (2, 9, 100)
    torch.save({"plain": plain, "logits": logits, "loss": loss}, folder / "seen.pt")


@torch.no_grad()
def read():
    seen = torch.load(folder / "seen.pt")
    base = T5ForConditionalGeneration.from_pretrained(folder / "base").eval()
    plain, _ = outputs(base)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    values = model.prompt_encoder["default"].embedding.weight
    logits, loss = outputs(model)
    show(values, logits, loss)
    assert logits.shape == (2, 4, 100), "the decoder has the prompt's positions now"
    both = by_hand(base, values[:5], values[5:])
    first = by_hand(base, values[:5], values[:0])
    print("  apart from 0.3.0: the adapter's logits", apart(logits, seen["logits"][:, -4:]))
    print("    the base's", apart(plain, seen["plain"]), "both halves by hand", apart(both, seen["logits"]))
    print("  from the first half in the encoder by hand:", apart(logits, first))
    print("  from the base without the adapter:", apart(logits, plain))
    assert apart(plain, seen["plain"]) < 1e-4
    assert values.shape == (10, 32) and apart(both, seen["logits"]) < 1e-4
    assert apart(logits, first) < 1e-4, "not the first half in the encoder alone"
    assert apart(logits, seen["logits"][:, -4:]) > 0.1, "the versions agree now"
    assert abs(loss - seen["loss"]) > 0.01, "the losses agree now"


def train():
    """A new prompt: its size, and which rows learn."""
    model = get_peft_model(T5ForConditionalGeneration.from_pretrained(folder / "base"), prompt)
    values = model.prompt_encoder["default"].embedding.weight
    model(**call, labels=written).loss.backward()
    learns = values.grad.abs().amax(dim=1) > 0
    print("  a new prompt:", [*values.shape], "rows with a gradient:", learns.nonzero()[:, 0].tolist())
    assert learns.tolist() == [True] * 5 + [False] * 5, "the second half learns now"


if role == "write":
    write()
else:
    read()
    train()
PYTHON
PYTHONPATH="$work/peft-0.3.0:$work/old" "$work/venv/bin/python" -W ignore "$work/probe.py" write "$work"
for path in "$work/peft-0.4.0:$work/old" ""; do
  PYTHONPATH=$path "$work/venv/bin/python" "$work/probe.py" read "$work" 2>"$work/said" ||
    { cat "$work/said" && exit 1; }
  if grep -iE "prompt|virtual|decoder|submodule" "$work/said"; then
    echo "PEFT speaks of it now" && exit 1
  fi
done
echo "as described"
