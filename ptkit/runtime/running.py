"""A batch whose rows come and go between tokens: continuous batching (Yu et al. 2022, "Orca",
section 4) over rows that each have their own prefix.

Every row keeps its keys and values at the left of its own line of one buffer, whatever its
neighbours' lengths: joining writes a line, leaving moves the last line into the gap. A forward
pass is as wide as its longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from ptkit.errors import ModelError
from ptkit.prefix import KVLayout, KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.cache import ReservedCache, prefilled_cache, shares_keys
from ptkit.runtime.forward import pad_rows
from ptkit.runtime.infix import read_before_last
from ptkit.runtime.runner import ModelRunner, Tokens, Want

#: Buffers grow by at least this many positions, so that not every token moves them.
_GROWTH = 64


def longest_row(model: PreTrainedModel) -> int | None:
    """The most positions a row of a `RunningBatch` of `model` may take; None: no limit.

    Where layers see a window only, it is the window: up to there it hides nothing, and rows of
    different lengths can share a buffer. Raises ModelError for models whose layers keep another
    kind of memory than keys and values, and for encoder-decoders.
    """
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} is an encoder-decoder; continuous batching is for causal "
            "language models (`ptkit generate` runs it)"
        )
    config: Any = model.config.get_text_config()
    if shares_keys(model):
        raise ModelError(
            f"{type(model).__name__} has layers that read the keys and values of others, which "
            "continuous batching has no place for (`ptkit generate` runs it)"
        )
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    if kinds - {DynamicLayer, DynamicSlidingWindowLayer}:
        raise ModelError(
            f"{type(model).__name__} has layers that keep a state instead of keys and values, "
            "which continuous batching cannot hand from row to row (`ptkit generate` runs it)"
        )
    limits = [getattr(config, "max_position_embeddings", None)]
    if DynamicSlidingWindowLayer in kinds:
        limits += [
            getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")
        ]
    return min((limit for limit in limits if limit), default=None)


@dataclass(frozen=True)
class RowInput:
    """What a row reads before its first new token: its prompt (at least one id) and its prefix."""

    prompt: list[int]
    prefix: KVPrefix | None


class Reading:
    """Inputs being read together, a piece at a time, so that a long one holds up nobody.

    `advance` until `done`; then `logits` are those after each input. An infix stands before the
    last token of its input: such inputs are read at once, and all are of one length.
    """

    def __init__(
        self, model: PreTrainedModel, inputs: Sequence[RowInput], layout: KVLayout, pad_id: int
    ) -> None:
        self._model = model
        ids, mask = pad_rows([row.prompt for row in inputs], pad_id, left=False)
        device = model.device
        self._ids = ids.to(device)
        self._batch = PrefixBatch.gathered([row.prefix for row in inputs], layout)
        if self._batch.infix is not None and not bool(mask.all()):
            raise ValueError("inputs with an infix are read together only at equal lengths")
        virtual = self._batch.visible.to(device)
        #: Which of the cache's columns are this row's own, `[rows, columns]`.
        self.visible = torch.cat([virtual, mask.bool().to(device)], dim=1)
        self._positions = (self.visible.long().cumsum(-1) - 1).clamp(min=0)[:, virtual.shape[1] :]
        self._last = mask.sum(-1).to(device) - 1
        self._read = 0
        self._found: Tensor | None = None
        self.cache = ReservedCache(self.visible.shape[1])

    @property
    def rows(self) -> int:
        """Number of inputs."""
        return len(self._ids)

    @property
    def done(self) -> bool:
        """Whether all of every input has been read."""
        return self._read == self._ids.shape[1]

    @property
    def logits(self) -> Tensor:
        """`[rows, vocabulary]`, after the last token of each input."""
        assert self.done
        assert self._found is not None
        return self._found

    @torch.no_grad()
    def advance(self, tokens: int) -> None:
        """Read the next `tokens` columns of the inputs."""
        end = min(self._read + tokens, self._ids.shape[1])
        if not self._read:
            end = self._begin(end)
        start = self._read
        here = torch.arange(start, end, device=self._ids.device) == self._last[:, None]
        piece = Tokens(
            self._ids[:, start:end], self.visible[:, : self._batch.longest + end].long(),
            self._positions[:, start:end],
        )  # fmt: skip
        # The prefixes are in the cache.
        found = ModelRunner(self._model).forward(piece, kv=self.cache, want=Want("logits", here))
        if self._found is None:
            self._found = found.new_empty(self.rows, found.shape[-1])
        self._found[here.any(-1)] = found
        self._read = end

    def _begin(self, end: int) -> int:
        """Put the prefixes in place. Returns where the first piece ends."""
        batch = self._batch
        if batch.infix is None:
            if batch.longest:
                prefilled_cache(batch, self.cache)
            return end
        mask = self.visible[:, batch.longest :].long()
        read_before_last(self._model, self._ids, mask, batch, self.cache)
        self._read = self._ids.shape[1] - 1
        return self._ids.shape[1]


class RunningBatch:
    """The rows under way. Row numbers are 0 to `len(batch) - 1`; see `leave` for when they change.

    Not thread-safe: it belongs to the loop that runs its rows.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = _RowsCache()

    def __len__(self) -> int:
        return len(self._cache.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._cache.layers)

    def join(self, reading: Reading, index: int) -> int:
        """Add the row `index` of a finished `reading`; returns its number. When it fails, the rows
        there are as they were."""
        return self._cache.append(reading.cache, index, reading.visible[index])

    def leave(self, row: int) -> None:
        """Drop `row`; the last row takes its number."""
        self._cache.remove(row)

    @torch.no_grad()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """Logits `[rows, vocabulary]` after one more token in every row.

        When it fails, the rows are as they were, so it may be tried again.
        """
        device = self._model.device
        lengths = self._cache.begin(device)
        column = torch.arange(self._cache.width, device=device)
        read = Tokens(
            torch.tensor(tokens, device=device)[:, None],
            (column <= lengths[:, None]).long(),
            lengths[:, None],
        )
        logits = ModelRunner(self._model).forward(read, kv=self._cache)
        self._cache.end()
        return logits[:, -1]


