"""Prefixes as PaddleNLP saves them; see case.py. They are of Llama, whose weights are copied."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from case import Cases, StandIns
from safetensors.numpy import load_file

# For tokenizers, data sets, services and reports.
sys.meta_path.insert(0, StandIns(
    "aistudio_sdk", "jieba", "colorlog", "colorama", "seqeval", "datasets", "dill", "multiprocess",
    "visualdl", "paddle2onnx", "fastapi", "uvicorn", "onnx", "sentencepiece", "tiktoken",
    "tool_helpers", "paddlefsl", "modelscope", "zstandard", "ml_dtypes", "huggingface_hub",
))  # fmt: skip
import paddle  # noqa: E402
from paddlenlp.peft import PrefixConfig, PrefixModelForCausalLM  # noqa: E402
from paddlenlp.peft.prefix import llama_postprocess_past_key_value  # noqa: E402
from paddlenlp.transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

SHAPE = {"num_attention_heads": 4, "num_hidden_layers": 2, "hidden_size": 32}
PREFIXES: dict[str, dict[str, Any]] = {
    "prefix": {"num_prefix_tokens": 5},
    "prefix1": {"num_prefix_tokens": 1},
    "prefixmlp": {
        "num_prefix_tokens": 3, "prefix_projection": True, "prefix_projection_hidden_size": 16,
    },
}  # fmt: skip


def llama(cases: Cases) -> Any:
    """PaddleNLP's Llama with the weights of the kept one."""
    config = LlamaConfig(
        vocab_size=100, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64,
        rms_norm_eps=1e-6, use_flash_attention=False, tie_word_embeddings=False, **SHAPE,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    held = load_file(cases.bases / "llama" / "model.safetensors")
    values = {}
    for name, own in model.state_dict().items():
        value = held[name.replace("llama.", "model.", 1) if name[:6] == "llama." else name]
        if "proj" in name or name == "lm_head.weight":  # [in, out] there
            value = value.T
        assert list(value.shape) == list(own.shape), name
        values[name] = paddle.to_tensor(np.ascontiguousarray(value))
    model.set_state_dict(values)
    model.eval()
    return model


def main() -> None:
    cases = Cases("paddlenlp")
    paddle.set_device("cpu")
    paddle.seed(int(cases.ids.sum()))
    ids = paddle.to_tensor(cases.ids.numpy())
    call = {"input_ids": ids, "attention_mask": paddle.ones(ids.shape, dtype="int64")}
    for setting, settings in PREFIXES.items():
        config = PrefixConfig(multi_query_group_num=2, dtype="float32", **SHAPE, **settings)
        model = PrefixModelForCausalLM(
            llama(cases), config, postprocess_past_key_value=llama_postprocess_past_key_value
        )
        for parameter in model.prefix_encoder.parameters():
            parameter.set_value(paddle.randn(parameter.shape) * 0.5)
        model.eval()
        folder = cases.folder("llama", setting)
        model.save_pretrained(str(folder))
        with paddle.no_grad():
            found = model(**call)
        found = found[0] if isinstance(found, tuple) else found
        cases.keep(folder, torch.from_numpy(found.numpy()))


if __name__ == "__main__":
    main()
