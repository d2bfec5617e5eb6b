"""Attention in two parts, merged by the logarithms of their sums of exponentials.

Causal attention behind a prefix needs no mask of tokens x tokens that way. With `is_causal`, fused
kernels take the first query for the first key, so behind a prefix they hide the wrong ones. A row
attends to the prefix and, causally, to its own tokens in two calls that need no mask. Backward,
each part is given the merged output and sum, as in ring attention (Liu et al. 2023, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: What `scaled_dot_product_attention` runs on a CPU; it returns the sums that are merged, too.
#: Several heads may read the same keys and values (torch 2.9 on).
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
#: Rows with fewer tokens are read with a mask, which is as fast there and small.
LEAST_TOKENS = 512
#: Arguments of an attention function that change what it computes, beside its scale.
_CHANGING = ("position_bias", "softcap", "s_aux", "dropout", "head_mask")


def is_plain(options: dict[str, Any]) -> bool:
    """Whether an attention function with `options` computes the plain softmax of scaled scores."""
    given = (options.get(name) for name in _CHANGING)
    return not any(isinstance(value, Tensor) or value for value in given)


def is_causal(module: Any, options: dict[str, Any]) -> bool:
    """Whether `module` attends causally where it is given no mask: the call's word, or its own."""
    said = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """The attention of the same queries to two parts, `[..., dim]`, from what `flash` returns for
    each: the output `[..., dim]` and the sums `[...]`."""
    weight = torch.sigmoid(one[1] - other[1])[..., None]
    return torch.lerp(other[0].to(weight.dtype), one[0].to(weight.dtype), weight)


def hides_padding(given: dict[str, Any]) -> bool:
    """Whether the padding in `given`, arguments of a causal model that reads long rows, stands
    behind their tokens, which do not see what follows. Told of no padding, transformers leaves its
    mask of tokens x tokens out."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is None or positions is None or mask.shape != positions.shape:
        return False
    if mask.shape[1] < LEAST_TOKENS or mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    read = mask.bool()
    return bool(read[:, 0].all()) and bool((read[:, 1:] <= read[:, :-1]).all())


def prefixed_causal(
    query: Tensor, keys: Tensor, values: Tensor, prefix: tuple[Tensor, Tensor], scale: float | None
) -> Tensor:
    """The attention of `query` `[rows, heads, tokens, dim]` to `prefix` and causally to the tokens
    before it: `[rows, tokens, heads, dim]`.

    keys, values: `[rows, kv_heads, tokens, dim]`; prefix: the same of the virtual tokens
    """
    output: Tensor = _PrefixedCausal.apply(query, keys, values, *prefix, scale)
    return output.transpose(1, 2)


class _PrefixedCausal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, *read: Any) -> Tensor:
        keys, values, prefix_keys, prefix_values, scale = read
        own, own_sums = flash(query, keys, values, is_causal=True, scale=scale)
        front, front_sums = flash(query, prefix_keys, prefix_values, scale=scale)
        output = merged((own, own_sums), (front, front_sums)).to(query.dtype)
        sums = torch.logaddexp(own_sums, front_sums)
        ctx.save_for_backward(query, *read[:4], output, sums)
        ctx.scale = scale
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, keys, values, prefix_keys, prefix_values, output, sums = ctx.saved_tensors
        gradients: list[Tensor] = []
        for k, v, causal in ((keys, values, True), (prefix_keys, prefix_values, False)):
            gradients += flash_backward(
                grad, query, k, v, output, sums, 0.0, causal, scale=ctx.scale
            )
        of_query, of_keys, of_values, again, of_prefix_keys, of_prefix_values = gradients
        return of_query + again, of_keys, of_values, of_prefix_keys, of_prefix_values, None
