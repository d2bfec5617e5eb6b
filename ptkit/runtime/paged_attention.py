"""A forward pass over sequences whose keys and values are in blocks.

On transformers' `AttentionInterface` every token is a row of its own, `[tokens, 1]`, so that
sequences of any lengths are read together without padding. The attention function puts the tokens
of sequences of similar length together again. It reads their keys and values from the blocks, and
calls the model's own attention. Elsewhere (bloom, falcon) the rows are sequences of one length, and
the cache hands the model their keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ptkit.errors import ModelError
from ptkit.runtime.attention import KEYWORD, Call, WithTheCall, layers_read
from ptkit.runtime.attention_choice import attention_of, take_prefixes
from ptkit.runtime.attention_sites import takes_positions
from ptkit.runtime.backends import backend_of
from ptkit.runtime.block_pool import BlockPool
from ptkit.runtime.group_attention import attended_in_parts, can_share, decoded
from ptkit.runtime.handed_cache import HandedCache
from ptkit.runtime.line_attention import GroupedAttention
from ptkit.runtime.paged_groups import (
    GROUPED_FOR,
    Chunk,
    TokenGroup,
    grouped,
    grouped_by_beginning,
)
from ptkit.runtime.parted_attention import is_plain


def reads_tokens_apart(model: PreTrainedModel) -> bool:
    """Whether every token of a pass can be a row of its own."""
    try:
        backend = backend_of(model)
    except ModelError:
        return False
    return (
        isinstance(backend, WithTheCall)
        and attention_of(model) in ("sdpa", "eager")
        and takes_positions(model)
    )


def reads_blocks(model: PreTrainedModel) -> bool:
    """Whether the attention of `model` is known to be right over blocks: `sdpa` or `eager` of
    transformers, or one that is handed its cache."""
    try:
        backend = backend_of(model)
    except ModelError:
        return False
    return isinstance(backend, HandedCache) or reads_tokens_apart(model)


class PagedCache(Cache):
    """What a model takes for its cache during one pass over blocks."""

    def __init__(self, pool: BlockPool, layers: int) -> None:
        super().__init__(layers=[])
        self.pool = pool
        self.layers: Any = [_PagedLayer(self, layer) for layer in range(layers)]

    def put(self, model: PreTrainedModel, call: Call) -> None:
        """Let `call` read and write the blocks."""
        raise NotImplementedError

    def updated(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write `keys` and `values` `[rows, heads, tokens, dim]`; returns what the model's
        attention is given."""
        raise NotImplementedError

    def sizes(self, queries: int) -> tuple[int, int]:
        """Positions that the model takes to be attended to, and to be read before the pass."""
        raise NotImplementedError


