"""The one way of running a base model: a forward pass whose prefixes are among its arguments.

Training, scoring, retention, generation and serving all run the model here. What a pass computes
depends on its arguments alone, so any number of threads run passes of one model.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ptkit.errors import ModelError
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.architecture import is_encoder
from ptkit.runtime.attention import Call, Repeats, prefixed_positions
from ptkit.runtime.attention_choice import set_attention, take_prefixes
from ptkit.runtime.attention_sites import takes_positions
from ptkit.runtime.backends import backend_of
from ptkit.runtime.fused import has_plain_head, head_losses
from ptkit.runtime.infix import placed_before_last
from ptkit.runtime.last_layer import last_block_on
from ptkit.runtime.locks import lock_of, running
from ptkit.runtime.paged_attention import PagedCache
from ptkit.runtime.placement import own_part
from ptkit.runtime.soft_prompts import put_soft_prompts, skipped_positions, with_embeddings
from ptkit.runtime.unpadded import unpadded
from ptkit.runtime.views import StandIn, looks_into_views, name_of, viewed


@dataclass(frozen=True)
class Encoded:
    """What an encoder-decoder's encoder read: its outputs, and the mask `[rows, tokens]` of them,
    soft prompts included."""

    outputs: Any
    mask: Tensor


@dataclass(frozen=True)
class Tokens:
    """The tokens of a forward pass.

    ids, mask: `[rows, tokens]`; the mask is 1 on real tokens, and covers what is in a cache, too
    positions: `[rows, tokens]`; None: they follow from the mask and the prefixes
    last: `[rows]`, index of the last token of each row's input (an infix stands before it). None
        where virtual tokens have no positions: in encoders and encoder-decoders
    written: `[rows, target tokens]` that an encoder-decoder's decoder is given
    encoded: what its encoder made of `ids`, where that is known
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor | None = None
    last: Tensor | None = None
    written: Tensor | None = None
    encoded: Encoded | None = None


@dataclass(frozen=True)
class Want:
    """What is wanted of a forward pass.

    what: the logits; or the hidden states that the output head reads; or the cross-entropy in nats
        of `targets`, float32
    at: `[rows, tokens]` bool, the positions it is wanted at, whose results come one after the
        other, `[n, ...]`; None: the logits everywhere, `[rows, tokens, vocab]`
    targets: `[n]`, the token id that each of these positions should predict
    nothing_else: layers may leave out what no wanted position depends on
    """

    what: Literal["logits", "hidden", "losses"] = "logits"
    at: Tensor | None = None
    targets: Tensor | None = None
    nothing_else: bool = False


