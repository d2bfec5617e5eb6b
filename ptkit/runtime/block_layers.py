"""Linear layers and embeddings whose frozen weights stay in the blocks of a GGUF file.

A block is a few values of one row: small integers with a scale of their own (ggml's types, such as
`Q4_1`). A weight is unpacked when it is read, a piece at a time, and again for the backward pass.
So no unpacked weight outlives its product.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ptkit.runtime.ggml_types import BLOCKS, NAMES, Q4_0, Q4_1, Q5_0, Q5_1, dequantized

#: Values that are unpacked at a time: 4 MB of float32.
PIECE = 1 << 20


def row_bytes(kind: int, width: int) -> int:
    """Bytes of a row of `width` values in blocks of ggml type `kind`."""
    values, size = BLOCKS[kind]
    return width // values * size


def unpacked(blocks: Tensor, kind: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of `blocks`, `[rows, bytes]` uint8, as `[rows, width]` in `dtype`.

    ggml-common.h has the layouts. For the four types most frequent on laptops, low and high halves
    of a byte are written to their place at once. This is two and a half times as fast as
    transformers' reader, which reads the other types. Values are equal bit for bit.
    """
    rows = blocks.shape[0]
    flat = blocks.reshape(-1, BLOCKS[kind][1])
    if kind not in (Q4_0, Q4_1, Q5_0, Q5_1):
        return dequantized(flat, kind, dtype).reshape(rows, -1)
    offset = kind in (Q4_1, Q5_1)  # a minimum beside the scale, in place of integers around zero
    head = 4 if offset else 2
    low = flat[:, -16:]
    values = torch.empty(len(flat), 32, dtype=dtype, device=blocks.device)
    if kind in (Q4_0, Q4_1):
        values[:, :16] = low & 15
        values[:, 16:] = low >> 4
    else:
        shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
        fifth = (flat[:, head : head + 4, None] >> shifts & 1).reshape(-1, 32) << 4
        values[:, :16] = low & 15 | fifth[:, :16]
        values[:, 16:] = low >> 4 | fifth[:, 16:]
    if not offset:
        values -= 8 if kind == Q4_0 else 16
    values *= flat[:, :2].view(torch.float16).to(dtype)
    if offset:
        values += flat[:, 2:4].view(torch.float16).to(dtype)
    return values.reshape(rows, -1)


class BlockLinear(nn.Linear):
    """A frozen linear layer; `weight` holds blocks, `[out_features, bytes of a row]` uint8.

    It is an `nn.Linear` for whoever looks for one by class (PEFT's LoRA does). Gradients flow to
    the input alone.
    """

    def __init__(self, in_features: int, out_features: int, kind: int, *, bias: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        blocks = torch.empty(out_features, row_bytes(kind, in_features), dtype=torch.uint8)
        self.weight = nn.Parameter(blocks, requires_grad=False)
        own = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.register_parameter("bias", own)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` -> `[..., out_features]`, in autocast's type where it is on."""
        product: Tensor = _Product.apply(input, self.weight, self.kind, self.in_features)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, {NAMES[self.kind]}"


class BlockEmbedding(nn.Embedding):
    """A frozen embedding; `weight` holds blocks, `[num_embeddings, bytes of a row]` uint8."""

    def __init__(self, num_embeddings: int, embedding_dim: int, kind: int, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.kind, self.dtype, self.padding_idx = kind, dtype, None
        blocks = torch.empty(num_embeddings, row_bytes(kind, embedding_dim), dtype=torch.uint8)
        self.weight = nn.Parameter(blocks, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Ids `[...]` -> `[..., embedding_dim]`."""
        rows = unpacked(self.weight[input.reshape(-1)], self.kind, self.dtype)
        return rows.reshape(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {NAMES[self.kind]}"


def pieces(
    blocks: Tensor, kind: int, width: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a weight of `width` columns, unpacked `PIECE` values at a time: which, and them."""
    rows = max(1, PIECE // width)
    for start in range(0, len(blocks), rows):
        part = slice(start, min(start + rows, len(blocks)))
        yield part, unpacked(blocks[part], kind, dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, blocks: Tensor, kind: int, width: int) -> Tensor:
        device = input.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        )
        ctx.save_for_backward(blocks)
        ctx.kind, ctx.width, ctx.dtype, ctx.input_dtype = kind, width, dtype, input.dtype
        read = input.to(dtype)
        if len(blocks) * width <= PIECE:
            return nn.functional.linear(read, unpacked(blocks, kind, dtype))
        out = torch.empty(*input.shape[:-1], len(blocks), dtype=dtype, device=input.device)
        for part, weight in pieces(blocks, kind, width, dtype):
            out[..., part] = nn.functional.linear(read, weight)
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        (blocks,) = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        gradient = upstream[0].to(ctx.dtype)
        total: Tensor | None = None
        for part, weight in pieces(blocks, ctx.kind, ctx.width, ctx.dtype):
            share = gradient[..., part] @ weight
            total = share if total is None else total.add_(share)
        assert total is not None
        return total.to(ctx.input_dtype), None, None, None
