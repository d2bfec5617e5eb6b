"""Loading the frozen base model."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ptkit.errors import ModelError
from ptkit.formats.fingerprint import model_fingerprint, tokenizer_fingerprint
from ptkit.prefix import KVLayout
from ptkit.recipe.schema import HeadedTask, ModelSection, Task, TokenClassificationTask
from ptkit.runtime.architecture import HeadKind, first_position, head_kind, is_encoder
from ptkit.runtime.compile import kv_layout
from ptkit.runtime.gguf_model import is_gguf
from ptkit.runtime.named_models import source_of
from ptkit.runtime.quantize import quantize_int8


class Labels(NamedTuple):
    """What a classification head is asked for: what it labels, and the labels in order."""

    kind: HeadKind
    names: tuple[str, ...]

    @classmethod
    def of(cls, task: Task) -> Labels | None:
        """Those of `task`; None for one that is solved in words."""
        if not isinstance(task, HeadedTask):
            return None
        kind: HeadKind = "token" if isinstance(task, TokenClassificationTask) else "sequence"
        return cls(kind, tuple(task.labels))


@dataclass(frozen=True)
class Head:
    """A classification head: what it labels, its labels in order, and the modules it is made of.

    modules: names within the model of everything that is not the pretrained backbone, and of what
        the checkpoint had no weights for; every adapter trains a copy of its own
    fresh: of those, the modules without weights in the checkpoint
    """

    kind: HeadKind
    labels: tuple[str, ...]
    modules: tuple[str, ...]
    fresh: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Base:
    """A frozen model with its tokenizer: a language model, causal or an encoder-decoder, or any
    backbone with a classification head (`head`).

    free_attention: whether training may choose the attention implementation that is fastest
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str | None = None
    head: Head | None = None
    quantized: bool = False
    free_attention: bool = False

    @cached_property
    def layout(self) -> KVLayout:
        """Shapes of the keys and values of each layer."""
        return kv_layout(self.model)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the weights (see `ptkit.formats.fingerprint`), before they were quantised; a
        new head has none."""
        return model_fingerprint(self.model, () if self.head is None else self.head.fresh)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Identity of the vocabulary."""
        return tokenizer_fingerprint(self.tokenizer)

    @property
    def encoder_decoder(self) -> bool:
        """Whether an encoder reads the input and a decoder writes the target."""
        return bool(self.model.config.is_encoder_decoder)

    @property
    def encoder(self) -> bool:
        """Whether every token sees those after it."""
        return is_encoder(self.model)

    @property
    def virtual_tokens_take_positions(self) -> bool:
        """Whether virtual tokens use up positions that the input could have had."""
        return not (self.encoder_decoder or self.encoder)

    @property
    def pad_token_id(self) -> int:
        """The id used for padding (never attended to)."""
        return int(self.tokenizer.pad_token_id)

    @property
    def first_token_id(self) -> int:
        """The token texts begin with; where the tokenizer names none, the one they end with.

        Raises ModelError where it names neither.
        """
        tokenizer = self.tokenizer
        for token in (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ModelError(f"the tokenizer of {self.id} names no token that texts begin or end with")

    @property
    def embedding(self) -> nn.Embedding:
        """The table of input embeddings, `[vocabulary, hidden]`."""
        table = self.model.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return table

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def max_positions(self) -> int | None:
        """The most positions the model was made for, virtual tokens included; None: unbounded."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return None if most is None else most - first_position(self.model)

    def require_positions(self, virtual: int, tokens: int, what: str) -> None:
        """Raise ModelError unless `virtual` + `tokens` positions fit into the model."""
        if not self.virtual_tokens_take_positions:
            virtual = 0
        if self.max_positions is not None and virtual + tokens > self.max_positions:
            raise ModelError(
                f"too few positions: {self.id} has {self.max_positions}, {what} takes {virtual} "
                f"virtual tokens and leaves {max(0, self.max_positions - virtual)}, but the data "
                f"needs {tokens}; lower the number of virtual tokens (or demonstrations), "
                "`max_input_tokens` or `max_target_tokens`"
            )


def resolve_device(name: str) -> torch.device:
    """`auto` picks CUDA, then MPS, then CPU; `cuda` is this process's own where several run on one
    machine. Raises ModelError for a device that is not there."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    name = own_device(name)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"device `{name}` is not available here ({error})") from error
    return device


def own_device(name: str) -> str:
    """`cuda` with the number that this process has on its machine, as torchrun and accelerate give
    numbers (accelerate picks the same one); other names as they are."""
    rank = int(os.environ.get("LOCAL_RANK", "-1"))
    if name != "cuda" or rank < 0 or not torch.cuda.is_available():
        return name
    return f"cuda:{rank % torch.cuda.device_count()}"


@contextmanager
def no_weights_bar() -> Iterator[None]:
    """Hide the bars of reading and writing weights; downloads keep theirs."""
    active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if active:
            logging.enable_progress_bar()


def load_base(section: ModelSection, labels: Labels | None = None) -> Base:
    """Load the base a recipe names, frozen and in evaluation mode.

    labels: of its classification head, a new one where the checkpoint has none of as many; None
        for a language model

    Raises ModelError when it cannot be found or is not such a model. Never runs code from a
    repository and reads safetensors only.
    """
    source = source_of(section.id, section.revision)
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise ModelError(f"cannot load the base model `{section.id}`: no such folder")
    device = resolve_device(section.device)
    revision = None if is_gguf(section.id) else section.revision
    options = {"revision": revision, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load the base model `{section.id}`: {_first_line(error)} "
            "(a hub id needs network and, for gated models, `hf auth login`)"
        ) from error
    try:
        with no_weights_bar():
            kind, extra = _class_for(config, labels)
            model, found = kind.from_pretrained(
                source,
                dtype=getattr(torch, section.dtype),
                attn_implementation=None if section.attention == "auto" else section.attention,
                use_safetensors=True,
                output_loading_info=True,
                **extra,
                **options,
            )
    except (OSError, ValueError, KeyError) as error:
        if "attention implementation" in str(error):
            raise ModelError(
                f"`{section.id}` has no `{section.attention}` attention; "
                "set `model.attention: auto`"
            ) from error
        raise ModelError(
            f"cannot load the weights of `{section.id}`: {_first_line(error)} "
            "(only safetensors are read, never pickles such as pytorch_model.bin)"
        ) from error
    model = model.to(device)
    if labels is not None:
        if section.quantize is not None:
            raise ModelError(
                "`model.quantize` is for language models; leave it out for classifiers"
            )
        fresh = {*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])}
        headed = headed_base(
            model, tokenizer, section.id, labels.names, fresh=fresh, revision=section.revision
        )
        return replace(headed, free_attention=section.attention == "auto")
    base = frozen_base(model, tokenizer, section.id, section.revision)
    base = replace(base, free_attention=section.attention == "auto")
    return base if section.quantize is None else quantized_base(base)


