"""What is measured on: a base of GPT-2-small's shape with random weights, and adapters for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from ptkit.bank import AdapterBank
from ptkit.errors import PtkitError
from ptkit.formats.adapter_files import AdapterFiles, write_adapter
from ptkit.formats.adapter_info import AdapterInfo, BaseInfo
from ptkit.methods import Demonstrations
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.methods.prefix_tuning.settings import PrefixTuningSection
from ptkit.runtime.base_model import Base, frozen_base, load_base
from ptkit.runtime.devices import resolve_device
from ptkit.runtime.model_names import TINY_EN

#: Name of the random base; its shape is the one PEFT's and S-LoRA's papers and issues talk about.
GPT2_SMALL = "gpt2-small"
#: Name of a random base most of whose parameters are its vocabulary, as small models' today are.
LARGE_VOCABULARY = "large-vocabulary"


def bench_base(model: str) -> Base:
    """The base `gpt2-small` or `large-vocabulary` (random weights, nothing to download),
    `tiny-en`, or any other id."""
    if model not in _RANDOM:
        return load_base(model, device="auto")
    torch.manual_seed(0)
    random_weights = _RANDOM[model]()
    random_weights.to(resolve_device("auto"))
    # Its ids are a part of the model's vocabulary; no text is read.
    tokenizer = load_base(TINY_EN, device="cpu").tokenizer
    base = frozen_base(random_weights, tokenizer, model)
    base.model.generation_config.eos_token_id = None  # every answer has the length asked for
    return base


def _gpt2_small() -> Any:
    # Its 1,024 positions are doubled, so that inputs can be lengthened to 1,024.
    return GPT2LMHeadModel(GPT2Config(n_positions=2048, eos_token_id=None, bos_token_id=None))


def _large_vocabulary() -> Any:
    config = Qwen3Config(
        vocab_size=151_936, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=2048, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


_RANDOM = {GPT2_SMALL: _gpt2_small, LARGE_VOCABULARY: _large_vocabulary}


def without_dropout(base: Base) -> Base:
    """Two sides cannot draw the same dropout; without it they can be compared step by step."""
    for module in base.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


def in_memory(base: Base) -> Base:
    """Copy the weights into memory of the process. Those that are a view of a file are read when
    they are first used, and would be counted as what training takes."""
    for parameter in base.model.parameters():
        parameter.data = parameter.data.clone()
    return base


def random_prompts(base: Base, rows: int, tokens: int, seed: int = 0) -> list[list[int]]:
    """`rows` prompts of `tokens` random ids."""
    generator = torch.Generator().manual_seed(seed)
    highest = min(base.embedding.num_embeddings, len(base.tokenizer))
    return torch.randint(1, highest, (rows, tokens), generator=generator).tolist()


def random_prefixes(
    base: Base, folder: Path, count: int, virtual_tokens: int, dtype: torch.dtype = torch.float32
) -> list[Path]:
    """`count` different prefix adapters of `base` below `folder`, as PEFT and ptkit save them."""
    section = PrefixTuningSection(
        kind="prefix_tuning", num_virtual_tokens=virtual_tokens, start="random"
    )
    files = PrefixTuning.create(section, base, Demonstrations((), 0)).files()
    shape = files.tensors["prompt_embeddings"].shape
    info = AdapterInfo(base=BaseInfo(id=base.id, fingerprint=base.fingerprint))
    generator = torch.Generator().manual_seed(1)
    paths = []
    for number in range(count):
        flat = torch.randn(shape, generator=generator).to(dtype)
        path = folder / f"adapter-{number:05d}"
        write_adapter(path, AdapterFiles(files.config, {"prompt_embeddings": flat}, info))
        paths.append(path)
    return paths


def load_beside_peft(bank: AdapterBank, paths: list[Path]) -> PeftModel:
    """Load the adapters in `paths` into `bank` and into a PeftModel of its base, as 0, 1, 2, ..."""
    peft: PeftModel = PeftModel.from_pretrained(bank.base.model, paths[0], adapter_name="0")
    for number, path in enumerate(paths):
        bank.load(path, str(number))
        if number:
            peft.load_adapter(path, adapter_name=str(number))
    return peft.eval()


class ParityError(PtkitError):
    """Candidates gave different results: a faster wrong answer is not reported."""
