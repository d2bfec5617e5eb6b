"""What a text becomes for a model: where it begins, what is cut, and what an answer shows.

Many tokenizers put a begin-of-text token before every text (Llama, Mistral, Gemma), some another
one, most of those for encoders one at each end. Models are trained with them, so a row without, or
with two of them, is read as something else. All of ptkit asks here; the lead of a tokenizer is
what it puts before a text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptkit.errors import DataError

#: How vocabularies write a space before a word.
_SPACES = ("▁", "Ġ")
#: What a text is put behind to see how it goes on; a tokenizer joins few texts to all of these.
_BEFORE = ("\n", ".", "a", "0")


def listed(entries: Any) -> list[Any]:
    """`entries` as a list. A str (or None, the plain base as a row's name) is one entry, and not
    a sequence of letters."""
    return [entries] if entries is None or isinstance(entries, str) else list(entries)


def lead_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids that `tokenizer` puts before every text; mostly one, or none."""
    for probe in _probes(tokenizer):
        own = part_ids(tokenizer, probe)
        if not own:
            continue
        framed = list(tokenizer(probe)["input_ids"])
        starts = range(len(framed) - len(own) + 1)
        at = next((i for i in starts if framed[i : i + len(own)] == own), 0)
        return framed[:at]
    return []


def _probes(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Texts of which a tokenizer makes nothing special, the likeliest first."""
    yield "a"
    special = set(tokenizer.all_special_tokens)
    yield from (word for word in tokenizer.get_vocab() if word not in special)


def part_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of a part of a text: nothing is put before or after it."""
    # Not verbose: a long text is cut later, or is meant to be long.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """`texts_ids` of one text."""
    return texts_ids(tokenizer, [text])[0]


def texts_ids(tokenizer: PreTrainedTokenizerBase, texts: str | Sequence[str]) -> list[list[int]]:
    """The token ids of whole texts that a causal model goes on with: the lead once, then the text.

    A text that was written with its lead already (a rendered chat template) has it once, too.
    Nothing is put after a text: what the model writes belongs there.
    """
    texts = listed(texts)
    if not texts:
        return []
    lead = lead_ids(tokenizer)
    parts = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [_begun(lead, ids) for ids in parts]


def whole_ids(
    tokenizer: PreTrainedTokenizerBase, texts: str | Sequence[str], limit: int | None = None
) -> list[list[int]]:
    """The token ids of whole texts for an encoder: with all that `tokenizer` puts around them.

    limit: the most tokens; longer texts lose their right end

    A text that was written with its lead already has it once.
    """
    texts = listed(texts)
    if not texts:
        return []

    def framed(some: list[str], most: int | None) -> list[list[int]]:
        cut: dict[str, Any] = {} if most is None else {"truncation": True, "max_length": most}
        return [list(ids) for ids in tokenizer(some, **cut)["input_ids"]]

    lead = lead_ids(tokenizer)
    begin = str(tokenizer.convert_ids_to_tokens(lead[0])) if lead else ""
    found = framed(texts, limit)
    twice = [
        i for i, text in enumerate(texts)
        if begin and begin in text and part_ids(tokenizer, text)[: len(lead)] == lead
    ]  # fmt: skip
    if twice:
        again = framed([texts[i] for i in twice], None if limit is None else limit + len(lead))
        for i, ids in zip(twice, again, strict=True):
            found[i] = ids[len(lead) :]
    return found


def places(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Of each part of a text its token ids, and first character and end of each."""
    if not texts:
        return []
    encoding = tokenizer(
        [*texts], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return [*zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)]


def places_after(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """`places` of a text that goes on with another one. Some tokenizers begin every text with a
    space; this one gets none.

    Raises DataError where such a tokenizer joins the text to whatever stands before it.
    """
    words = tokenizer.convert_ids_to_tokens(part_ids(tokenizer, "a"))
    if not (words and str(words[0])[:1] in _SPACES):
        return places(tokenizer, [text])[0]
    for before in _BEFORE:
        own = part_ids(tokenizer, before)
        ids, offsets = places(tokenizer, [before + text])[0]
        at = len(own)
        if ids[:at] == own and (at == len(ids) or offsets[at][0] >= len(before)):
            moved = [(a - len(before), b - len(before)) for a, b in offsets[at:]]
            return ids[at:], moved
    raise DataError(f"the tokenizer cannot begin an answer with {text[:20]!r}")


def cut_left(ids: Sequence[int], limit: int, lead: Sequence[int]) -> list[int]:
    """`ids` without what is too much at the left of a text: at most `limit` (at least 1) tokens.

    A lead that they begin with stays.
    """
    kept = list(lead) if list(ids[: len(lead)]) == list(lead) else []
    if len(ids) <= limit:
        return list(ids)
    room = limit - len(kept)
    return [*kept, *ids[-room:]] if room > 0 else kept[:limit]


def without_lead(ids: Sequence[int], lead: Sequence[int]) -> list[int]:
    """`ids` for a place behind something that begins with the lead: it stands there once.

    A text of nothing but the lead keeps it, for something must be read.
    """
    begins = len(ids) > len(lead) and list(ids[: len(lead)]) == list(lead)
    return list(ids[len(lead) :]) if begins else list(ids)


def frame_ids(tokenizer: PreTrainedTokenizerBase, ends: Iterable[int] = ()) -> frozenset[int]:
    """The token ids that frame a text and are no part of it: padding, begin and end.

    ends: tokens at which the model stops, beside the tokenizer's own
    """
    own = (
        tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.cls_token_id,
        tokenizer.eos_token_id, *lead_ids(tokenizer), *ends,
    )  # fmt: skip
    return frozenset(int(token) for token in own if token is not None)


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], frame: Collection[int]) -> str:
    """The text of `ids`, without those of `frame`. Other special tokens (a `<sep>` that a target
    is made of) are words like any."""
    return str(tokenizer.decode([i for i in ids if i not in frame], skip_special_tokens=False))


def _begun(lead: Sequence[int], ids: Sequence[int]) -> list[int]:
    """`ids` with the lead before them, unless they begin with it."""
    return list(ids) if list(ids[: len(lead)]) == list(lead) else [*lead, *ids]
