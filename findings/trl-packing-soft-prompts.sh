#!/usr/bin/env bash
# TRL's packing puts several rows into one, and the model tells them apart by their position ids. With LoRA a packed row
# costs what it costs alone. With a prefix or a learnt prompt of PEFT the rows of a pack read each other, in training
# and in validation. For prefix tuning nothing says so: PEFT moves the position ids behind the prefix, and
# transformers looks for packed rows only where no cache is there, which the prefix is. For prompt tuning PEFT drops the
# position ids, with a warning of them and none of the rows.
#
# Versions: TRL 1.16.0, PEFT 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11; a random Llama of three layers of
#       width 64, its default attention (SDPA), adapters with values drawn once; six rows of 9 to 25 tokens.
# Seen, validation loss by SFTTrainer, six rows alone and in one pack: prefix tuning 5.060 and 5.212, prompt tuning 4.954
#       and 5.049, LoRA 4.993 and 4.993.
# Fails when the losses of a soft prompt are equal, or LoRA's are not.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0
$pip install trl==1.16.0 peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0
cat > "$work/probe.py" <<'PYTHON'
import contextlib
import io
import sys

import datasets
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
words = Tokenizer(models.WordLevel({"<end>": 0} | {f"w{i}": i for i in range(1, 97)}, unk_token="<end>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
torch.manual_seed(3)
lengths = (20, 14, 17, 11, 25, 9)
rows = datasets.Dataset.from_list([{"input_ids": torch.randint(1, 97, (n,)).tolist()} for n in lengths])


def loss(config, packing):
    """The validation loss, and how many rows the model reads."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )
    settings = SFTConfig(
        sys.argv[1], packing=packing, max_length=128, report_to="none", use_cpu=True, bf16=False,
        per_device_eval_batch_size=8, disable_tqdm=True,
    )
    trainer = SFTTrainer(
        base, settings, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, peft_config=config
    )
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
            elif parameter.ndim == 2:
                parameter.mul_(6)  # random logits are nearly equal else
    with contextlib.redirect_stdout(io.StringIO()):
        found = trainer.evaluate()["eval_loss"]
    return found, len(trainer.eval_dataset)


size = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
for config in (
    PrefixTuningConfig(**size),
    PromptTuningConfig(**size),
    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
):
    name = type(config).__name__.removesuffix("Config")
    (alone, six), (packed, one) = loss(config, False), loss(config, True)
    assert (six, one) == (6, 1)
    print(f"{name}: rows alone {alone:.3f}, packed {packed:.3f}")
    if name == "Lora":
        assert abs(alone - packed) < 1e-4, "LoRA's losses differ"
    else:
        assert abs(alone - packed) > 0.02, "a soft prompt's losses are equal"
PYTHON
"$work/venv/bin/python" -W ignore "$work/probe.py" "$work/out"
echo "as described"
