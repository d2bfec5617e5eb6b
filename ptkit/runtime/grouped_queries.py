"""Attention whose heads share keys and values, with a mask, on a CPU: no key is written twice.

transformers repeats keys and values for every head of a group wherever there is a mask, for other
devices' sake. A CPU's kernel reads grouped ones (Ainslie et al. 2023, "GQA", section 2; torch 2.9
on) and gives the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptkit.runtime.parted_attention import is_plain


def reads_grouped(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether several tokens attend in groups of heads, plainly, where the kernel can."""
    return (
        query.device.type == "cpu"
        and query.shape[1] > key.shape[1]
        and query.shape[2] > 1
        and key.shape[-1] == value.shape[-1]
        and is_plain(options)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """The attention of `query` `[rows, heads, queries, dim]`: `[rows, queries, heads, dim]`.

    key, value: `[rows, kv_heads, keys, dim]`; mask: `[rows|1, 1, queries, keys]`
    """
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous()
