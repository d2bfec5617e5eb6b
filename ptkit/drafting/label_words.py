"""Words for labels that a model tells apart by their first token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from ptkit.data.encode import require_apart
from ptkit.data.tokens import part_ids
from ptkit.errors import DataError

#: Where a label's name has words within: `refundRequest`, `refund_request`, `level1`.
_PARTS = re.compile(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])|\d+|[^\W\d_]+")


def label_words(
    labels: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, str], str]:
    """Label -> the words that stand for it after an input, and why these.

    The labels themselves are taken where their first tokens differ. Otherwise it is the word that
    each has and no other does, then letters. Raises DataError where none of these can be told
    apart.
    """
    whole = {label: f" {_spoken(label)}" for label in labels}
    if _apart(whole, tokenizer):
        return whole, "each label's own words, whose first tokens differ"
    own = _own_words(labels, tokenizer)
    if own is not None:
        return own, "labels begin alike, so each has the word that no other label has"
    try:
        require_apart({label: part_ids(tokenizer, words) for label, words in whole.items()})
    except DataError:
        letters = {label: f" {chr(ord('A') + i)}" for i, label in enumerate(labels[:26])}
        if len(labels) <= 26 and _apart(letters, tokenizer):
            return letters, "the labels' words begin each other's, so letters stand for them"
        raise
    return whole, "each label's own words; some begin with the same token"


def _spoken(label: str) -> str:
    """A label as it would be written in a text."""
    return " ".join(re.sub(r"[_/-]+", " ", label).split()) or label


def _first(words: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first token of `words`, after what stands for the space before them."""
    space = part_ids(tokenizer, " ")
    ids = part_ids(tokenizer, words)
    if len(ids) > len(space) and ids[: len(space)] == space:
        ids = ids[len(space) :]
    return ids[0] if ids else None


def _apart(words: Mapping[str, str], tokenizer: PreTrainedTokenizerBase) -> bool:
    first = [_first(own, tokenizer) for own in words.values()]
    return None not in first and len({*first}) == len(first)


def _own_words(labels: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, str] | None:
    """A word of each label that no other has, with first tokens that differ; None without them."""
    parts = {label: _PARTS.findall(label) for label in labels}
    taken: set[int | None] = {None}
    found = {}
    for label in sorted(labels, key=lambda label: len(parts[label])):
        others = {p.lower() for other in labels if other != label for p in parts[other]}
        for part in parts[label]:
            first = _first(f" {part}", tokenizer)
            if part.lower() not in others and first not in taken:
                taken.add(first)
                found[label] = f" {part}"
                break
        else:
            return None
    return {label: found[label] for label in labels}
