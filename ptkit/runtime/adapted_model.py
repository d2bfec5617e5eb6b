"""A base with one adapter on it, as a model of transformers: for code that takes such a model.

A pipeline, transformers' `Trainer` and TRL's `SFTTrainer` call `forward`, `generate`,
`base_model` and `save_pretrained`. Here each of them runs the base with the adapter. The base
itself stays the plain base: the two share their modules, and nothing is set on the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from ptkit.errors import ModelError, UserError
from ptkit.prefix import Compiled
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.forward import (
    all_logits,
    input_tokens,
    last_of_rows,
    pad_rows,
    rows_for,
    supervised_losses,
)
from ptkit.runtime.generation import generate
from ptkit.runtime.runner import ModelRunner, Tokens
from ptkit.runtime.views import StandIn, twin

#: Arguments of a forward pass that change nothing of what is computed here.
_HARMLESS = frozenset({"return_dict", "use_cache", "token_type_ids", "logits_to_keep"})


class AdaptedModel:
    """What stands before a model's own class in `adapted_model`."""

    _plain: tuple[PreTrainedModel]
    _compile: Callable[[], Compiled]
    _pad: int
    _save: Callable[[str], None] | None
    training: bool
    __dict__: dict[str, Any]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        decoder_input_ids: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutput:
        """The loss, or the logits, of rows that read the adapter's prefix.

        input_ids, attention_mask: `[rows, tokens]`, padded at either side
        labels: as transformers': each at its own token, -100 where none is learnt. They are
            `[rows, tokens]`; of an encoder-decoder `[rows, target tokens]`
        num_items_in_batch: supervised tokens of the whole step; None: those of these rows

        With `labels` there is the loss alone, in nats per token: logits are made at supervised
        positions only, and not kept. Without them `logits` are `[rows, tokens, vocabulary]`.

        Raises ModelError for what has no place here: several rows packed into one
        (`position_ids`), a cache, embeddings in place of ids.
        """
        _require_known(others)
        ids = _given(input_ids)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        model, rows = self._plain[0], self._rows(ids, mask, labels)
        if labels is None:
            logits = self._logits(ids, mask, decoder_input_ids, rows)
            return CausalLMOutput(logits=cast(Any, logits))
        losses = supervised_losses(model, ids, mask, labels, rows)
        loss = losses.sum() / (losses.numel() if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutput(loss=cast(Any, loss))

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The rows with what follows each, `[rows, tokens + new tokens]`, padded at the right.

        options: anything transformers' `generate` takes, without `return_dict_in_generate`

        The token that ends a text is not among the new ones, unlike in transformers'.
        """
        ids = _given(options.pop("input_ids", inputs))
        config = options.get("generation_config")
        if options.pop("return_dict_in_generate", None) or (
            config is not None and config.return_dict_in_generate
        ):
            raise ModelError("`return_dict_in_generate` is not known here; leave it out")
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        prompts = [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
        written = generate(
            self._plain[0], prompts, rows_for(self._compile(), prompts),
            pad_token_id=self._pad, **options,
        )  # fmt: skip
        new, _ = pad_rows(written, self._pad, left=False)
        answers = new.to(ids.device)
        if self._plain[0].config.is_encoder_decoder:
            return answers
        read = ids.repeat_interleave(len(written) // len(prompts), 0)
        return torch.cat([read, answers], dim=1)

    def generate_batch(self, *_: Any, **__: Any) -> Any:
        """Raises ModelError: transformers' continuous batching has no place for a prefix."""
        raise ModelError(
            "transformers' continuous batching reads no prefix; `generate` takes many rows, and "
            "`ptkit serve` batches continuously"
        )

    init_continuous_batching = generate_batch
    continuous_batching_context_manager = generate_batch

    @property
    def base_model(self) -> nn.Module:
        """The backbone, whose hidden states are those of rows that read the adapter's prefix."""
        return _Backbone(self._plain[0].base_model, self)

    def save_pretrained(self, save_directory: Any, **_: Any) -> None:
        """Write the adapter to the folder, and what training it further needs.

        Raises UserError where it is not in training: its files are there already.
        """
        if self._save is None:
            raise UserError("the adapter is not in training; copy its folder")
        self._save(str(save_directory))

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        """As a module's; the base's frozen weights, which no checkpoint has, are not missed."""
        result = super().load_state_dict(state_dict, *args, **options)  # type: ignore[misc]
        frozen = self._plain[0].state_dict().keys()
        result.missing_keys[:] = [name for name in result.missing_keys if name not in frozen]
        return result

    def train(self, mode: bool = True) -> Any:
        """Let the base, too, know whether it trains: dropout and checkpointing ask it."""
        self._plain[0].train(mode)
        return super().train(mode)  # type: ignore[misc]

    def _rows(self, ids: Tensor, mask: Tensor, labels: Tensor | None) -> PrefixBatch:
        read = mask.bool() if labels is None else input_tokens(self._plain[0], mask, labels)
        return self._compile().for_rows(ids, read)

    def _logits(
        self, ids: Tensor, mask: Tensor, written: Tensor | None, rows: PrefixBatch
    ) -> Tensor:
        model = self._plain[0]
        if not model.config.is_encoder_decoder:
            return all_logits(model, ids, mask, rows)
        if written is None:
            raise ModelError("give `labels` or `decoder_input_ids`: the decoder writes them")
        return ModelRunner(model).forward(Tokens(ids, mask, written=written), rows)


class _Backbone(StandIn):
    """The backbone of an `AdaptedModel`; the output head is not part of it."""

    def __init__(self, inner: nn.Module, adapted: AdaptedModel) -> None:
        super().__init__(inner)
        self.__dict__["adapted"] = adapted  # no child: it has the backbone itself

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **others: Any
    ) -> Any:
        adapted: AdaptedModel = self.__dict__["adapted"]
        _require_known(others)
        ids = _given(input_ids)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        tokens = Tokens(ids, mask, last=last_of_rows(mask))
        runner = ModelRunner(adapted._plain[0])
        return runner.backbone(tokens, adapted._rows(ids, mask, None))


