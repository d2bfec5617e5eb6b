"""Tiny random encoders of every family, with a classification head."""

from __future__ import annotations

import torch
from conftest import VOCABULARY, word_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from ptkit.runtime.base_model import Base, headed_base

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 0,
}  # fmt: skip
ENCODERS = {
    "bert": lambda: BertConfig(**SHAPE),
    "roberta": lambda: RobertaConfig(**{**SHAPE, "pad_token_id": 1}),
    # embeddings narrower than the layers, as in electra-small
    "electra": lambda: ElectraConfig(**SHAPE, embedding_size=16),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=3, n_heads=4, hidden_dim=48,
        max_position_embeddings=64, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
        pad_token_id=0,
    ),
    "modernbert": lambda: ModernBertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, local_attention=8,
        global_attn_every_n_layers=2, pad_token_id=0, cls_token_id=1, sep_token_id=2,
        bos_token_id=1, eos_token_id=2, classifier_pooling="mean",
    ),
    "deberta_v2": lambda: DebertaV2Config(
        **SHAPE, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8,
        max_relative_positions=-1, norm_rel_ebd="layer_norm", share_att_key=True,
        position_biased_input=False, pooler_dropout=0.0, pooler_hidden_size=32, conv_kernel_size=3,
    ),
}  # fmt: skip
DECODERS = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=3, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
    "llama": lambda: LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
}  # fmt: skip
LABELS = ("yes", "no", "maybe")


def random_classifier(
    family: str, kind: str = "sequence", attention: str = "eager", seed: int = 0
) -> Base:
    """A frozen random model of `family` with a head for `LABELS`."""
    torch.manual_seed(seed)
    config: PreTrainedConfig = {**ENCODERS, **DECODERS}[family]()
    config.num_labels = len(LABELS)
    auto = {
        "sequence": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification
    }[kind]  # fmt: skip
    model = auto.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    tokenizer = word_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    return headed_base(model.eval(), tokenizer, f"random-{family}", LABELS)
