"""A gate before an adapter: inputs unlike its task's are read by the base alone.

An adapter that is on for everything changes everything the base reads. A linear classifier decides
here whether an input is one that the adapter was trained for. It reads what the input is made of
and how it ends, as the frozen base embeds it. It decides once, before the row is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ptkit.prefix import Compiled, KVLayout, KVPrefix
from ptkit.prefix_batch import PrefixBatch

#: Tokens of an input's end.
ENDING = 3


def input_features(embedding: nn.Embedding, input_ids: Tensor, read: Tensor) -> Tensor:
    """The mean embedding of every row's input, `[rows, hidden]` in float32, at a length of 1.

    input_ids: `[rows, tokens]`; read: the same, true at the tokens of the rows' inputs; a row
        without any has zeros
    """
    device = embedding.weight.device
    with torch.autocast(device.type, enabled=False):
        embedded = embedding(input_ids.to(device)).float()
        counted = read.to(device=device, dtype=embedded.dtype)[..., None]
        mean = (embedded * counted).sum(1) / counted.sum(1).clamp(min=1)
        # Embeddings are 0.02 large in one family and 10 in another, and 256 or 4096 wide.
        return nn.functional.normalize(mean - mean.mean(-1, keepdim=True), dim=-1)


def gate_features(embedding: nn.Embedding, input_ids: Tensor, read: Tensor) -> Tensor:
    """What a gate reads of every row's input, `[rows, 2 * hidden]`: `input_features` of all its
    tokens and of its last `ENDING`, where templates say what is asked."""
    read = read.to(torch.bool)
    last = read & (read.flip(-1).cumsum(-1).flip(-1) <= ENDING)
    parts = [input_features(embedding, input_ids, tokens) for tokens in (read, last)]
    return torch.cat(parts, dim=-1)


@dataclass(frozen=True, eq=False)
class Gate:
    """Opens for inputs that score above zero.

    weight, bias: of the score of `gate_features`, `[2 * hidden]` and `[1]`, in float32
    embedding: the base's table of input embeddings, `[vocabulary, hidden]`
    """

    weight: Tensor
    bias: Tensor
    embedding: nn.Embedding

    def opens(self, input_ids: Tensor, read: Tensor) -> Tensor:
        """Which rows are given the adapter, `[rows]` bool (arguments as `input_features`')."""
        features = gate_features(self.embedding, input_ids, read)
        return features @ self.weight + self.bias > 0

    @property
    def parameters(self) -> int:
        """Number of values that were fitted."""
        return self.weight.numel() + self.bias.numel()

    def map(self, change: Callable[[Tensor], Tensor]) -> Gate:
        """The same with `change` applied to its own tensors."""
        return replace(self, weight=change(self.weight), bias=change(self.bias))


@dataclass(frozen=True, eq=False)
class Gated:
    """A compiled adapter that only some inputs are given (see `Compiled`)."""

    compiled: Compiled
    gate: Gate

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens of a row that is given the adapter."""
        return self.compiled.virtual_tokens

    @property
    def positions(self) -> int:
        """See `KVPrefix.positions`."""
        return self.compiled.positions

    @property
    def infix(self) -> bool:
        """See `KVPrefix.infix`."""
        return self.compiled.infix

    @property
    def layout(self) -> KVLayout:
        """The layer shapes of the base model it was made for."""
        return self.compiled.layout

    @cached_property
    def nbytes(self) -> int:
        """Bytes held by the adapter and the gate."""
        return self.compiled.nbytes + self.gate.weight.nbytes + self.gate.bias.nbytes

    def for_rows(self, input_ids: Tensor, read: Tensor) -> PrefixBatch:
        """The prefixes of a batch's rows; none where the gate stays shut."""
        opened = self.gate.opens(input_ids, read)
        return self.compiled.for_rows(input_ids, read).only(opened)

    def for_input(self, ids: Sequence[int]) -> KVPrefix:
        """The prefix of one row whose input is `ids`, of no virtual tokens where the gate stays
        shut."""
        read = torch.ones(1, max(1, len(ids)), dtype=torch.bool)
        opened = self.gate.opens(torch.tensor([ids or [0]]), read & bool(ids))
        prefix = self.compiled.for_input(ids)
        return prefix if bool(opened) else prefix.emptied()

    def map(self, change: Callable[[Tensor], Tensor]) -> Gated:
        """The same with `change` applied to every tensor of its own."""
        return Gated(self.compiled.map(change), self.gate.map(change))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Gated:
        """The same with the adapter on `device` in `dtype`; the gate stays in float32."""
        return Gated(self.compiled.to(device, dtype), self.gate.map(lambda t: t.to(device)))

    def detach(self) -> Gated:
        """The same cut from the graph that made it."""
        return Gated(self.compiled.detach(), self.gate)
