"""What an adapter is made of: tensors, sizes, nearest words, norms per layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ptkit.data.tokens import text_ids
from ptkit.formats.adapter_files import AdapterFiles, read_adapter
from ptkit.formats.adapter_folder import weights_path
from ptkit.methods import adapter_from_files, require_same_base
from ptkit.methods.soft_prompt import SoftPrompt
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.compile import compile_tokens
from ptkit.runtime.runner import ModelRunner, Tokens


@dataclass(frozen=True)
class LayerNorms:
    """Mean length of a layer's key and value vectors, of the adapter and of real text."""

    layer: int
    key: float
    value: float
    text_key: float
    text_value: float


@dataclass(frozen=True)
class Anatomy:
    """The parts of one adapter.

    nearest: for each virtual token of a soft prompt, (token, cosine) of the closest words
    attention: for each virtual token, the share of all attention it gets while a sentence is read;
        empty on bases that read from both sides
    """

    files: AdapterFiles
    parameters: int
    share: float
    bytes: int
    virtual_tokens: int
    prefix_bytes: int
    layers: list[LayerNorms]
    nearest: list[list[tuple[str, float]]]
    attention: list[float]


def dissect(path: Path, base: Base, *, words: int = 3, chosen: bool = False) -> Anatomy:
    """Read the adapter in `path` and describe it on `base` (chosen: see `require_same_base`)."""
    files = read_adapter(path)
    require_same_base(files, base, str(path), chosen=chosen)
    adapter = adapter_from_files(files, base)
    try:
        causal = not base.encoder and not base.encoder_decoder
        compiled = adapter.own_compiled()
        compiled = None if compiled is None else compiled.detach()
        # Of an adapter that makes one for each input there is no one prefix to look at.
        prefix = compiled if isinstance(compiled, KVPrefix) else None
        nearest = nearest_words(adapter, base, words) if isinstance(adapter, SoftPrompt) else []
        parameters = sum(t.numel() for t in files.tensors.values())
        return Anatomy(
            files,
            parameters,
            parameters / base.parameters,
            weights_path(path).stat().st_size,
            adapter.virtual_tokens,
            0 if compiled is None else compiled.nbytes,
            # A soft prompt that an encoder reads has no keys and values of its own.
            [] if prefix is None or prefix.embeddings is not None else layer_norms(prefix, base),
            nearest,
            [] if prefix is None or not causal else attention_shares(prefix, base),
        )
    finally:
        adapter.close()


@torch.no_grad()
def nearest_words(adapter: SoftPrompt, base: Base, count: int) -> list[list[tuple[str, float]]]:
    """The `count` vocabulary tokens most similar (cosine) to each virtual token's embedding."""
    normalised = torch.nn.functional.normalize
    vocabulary = normalised(base.word_vectors, dim=-1)
    soft = normalised(adapter.embeddings().float(), dim=-1)
    similarity, ids = (soft @ vocabulary.T).topk(count, dim=-1)
    return [
        [(str(base.tokenizer.decode([i])), s) for i, s in zip(row_ids, row, strict=True)]
        for row_ids, row in zip(ids.tolist(), similarity.tolist(), strict=True)
    ]


#: Plain text that adapters are looked at on.
SENTENCE = "The committee published its report on Monday, and nobody was surprised by it."


@torch.no_grad()
def attention_shares(prefix: KVPrefix, base: Base, text: str = SENTENCE) -> list[float]:
    """The share of attention that each virtual token gets while the base reads `text`. It is the
    mean of the attention weights over layers, heads and the tokens of the text."""
    model = base.model
    ids = torch.tensor([text_ids(base.tokenizer, text)]).to(model.device)
    last = torch.tensor([ids.shape[1] - 1], device=ids.device)
    # per layer [1, heads, tokens, virtual tokens + tokens]
    weights = ModelRunner(model).attention_weights(
        Tokens(ids, torch.ones_like(ids), last=last), PrefixBatch.shared(prefix, 1)
    )
    shares = torch.stack([w[..., : prefix.virtual_tokens].float().mean((0, 1, 2)) for w in weights])
    return shares.mean(0).tolist()


def layer_norms(prefix: KVPrefix, base: Base) -> list[LayerNorms]:
    """Vector lengths per layer, beside those of a sentence the base reads."""
    text = compile_tokens(base.model, torch.tensor(text_ids(base.tokenizer, SENTENCE)))

    def length(vectors: torch.Tensor) -> float:
        return float(vectors.float().norm(dim=-1).mean())

    return [
        LayerNorms(i, *map(length, parts))
        for i, parts in enumerate(
            zip(prefix.keys, prefix.values, text.keys, text.values, strict=True)
        )
    ]