class _RowsLayer(CacheLayerMixin):
    """One layer's keys and values, `[rows, heads, positions, dim]`, each row at the left."""

    is_sliding = False

    def __init__(self, rows: _RowsCache) -> None:
        super().__init__()
        self._rows = rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise NotImplementedError("rows join with `append`")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kw: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token per row at the row's own length; return all up to the longest."""
        rows = self._rows
        keys: Any = self.keys
        values: Any = self.values
        keys[rows.index, :, rows.column] = key_states[:, :, 0]
        values[rows.index, :, rows.column] = value_states[:, :, 0]
        count = len(rows.lengths)
        return keys[:count, :, : rows.width], values[:count, :, : rows.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._rows.width, 0

    def get_seq_length(self) -> int:
        return self._rows.width - 1

    def get_max_length(self) -> int:
        return -1


class _RowsCache(Cache):
    """What the model takes for its cache during a step of a `RunningBatch`."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.layers: Any = []
        self.lengths: list[int] = []
        self.width = 0
        self.index = self.column = torch.empty(0, dtype=torch.long)

    def append(self, cache: DynamicCache, index: int, visible: Tensor) -> int:
        """Add row `index` of `cache`, of whose columns only the `visible` `[columns]` are its."""
        row, length = len(self.lengths), int(visible.sum())
        if not self.layers:
            self.layers = [_RowsLayer(self) for _ in cache.layers]
        # Layers may differ in their room when this fails half-way; the rows are the same in all.
        # A run of columns is copied as a slice; the prefix region may leave gaps in others.
        first = int(visible.nonzero()[0])
        run = bool(visible[first : first + length].all())
        columns: Any = slice(first, first + length) if run else visible
        for layer, source in zip(self.layers, cache.layers, strict=True):
            read: Any = source
            for name in ("keys", "values"):
                found = getattr(read, name)[index][:, columns]
                buffer = _grown(getattr(layer, name), row + 1, length + 1, found)
                buffer[row, :, :length] = found
                # Hidden positions are multiplied by zero, which must not meet a NaN left there.
                buffer[row, :, length:] = 0
                setattr(layer, name, buffer)
        self.lengths.append(length)
        return row

    def remove(self, row: int) -> None:
        """Drop `row`; the last row takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            for layer in self.layers:
                for tensor in (layer.keys, layer.values):
                    tensor[row] = tensor[last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()
        if not self.lengths:
            self.layers = []  # an idle server keeps no buffers

    def begin(self, device: torch.device) -> Tensor:
        """Make ready for one more token per row. Returns the rows' lengths, `[rows]`."""
        self.width = max(self.lengths) + 1
        self.column = torch.tensor(self.lengths, device=device)
        self.index = torch.arange(len(self.lengths), device=device)
        for layer in self.layers:
            for name in ("keys", "values"):
                tensor = getattr(layer, name)
                if tensor.shape[2] < self.width:
                    setattr(layer, name, _grown(tensor, tensor.shape[0], self.width, tensor[0]))
        return self.column

    def end(self) -> None:
        """The token has been read."""
        self.lengths = [length + 1 for length in self.lengths]


def _grown(buffer: Tensor | None, rows: int, positions: int, like: Tensor) -> Tensor:
    """`buffer` `[rows, heads, positions, dim]` with room for so much; itself where it has it.

    like: `[heads, positions, dim]`, for the first one's shape and type
    """
    had = (0, 0) if buffer is None else (buffer.shape[0], buffer.shape[2])
    if buffer is not None and had[0] >= rows and had[1] >= positions:
        return buffer
    rows = max(rows, had[0]) if had[0] >= rows else max(rows, 2 * had[0])
    longer = max(positions + _GROWTH, had[1] + had[1] // 2)
    positions = longer if had[1] < positions else had[1]
    grown = like.new_zeros(rows, like.shape[0], positions, like.shape[2])
    if buffer is not None:
        grown[: had[0], :, : had[1]] = buffer
    return grown
