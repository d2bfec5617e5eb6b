"""Several prefixes of which every row gets a mean of its own: an input-dependent prompt, compiled.

The weights come from the row's input alone, before the model reads it, so a row's prefix is made
once. From then on it is a prefix like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ptkit.prefix import KVLayout, KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.gate import input_features


@dataclass(frozen=True, eq=False)
class MixedPrefixes:
    """Prefixes and the gate that weighs them (see `ptkit.methods.prefix_mixture`).

    prefixes: of one base and length
    weight, bias: the gate, `[prefixes, hidden]` and `[prefixes]`, in float32
    embedding: the base's table of input embeddings, `[vocabulary, hidden]`
    top: how many prefixes a row gets; None: all
    """

    prefixes: tuple[KVPrefix, ...]
    weight: Tensor
    bias: Tensor
    embedding: nn.Embedding
    top: int | None = None

    @property
    def virtual_tokens(self) -> int:
        """Number of virtual tokens of a row."""
        return self.prefixes[0].virtual_tokens

    @property
    def positions(self) -> int:
        """See `KVPrefix.positions`."""
        return self.prefixes[0].positions

    @property
    def infix(self) -> bool:
        """See `KVPrefix.infix`."""
        return self.prefixes[0].infix

    @property
    def layout(self) -> KVLayout:
        """The layer shapes of the base model it was made for."""
        return self.prefixes[0].layout

    @cached_property
    def nbytes(self) -> int:
        """Bytes held by all prefixes and the gate."""
        return sum(p.nbytes for p in self.prefixes) + self.weight.nbytes + self.bias.nbytes

    def weights(self, input_ids: Tensor, read: Tensor) -> Tensor:
        """What each prefix counts in each row, `[rows, prefixes]`, adding up to 1.

        input_ids: `[rows, tokens]`
        read: the same, true at the tokens of the rows' inputs. Their mean embedding is taken, at a
            length of 1; without any, the bias decides

        With `top`, the others count nothing, and the gradient is that of all prefixes' weights
        (straight through; Bengio et al. 2013, https://arxiv.org/abs/1308.3432).
        """
        with torch.autocast(self.embedding.weight.device.type, enabled=False):
            seen = input_features(self.embedding, input_ids, read)
            logits = nn.functional.linear(seen, self.weight.float(), self.bias.float())
            soft = logits.softmax(-1)
            if self.top is None:
                return soft
            likeliest = logits.topk(self.top, dim=-1)
            kept = torch.zeros_like(soft).scatter(
                -1, likeliest.indices, likeliest.values.softmax(-1)
            )
            return kept.detach() + (soft - soft.detach())

    def for_rows(self, input_ids: Tensor, read: Tensor) -> PrefixBatch:
        """The prefixes of a batch's rows (see `Compiled.for_rows`)."""
        weights = self.weights(input_ids, read)
        shared = PrefixBatch.shared(self.prefixes[0], len(weights))
        parts = [(*p.keys, *p.values) for p in self.prefixes]
        # [values of one prefix], all layers in one operation; a sum over prefixes rather than a
        # matrix product, so that a row's result does not depend on how many rows there are.
        flat = [torch.cat([t.flatten() for t in own]) for own in parts]
        shares = weights.to(flat[0].dtype)
        mixed = shares[:, :1] * flat[0]
        for i, values in enumerate(flat[1:], start=1):
            mixed = mixed + shares[:, i : i + 1] * values
        sizes = [t.numel() for t in parts[0]]
        made = [
            piece.view(len(weights), *like.shape)
            for piece, like in zip(mixed.split(sizes, dim=1), parts[0], strict=True)
        ]
        layers = len(self.prefixes[0].keys)
        return replace(shared, keys=tuple(made[:layers]), values=tuple(made[layers:]))

    def for_input(self, ids: Sequence[int]) -> KVPrefix:
        """The prefix of one row whose input is `ids`."""
        read = torch.ones(1, max(1, len(ids)), dtype=torch.bool)
        batch = self.for_rows(torch.tensor([ids or [0]]), read & bool(ids))
        return replace(
            self.prefixes[0],
            keys=tuple(k[0] for k in batch.keys),
            values=tuple(v[0] for v in batch.values),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> MixedPrefixes:
        """The same with `change` applied to every tensor of its own."""
        return replace(
            self,
            prefixes=tuple(p.map(change) for p in self.prefixes),
            weight=change(self.weight),
            bias=change(self.bias),
        )

    def to(self, device: torch.device | str, dtype: torch.dtype) -> MixedPrefixes:
        """The same with prefixes on `device` in `dtype`; the gate stays in float32."""
        return replace(
            self,
            prefixes=tuple(p.to(device, dtype) for p in self.prefixes),
            weight=self.weight.to(device),
            bias=self.bias.to(device),
        )

    def detach(self) -> MixedPrefixes:
        """The same cut from the graph that made it, and from the parameters of its gate."""
        cut = self.map(lambda t: t.detach())
        return replace(cut, weight=cut.weight.clone(), bias=cut.bias.clone())
