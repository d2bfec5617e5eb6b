"""Rows of different lengths read as one: everything but the attention sees real tokens only.

A batch of rows is a rectangle, filled up with padding. Linear layers, norms and activations treat
positions one by one, so there the real tokens stand in one line, `[1, real tokens]`. Attention
alone needs to know where a row begins: there they are put back into the rectangle. (Zeng et al.
2023, "Boosting distributed training performance of the unpadded BERT model", section 3.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptkit.errors import ModelError, PtkitError
from ptkit.runtime.architecture import is_encoder
from ptkit.runtime.attention import KEYWORD, Call, Placed
from ptkit.runtime.attention_choice import attention_of, take_prefixes
from ptkit.runtime.backends import WithTheCall, backend_of
from ptkit.runtime.cache import sees_everything
from ptkit.runtime.compile import reading
from ptkit.runtime.facts import NotNow, holds
from ptkit.runtime.line_attention import RowAttention
from ptkit.runtime.parted_attention import LEAST_TOKENS, is_causal, is_plain
from ptkit.runtime.row_adapters import row_adapters
from ptkit.runtime.row_attention import attended_by_row

#: Where more of the rectangle than this is real, its padding costs less than moving tokens.
MOST_FILLED = 0.9
_READ = {"input_ids", "attention_mask", "position_ids", "use_cache", KEYWORD}


def unpadded(model: PreTrainedModel, call: Call, mask: Tensor, wanted: Tensor) -> Tensor | None:
    """Let `call`, a pass of `model` over right-padded rows, read their real tokens in one line.

    mask: `[rows, tokens]`, 1 on real tokens; wanted: the same of positions that are asked for, bool

    Returns where the real tokens stood in the flattened rectangle, `[real tokens]`, or None where
    the call stays as it is. There little of it is padding, or padding is asked for, or `model`
    looks at rows outside of its attention.
    """
    given = {*call.arguments}
    if call.replaced or not given <= _READ or "position_ids" not in given:
        return None
    if torch.compiler.is_compiling() or row_adapters():
        return None
    real = mask.bool()
    if real.sum() > MOST_FILLED * real.numel() or not _is_behind(real):
        return None
    if bool((wanted & ~real).any()):
        return None
    if not holds(model, _reads_one_line):
        return None
    return _in_one_line(model, call, mask)


def _is_behind(real: Tensor) -> bool:
    """Whether all padding stands behind the tokens, which do not see it there."""
    return bool(real[:, 0].all()) and bool((real[:, 1:] <= real[:, :-1]).all())


def _in_one_line(model: PreTrainedModel, call: Call, mask: Tensor) -> Tensor:
    take_prefixes(model)
    given = call.arguments
    kept = mask.flatten().nonzero()[:, 0]
    for name in ("input_ids", "position_ids"):
        given[name] = given[name].flatten().index_select(0, kept)[None]
    # All of one text, as far as transformers knows: it then makes no mask.
    given["attention_mask"] = mask.new_ones(1, len(kept))
    given[KEYWORD] = _Rows(given.get(KEYWORD), kept, mask)
    return kept


class _Rows(RowAttention):
    """The attention of a line of tokens: each row of the rectangle they came from by itself.

    On a CPU each short row is a call of its own, so no padding is attended to either. On other
    devices that many small kernels would wait for each other, and long rows attend without a mask
    (see `parted_attention`). There the rectangle is filled again.
    """

    def __init__(self, placed: Placed | None, kept: Tensor, mask: Tensor) -> None:
        self.placed, self.kept, self.shape = placed, kept, mask.shape
        self.lengths: list[int] = mask.sum(-1).tolist()
        self._last: tuple[Tensor, list[Tensor]] | None = None

    def attended(
        self,
        module: Any,
        tensors: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        options: dict[str, Any],
        attention: Callable[..., tuple[Tensor, Any]],
    ) -> Tensor:
        if mask is not None:
            raise PtkitError(f"{type(module).__name__} was given a mask for rows without padding")
        short = tensors[0].device.type == "cpu" and self.shape[1] < LEAST_TOKENS
        if short and self._is_simple(module, tensors, options):
            return self._row_by_row(module, tensors, options)
        rows = (self._rectangle(tensor) for tensor in tensors)
        placed = {} if self.placed is None else {KEYWORD: self.placed}
        output, _ = attention(module, *rows, None, **options, **placed)
        return output.flatten(0, 1).index_select(0, self.kept.to(output.device))[None]

    def _row_by_row(
        self, module: Any, tensors: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]
    ) -> Tensor:
        query, key, value = tensors
        fronts, masks = None, None
        if self.placed is not None:
            before, mask = self.placed.of_rows(module, self.shape[1], options)
            fronts = before[0].to(key.dtype), before[1].to(value.dtype)
            masks = self._masks_of(mask, query.dtype)
        scale = options.get("scaling")
        return attended_by_row(query, key, value, self.lengths, fronts, masks, scale)

    def _masks_of(self, mask: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """Each row's own part of `mask`, `[rows, 1, tokens, virtual tokens + tokens]`, as it is
        added to its scores. Layers share a mask, so the last one is remembered."""
        if self._last is None or self._last[0] is not mask:
            front = mask.shape[-1] - self.shape[1]
            rows = [
                own[..., :length, : front + length]
                for own, length in zip(mask.split(1), self.lengths, strict=True)
            ]
            self._last = mask, [_added(row, dtype) for row in rows]
        return self._last[1]

    def _is_simple(
        self, module: Any, tensors: tuple[Tensor, Tensor, Tensor], options: dict[str, Any]
    ) -> bool:
        """Whether rows can attend by themselves: plainly, and nothing of the whole batch is
        noted."""
        return (
            is_plain(options)
            and is_causal(module, options)
            and tensors[1].shape[-1] == tensors[2].shape[-1]
            and (self.placed is None or self.placed.noted is None)
        )

    def _rectangle(self, line: Tensor) -> Tensor:
        """`line` `[1, heads, real tokens, dim]` as `[rows, heads, tokens, dim]`."""
        _, heads, _, dim = line.shape
        rows, tokens = self.shape
        empty = line.new_zeros(rows * tokens, heads, dim)
        filled = empty.index_copy(0, self.kept.to(line.device), line[0].transpose(0, 1))
        return filled.view(rows, tokens, heads, dim).transpose(1, 2)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """`mask` as it is added to scores of `dtype`."""
    if mask.dtype != torch.bool:
        return mask.to(dtype).contiguous()
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


@torch.no_grad()
def _reads_one_line(model: PreTrainedModel) -> bool:
    """Whether the logits of two rows are the same in one line. Asked of the model, because families
    differ in what they do with rows outside of their attention."""
    config = model.config
    if config.is_encoder_decoder or is_encoder(model) or not sees_everything(model):
        return False
    if attention_of(model) != "sdpa" or not isinstance(backend_of(model), WithTheCall):
        return False
    words = int(config.get_text_config().vocab_size)
    ids = torch.arange(7, 21, device=model.device).reshape(2, 7) % words
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions,
             "use_cache": False}  # fmt: skip
    call = Call(dict(given))
    try:
        with reading(model):
            kept = _in_one_line(model, call, mask)
            line = model(**call.arguments).logits.float()
            wanted = model(**given).logits.float().flatten(0, 1).index_select(0, kept)[None]
    except torch.OutOfMemoryError:
        raise  # says nothing about the family
    except (ModelError, PtkitError, TypeError, ValueError, RuntimeError):
        return False  # it cannot even be asked so
    if not bool(wanted.isfinite().all()):
        raise NotNow  # training has diverged, and will be given up
    return bool((line - wanted).norm() <= 1e-3 * wanted.norm())
