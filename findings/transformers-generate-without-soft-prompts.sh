#!/usr/bin/env bash
# transformers can write in several ways, and two of them lose a soft prompt of PEFT without a word. Its continuous
# batching (`generate_batch`, which TRL can write rollouts with) answers a PeftModel's questions as the base alone, for
# prefix tuning, prompt tuning and P-tuning. A prefill in chunks (`prefill_chunk_size`) makes a model with a learnt
# prompt write something else. With LoRA both write what `generate` does. Why: a soft prompt is added in PeftModel's
# `generate` and `forward`. `generate_batch` is found on the base behind it, and chunks are told apart by their cache.
#
# Versions: PEFT 0.21.2, transformers 5.23.0, torch 2.13.0, Python 3.11; a random Llama of three layers of width 64,
#       adapters with values drawn once; 20 rows of 14 tokens, 16 greedy tokens each.
# Seen, of 20 rows: `generate` writes other tokens than the base in 20 with each adapter. `generate_batch`: all 20 as the
#       base for the three soft prompts, 20 as `generate` for LoRA. Chunks of 4 tokens: 0 to 1 as `generate` for prompt
#       tuning and P-tuning, 20 for LoRA, an error for prefix tuning.
# Fails when `generate_batch` differs from the base for a soft prompt, when chunks no longer change a prompt's rows, or
# when LoRA's rows differ.
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
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(1)
rows = torch.randint(1, 97, (20, 14))
greedy = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}


def adapted(config):
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=96,
        )
    )
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and not parameter.requires_grad:
                parameter.mul_(6)  # random logits are nearly equal else
            elif parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    return model


def written(model, **options):
    ones = torch.ones_like(rows)
    return model.generate(input_ids=rows, attention_mask=ones, **greedy, **options)[:, 14:].tolist()


def batched(model):
    config = GenerationConfig(**greedy)
    # By itself it takes most of the free memory.
    small = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=512, max_memory_percent=0.02)
    answers = model.generate_batch(
        [row.tolist() for row in rows], generation_config=config, continuous_batching_config=small
    )
    ordered = {tuple(answer.prompt_ids): list(answer.generated_tokens) for answer in answers.values()}
    return [ordered[tuple(row.tolist())] for row in rows]


def equal(one, another):
    return sum(a == b for a, b in zip(one, another, strict=True))


size = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}
for config in (
    PrefixTuningConfig(**size),
    PromptTuningConfig(**size),
    PromptEncoderConfig(**size, encoder_hidden_size=64),
    LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]),
):
    name = type(config).__name__.removesuffix("Config")
    model = adapted(config)
    own = written(model)
    with model.disable_adapter():
        base = written(model)
    many = batched(model)
    try:
        chunks = equal(written(model, prefill_chunk_size=4), own)
    except RuntimeError as error:
        chunks = type(error).__name__
    print(
        f"{name}: generate as the base {equal(own, base)}; generate_batch as generate {equal(many, own)}, "
        f"as the base {equal(many, base)}; in chunks as generate {chunks}"
    )
    assert equal(own, base) == 0
    if name == "Lora":
        assert equal(many, own) == chunks == 20, "LoRA's rows differ"
    else:
        assert equal(many, base) == 20, "continuous batching reads the soft prompt"
    if name.startswith("Prompt"):
        assert chunks < 5, "chunks write what generate does"
PYTHON
"$work/venv/bin/python" -W ignore "$work/probe.py"
echo "as described"
