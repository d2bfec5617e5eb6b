"""Loading the frozen base model."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ptkit.errors import ModelError, did_you_mean
from ptkit.extras import install_line
from ptkit.formats import checkpoint
from ptkit.formats.fingerprint import Identity, legacy_fingerprint, of_loaded, tokenizer_fingerprint
from ptkit.launched import require_supported_launch
from ptkit.options import Attention, Dtype, Quantize
from ptkit.prefix import KVLayout
from ptkit.runtime.architecture import first_position, head_kind, is_encoder
from ptkit.runtime.attention_choice import asked_attention
from ptkit.runtime.block_layers import BlockEmbedding, unpacked
from ptkit.runtime.compile import kv_layout
from ptkit.runtime.devices import resolve_device
from ptkit.runtime.freezing import freeze
from ptkit.runtime.gguf_blocks import in_blocks
from ptkit.runtime.gguf_model import is_gguf, stored_type
from ptkit.runtime.heads import Head, Labels, class_for, label_names
from ptkit.runtime.label_order import order_of, reorder, told
from ptkit.runtime.model_names import TINY_EN
from ptkit.runtime.named_models import gguf_behind, source_of
from ptkit.runtime.placement import full_weight, is_whole, processes_of
from ptkit.runtime.progress import no_weights_bar
from ptkit.runtime.quantize import logical_size, quantization_config, require_quantized
from ptkit.runtime.runner import ModelRunner
from ptkit.runtime.spread import Spread
from ptkit.runtime.tokenization import TokenizerMixin


@dataclass(frozen=True)
class Base(TokenizerMixin):
    """A frozen model with its tokenizer: a language model, causal or an encoder-decoder, or any
    backbone with a classification head (`head`).

    quantized: whether its frozen matrices are in fewer bits than a floating type's
    stored: the ggml type of the GGUF file it was read from, or how `model.quantize` rounded it
    read: the identity of the checkpoint it was loaded from; None: it was made in memory
    free_attention: whether training may choose the attention implementation that is fastest
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str
    revision: str | None = None
    head: Head | None = None
    quantized: bool = False
    stored: str | None = None
    read: Identity | None = None
    free_attention: bool = False

    @cached_property
    def layout(self) -> KVLayout:
        """Shapes of the keys and values of each layer."""
        return kv_layout(self.model)

    @cached_property
    def identity(self) -> Identity:
        """Which model it is (see `ptkit.formats.fingerprint`), whatever its precision; a new head
        plays no part."""
        return self.read or of_loaded(self.model, () if self.head is None else self.head.fresh)

    @property
    def fingerprint(self) -> str:
        """The identity's 16 hex digits."""
        return self.identity.fingerprint

    @cached_property
    def legacy_fingerprint(self) -> str:
        """What adapters of earlier versions recorded as its fingerprint."""
        if not self.quantized and self.model.dtype != torch.float16 and is_whole(self.model):
            without = () if self.head is None else self.head.fresh
            return legacy_fingerprint(self.model, without)
        # It was taken of floating-point weights, before any were rounded.
        labels = None if self.head is None else Labels(self.head.kind, self.head.labels)
        plain = load_base(self.id, revision=self.revision, device="cpu", labels=labels)
        return plain.legacy_fingerprint

    def remember(self) -> None:
        """Read what is told by the names of the model's modules, before an adapter changes them."""
        self.identity, self.layout  # noqa: B018
        if not self.quantized and self.model.dtype != torch.float16 and is_whole(self.model):
            self.legacy_fingerprint  # noqa: B018

    @property
    def precision(self) -> str:
        """What its values are rounded to: `float32`, `bfloat16`, `int8`, `nf4`, ggml's `Q4_1`."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        if self.stored is not None and (self.quantized or dtype == "float32"):
            return self.stored
        return dtype

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Identity of the vocabulary."""
        return tokenizer_fingerprint(self.tokenizer)

    @property
    def runner(self) -> ModelRunner:
        """What runs its model."""
        return ModelRunner(self.model)

    @property
    def processes(self) -> int:
        """Over how many processes every layer is split (tensor parallelism); 1: it is not."""
        return processes_of(self.model)

    @property
    def offloaded(self) -> bool:
        """Whether some of its weights are fetched for each pass."""
        return any(parameter.is_meta for parameter in self.model.parameters())

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
    def embedding(self) -> nn.Embedding:
        """The table of input embeddings, `[vocabulary, hidden]`."""
        table = self.model.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return table

    @property
    def word_vectors(self) -> Tensor:
        """The rows of the table of input embeddings, `[vocabulary, hidden]`, in float32."""
        table = self.embedding
        if isinstance(table, BlockEmbedding):
            return unpacked(table.weight, table.kind)
        return full_weight(table, f"the embeddings of {self.id}").float()

    @property
    def parameters(self) -> int:
        """Number of parameters, tied ones once."""
        counted: dict[int, int] = {}
        for module in self.model.modules():
            for parameter in module.parameters(recurse=False):
                counted.setdefault(id(parameter), logical_size(parameter, module))
        return sum(counted.values())

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
                "`max_input_tokens` (`max_tokens` of a chat) or `max_target_tokens`"
            )


