"""How the prefixes of a forward pass reach a model's attention: they are handed over with the call.

transformers gives keyword arguments of a model's forward to its attention function. So a registered
function finds the prefixes among its own arguments and puts them before the layer's keys and
values. Nothing is cached and nothing is written into the model: gradient checkpointing recomputes
with the same arguments, and passes of other threads have theirs. Without a prefix the function is
the model's own, bit for bit.

Families off transformers' `AttentionInterface` have a back end of their own (`backend_of`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from ptkit.errors import ModelError
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.attention_choice import OURS, attention_of, take_prefixes
from ptkit.runtime.attention_sites import layer_table, require_attention
from ptkit.runtime.facts import known
from ptkit.runtime.grouped_queries import grouped, reads_grouped
from ptkit.runtime.line_attention import GroupedAttention, RowAttention
from ptkit.runtime.parted_attention import (
    LEAST_TOKENS,
    hides_padding,
    is_causal,
    is_plain,
    prefixed_causal,
)

#: The argument of a model's forward that holds a `Placed`.
KEYWORD = "ptkit_prefix"
#: Layer -> the keys and values it computed.
Noted = dict[int, tuple[Tensor, Tensor]] | None


@dataclass
class Call:
    """A forward pass about to be made.

    arguments: of the model's forward
    replaced: modules that run in this pass in place of the model's own, by their dotted names
    after: what is done to the pass's output
    """

    arguments: dict[str, Any]
    replaced: dict[str, nn.Module] = field(default_factory=dict)
    after: Callable[[Any], Any] = lambda output: output


class Repeats:
    """A batch with every row several times in a row, as beams are; each made once."""

    def __init__(self, batch: PrefixBatch) -> None:
        self.batch = batch
        self._made = {1: batch}

    def times(self, times: int) -> PrefixBatch:
        """The batch with every row `times` in a row."""
        if times not in self._made:
            self._made[times] = self.batch.repeated(times)
        return self._made[times]


class Placed:
    """The prefixes of one forward pass, as its attention modules take them.

    batch: None: nothing is put before anything
    layers: attention module -> the entry of the layout that it reads
    cached: tokens that were in the cache before the pass
    positions: position ids of the pass, `[rows, tokens]`, where it was given some
    noted: where to leave the keys and values that each layer computes in the pass, if anywhere
    """

    def __init__(
        self,
        batch: PrefixBatch | Repeats | None,
        layers: Mapping[nn.Module, int],
        *,
        cached: int | Tensor = 0,
        positions: Tensor | None = None,
        noted: Noted = None,
    ) -> None:
        self.repeats = Repeats(batch) if isinstance(batch, PrefixBatch) else batch
        self.layers, self.cached, self.positions, self.noted = layers, cached, positions, noted
        #: Layers of a pass share a mask: the mask itself, and with the prefix region before it.
        self._extended: dict[object, tuple[Tensor | None, Tensor]] = {}
        self._seen_by_all: bool | None = None  # whether every token sees all virtual tokens

    def in_parts(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        options: dict[str, Any],
    ) -> Tensor | None:
        """The attention of `query`, plainly causal among its own tokens, in two parts that need no
        mask: `[rows, tokens, heads, dim]`. None where it is not so, or a mask is as fast."""
        tokens, batch = query.shape[2], None if self.repeats is None else self.repeats.batch
        if (
            batch is None
            or not LEAST_TOKENS <= tokens == key.shape[2]
            or query.device.type != "cpu"
            or key.shape[-1] != value.shape[-1]
            or not is_causal(module, options)
            or torch.compiler.is_compiling()
            or not is_plain(options)
            or batch.seen_from is not None
            or (batch.as_text is not None and options.get("sliding_window") is not None)
        ):
            return None
        if self._seen_by_all is None:
            self._seen_by_all = bool(batch.visible.all())
        if not self._seen_by_all or len(key) != batch.rows:
            return None
        layer = self.layers[module]
        if self.noted is not None:
            self.noted[layer] = key, value
        prefix = batch.keys[layer].to(key.dtype), batch.values[layer].to(value.dtype)
        return prefixed_causal(query, key, value, prefix, options.get("scaling"))

    def before(
        self,
        module: nn.Module,
        queries: int,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`key` and `value` with the layer's prefix before them, and `mask` widened to match.

        queries: number of tokens that attend
        mask: None says "all", or "causal" where the module is
        options: of the attention function; a relative position bias in it is widened too, by
            zeros: virtual tokens have no distance
        """
        layer = self.layers[module]
        if self.noted is not None:
            self.noted[layer] = key, value
        if self.repeats is None:
            return key, value, mask
        # Beams, of a decoder whose encoder reads every row once.
        batch = self.repeats.times(len(key) // self.repeats.batch.rows)
        extended = self._with_region(batch, mask, (module, queries, key.shape[2]), options)
        key = torch.cat([batch.keys[layer].to(key.dtype), key], dim=2)
        value = torch.cat([batch.values[layer].to(value.dtype), value], dim=2)
        if options.get("position_bias") is not None:
            bias = options["position_bias"]
            options["position_bias"] = nn.functional.pad(bias, (batch.longest, 0))
        return key, value, extended.to(key.device)

    def of_rows(
        self, module: nn.Module, tokens: int, options: dict[str, Any]
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The layer's prefixes, `[rows, kv_heads, virtual tokens, dim]` of keys and of values, and
        the mask `[rows, 1, tokens, virtual tokens + tokens]` of rows that attend causally to them
        and to their own tokens."""
        assert self.repeats is not None
        batch, layer = self.repeats.batch, self.layers[module]
        mask = self._with_region(batch, None, (module, tokens, tokens), options)
        return (batch.keys[layer], batch.values[layer]), mask

    def _with_region(
        self,
        batch: PrefixBatch,
        mask: Tensor | None,
        asked: tuple[nn.Module, int, int],
        options: dict[str, Any],
    ) -> Tensor:
        """`mask` `[rows|1, 1, queries, keys]` with the prefix region before its keys; the work is
        done once for each distinct mask of a pass.

        asked: the module, and the numbers of its queries and of its keys
        """
        module, queries, keys = asked
        causal = is_causal(module, options)
        window = options.get("sliding_window")
        if torch.compiler.is_compiling():  # the compiler shares equal work by itself
            own = _written_out(queries, keys, causal, batch) if mask is None else mask
            return self._joined(batch, own, window)
        name = (id(mask), len(batch.visible), window) if mask is not None else (
            queries, keys, causal, len(batch.visible), window
        )  # fmt: skip
        if name not in self._extended:
            own = _written_out(queries, keys, causal, batch) if mask is None else mask
            # The mask is held, so that no other one gets its id.
            self._extended[name] = mask, self._joined(batch, own, window)
        return self._extended[name][1]

    def _joined(self, batch: PrefixBatch, mask: Tensor, window: int | None) -> Tensor:
        """Columns for the prefix region, then those of `mask`.

        window: of the layer, which hides from a token what is so far behind it
        """
        rows, heads, queries = batch.rows, mask.shape[1], mask.shape[-2]
        visible = batch.visible[:, None, None, :]
        # Some layers are asked about the last tokens of a pass only (Gemma 4's that share keys).
        ahead = 0 if self.positions is None else self.positions.shape[1] - queries
        if batch.seen_from is not None:
            query = torch.arange(queries, device=visible.device) + ahead + self.cached
            visible = visible & (query >= batch.seen_from[:, None])[:, None, :, None]
        if batch.as_text is not None and window is not None:
            assert self.positions is not None
            distance = self.positions[:, -queries:, None] - (batch.visible.cumsum(-1) - 1)[:, None]
            near = (distance < window) | ~batch.as_text[:, None, None]
            visible = visible & near[:, None]
        visible = visible.to(mask.device)  # layers may lie on other devices than the input
        return _with_columns(visible, mask, (rows, heads, queries, batch.longest))


def _written_out(queries: int, keys: int, causal: bool, batch: PrefixBatch) -> Tensor:
    """The mask that transformers leaves out where it is plain, `[1, 1, queries, keys]`."""
    whole = torch.ones(queries, keys, dtype=torch.bool, device=batch.visible.device)
    # One token alone sees everything before it.
    return (whole.tril() if causal and queries > 1 else whole)[None, None]


def _with_columns(visible: Tensor, mask: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """`visible`, expanded to `shape`, in the form of `mask`, and `mask` after it."""
    rows, heads, queries, _ = shape
    if mask.dtype != torch.bool:  # additive, as eager attention wants it
        least = torch.finfo(mask.dtype).min
        visible = mask.new_zeros(visible.shape).masked_fill(~visible, least)
    columns = visible.expand(shape)
    return torch.cat([columns, mask.expand(rows, heads, queries, mask.shape[-1])], dim=-1)


def _prefix_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kw: Any,
) -> tuple[Tensor, None]:
    placed: Placed | GroupedAttention | RowAttention | None = kw.pop(KEYWORD, None)
    if isinstance(placed, GroupedAttention):
        return placed.attended(module, query, kw, sdpa_attention_forward), None
    if isinstance(placed, RowAttention):
        tensors = query, key, value
        return placed.attended(module, tensors, attention_mask, kw, _prefix_sdpa), None
    if placed is not None:
        if attention_mask is None:
            output = placed.in_parts(module, query, key, value, kw)
            if output is not None:
                return output, None
        key, value, attention_mask = placed.before(
            module, query.shape[2], key, value, attention_mask, kw
        )
    if attention_mask is not None and reads_grouped(query, key, value, kw):
        return grouped(query, key, value, attention_mask, kw.get("scaling")), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kw)


def _prefix_eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kw: Any,
) -> tuple[Tensor, Tensor | None]:
    placed: Placed | GroupedAttention | None = kw.pop(KEYWORD, None)
    if isinstance(placed, GroupedAttention):
        return placed.attended(module, query, kw, _prefix_eager), None
    if placed is not None:
        key, value, attention_mask = placed.before(
            module, query.shape[2], key, value, attention_mask, kw
        )
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            least = torch.finfo(query.dtype).min
            attention_mask = query.new_zeros(attention_mask.shape).masked_fill(
                ~attention_mask, least
            )
    if getattr(module, "reorder_and_upcast_attn", False):  # some checkpoints of GPT-2's
        return module._upcast_and_reordered_attn(query, key, value, attention_mask)  # type: ignore[operator]
    # Every family keeps its own eager attention (scaling, soft caps, sinks) in its module.
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kw)


AttentionInterface.register(f"{OURS}sdpa", _prefix_sdpa)
AttentionMaskInterface.register(f"{OURS}sdpa", sdpa_mask)
AttentionInterface.register(f"{OURS}eager", _prefix_eager)
AttentionMaskInterface.register(f"{OURS}eager", eager_mask)


class Backend(Protocol):
    """A way of putting prefixes into the attention of one model."""

    def put(
        self, model: PreTrainedModel, prefixes: Repeats | None, call: Call, noted: Noted = None
    ) -> None:
        """Change `call`, a forward pass of `model`, so that its rows attend to `prefixes`.

        noted: see `Placed`
        """


def in_place(
    model: PreTrainedModel, prefixes: Repeats | None, call: Call, noted: Noted = None
) -> Placed:
    """What the attention modules of `model` take in `call`."""
    cache = call.arguments.get("past_key_values")
    return Placed(
        prefixes, layers_read(model), cached=0 if cache is None else cache.get_seq_length(),
        positions=call.arguments.get("position_ids"), noted=noted,
    )  # fmt: skip


class WithTheCall:
    """Of models on transformers' `AttentionInterface`: an argument of the call."""

    def put(
        self, model: PreTrainedModel, prefixes: Repeats | None, call: Call, noted: Noted = None
    ) -> None:
        take_prefixes(model)
        own = attention_of(model)
        if own not in ("sdpa", "eager"):
            raise ModelError(
                f"a prefix can be read with `sdpa` or `eager` attention, this model uses `{own}`; "
                'load it with attn_implementation="sdpa"'
            )
        given = call.arguments
        positions = given.get("position_ids")
        whole = given.get("past_key_values") is None
        if (
            positions is not None
            and whole
            and (
                # Without a mask, transformers takes positions with a gap for several texts.
                given.get("attention_mask") is None or hides_padding(given)
            )
        ):
            given["attention_mask"] = torch.ones_like(positions)
        given[KEYWORD] = in_place(model, prefixes, call, noted)


def layers_read(model: PreTrainedModel) -> Mapping[nn.Module, int]:
    """Attention module of `model` -> the entry of the layout that it reads.

    Raises ModelError where no prefix can be put into them.
    """
    return known(model, _layers_read)


def _layers_read(model: PreTrainedModel) -> Mapping[nn.Module, int]:
    return layer_table(require_attention(model))


def prefixed_positions(batch: PrefixBatch, attention_mask: Tensor) -> Tensor:
    """Position ids `[rows, tokens]` of real tokens around each row's own virtual tokens.

    attention_mask: `[rows, tokens]`, 1 on real tokens, padding on either side. Virtual tokens take
        the first positions, as in PEFT and in both prefix-tuning and prompt-tuning papers. An infix
        takes those between the tokens before `batch.seen_from` and the others. Some take none.
    """
    lengths = batch.placed.sum(-1, keepdim=True).to(attention_mask.device)
    if batch.seen_from is not None:
        token = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        lengths = lengths * (token >= batch.seen_from[:, None])
    positions = attention_mask.long().cumsum(-1) - 1 + lengths
    return positions.masked_fill(attention_mask == 0, 0)
