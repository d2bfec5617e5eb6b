"""One adapter on one base, from Python: `load_adapter`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptkit.comparison.figures import size
from ptkit.comparison.notebook import shown_in_notebook
from ptkit.data.chat_template import ChatTemplate
from ptkit.data.tokens import listed
from ptkit.errors import AdapterError, ModelError, UserError
from ptkit.formats.adapter_files import read_adapter
from ptkit.formats.adapter_info import AdapterInfo
from ptkit.formats.places import find_adapter
from ptkit.methods import base_of, compile_files, require_same_base
from ptkit.methods.head import labels_of_files
from ptkit.prefix import Compiled
from ptkit.runtime.adapted_model import adapted_model
from ptkit.runtime.base_model import Base
from ptkit.runtime.cache import ReservedCache, prefilled_cache, sees_everything
from ptkit.runtime.forward import rows_for
from ptkit.runtime.generation import generate
from ptkit.runtime.given_base import given_base
from ptkit.runtime.tokenization import own_ends


class LoadedAdapter:
    """One adapter on one base, ready to answer.

    The prefix is compiled: nothing of the method runs when text is read, but the gate of an adapter
    that depends on the input. For many adapters, or different ones in one batch, see `AdapterBank`.
    """

    def __init__(self, path: Path, base: Base, prefix: Compiled, info: AdapterInfo) -> None:
        self.path, self.base, self.prefix, self.info = path, base, prefix, info

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        scores = self.info.metrics or {}
        row = {
            "adapter": self.path.name,
            "method": self.info.method_kind or "unknown",
            "base": self.base.id,
            "virtual tokens": str(self.prefix.virtual_tokens),
            "in memory": size(self.prefix.nbytes),
            **{name: f"{score.value:.1f}" for name, score in scores.items()},
        }
        scored = f"; n = {self.info.n_test} test rows" if scores else ""
        return shown_in_notebook([row], f"{self.path}{scored}")

    def inputs(self, encoding: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments for transformers' own `model.generate(**inputs, max_new_tokens=...)`.

        encoding: what the tokenizer gives, `input_ids` and `attention_mask` `[rows, tokens]`;
            several rows of unequal length are padded at the left (`padding_side="left"`)

        The answers start after `inputs["input_ids"].shape[1]` positions. Beam search and several
        returned sequences need the rows repeated first. Logits processors and lengths count the
        placeholders and the padding. Use `generate` of this class for those.
        """
        if self.prefix.infix:
            raise AdapterError(
                f"{self.path} stands within its input, which `model.generate` has no place for; "
                "use `generate` of this class"
            )
        ids, mask = encoding["input_ids"], encoding["attention_mask"]
        batch = self.prefix.for_rows(ids, mask)
        if batch.embeddings is not None:
            raise AdapterError(
                f"{self.path} is a soft prompt that the encoder reads with its input; use "
                "`generate` of this class"
            )
        if batch.placeless is not None:
            raise AdapterError(
                f"{self.path} takes no positions, and `model.generate` counts what its cache "
                "holds; use `generate` of this class"
            )
        if not sees_everything(self.base.model):
            raise ModelError(
                f"{type(self.base.model).__name__} has layers with a window or a state, where a "
                "prefix cannot be part of the cache; use `generate` of this class"
            )
        virtual = torch.full((len(ids), batch.longest), self.base.pad_token_id, dtype=ids.dtype)
        seen = batch.visible.to(mask.device, mask.dtype)  # all, but where a gate is shut
        return {
            "input_ids": torch.cat([virtual.to(ids.device), ids], dim=1),
            "attention_mask": torch.cat([seen, mask], dim=1),
            "past_key_values": prefilled_cache(
                self.base.model, batch, ReservedCache(batch.longest + ids.shape[1] + 64)
            ),
        }

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base with the adapter on it, as a model of transformers: for
        `pipeline("text-generation", model=adapter.model, tokenizer=adapter.tokenizer)`, say.

        See `AdaptedModel`. The base stays as it is.
        """
        pad = self.base.pad_token_id
        return adapted_model(self.base.model, lambda: self.prefix, pad)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, with the chat template that the adapter was trained with."""
        template = ChatTemplate.of_record(self.base.tokenizer, self.info.chat)
        own = copy.copy(self.base.tokenizer)
        own.chat_template = template.given or own.chat_template
        return own

    def generate(self, texts: str | Sequence[str], **options: Any) -> list[str]:
        """Answers to `texts`, or to one text; `options` are transformers' (`max_new_tokens`,
        `num_beams`, ...)."""
        prompts = self.base.encode(listed(texts))
        if not prompts:
            return []
        tokens = generate(
            self.base.model, prompts, rows_for(self.prefix, prompts),
            pad_token_id=self.base.pad_token_id, **options,
        )  # fmt: skip
        return self.base.decode(tokens)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The answer to a conversation, in the chat template and with the system prompt that the
        adapter was trained with. Where it records none, the base's template is used.

        messages: `role` and `content` each, a question last; options: as for `generate`

        Raises UserError where there is no template.
        """
        template = ChatTemplate.of_record(self.base.tokenizer, self.info.chat)
        if not template.exists:
            raise UserError(f"neither {self.path} nor {self.base.id} has a chat template")
        prompt = template.ids(template.with_system([*messages]))
        ends = sorted({*own_ends(self.base.model), *template.ends})
        tokens = generate(
            self.base.model, [prompt], rows_for(self.prefix, [prompt]),
            pad_token_id=self.base.pad_token_id, **{"eos_token_id": ends, **options},
        )  # fmt: skip
        return self.base.decode(tokens)[0]


def load_adapter(
    source: str | Path,
    model: Base | PreTrainedModel | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> LoadedAdapter:
    """Read, check and compile the adapter `source`: a folder, a run, or `user/repo[@revision]`.

    model: the base, loaded or by name; default: the one the adapter names
    tokenizer: its tokenizer, where `model` is a transformers model

    Raises AdapterError when it is damaged, unsafe, for another base, or has no virtual tokens
    (LoRA: give it to PEFT, or to an `AdapterBank`). Raises ModelError when the base cannot be
    loaded.
    """
    path = find_adapter(Path(source))
    files = read_adapter(path)
    if labels_of_files(files) is not None:
        raise AdapterError(
            f"{source} is an adapter of a classifier; open it with `ptkit.classifier(...)`"
        )
    if isinstance(model, Base | PreTrainedModel):
        base = given_base(model, tokenizer, "load_adapter(source, model, tokenizer)")
    else:
        base = base_of(files, model, str(source))
    require_same_base(files, base, str(source), chosen=model is not None)
    prefix = compile_files(files, base)
    if prefix is None:
        raise AdapterError(
            f"{source} is a {files.peft_type} adapter: it has no virtual tokens; load it with "
            "PEFT, or into an AdapterBank"
        )
    return LoadedAdapter(path, base, prefix, files.info)
