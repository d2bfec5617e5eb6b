"""A forward pass over sequences whose keys and values are in blocks.

On transformers' `AttentionInterface` every token is a row of its own, `[tokens, 1]`, so that
sequences of any lengths are read together without padding. The attention function puts the tokens
of sequences of similar length together again. It reads their keys and values from the blocks, and
calls the model's own attention. Elsewhere (bloom, falcon) the rows are sequences of one length, and
the cache hands the model their keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ptkit.errors import ModelError
from ptkit.runtime.attention import (
    KEYWORD,
    Call,
    GroupedAttention,
    WithTheCall,
    attention_of,
    layers_read,
    take_prefixes,
)
from ptkit.runtime.attention_sites import takes_positions
from ptkit.runtime.backends import backend_of
from ptkit.runtime.block_pool import BlockPool
from ptkit.runtime.handed_cache import HandedCache

#: Sequences are read together while the shorter one has so much of the longer one's length, or
#: lacks so few positions of it.
_SIMILAR, _CLOSE = 0.7, 32


@dataclass(frozen=True)
class Chunk:
    """New tokens of one sequence.

    ids: the tokens; written: their slots; slots: those of all its positions, these at the end
    number: which sequence of the pass it is
    placeless: how many of the sequence's first slots take no position
    """

    number: int
    ids: Sequence[int]
    slots: np.ndarray
    placeless: int = 0

    @property
    def written(self) -> np.ndarray:
        """The slots of the new tokens."""
        return self.slots[len(self.slots) - len(self.ids) :]

    @property
    def before(self) -> int:
        """Slots before the new tokens."""
        return len(self.slots) - len(self.ids)

    @property
    def position(self) -> int:
        """Position of the first new token."""
        return self.before - self.placeless


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


def grouped(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """`chunks` in groups of similar numbers of new tokens and similar lengths."""
    ordered = sorted(chunks, key=lambda chunk: (-len(chunk.ids), -len(chunk.slots)))
    groups: list[list[Chunk]] = []
    most = longest = 0  # new tokens, and positions, of the last group
    for chunk in ordered:
        new, length = len(chunk.ids), len(chunk.slots)
        if groups and _similar(new, most) and _similar(length, longest):
            groups[-1].append(chunk)
            longest = max(longest, length)
        else:
            groups.append([chunk])
            most, longest = new, length
    return groups


def of_one_length(group: Sequence[Chunk]) -> list[list[Chunk]]:
    """`group` in parts that a `TogetherPass` takes: one token each, or equal lengths."""
    parts: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in group:
        single = len(chunk.ids) == 1
        parts.setdefault((len(chunk.ids), 0 if single else len(chunk.slots)), []).append(chunk)
    return [*parts.values()]


def _similar(one: int, other: int) -> bool:
    if one > other:
        one, other = other, one
    if one == 1 < other:
        return False  # one token alone needs no mask of its own
    return one >= _SIMILAR * other or other - one <= _CLOSE


class _Group:
    """Sequences of a pass that attend together: `rows` of them, each with `queries` tokens.

    start, tokens: where their tokens are among those of the pass
    """

    def __init__(self, chunks: Sequence[Chunk], start: int, model: PreTrainedModel) -> None:
        device, rows = model.device, len(chunks)
        counts = np.array([len(chunk.ids) for chunk in chunks])
        lengths = np.array([len(chunk.slots) for chunk in chunks])
        self.start, self.tokens, self.rows = start, int(counts.sum()), rows
        self.queries, longest = int(counts.max()), int(lengths.max())
        # A missing position is the sequence's own first one: it is hidden, but must be finite
        # where the sequence is.
        slots = np.empty((rows, longest), dtype=np.int64)
        for row, chunk in enumerate(chunks):
            slots[row, : len(chunk.slots)] = chunk.slots
            slots[row, len(chunk.slots) :] = chunk.slots[0]
        self.positions = longest
        #: Of all positions of the rows, one row after the other, `[rows * positions]`.
        self.slots = torch.from_numpy(slots.reshape(-1)).to(device)
        #: Padded query -> token, and token -> padded query; None where nothing is padded.
        self.query: Tensor | None = None
        self.back: Tensor | None = None
        if self.tokens != rows * self.queries:
            first = np.cumsum(counts) - counts
            column = np.arange(self.queries)
            there = column < counts[:, None]
            self.query = torch.from_numpy(
                np.where(there, first[:, None] + column, first[:, None]).reshape(-1)
            ).to(device)
            self.back = torch.from_numpy(np.flatnonzero(there)).to(device)
        self.mask = self._mask(lengths - counts, lengths, longest, model)

    def _mask(
        self, before: np.ndarray, lengths: np.ndarray, longest: int, model: PreTrainedModel
    ) -> Tensor | None:
        """What the queries attend to, `[rows, 1, queries, positions]`, added to the scores."""
        if self.queries == 1 and (lengths == longest).all():
            return None
        if not before.any() and attention_of(model) == "sdpa":
            return None  # plainly causal, by itself
        seen = torch.from_numpy(before)[:, None] + torch.arange(self.queries)
        hidden = torch.arange(longest) > seen[:, None, :, None]
        mask = torch.zeros(hidden.shape, dtype=model.dtype)
        mask.masked_fill_(hidden, torch.finfo(model.dtype).min)
        return mask.to(model.device)


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

    chunks: what is read, in the order of the rows
    """

    def __init__(self, model: PreTrainedModel, pool: BlockPool, chunks: Sequence[Chunk]) -> None:
        super().__init__(pool, len(pool.layout))
        self.chunks: list[Chunk] = []
        self._groups: list[_Group] = []
        start = 0
        for group in grouped(chunks):
            self.chunks += group
            made = _Group(group, start, model)
            self._groups.append(made)
            start += made.tokens
        self._numbers = layers_read(model)
        device = model.device
        written = np.concatenate([chunk.written for chunk in self.chunks])
        self._written = torch.from_numpy(written).to(device)
        self.ids = torch.tensor(
            [token for chunk in self.chunks for token in chunk.ids], device=device
        )[:, None]
        positions = [np.arange(c.position, c.position + len(c.ids)) for c in self.chunks]
        self.positions = torch.from_numpy(np.concatenate(positions)).to(device)[:, None]
        self.mask = torch.ones_like(self.ids)

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
        for group in self._groups:
            own = query[group.start : group.start + group.tokens]  # [tokens, heads, 1, dim]
            if group.queries > 1:
                own = own[:, :, 0]
                if group.query is not None:
                    own = own.index_select(0, group.query.to(own.device))
                own = own.view(group.rows, group.queries, *own.shape[1:]).transpose(1, 2)
            keys, values = self.pool.read(layer, group.slots, group.rows)
            mask = None if group.mask is None else group.mask.to(own.device)
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
        group = _Group(self.chunks, 0, model)
        assert group.query is None
        self._slots, self._rows, self._longest = group.slots, group.rows, group.positions
        self._queries = group.queries
        device = model.device
        lengths = torch.tensor([len(chunk.slots) for chunk in chunks], device=device)[:, None]
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
        return self.pool.read(layer, self._slots, self._rows)

    def sizes(self, queries: int) -> tuple[int, int]:
        return self._longest, self._longest - self._queries