def quantized_base(base: Base) -> Base:
    """`base` with its linear layers in eight bits (see `ptkit.runtime.quantize`).

    It keeps the fingerprint: adapters of the one are loaded on the other, at their user's choice.
    """
    fingerprint = base.fingerprint  # while there are floating-point weights to read
    quantize_int8(base.model)
    base = replace(base, quantized=True)
    base.__dict__["fingerprint"] = fingerprint
    return base


def _class_for(config: Any, labels: Labels | None) -> tuple[Any, dict[str, Any]]:
    """The class that loads a model with these labels (None: a language model), and its options."""
    if labels is None:
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return kind, {}
    numbered = dict(enumerate(labels.names))
    return (
        AutoModelForTokenClassification
        if labels.kind == "token"
        else AutoModelForSequenceClassification,
        {
            "id2label": numbered,
            "label2id": {label: number for number, label in numbered.items()},
            # A checkpoint of a classifier with other labels: its head is replaced.
            "ignore_mismatched_sizes": True,
        },
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def frozen_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    id: str,
    revision: str | None = None,
) -> Base:
    """Freeze the language model `model` and pair it with its tokenizer (given a padding token if
    it has none). Raises ModelError for an encoder, which writes no text."""
    if head_kind(model) is None and is_encoder(model):
        raise ModelError(
            f"{id} is an encoder ({model.config.model_type}): it writes no text; give the recipe a "
            "task of `kind: sequence_classification` or `token_classification`, which trains a head"
        )
    _freeze(model, tokenizer, id)
    return Base(model, tokenizer, id, revision)


def headed_base(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    id: str,
    labels: Sequence[str],
    *,
    fresh: Collection[str] | None = None,
    revision: str | None = None,
) -> Base:
    """Freeze `model`, which has a classification head, and pair it with its tokenizer.

    fresh: names of the parameters that were not in the checkpoint; None: those of the head

    Raises ModelError for a model without such a head, or an encoder-decoder with one.
    """
    kind = head_kind(model)
    if kind is None or model.config.is_encoder_decoder:
        raise ModelError(
            f"{type(model).__name__} is not an encoder or decoder with a classification head"
        )
    _freeze(model, tokenizer, id)
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders look for the last real token
    names = {name for name, _ in model.named_parameters()}
    outside = {name for name in names if not name.startswith(f"{model.base_model_prefix}.")}
    new = outside if fresh is None else names & {*fresh}
    modules = {name.split(".")[0] for name in outside}
    modules |= {name.rpartition(".")[0] for name in new - outside}
    untrained = frozenset(m for m in modules if any(name.startswith(f"{m}.") for name in new))
    head = Head(kind, tuple(labels), tuple(sorted(modules)), untrained)
    return Base(model, tokenizer, id, revision, head)


def _freeze(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, id: str) -> None:
    model.requires_grad_(False)
    model.eval()
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ModelError(f"the tokenizer of {id} has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    if model.can_generate():
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        _end_where_the_tokenizer_ends(model, tokenizer)


def _end_where_the_tokenizer_ends(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Let generation stop at the tokenizer's end token too, which is the one targets are learnt
    with. Chat models often name another one in their generation config."""
    settings, end = model.generation_config, tokenizer.eos_token_id
    own = settings.eos_token_id
    ends = [own] if isinstance(own, int) else [*(own or ())]
    if end is not None and end not in ends:
        settings.eos_token_id = [*ends, end]
