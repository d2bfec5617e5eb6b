"""What the checks are run on: a base model, small and random or the real thing."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from ptkit.families.kinds import ModelKind
from ptkit.families.shapes import FIRST_WORD, VOCABULARY
from ptkit.runtime.attention_choice import attention_of, set_attention, takes_sdpa
from ptkit.runtime.base_model import Base, frozen_base, headed_base

#: Of the classification heads of small models.
LABELS = ("yes", "no", "maybe")


class NotApplicable(Exception):
    """There is nothing to check here; the message says why."""


@dataclass(frozen=True)
class TokenRow:
    """Token ids that are read, and those that are to be written after them.

    labelled: `answer` are numbers of labels instead, of the input or of each of its tokens
    """

    input: list[int]
    answer: list[int]
    labelled: bool = False

    @property
    def whole(self) -> list[int]:
        """The tokens of one text: the input, and the answer if that is written after it."""
        return self.input if self.labelled else self.input + self.answer


@dataclass(frozen=True)
class ModelUnderTest:
    """A way to make the same base model again and again, so that no check spoils the next.

    config: what it is made of; None for a real model, which is copied
    attention: implementation; None for the one transformers chooses
    labels: of its classification head, if it has one
    again: it was loaded a second time, and what the checkpoint has no weights for is new
    """

    name: str
    make_model: Callable[[ModelUnderTest], PreTrainedModel]
    tokenizer: Any
    words: list[int]
    kind: ModelKind
    config: PretrainedConfig | None = None
    attention: str | None = None
    dtype: torch.dtype = torch.float32
    labels: tuple[str, ...] = LABELS
    again: bool = False

    def base(self) -> Base:
        """A fresh base model, frozen."""
        model: Any = self.make_model(self)
        if model.dtype != self.dtype:  # what is rounded has no other type
            model.to(self.dtype)
        name = self.name if self.config is None else f"a small {self.name}"
        if self.kind.head is None:
            return frozen_base(model, self.tokenizer, name)
        new = () if self.config is None else _new_names(self.kind, model)
        return headed_base(model, self.tokenizer, name, self.labels, fresh=new)

    def loaded_again(self) -> ModelUnderTest:
        """The same in another process, where a new head starts anew."""
        return replace(self, again=True)

    def attending(self, implementation: str) -> ModelUnderTest:
        """The same with another attention. Raises NotApplicable where transformers has none."""
        own = self.base().model
        has = {"eager": True, "sdpa": own._supports_sdpa and takes_sdpa(own.config)}[implementation]
        if attention_of(own) == implementation or not has:
            raise NotApplicable(f"{type(own).__name__} has no {implementation} attention to change")
        return replace(self, attention=implementation)

    def changed(self, **settings: Any) -> ModelUnderTest:
        """The same with other settings of its config (small models only)."""
        assert self.config is not None
        config = copy.deepcopy(self.config)
        for name, value in settings.items():
            setattr(config, name, value)
        return replace(self, config=config)

    def rows(self, *lengths: tuple[int, int]) -> list[TokenRow]:
        """Rows of random words: the lengths of each one's input and answer (which with a
        classification head is as long as it has to be)."""
        draw = random.Random(7)
        if self.kind.head is not None:
            labelled = [1 if self.kind.head == "sequence" else read for read, _ in lengths]
            return [
                TokenRow(
                    draw.choices(self.words, k=read),
                    draw.choices(range(len(self.labels)), k=count),
                    labelled=True,
                )
                for (read, _), count in zip(lengths, labelled, strict=True)
            ]
        rows = [
            TokenRow(draw.choices(self.words, k=read), draw.choices(self.words, k=written))
            for read, written in lengths
        ]
        if self._language is not None:
            rows = [TokenRow(row.input, [*row.answer[:-1], self._language]) for row in rows]
        return rows

    @cached_property
    def _language(self) -> int | None:
        """What an answer ends with in mBART, which begins with it: the token of its language."""
        config = self.base().model.config
        return config.decoder_start_token_id if config.model_type == "mbart" else None

    def text(self, tokens: int) -> str:
        """A text of `tokens` words (about as many tokens for a real tokenizer)."""
        return str(self.tokenizer.decode(random.Random(8).choices(self.words, k=tokens)))


def small_model(name: str, config: PretrainedConfig, kind: ModelKind) -> ModelUnderTest:
    """A random model of `config`, with a word for every id, used as `kind`."""
    words = list(range(FIRST_WORD, VOCABULARY - 1))
    if kind.head is not None:
        config = copy.deepcopy(config)
        config.num_labels = len(LABELS)
    return ModelUnderTest(name, _random_model, word_tokenizer(config), words, kind, config)


def real_model(base: Base, kind: ModelKind) -> ModelUnderTest:
    """The model of `base` itself, used as `kind`, copied for every check."""
    size = min(len(base.tokenizer), base.embedding.num_embeddings)
    special = set(base.tokenizer.all_special_ids)
    words = [i for i in range(size // 4, size // 2) if i not in special]

    def copied(tested: ModelUnderTest) -> PreTrainedModel:
        model = copy.deepcopy(base.model)
        if tested.attention is not None:
            set_attention(model, tested.attention)
        return model

    labels = LABELS if base.head is None else base.head.labels
    return ModelUnderTest(base.id, copied, base.tokenizer, words, kind, labels=labels)


def _random_model(tested: ModelUnderTest) -> PreTrainedModel:
    """Weights large enough to make different words give different answers."""
    config = copy.deepcopy(tested.config)
    assert config is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = tested.attention or (None if takes_sdpa(config) else "eager")
        model = tested.kind.loader.from_config(config, attn_implementation=own)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1.5 if config.model_type == "t5" else 6)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            if tested.again:
                for name in _new_names(tested.kind, model):
                    parameter = model.get_parameter(name)
                    parameter.copy_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _new_names(kind: ModelKind, model: PreTrainedModel) -> list[str]:
    """Names of the parameters that the checkpoints `model` starts from have no weights for."""
    loader = next((c for c in kind.pretrained if type(model.config) in c._model_mapping), None)
    if loader is None:
        return []
    with torch.device("meta"):
        known = loader.from_config(copy.deepcopy(model.config)).state_dict()
    return [name for name, _ in model.named_parameters() if name not in known]


def word_tokenizer(config: PretrainedConfig) -> PreTrainedTokenizerFast:
    """Words w3, w4, ... are tokens 3, 4, ...; those below are what `config` says they are."""
    vocabulary = {
        "<pad>": config.pad_token_id, "<end>": config.eos_token_id, "<start>": config.bos_token_id,
    }  # fmt: skip
    vocabulary |= {f"w{i}": i for i in range(FIRST_WORD, VOCABULARY - 1)}
    vocabulary["<unk>"] = VOCABULARY - 1
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<start>",
        unk_token="<unk>",
    )  # fmt: skip