def load_base(
    id: str | os.PathLike[str] = TINY_EN,
    *,
    revision: str | None = None,
    dtype: Dtype = "float32",
    attention: Attention = "auto",
    quantize: Quantize | None = None,
    device: str = "auto",
    device_map: str | Mapping[str, int | str] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | None = None,
    tp_plan: str | Mapping[str, str] | None = None,
    labels: Labels | None = None,
) -> Base:
    """Load a base model, frozen and in evaluation mode.

    id: as `model.id` of a recipe: of the Hub, a folder, a GGUF file or a name that ptkit knows
    revision, dtype, attention, quantize, device: as the keys of `model` in a recipe
    device_map, max_memory, offload_folder: the same; for a base over several devices
    tp_plan: the same; for a base over several processes, each of which calls this
    labels: of its classification head, a new one where the checkpoint has none of as many; None
        for a language model. Outputs of the checkpoint's head go to the labels of the same name

    Raises ModelError when it cannot be found, is not such a model or cannot be spread so. Raises
    UserError in processes that were started for FSDP or DeepSpeed. Never runs code from a
    repository and reads safetensors only.
    """
    id = str(id)
    require_supported_launch()
    _require_words(dtype=(dtype, Dtype), attention=(attention, Attention))
    if quantize is not None:
        _require_words(quantize=(quantize, Quantize))
    source = source_of(id, revision)
    if source.startswith((".", "/", "~")) and not Path(source).expanduser().is_dir():
        raise ModelError(f"cannot load the base model `{id}`: no such folder")
    place = resolve_device(device)
    spread = Spread(device_map, max_memory, offload_folder, tp_plan)
    file = gguf_behind(id, revision)
    plain = labels is None and quantize is None and file is None
    spread.require_possible(device=device, plain=plain)
    if quantize is not None and labels is not None:
        raise ModelError("`model.quantize` is for language models; leave it out for classifiers")
    weights = source
    if quantize == "blocks":
        if file is None:
            raise ModelError(
                f"`model.quantize: blocks` keeps the blocks of a GGUF file, and `{id}` is "
                f"none; use nf4 or int8, which round any checkpoint ({install_line('quantize')})"
            )
        weights = str(in_blocks(file, Path(source)))
    values = getattr(torch, dtype)
    of_hub = None if is_gguf(id) else revision
    options = {"revision": of_hub, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load the base model `{id}`: {_first_line(error)} "
            "(a hub id needs network and, for gated models, `hf auth login`)"
        ) from error
    own = asked_attention(config, attention, id)
    try:
        with no_weights_bar():
            kind, extra = class_for(config, labels)
            spread.require_plan(config, kind, id)
            rounding = quantization_config(quantize, values)
            if rounding is not None:
                extra |= {"quantization_config": rounding, "device_map": {"": place}}
            extra |= spread.options()
            model, found = kind.from_pretrained(
                weights,
                dtype=values,
                attn_implementation=own,
                use_safetensors=True,
                output_loading_info=True,
                **extra,
                **options,
            )
    except (OSError, ValueError, KeyError) as error:
        if "attention implementation" in str(error):
            raise ModelError(
                f"`{id}` has no `{attention}` attention; set `model.attention: auto`"
            ) from error
        raise ModelError(
            f"cannot load the weights of `{id}`: {_first_line(error)} "
            "(only safetensors are read, never pickles such as pytorch_model.bin)"
        ) from error
    if quantize != "nf4" and not spread.elsewhere:  # bitsandbytes moves nothing that it has packed
        model = model.to(place)
    spread.require_runs(model, id)
    if labels is not None:
        return _with_its_labels(
            model, tokenizer, id, revision, labels, free_attention=attention == "auto",
            own=label_names(config), loader=kind, found=found, source=source,
        )  # fmt: skip
    base = frozen_base(model, tokenizer, id, revision)
    if quantize is not None:
        require_quantized(model, quantize, id)
    rounded = quantize if quantize != "blocks" else None
    return replace(
        base,
        quantized=quantize is not None,
        stored=rounded or (None if file is None else stored_type(Path(source))),
        read=_identity(source, of_hub),
        free_attention=attention == "auto",
    )


