"""Making a loaded model a frozen base."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptkit.errors import ModelError
from ptkit.runtime.runner import ModelRunner
from ptkit.runtime.spread import require_known_parallelism
from ptkit.runtime.tokenization import embedded_tokens, own_ends


def freeze(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, id: str) -> None:
    """Freeze `model` in evaluation mode, with a token to pad with and the ends of its texts.

    Raises ModelError where the tokenizer has neither a padding nor an end token.
    """
    require_known_parallelism(model)
    model.requires_grad_(False)
    model.eval()
    ModelRunner(model).prepare()
    pad, known = tokenizer.pad_token_id, embedded_tokens(model)
    # Padding is not read, but looked up: a token that was added for it may have no embedding.
    if pad is None or (known is not None and pad >= known):
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
    ends, end = own_ends(model), tokenizer.eos_token_id
    if end is not None and end not in ends:
        model.generation_config.eos_token_id = [*ends, end]