class _PagedLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, cache: PagedCache, layer: int) -> None:
        super().__init__()
        self._cache, self._layer = cache, layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("the blocks are there")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any
    ) -> tuple[Tensor, Tensor]:
        return self._cache.updated(self._layer, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.sizes(query_length)[0], 0

    def get_seq_length(self) -> int:
        return self._cache.sizes(1)[1]

    def get_max_length(self) -> int:
        return -1


class ApartPass(PagedCache, GroupedAttention):
    """A pass in which every token is a row of its own.

    chunks: what is read, in any order; afterwards in the order of the rows
    """

    def __init__(self, model: PreTrainedModel, pool: BlockPool, chunks: Sequence[Chunk]) -> None:
        super().__init__(pool, len(pool.layout))
        self.chunks: list[Chunk] = []
        self._device = model.device
        self._numbers = layers_read(model)
        self._is_sdpa = attention_of(model) == "sdpa"
        #: Attention modules -> whether they compute the plain attention.
        self._plain: dict[nn.Module, bool] = {}
        if self._is_sdpa and can_share(pool, model.device):
            groups = grouped_by_beginning(chunks)
        else:
            groups = [(group, 0) for group in grouped(chunks)]
        self._groups: list[TokenGroup] = []
        start = 0
        for group, shared in groups:
            self._groups.append(TokenGroup(group, start, model, shared))
            self.chunks += group
            start += self._groups[-1].tokens
        positions = [np.arange(c.position, c.position + len(c.ids)) for c in self.chunks]
        self.positions = torch.from_numpy(np.concatenate(positions)).to(self._device)[:, None]
        self._lengths = [chunk.table.length for chunk in self.chunks]
        self._steps = GROUPED_FOR if start == len(self.chunks) else 0  # for which it can go on
        self._take([chunk.written for chunk in self.chunks])
        self.mask = torch.ones_like(self.ids)

    def goes_on(self, chunks: Sequence[Chunk]) -> bool:
        """Whether this can be the pass of `chunks`, in the order of their numbers, as well: one
        more token of each sequence. It is that pass from then on."""
        if not self._steps or len(chunks) != len(self.chunks):
            return False
        ordered = [chunks[chunk.number] for chunk in self.chunks]
        lengths = [length + 1 for length in self._lengths]
        if not all(
            new.table is old.table and len(new.ids) == 1 and new.table.length == length
            for new, old, length in zip(ordered, self.chunks, lengths, strict=True)
        ):
            return False
        self._steps -= 1
        self._lengths, self.chunks = lengths, ordered
        for group in self._groups:
            group.advance()
        self.positions = self.positions + 1
        self._take([chunk.written for chunk in ordered])
        return True

    def _take(self, written: Sequence[np.ndarray]) -> None:
        self._written = torch.from_numpy(np.concatenate(written)).to(self._device)
        ids = [token for chunk in self.chunks for token in chunk.ids]
        self.ids = torch.tensor(ids, device=self._device)[:, None]

    def put(self, model: PreTrainedModel, call: Call) -> None:
        take_prefixes(model)
        call.arguments |= {"past_key_values": self, "use_cache": True, KEYWORD: self}
        # Rows of one token without a mask: the model makes none, and ours are the groups'.
        call.arguments["attention_mask"] = None

    def updated(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.pool.write(layer, self._written, keys[:, :, 0], values[:, :, 0])
        return keys, values

    def sizes(self, queries: int) -> tuple[int, int]:
        return queries, 0

    def attended(
        self,
        module: nn.Module,
        query: Tensor,
        options: dict[str, Any],
        attention: Callable[..., tuple[Tensor, Any]],
    ) -> Tensor:
        layer, found = self._numbers[module], []
        plain = self._plain.get(module)
        if plain is None:
            self._plain[module] = plain = self._is_sdpa and is_plain(options)
            if not plain:
                self._groups = [g if g.shared is None else g.whole() for g in self._groups]
        scaling = options.get("scaling")
        for group in self._groups:
            own = query  # [tokens, heads, 1, dim]
            if len(self._groups) > 1:
                own = query[group.start : group.start + group.tokens]
            if group.queries > 1:
                own = own[:, :, 0]
                if group.query is not None:
                    own = own.index_select(0, group.query.to(own.device))
                own = own.view(group.rows, group.queries, *own.shape[1:]).transpose(1, 2)
            if group.shared is not None:
                output = attended_in_parts(group, own, self.pool, layer, scaling)
            elif plain and group.queries == 1:
                output = decoded(group, own, self.pool, layer, scaling)
            else:
                keys, values = group.own.read(self.pool, layer)
                mask = group.mask_on(own.device)
                output, _ = attention(module, own, keys, values, mask, **options)
            if group.queries > 1:
                output = output.flatten(0, 1)  # [padded tokens, heads, dim]
                if group.back is not None:
                    output = output.index_select(0, group.back.to(output.device))
                output = output[:, None]
            found.append(output)
        return found[0] if len(found) == 1 else torch.cat(found)


class TogetherPass(PagedCache):
    """A pass whose rows are sequences with equal numbers of new tokens; more than one new token
    each only where they are of one length."""

    def __init__(self, model: PreTrainedModel, pool: BlockPool, chunks: Sequence[Chunk]) -> None:
        super().__init__(pool, len(pool.layout))
        self.chunks = [*chunks]
        group = TokenGroup(self.chunks, 0, model)
        assert group.query is None
        self._own, self._longest, self._queries = group.own, group.positions, group.queries
        device = model.device
        lengths = torch.tensor([chunk.table.length for chunk in chunks], device=device)[:, None]
        written = np.concatenate([chunk.written for chunk in chunks])
        self._written = torch.from_numpy(written).to(device)
        self.ids = torch.tensor([[*chunk.ids] for chunk in chunks], device=device)
        first = torch.tensor([chunk.position for chunk in chunks], device=device)[:, None]
        self.positions = first + torch.arange(self._queries, device=device)
        self.mask = (torch.arange(self._longest, device=device) < lengths).long()

    def put(self, model: PreTrainedModel, call: Call) -> None:
        call.arguments |= {"past_key_values": self, "use_cache": True}

    def updated(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)
        self.pool.write(layer, self._written, keys, values)
        return self._own.read(self.pool, layer)

    def sizes(self, queries: int) -> tuple[int, int]:
        return self._longest, self._longest - self._queries