def adapted_model(
    model: PreTrainedModel,
    compile: Callable[[], Compiled],
    pad_token_id: int,
    *,
    parts: Mapping[str, nn.Module] | None = None,
    save: Callable[[str], None] | None = None,
) -> PreTrainedModel:
    """`model` with the adapter that `compile` gives, as a model of the same class.

    compile: called in every forward pass; differentiable in what is trained
    parts: modules that are trained, by name; they become children, so that optimisers find them
    save: writes the adapter to a folder
    """
    made = cast(Any, twin(model))
    made.__class__ = _class_for(cast(Any, type(model)))
    made.__dict__["_modules"] = {**model._modules, **(parts or {})}
    held = {"_plain": (model,), "_compile": compile, "_pad": pad_token_id, "_save": save}
    made.__dict__.update(held)
    return cast(PreTrainedModel, made)


@cache
def _class_for(kind: type) -> type:
    """Of the same name: a pipeline looks it up to tell what a model can do."""
    return type(kind.__name__, (AdaptedModel, kind), {"__module__": __name__})


def _given(ids: Tensor | None) -> Tensor:
    if ids is None:
        raise ModelError("give `input_ids`: an adapter is read with tokens")
    return ids


def _require_known(others: Mapping[str, Any]) -> None:
    """Raise ModelError for an argument of a forward pass that would have to change its result."""
    unknown = [name for name, value in others.items() if value is not None and value is not False]
    if wrong := sorted({*unknown} - _HARMLESS):
        raise ModelError(
            f"a forward pass with an adapter takes no `{wrong[0]}`: a row is one text, "
            "read from its beginning (turn packing and padding-free batches off)"
        )
