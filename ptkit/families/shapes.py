"""The families that are checked, and how a config is made small without losing its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ptkit.errors import ModelError

#: Ids below it are special: padding, end, start.
FIRST_WORD = 3
VOCABULARY = 96


@dataclass(frozen=True)
class Family:
    """A family by transformers' `model_type`, with settings that make it one of its variants."""

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> PretrainedConfig:
        """The variant's config, in the size transformers gives it."""
        return AutoConfig.for_model(self.model_type, **self.settings)


_GROUPED = {"num_key_value_heads": 8}
_FALCON = {"num_attention_heads": 64, "hidden_size": 4096}
_DEBERTA = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 256,
    "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "gpt2": Family("gpt2"),
    "opt": Family("opt"),
    # As OPT-350m: embeddings narrower than the layers.
    "opt (projected)": Family("opt", {"word_embed_proj_dim": 512, "do_layer_norm_before": False}),
    "bloom": Family("bloom"),
    "gptj": Family("gptj"),
    "gpt_neox": Family("gpt_neox"),
    "gpt_bigcode": Family("gpt_bigcode"),
    "falcon": Family("falcon", _FALCON),
    "falcon (new)": Family("falcon", {**_FALCON, "new_decoder_architecture": True,
                                      "num_kv_heads": 8}),
    "falcon (alibi)": Family("falcon", {**_FALCON, "alibi": True, "multi_query": False,
                                        "parallel_attn": False, "bias": True}),
    "llama": Family("llama", _GROUPED),
    "mistral": Family("mistral"),
    "qwen2": Family("qwen2", _GROUPED),
    "qwen3": Family("qwen3", {**_GROUPED, "head_dim": 96}),
    "gemma2": Family("gemma2"),
    "gemma3": Family("gemma3_text"),
    # As the 31B: full layers with wider, fewer heads, whose values are their keys.
    "gemma4": Family("gemma4_text", {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True,
                                     "num_global_key_value_heads": 1}),
    # As E2B: every layer looks token ids up, and the last ones share keys and values.
    "gemma4 (E2B)": Family("gemma4_text", {"num_kv_shared_layers": 20}),
    "phi3": Family("phi3", {"sliding_window": 2047}),
    "olmo2": Family("olmo2"),
    "smollm3": Family("smollm3"),
    "mixtral": Family("mixtral"),
    "qwen3_moe": Family("qwen3_moe"),
    "gpt_oss": Family("gpt_oss"),
    "qwen3_next": Family("qwen3_next"),
    "lfm2": Family("lfm2", {"layer_types": ["conv", "conv", "full_attention"] * 2,
                            "num_hidden_layers": 6}),
    "t5": Family("t5"),
    # As t5-v1_1: the heads' width is not the model's.
    "t5 (v1.1)": Family("t5", {"d_kv": 48, "feed_forward_proj": "gated-gelu",
                               "tie_word_embeddings": False}),
    "bart": Family("bart"),
    "bart (unequal)": Family("bart", {"decoder_layers": 6}),
    # As published, these three scale what they look up.
    "mbart": Family("mbart", {"scale_embedding": True}),
    "pegasus": Family("pegasus", {"scale_embedding": True}),
    "marian": Family("marian", {"scale_embedding": True}),
    "bert": Family("bert"),
    "roberta": Family("roberta"),
    # Embeddings narrower than the layers.
    "electra": Family("electra"),
    "distilbert": Family("distilbert"),
    "modernbert": Family("modernbert"),
    "modernbert (mean)": Family("modernbert", {"classifier_pooling": "mean"}),
    # As DeBERTa-v3: relative positions only, in buckets.
    "deberta_v2": Family("deberta-v2", _DEBERTA),
    # As DeBERTa-v2-xlarge: the first layer sees its neighbours through a convolution, too.
    "deberta_v2 (conv)": Family("deberta-v2", {**_DEBERTA, "conv_kernel_size": 3,
                                               "conv_act": "gelu"}),
}  # fmt: skip

