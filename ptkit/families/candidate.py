"""Who is checked: a program that adapts a model, behind one set of questions.

`Ours` is ptkit; `scripts/make_models_reference.py` puts PEFT behind the same questions.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptkit.data.encoded import EncodedExample
from ptkit.families.model_under_test import ModelUnderTest, NotApplicable, TokenRow
from ptkit.families.oracle import (
    Embedded,
    Inside,
    Labelled,
    Listened,
    Merged,
    Oracle,
    TextPromptOracle,
)
from ptkit.families.prefix_oracle import prefix_oracle
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.methods import ADAPTERS, Adapter, Demonstrations, adapter_from_files, create_adapter
from ptkit.methods.catalogue import all_sections
from ptkit.methods.soft_prompt import SoftPrompt
from ptkit.methods.text_prompt.adapter import TextPrompt
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.cache import conversation_cache
from ptkit.runtime.forward import (
    IGNORED,
    collate,
    head_logits,
    pad_rows,
    supervised_logits,
    token_losses,
)
from ptkit.runtime.generation import generate

#: Virtual tokens of every adapter in the matrix.
VIRTUAL_TOKENS = 5
_PROMPT = {"num_virtual_tokens": VIRTUAL_TOKENS, "start": "random"}

#: Column -> a method's settings, as a recipe has them.
METHODS: dict[str, dict[str, Any]] = {
    "prefix": {"kind": "prefix_tuning", **_PROMPT},
    "prefix (MLP)": {"kind": "prefix_tuning", **_PROMPT, "reparameterize": True,
                     "encoder_hidden_size": 16},
    "infix": {"kind": "prefix_tuning", "num_virtual_tokens": VIRTUAL_TOKENS, "start": "text",
              "position": "infix"},
    "prompt": {"kind": "prompt_tuning", **_PROMPT},
    "p-tuning": {"kind": "p_tuning", **_PROMPT, "encoder_hidden_size": 16},
    "text prompt": {"kind": "text_prompt", "separator": " "},
    "lora": {"kind": "lora", "rank": 4},
    "linear probe": {"kind": "linear_probe"},
}  # fmt: skip

#: Methods that nothing is asked about, and why. With `METHODS` they are all that there are.
NOT_ASKED: dict[str, str] = {
    kind: section.not_asked
    for kind, section in all_sections().items()
    if section.not_asked is not None
}


class Candidate(ABC):
    """An adapter on a model, made by some program."""

    @property
    @abstractmethod
    def oracle(self) -> Oracle:
        """What the adapter should do."""

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The base model below the adapter."""

    @abstractmethod
    def parameters(self) -> dict[str, nn.Parameter]:
        """All that is trained."""

    @abstractmethod
    def logits(self, rows: Sequence[TokenRow], *, left: bool) -> list[Tensor]:
        """Logits of each row's answer (see `Oracle.logits`), the rows being padded."""

    @abstractmethod
    def loss(self, rows: Sequence[TokenRow]) -> Tensor:
        """Mean cross-entropy of the answers' tokens, differentiable."""

    @abstractmethod
    def generate(self, inputs: Sequence[list[int]], **options: Any) -> list[list[int]]:
        """New tokens for each input; ends of text are ordinary words."""

    @abstractmethod
    def turns(self, inputs: Sequence[list[int]], tokens: int) -> list[list[int]]:
        """Answers to `inputs` as turns of one conversation, the cache kept between them."""

    @abstractmethod
    def reloaded(self, folder: Path) -> Candidate:
        """What comes back when the adapter is saved to `folder` and read on a fresh base."""

    @abstractmethod
    def off(self) -> AbstractContextManager[Any]:
        """Within this context what is yielded is to act as the base without any adapter."""

    @abstractmethod
    def training(self, *, checkpointed: bool) -> AbstractContextManager[None]:
        """Within this context losses are computed as in training."""


