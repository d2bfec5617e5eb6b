"""What a base makes of texts: their token ids, and the texts of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ptkit.data.tokens import decoded, frame_ids, lead_ids, part_ids, texts_ids, whole_ids
from ptkit.errors import ModelError
from ptkit.runtime.architecture import head_kind
from ptkit.runtime.gguf_model import is_gguf
from ptkit.runtime.named_models import source_of


class TokenizerMixin:
    """The part of a `Base` that knows its tokenizer. See `ptkit.data.tokens`."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    id: str

    @property
    def lead(self) -> list[int]:
        """The token ids that stand before every text a causal model reads; mostly one, or none.
        An encoder-decoder's texts have a frame of their own (see `encode`)."""
        return [] if self.model.config.is_encoder_decoder else lead_ids(self.tokenizer)

    def encode(self, texts: str | Sequence[str]) -> list[list[int]]:
        """The token ids of whole texts, each as the model is given it.

        Raises ModelError for a token that the model has no embedding for.
        """
        whole = self.model.config.is_encoder_decoder or head_kind(self.model) is not None
        found = (whole_ids if whole else texts_ids)(self.tokenizer, texts)
        self.require_embedded(found)
        return found

    def encode_part(self, text: str) -> list[int]:
        """The token ids of a part of a text, without what stands before and after a whole one.

        Raises ModelError for a token that the model has no embedding for.
        """
        found = part_ids(self.tokenizer, text)
        self.require_embedded([found])
        return found

    def decode(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """The texts of rows of token ids, without `frame`."""
        frame = self.frame
        return [decoded(self.tokenizer, ids, frame) for ids in rows]

    @property
    def frame(self) -> frozenset[int]:
        """The token ids that an answer does not show: padding, begin and end."""
        return frame_ids(self.tokenizer, own_ends(self.model))

    def require_embedded(self, rows: Iterable[Sequence[int]]) -> None:
        """Raise ModelError for a token id that the model has no embedding for.

        A tokenizer may know such tokens (Gemma 3's does): only a text that has one is at fault.
        """
        known, tokenizer = embedded_tokens(self.model), self.tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {})
        highest = max([len(tokenizer) - 1, *added])
        if known is None or highest < known:
            return
        beyond = next((id for row in rows for id in row if id >= known), None)
        if beyond is not None:
            raise ModelError(
                f"the data has the token `{tokenizer.convert_ids_to_tokens(beyond)}` (number "
                f"{beyond}), for which {self.id} has no embedding: its tokenizer has "
                f"{len(tokenizer)} tokens, the model {known} rows; save the model with "
                f"`model.resize_token_embeddings({highest + 1})`, or leave the token out"
            )

    @property
    def first_token_id(self) -> int:
        """The token texts begin with; where the tokenizer names none, the one they end with.

        Raises ModelError where it names neither.
        """
        tokenizer = self.tokenizer
        named = (tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.eos_token_id)
        for token in (*self.lead[:1], *named):
            if token is not None:
                return int(token)
        raise ModelError(f"the tokenizer of {self.id} names no token that texts begin or end with")


def load_tokenizer(id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of the model called `id`, without the model.

    Raises ModelError where there is none. Never runs code from a repository.
    """
    source = source_of(id, revision)
    options = {"revision": None if is_gguf(id) else revision, "trust_remote_code": False}
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"cannot load the tokenizer of `{id}`: {reason} "
            "(a hub id needs network and, for gated models, `hf auth login`)"
        ) from error
    return found


def embedded_tokens(model: PreTrainedModel) -> int | None:
    """How many token ids the model has an embedding for; None where that is no table."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None


def own_ends(model: PreTrainedModel) -> list[int]:
    """The token ids at which the model stops by its own settings; none where it writes nothing."""
    own = model.generation_config.eos_token_id if model.can_generate() else None
    return [own] if isinstance(own, int) else [*(own or ())]