_WIDTH = ("hidden_size", "n_embd", "d_model", "dim", "pooler_hidden_size")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
          "decoder_attention_heads")  # fmt: skip
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_INNER = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "d_ff", "n_inner", "hidden_dim",
          "encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size",
          "shared_expert_intermediate_size")  # fmt: skip
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_WINDOWS = ("sliding_window", "window_size", "attention_chunk_size", "local_attention",
            "position_buckets")  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts")
_DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_STACKS = (("encoder_layers", "decoder_layers"), ("num_layers", "num_decoder_layers"))
#: Derived from others when a config is made.
_DERIVED = ("full_attn_idxs", "_sliding_window_pattern", "attention_layers", "model_type",
            "transformers_version", "dtype", "num_hidden_layers_per_stage")  # fmt: skip
#: One entry per layer.
_PATTERNS = ("layer_types", "no_rope_layers")

HIDDEN, HEADS, HEAD, WINDOW = 64, 4, 16, 8


def small(config: PretrainedConfig) -> PretrainedConfig:
    """A config of the same kind with few layers and small widths.

    These are kept: kinds of layers in their order, windows (but shorter than a few words), and
    heads that share keys or not. So are heads whose width is not hidden / heads, tied or untied
    embeddings, different depths of encoder and decoder, and operations on logits. Dropout is off.
    Raises ModelError for models without attention.
    """
    if not config.is_encoder_decoder:
        config = config.get_text_config()
    old = config.to_dict()
    new = {k: v for k, v in old.items() if k not in _DERIVED}
    new |= {k: HIDDEN for k in _WIDTH if k in old} | {k: HEADS for k in _HEADS if k in old}
    new |= {k: 48 for k in _INNER if old.get(k)} | {k: 128 for k in _POSITIONS if k in old}
    new |= {k: WINDOW for k in _WINDOWS if (old.get(k) or 0) > 0}
    new |= {k: 4 for k in _EXPERTS if old.get(k)}
    new |= {k: 0.0 for k, v in old.items() if "drop" in k and isinstance(v, float)}
    heads = next((old[k] for k in _HEADS if old.get(k)), None)
    if heads is None:
        raise ModelError(
            f"`{config.model_type}` has no attention heads, so there is nothing to put a prefix "
            "into; LoRA may work: `ptkit models check MODEL --full --method lora`"
        )
    width = next(old[k] for k in _WIDTH if k in old)
    for name in _GROUPS:
        if old.get(name):
            new[name] = 1 if old[name] == 1 else HEADS if old[name] == heads else HEADS // 2
    for name in ("head_dim", "d_kv"):
        if old.get(name):
            new[name] = HEAD if old[name] * heads == width else HEAD + 8
    if old.get("rotary_dim"):
        new["rotary_dim"] = HEAD // 2
    if old.get("query_pre_attn_scalar"):
        new["query_pre_attn_scalar"] = new["head_dim"]
    for name in ("word_embed_proj_dim", "embedding_size"):
        if old.get(name):
            new[name] = HIDDEN if old[name] == width else 40
    new |= {k: 2 for k in ("num_experts_per_tok", "top_k_experts") if old.get(k)}
    for name, value in old.items():
        if name.startswith("linear_") and name.endswith("_head_dim"):
            new[name] = HEAD
        elif name.startswith("linear_num_") and value:
            more = value > old["linear_num_key_heads"]
            new[name] = 4 if more else 2
    new |= {k: HEAD for k in ("hidden_size_per_layer_input",) if old.get(k)}
    new |= _layers(old) | _words(old)
    if config.is_heterogeneous:
        new["per_layer_config"] = _unlike_layers(old, new)
    if isinstance(rope := old.get("rope_parameters"), dict):
        new["rope_parameters"] = _short_factors(rope)
    return AutoConfig.for_model(config.model_type, **new)