class PtkitCandidate(Candidate):
    """ptkit."""

    def __init__(self, tested: ModelUnderTest, method: str, adapter: Adapter) -> None:
        self.tested, self.method, self.adapter = tested, method, adapter
        self._oracle: Oracle | None = None

    @classmethod
    def made(cls, tested: ModelUnderTest, method: str) -> PtkitCandidate:
        """A fresh adapter. Raises ModelError where the method does not fit."""
        settings = dict(METHODS[method])
        if method == "infix":
            settings["start_text"] = tested.text(VIRTUAL_TOKENS)
        elif method == "text prompt":
            settings["instruction"] = tested.text(VIRTUAL_TOKENS)
            settings["examples"] = 0
        section = ADAPTERS[settings["kind"]].section_class(**settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            adapter = create_adapter(section, tested.base(), Demonstrations([], 0))
            for name, parameter in adapter.named_parameters():
                if "lora_B" in name:  # starts at zero, where LoRA does nothing
                    torch.nn.init.normal_(parameter, std=0.05)
            if adapter.head is not None:  # as after some training
                for parameter in adapter.head.copies.parameters():
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
        return cls(tested, method, adapter)

    @property
    def oracle(self) -> Oracle:
        if self._oracle is None:
            self._oracle = self._make_oracle()
        return self._oracle

    def _make_oracle(self) -> Oracle:
        adapter, kind = self.adapter, self.tested.kind
        if self.method == "lora":
            merged: Any = copy.deepcopy(adapter.peft_model)
            return Merged(self._with_head(merged.merge_and_unload()))
        model = self._with_head(self.tested.base().model)
        if isinstance(adapter, SoftPrompt):
            soft = adapter.embeddings().detach()
            if adapter.base.encoder_decoder:
                return Listened(model, soft)
            return Labelled(model, soft, as_text=False) if adapter.base.encoder else Embedded(
                model, soft
            )  # fmt: skip
        if isinstance(adapter, TextPrompt):
            return TextPromptOracle(model, adapter.token_ids.tolist())
        if self.method == "infix":
            tokens = adapter.base.tokenizer(
                self.tested.text(VIRTUAL_TOKENS), add_special_tokens=False
            )["input_ids"]
            return Inside(model, tokens)
        prefix = adapter.prefix()
        if prefix is None:
            return Merged(model)
        prefix = prefix.detach()
        return prefix_oracle(
            model, prefix.keys, prefix.values, takes_positions=kind.takes_positions
        )

    def _with_head(self, model: PreTrainedModel) -> PreTrainedModel:
        """`model`, of its own, with the weights of the adapter's head if it has one."""
        if (head := self.adapter.head) is not None:
            for name, trained in zip(head.names, head.copies, strict=True):
                model.get_submodule(name).load_state_dict(trained.state_dict())
        return model

    @property
    def model(self) -> PreTrainedModel:
        return self.adapter.base.model if self.adapter.head is None else self.adapter.head.view

    def parameters(self) -> dict[str, nn.Parameter]:
        return self.adapter.trainable()

    def _batch(self, rows: int, *, detached: bool = True) -> PrefixBatch | None:
        prefix = self.adapter.prefix()
        if prefix is None:
            return None
        return PrefixBatch.shared(prefix.detach() if detached else prefix, rows)

    def _read(self, rows: Sequence[TokenRow], batch: PrefixBatch | None, left: bool) -> Any:
        base = self.adapter.base
        if base.head is not None:
            read = collate([EncodedExample(row.input, row.answer) for row in rows], base)
            labels = read.pop("labels")
            found = head_logits(self.adapter.model, **read, batch=batch)
            learnt = labels != IGNORED
            return found.view(*labels.shape, -1)[learnt], labels[learnt]
        if base.encoder_decoder:
            ids, mask = pad_rows([r.input for r in rows], base.pad_token_id, left=left)
            labels, written = pad_rows([r.answer for r in rows], base.pad_token_id, left=False)
            labels = labels.masked_fill(written == 0, IGNORED)
        else:
            ids, mask = pad_rows([r.input + r.answer for r in rows], base.pad_token_id, left=left)
            labels = torch.full_like(ids, IGNORED)
            for i, row in enumerate(rows):
                first = mask[i].argmax() + len(row.input)
                labels[i, first : first + len(row.answer)] = torch.tensor(row.answer)
        ids, mask, labels = (t.to(base.model.device) for t in (ids, mask, labels))
        return supervised_logits(self.adapter.model, ids, mask, labels, batch)

    def logits(self, rows: Sequence[TokenRow], *, left: bool) -> list[Tensor]:
        with torch.no_grad():
            logits, _ = self._read(rows, self._batch(len(rows)), left)
        return list(logits.split([len(row.answer) for row in rows]))

    def loss(self, rows: Sequence[TokenRow]) -> Tensor:
        batch = self._batch(len(rows), detached=False)
        return token_losses(*self._read(rows, batch, False)).mean()

    def generate(self, inputs: Sequence[list[int]], **options: Any) -> list[list[int]]:
        if options.pop("cache_implementation", None) == "static":
            options["static_positions"] = 64
        return generate(
            self.adapter.model, list(inputs), self._batch(len(inputs)),
            pad_token_id=self.adapter.base.pad_token_id, do_sample=False, eos_token_id=None,
            **options,
        )  # fmt: skip

    def turns(self, inputs: Sequence[list[int]], tokens: int) -> list[list[int]]:
        if self.method == "infix":
            raise NotApplicable("an infix belongs to one input")
        base = self.adapter.base
        batch = self._batch(1)
        cache = conversation_cache(base.model, batch, 64)
        said: list[int] = []
        answers = []
        for read in inputs:
            said += read
            (answer,) = generate(
                self.adapter.model, [said], batch, pad_token_id=base.pad_token_id,
                do_sample=False, eos_token_id=None, max_new_tokens=tokens, read=cache,
            )  # fmt: skip
            said += answer
            answers.append(answer)
        return answers

    def reloaded(self, folder: Path) -> PtkitCandidate:
        if not self.parameters():
            raise NotApplicable("nothing is trained")
        write_adapter(folder / "adapter", self.adapter.files())
        base = self.tested.loaded_again().base()
        adapter = adapter_from_files(read_adapter(folder / "adapter"), base)
        return PtkitCandidate(self.tested, self.method, adapter)

    @contextmanager
    def off(self) -> Iterator[Any]:
        with self.adapter.off():
            yield self.adapter.base.model

    @contextmanager
    def training(self, *, checkpointed: bool) -> Iterator[None]:
        model: Any = self.adapter.model
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            model.gradient_checkpointing_disable()
            model.eval()
