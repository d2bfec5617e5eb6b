"""Attention of one group of a pass over blocks, beside the model's own attention function.

A beginning that several sequences share is read once for all of them. The queries of all sequences
attend to the shared positions as if they were of one sequence. They attend to the sequence's own
positions apart. Then the two outputs are merged (`parted_attention`). Juravsky et al. 2024,
"Hydragen: High-throughput LLM inference with shared prefixes", describe it in section 3.1.
FlashInfer (Ye et al. 2025) calls it cascade attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ptkit.runtime.block_pool import BlockPool
from ptkit.runtime.paged_groups import TokenGroup
from ptkit.runtime.parted_attention import flash, merged


def decoded(group: TokenGroup, query: Tensor, pool: BlockPool, layer: int, scaling: Any) -> Tensor:
    """The attention of one token in each sequence of `group`, `query` `[rows, heads, 1, dim]`, to
    the positions of its own: `[rows, 1, heads, dim]`.

    Heads that read the same keys are queries of them, so that no keys are repeated.
    """
    keys, values = group.own.read(pool, layer)
    rows, heads, _, dim = query.shape
    kv_heads = keys.shape[1]
    packed = query.reshape(rows, kv_heads, heads // kv_heads, dim)
    output = scaled_dot_product_attention(
        packed, keys, values, attn_mask=group.mask_on(query.device), scale=scaling
    )
    return output.reshape(rows, 1, heads, -1)


def can_share(pool: BlockPool, device: torch.device) -> bool:
    """Whether attention to a shared beginning can be computed apart: on a CPU, with heads whose
    keys and values are of one width."""
    return device.type == "cpu" and all(s.key_dim == s.value_dim for s in pool.layout)


def attended_in_parts(
    group: TokenGroup, query: Tensor, pool: BlockPool, layer: int, scaling: Any
) -> Tensor:
    """The attention of `query` `[rows, heads, queries, dim]` to the positions that the sequences of
    `group` share, and to their own: `[rows, queries, heads, dim]`."""
    assert group.shared is not None
    keys, values = group.own.read(pool, layer)
    (rows, heads, queries, dim), kv_heads = query.shape, keys.shape[1]
    times = heads // kv_heads
    # [rows, kv heads, times * queries, dim]: heads that read the same keys are queries of them.
    packed = query.reshape(rows, kv_heads, times * queries, dim)
    if queries == 1:
        own, own_sums = flash(packed, keys, values, attn_mask=group.mask, scale=scaling)
    else:
        if times > 1:
            keys, values = (x.repeat_interleave(times, dim=1) for x in (keys, values))
        own, own_sums = flash(
            query, keys, values, is_causal=group.mask is None, attn_mask=group.mask, scale=scaling
        )
        own = own.reshape(packed.shape)
        own_sums = own_sums.reshape(packed.shape[:-1])
    keys, values = group.shared.read(pool, layer, place=1)
    joined = packed.transpose(0, 1).reshape(1, kv_heads, rows * times * queries, dim)
    shared, shared_sums = flash(joined, keys, values, scale=scaling)
    shared = shared.reshape(kv_heads, rows, times * queries, dim).transpose(0, 1)
    shared_sums = shared_sums.reshape(kv_heads, rows, times * queries).transpose(0, 1)
    output = merged((own, own_sums), (shared, shared_sums)).to(query.dtype)
    return output.reshape(rows, heads, queries, dim).transpose(1, 2)