def _require_words(**given: tuple[object, Any]) -> None:
    """Raise ModelError for a word that is none of its type's: argument -> the word and the type."""
    for name, (word, known) in given.items():
        if word not in get_args(known):
            raise ModelError(f"no `{name}` {word!r}; {did_you_mean(str(word), get_args(known))}")


def _identity(source: str, revision: str | None, without: Collection[str] = ()) -> Identity | None:
    """Of the checkpoint's files; None where they do not tell."""
    tensors = checkpoint.of_files(source, revision, without)
    return None if tensors is None else Identity.of(tensors)


def _with_its_labels(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    id: str,
    revision: str | None,
    labels: Labels,
    *,
    free_attention: bool,
    own: list[str],
    loader: Any,
    found: dict[str, Any],
    source: str,
) -> Base:
    """The loaded `model` with each output of its head at the label of that name.

    own: the checkpoint's names of its outputs
    found: what transformers says of the weights it read; source: where from
    """
    mismatched = {entry[0] for entry in found["mismatched_keys"]}
    fresh = {*found["missing_keys"], *mismatched}
    base = headed_base(model, tokenizer, id, labels.names, fresh=fresh, revision=revision)
    assert base.head is not None
    backbone = f"{model.base_model_prefix}."
    replaced = any(not name.startswith(backbone) for name in mismatched)
    kept = len(own) == len(labels.names) and all(name.startswith(backbone) for name in fresh)
    # A checkpoint without a head says nothing that had to be decided.
    said = told(id, own, labels.names, anew=replaced) if replaced or kept else ""
    base = replace(
        base,
        head=replace(base.head, told=said),
        free_attention=free_attention,
        read=_identity(source, revision, base.head.fresh),
    )
    order = order_of(own, labels.names) if kept else []
    if order != [*range(len(order))]:
        base.remember()  # what it is in the checkpoint's order
        reorder(model, loader, order)
    return base


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
    freeze(model, tokenizer, id)
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
    freeze(model, tokenizer, id)
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders look for the last real token
    names = {name for name, _ in model.named_parameters()}
    outside = {name for name in names if not name.startswith(f"{model.base_model_prefix}.")}
    new = outside if fresh is None else names & {*fresh}
    modules = {name.split(".")[0] for name in outside}
    modules |= {name.rpartition(".")[0] for name in new - outside}
    untrained = frozenset(m for m in modules if any(name.startswith(f"{m}.") for name in new))
    head = Head(kind, tuple(labels), tuple(sorted(modules)), untrained)
    return Base(model, tokenizer, id, revision, head)