def _layers(old: Mapping[str, Any]) -> dict[str, Any]:
    """Two layers, or one of every kind; depths that differ still do."""
    for encoder, decoder in _STACKS:
        if old.get(encoder) and old.get(decoder):
            first, second = old[encoder], old[decoder]
            return {encoder: 3 if first > second else 2, decoder: 3 if second > first else 2}
    patterns = [old[name] for name in _PATTERNS if old.get(name)]
    # The first layer of every kind, kinds being what all patterns say together.
    kinds = list(dict.fromkeys(zip(*patterns, strict=True))) if patterns else []
    kinds = kinds * 2 if len(kinds) == 1 else kinds
    named = dict(zip([n for n in _PATTERNS if old.get(n)], zip(*kinds, strict=True), strict=True))
    found = {name: list(values) for name, values in named.items()}
    depth = next(name for name in _DEPTH if name in old)
    if old.get("num_kv_shared_layers"):  # as many that have keys of their own, and then share them
        found = {name: values * 2 for name, values in found.items()}
        found["num_kv_shared_layers"] = len(kinds) or 2  # type: ignore[assignment]
        found[depth] = 2 * (len(kinds) or 2)  # type: ignore[assignment]
        return found
    found[depth] = len(kinds) or 2  # type: ignore[assignment]
    if "attention_types" in old:
        found["attention_types"] = [[["global", "local"], 1]]
    return found


def _unlike_layers(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """What each of the `new` layers has otherwise than the config says: wider heads, or fewer.

    Raises ModelError for a config whose layers differ in something else.
    """
    kinds = list(old.get("layer_types") or ())
    overrides = {int(layer): dict(own) for layer, own in old["per_layer_config"].items()}
    found: dict[int, dict[str, Any]] = {}
    for number, kind in enumerate(new.get("layer_types") or ()):
        own = overrides.get(kinds.index(kind), {})
        unknown = own.keys() - {"head_dim", "num_key_value_heads"}
        if unknown:
            raise ModelError(
                f"layers that differ in {', '.join(sorted(unknown))} are not made small yet; check "
                "the real weights with --full"
            )
        made = {}
        if own.get("head_dim", old.get("head_dim")) != old.get("head_dim"):
            made["head_dim"] = new["head_dim"] + HEAD // 2
        if own.get("num_key_value_heads") not in (None, old.get("num_key_value_heads")):
            made["num_key_value_heads"] = 1
        if made:
            found[number] = made
    return found


def _words(old: Mapping[str, Any]) -> dict[str, Any]:
    # A family's own places where they are below those of words: RoBERTa counts positions from that
    # of padding.
    special = [old.get(k) for k in ("pad_token_id", "eos_token_id", "bos_token_id")]
    own = sorted(map(str, special)) == [str(i) for i in range(FIRST_WORD)]
    pad, end, start = special if own else range(FIRST_WORD)
    found: dict[str, Any] = {"pad_token_id": pad, "eos_token_id": end, "bos_token_id": start}
    found |= {k: v for k, v in (("cls_token_id", start), ("sep_token_id", end)) if k in old}
    found |= {
        k: VOCABULARY
        for k in ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input")
        if old.get(k)
    }
    if old.get("is_encoder_decoder"):
        first = old.get("decoder_start_token_id")
        padded = first is not None and first == old.get("pad_token_id")
        found["decoder_start_token_id"] = (
            pad if padded else first if own and first is not None else start
        )
        found |= {"forced_bos_token_id": None, "forced_eos_token_id": None}
    return found


def _short_factors(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of one factor per rotary pair, cut to the pairs there are."""
    short = dict(rope)
    for name in ("short_factor", "long_factor"):
        if name in short:
            pairs = int(HEAD * short.get("partial_rotary_factor", 1.0)) // 2
            short[name] = list(short[name])[:pairs]
    return short