class ModelRunner:
    """Runs one model, as often and in as many threads as one likes. It holds nothing but the model:
    what is known of it is asked once and kept with it (`ptkit.runtime.facts`)."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def prepare(self) -> None:
        """Ask the model what passes need to know of it. It is asked by the first pass otherwise,
        and a compiler that traces this must not see it."""
        take_prefixes(self.model)
        with suppress(ModelError):  # said where a prefix is to be put into it
            backend_of(self.model)

    def forward(
        self,
        tokens: Tokens,
        prefixes: PrefixBatch | None = None,
        kv: Cache | None = None,
        want: Want | None = None,
    ) -> Tensor:
        """What is wanted of `tokens`, each row behind its own prefix.

        prefixes: None: the plain base
        want: None: the logits at every position
        kv: what was read before, which the tokens are added to; prefixes may be in it already

        Raises ModelError for models whose attention can neither be replaced nor be handed a cache,
        or that use an implementation other than sdpa and eager.
        """
        model = self.model
        with running(model):
            call = self._call(tokens, prefixes, kv)
            if want is None or want.at is None:
                return self._output(call).logits
            if not looks_into_views(model):  # it is read whole
                logits = self._output(call).logits[want.at]
                return logits if want.targets is None else token_losses(logits, want.targets)
            kept = unpadded(model, call, tokens.mask, want.at) if kv is None else None
            at = want.at
            if kept is not None:
                at = at.flatten().index_select(0, kept)[None]
                want = replace(want, at=at)
            if want.what == "losses":
                return self._losses(call, prefixes, want)
            if want.what == "hidden":
                return self._hidden(call, prefixes, want)
            self._leave_out(call, prefixes, want)
            self._at_head(call, _Selecting(model.get_output_embeddings(), at))
            return self._output(call).logits

    def attention_weights(self, tokens: Tokens, prefixes: PrefixBatch) -> list[Tensor]:
        """The weights of each layer's attention, `[rows, heads, tokens, virtual tokens + tokens]`.

        For looking at a model, not for running it: other threads wait.
        """
        model = self.model
        with lock_of(model):
            own = model.config._attn_implementation
            set_attention(model, "eager")  # the others do not return their weights
            try:
                call = self._call(tokens, prefixes, None)
                backbone = viewed(model, call.replaced).base_model
                output: Any = backbone(**call.arguments, output_attentions=True)
            finally:
                set_attention(model, own)
        return list(output.attentions)

    @torch.no_grad()
    def encode(self, ids: Tensor, mask: Tensor, prefixes: PrefixBatch | None) -> Encoded:
        """What an encoder-decoder's encoder makes of `ids` `[rows, tokens]`."""
        model = self.model
        read = with_embeddings(model, ids, mask, prefixes)
        call = Call(dict(read))
        encoder: Any = model.get_encoder()
        with running(model):
            self._put(call, prefixes)
            if prefixes is not None and prefixes.embeddings is not None:
                encoder = viewed(encoder, skipped_positions(encoder, prefixes.embeddings.shape[1]))
            outputs = encoder(**call.arguments)
        return Encoded(outputs, read["attention_mask"])

    def backbone(self, tokens: Tokens, prefixes: PrefixBatch | None) -> Any:
        """What the backbone makes of `tokens`: its output, whose `last_hidden_state` is what the
        output head reads. Raises ModelError for a soft prompt that is read as embeddings."""
        if prefixes is not None and prefixes.embeddings is not None:
            raise ModelError(
                f"{type(self.model).__name__} reads a soft prompt as embeddings, which lengthen "
                "the hidden states; use prefix_tuning where hidden states are wanted"
            )
        with running(self.model):
            call = self._call(tokens, prefixes, None)
            return viewed(self.model, call.replaced).base_model(**call.arguments)

    def step(self, arguments: dict[str, Any], prefixes: Repeats) -> Any:
        """The output of one forward pass that transformers' `generate` makes with `arguments`, its
        rows attending to `prefixes`; hooks on the model have run already."""
        call = Call(dict(arguments))
        backend_of(self.model).put(self.model, prefixes, call)
        return call.after(viewed(self.model, call.replaced).forward(**call.arguments))

    def _call(self, tokens: Tokens, prefixes: PrefixBatch | None, kv: Cache | None) -> Call:
        """The forward pass that reads `tokens` behind `prefixes`."""
        model = self.model
        if prefixes is not None and prefixes.longest and tokens.last is not None:
            prefixes = placed_before_last(model, prefixes, tokens.mask, tokens.last)
        if model.config.is_encoder_decoder:
            call = Call(self._written(tokens, prefixes))
        else:
            call = Call({"input_ids": tokens.ids, "attention_mask": tokens.mask})
            if kv is not None:
                call.arguments |= {"past_key_values": kv, "use_cache": True}
            elif not (tokens.last is None and is_encoder(model)):
                call.arguments["use_cache"] = False
            positions = tokens.positions
            if positions is None and tokens.last is not None:
                # Not told, a model takes padding at the left for words.
                positions = prefixed_positions(prefixes or _no_prefixes(tokens.mask), tokens.mask)
            if positions is not None and takes_positions(model):
                call.arguments["position_ids"] = positions
        if isinstance(kv, PagedCache):
            kv.put(model, call)
        self._put(call, prefixes)
        if prefixes is not None and prefixes.embeddings is not None and tokens.encoded is None:
            put_soft_prompts(model, prefixes, call)
        return call

    def _written(self, tokens: Tokens, prefixes: PrefixBatch | None) -> dict[str, Any]:
        """The arguments of an encoder-decoder."""
        written = {"decoder_input_ids": tokens.written, "use_cache": False}
        if tokens.encoded is not None:
            known = tokens.encoded
            return {"encoder_outputs": known.outputs, "attention_mask": known.mask, **written}
        return {**with_embeddings(self.model, tokens.ids, tokens.mask, prefixes), **written}

    def _put(self, call: Call, prefixes: PrefixBatch | None) -> None:
        if prefixes is not None and prefixes.longest:
            backend_of(self.model).put(self.model, Repeats(own_part(self.model, prefixes)), call)

    def _output(self, call: Call) -> Any:
        return call.after(viewed(self.model, call.replaced)(**call.arguments))

    def _at_head(self, call: Call, head: StandIn) -> None:
        call.replaced[name_of(self.model, head.inner)] = head

    def _leave_out(self, call: Call, prefixes: PrefixBatch | None, want: Want) -> None:
        """Let the last layer leave out what nobody wants."""
        lengthened = prefixes is not None and prefixes.embeddings is not None
        if want.nothing_else and not lengthened:
            assert want.at is not None
            call.replaced |= last_block_on(self.model, want.at)

    def _hidden(self, call: Call, prefixes: PrefixBatch | None, want: Want) -> Tensor:
        assert want.at is not None
        head = _Listening(self.model.get_output_embeddings())
        self._leave_out(call, prefixes, want)
        self._at_head(call, head)
        self._output(call)
        return head.heard[0][want.at]

    def _losses(self, call: Call, prefixes: PrefixBatch | None, want: Want) -> Tensor:
        assert want.targets is not None
        head: Any = self.model.get_output_embeddings()
        if has_plain_head(self.model):
            return head_losses(head, self._hidden(call, prefixes, want), want.targets)
        self._leave_out(call, prefixes, want)
        assert want.at is not None
        self._at_head(call, _Selecting(head, want.at))
        return token_losses(self._output(call).logits, want.targets)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of each supervised token, `[n]`, computed in float32."""
    return nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _no_prefixes(mask: Tensor) -> PrefixBatch:
    return PrefixBatch((), (), mask.new_zeros(len(mask), 0).bool())


class _Selecting(StandIn):
    """An output head that reads the positions `at` only; its logits are `[n, vocab]`.

    Whatever the family does after its head (soft caps, scaling) is element-wise and stays as it is.
    """

    def __init__(self, inner: nn.Module, at: Tensor) -> None:
        super().__init__(inner)
        self.at = at

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden[self.at])


class _Listening(StandIn):
    """An output head that leaves what it is given in `heard`, and reads one position of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__(inner)
        self.heard: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.heard.append(hidden)
        return self.inner(hidden[:1, :1].detach())
