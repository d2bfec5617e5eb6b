"""Attention of rows that stand in one line, each to a prefix and causally to itself, on a CPU.

One operation takes all rows of a layer. Its backward pass needs what the model keeps anyway: the
line of queries, of keys, of values and of outputs. A row's keys behind its prefix exist while the
row is computed, and the heads of a group read the same ones (grouped-query attention, Ainslie et
al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ptkit.runtime.parted_attention import flash, flash_backward


def attended_by_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    fronts: tuple[Tensor, Tensor] | None = None,
    masks: Sequence[Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """The attention of each row to its front and to itself: `[1, tokens, heads, dim]`.

    query: `[1, heads, tokens, dim]`, the rows one behind the other; key, value: the same with
        `kv_heads`, which divide the heads
    lengths: tokens of each row
    fronts: keys and values before each row's own, `[rows, kv_heads, virtual_tokens, dim]`
    masks: of each row with fronts, added to the scores, `[1, 1, length, virtual_tokens + length]`;
        without fronts rows are causal
    """
    front = (None, None) if fronts is None else fronts
    by_row = [None] * len(lengths) if masks is None else masks
    output: Tensor = _ByRow.apply(query, key, value, *front, lengths, by_row, scale)
    return output


class _Row(NamedTuple):
    """A row's place in the line, its number, its mask, and the virtual tokens before it."""

    at: slice
    number: int
    mask: Tensor | None
    virtual: int

    def reads(self, line: Tensor, fronts: Tensor | None) -> Tensor:
        """Keys, or values, that the row attends to, `[1, kv_heads, virtual + length, dim]`."""
        own = line[:, :, self.at]
        if fronts is None:
            return own
        return torch.cat([fronts[self.number, None], own], dim=2)


class _ByRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        front_keys: Tensor | None,
        front_values: Tensor | None,
        lengths: Sequence[int],
        masks: Sequence[Tensor | None],
        scale: float | None,
    ) -> Tensor:
        ctx.lengths, ctx.masks, ctx.scale = lengths, masks, scale
        _, heads, tokens, dim = query.shape
        line = query.new_empty(1, tokens, heads, dim)
        sums = query.new_empty(1, heads, tokens, dtype=torch.float32)
        for row in _rows(ctx, front_keys):
            line[:, row.at], sums[:, :, row.at] = _attended(
                query[:, :, row.at], row.reads(key, front_keys), row.reads(value, front_values),
                row.mask, scale,
            )  # fmt: skip
        ctx.save_for_backward(query, key, value, front_keys, front_values, line, sums)
        return line

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        query, key, value, front_keys, front_values, line, sums = ctx.saved_tensors
        of_query, of_key, of_value = map(torch.empty_like, (query, key, value))
        of_fronts = None
        if front_keys is not None:
            of_fronts = torch.empty_like(front_keys), torch.empty_like(front_values)
        for row in _rows(ctx, front_keys):
            of_query[:, :, row.at], *of_read = flash_backward(
                upstream[:, row.at].transpose(1, 2), query[:, :, row.at],
                row.reads(key, front_keys), row.reads(value, front_values),
                line[:, row.at].transpose(1, 2), sums[:, :, row.at],
                0.0, row.mask is None, attn_mask=row.mask, scale=ctx.scale,
            )  # fmt: skip
            for part, of_line in zip(of_read, (of_key, of_value), strict=True):
                of_line[:, :, row.at] = part[:, :, row.virtual :]
            if of_fronts is not None:
                for part, of_front in zip(of_read, of_fronts, strict=True):
                    of_front[row.number] = part[0, :, : row.virtual]
        return of_query, of_key, of_value, *(of_fronts or (None, None)), None, None, None


def _rows(ctx: Any, fronts: Tensor | None) -> Iterator[_Row]:
    start, virtual = 0, 0 if fronts is None else fronts.shape[2]
    for number, (length, mask) in enumerate(zip(ctx.lengths, ctx.masks, strict=True)):
        yield _Row(slice(start, start + length), number, mask, virtual)
        start += length


def _attended(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    output, sums = flash(query, keys, values, is_causal=mask is None, attn_mask=mask, scale=scale)
    return output.transpose(1, 2), sums
