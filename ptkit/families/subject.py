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

from ptkit.families.kinds import Kind, kind_of
from ptkit.families.shapes import FIRST_WORD, VOCABULARY
from ptkit.runtime.base_model import Base, frozen_base


class NotApplicable(Exception):
    """There is nothing to check here; the message says why."""


@dataclass(frozen=True)
class Row:
    """Token ids that are read, and those that are to be written after them."""

    input: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Subject:
    """A way to make the same base model again and again, so that no check spoils the next.

    config: what it is made of; None for a real model, which is copied
    attention: implementation; None for the one transformers chooses
    """

    name: str
    make_model: Callable[[Subject], PreTrainedModel]
    tokenizer: Any
    words: list[int]
    kind: Kind
    config: PretrainedConfig | None = None
    attention: str | None = None
    dtype: torch.dtype = torch.float32

    def base(self) -> Base:
        """A fresh base model, frozen."""
        model: Any = self.make_model(self)
        name = self.name if self.config is None else f"a small {self.name}"
        return frozen_base(model.to(self.dtype), self.tokenizer, name)

    def attending(self, implementation: str) -> Subject:
        """The same with another attention. Raises NotApplicable where transformers has none."""
        own = self.base().model
        has = {"eager": True, "sdpa": own._supports_sdpa}[implementation]
        if own.config._attn_implementation == implementation or not has:
            raise NotApplicable(f"{type(own).__name__} has no {implementation} attention to change")
        return replace(self, attention=implementation)

    def changed(self, **settings: Any) -> Subject:
        """The same with other settings of its config (small models only)."""
        assert self.config is not None
        config = copy.deepcopy(self.config)
        for name, value in settings.items():
            setattr(config, name, value)
        return replace(self, config=config)

    def rows(self, *lengths: tuple[int, int]) -> list[Row]:
        """Rows of random words: the lengths of each one's input and answer."""
        draw = random.Random(7)
        rows = [
            Row(draw.choices(self.words, k=read), draw.choices(self.words, k=written))
            for read, written in lengths
        ]
        if self._language is not None:
            rows = [Row(row.input, [*row.answer[:-1], self._language]) for row in rows]
        return rows

    @cached_property
    def _language(self) -> int | None:
        """What an answer ends with in mBART, which begins with it: the token of its language."""
        config = self.base().model.config
        return config.decoder_start_token_id if config.model_type == "mbart" else None

    def text(self, tokens: int) -> str:
        """A text of `tokens` words (about as many tokens for a real tokenizer)."""
        return str(self.tokenizer.decode(random.Random(8).choices(self.words, k=tokens)))


def small_subject(name: str, config: PretrainedConfig) -> Subject:
    """A random model of `config`, with a word for every id."""
    words = list(range(FIRST_WORD, VOCABULARY - 1))
    return Subject(name, _random_model, word_tokenizer(), words, kind_of(config), config)


def real_subject(base: Base) -> Subject:
    """The model of `base` itself, copied for every check."""
    size = min(len(base.tokenizer), base.embedding.num_embeddings)
    special = set(base.tokenizer.all_special_ids)
    words = [i for i in range(size // 4, size // 2) if i not in special]

    def copied(subject: Subject) -> PreTrainedModel:
        model = copy.deepcopy(base.model)
        if subject.attention is not None:
            model.set_attn_implementation(subject.attention)
        return model

    return Subject(base.id, copied, base.tokenizer, words, kind_of(base.model.config))


def _random_model(subject: Subject) -> PreTrainedModel:
    """Weights large enough to make different words give different answers."""
    config = copy.deepcopy(subject.config)
    assert config is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = subject.kind.loader.from_config(config, attn_implementation=subject.attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(1.5 if config.model_type == "t5" else 6)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w3, w4, ... are tokens 3, 4, ...; 0 pads, 1 ends and 2 starts a text."""
    vocabulary = {"<pad>": 0, "<end>": 1, "<start>": 2}
    vocabulary |= {f"w{i}": i for i in range(FIRST_WORD, VOCABULARY - 1)}
    vocabulary["<unk>"] = VOCABULARY - 1
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", bos_token="<start>",
        unk_token="<unk>",
    )  # fmt: skip
