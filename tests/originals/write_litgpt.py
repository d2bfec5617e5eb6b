"""An adapter (v1) as litgpt saves it; see case.py."""

from __future__ import annotations

import sys

import torch
from case import Cases, StandIns

# For training and serving.
sys.meta_path.insert(0, StandIns("lightning", "torchmetrics"))
from litgpt.adapter import GPT, Config, adapter_filter  # noqa: E402


def main() -> None:
    cases = Cases("litgpt")
    config = Config(
        name="tiny", n_layer=4, n_head=4, n_embd=32, vocab_size=100, padded_vocab_size=100,
        block_size=64, adapter_prompt_length=5, adapter_start_layer=2, rotary_percentage=1.0,
        bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", intermediate_size=48,
    )  # fmt: skip
    model = GPT(config)
    state = {n: t for n, t in model.state_dict().items() if adapter_filter(n, t)}
    # As its `save_adapter_checkpoint` names and nests it.
    torch.save({"model": state}, cases.folder("llama", "v1") / "lit_model.pth.adapter")


if __name__ == "__main__":
    main()
