"""What metrics can judge: scripts their tokenisers read, schemes of labels for spans."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import regex

from ptkit.errors import UserError

#: In place of the label of a word the model has not read: beyond `max_input_tokens`, or one the
#: tokenizer makes nothing of. It is never right, and no label.
UNREAD = "?"
#: Share of letters a tokeniser may make nothing of: a name in an English text, not a language.
MOST_LOST = 0.01
#: Scripts that put no spaces between words.
_UNSPACED = (
    r"(?=\p{L})[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
)


def require_english_letters(name: str, references: Sequence[Sequence[str]]) -> None:
    """Raise UserError where rouge-score's words, `a-z` and `0-9`, leave letters out."""
    _require(
        name, references, r"(?![A-Za-z])\p{L}",
        "is made of the letters a to z and drops others",
        f"use `{name}-intl` (words of any script), `{name}-char` or `{name}-zh`",
    )  # fmt: skip


def require_words_at_spaces(name: str, references: Sequence[Sequence[str]]) -> None:
    """Raise UserError for scripts without spaces, where a sentence would be one word."""
    fix = "use `chrf`, which reads characters"
    if name == "bleu":
        fix = "use `bleu-zh`, `bleu-ja-mecab`, `bleu-ko-mecab`, `bleu-flores200` or `bleu-char`"
    _require(
        name, references, _UNSPACED, "finds words at spaces, and this script has none", fix
    )  # fmt: skip


def _require(
    name: str, references: Sequence[Sequence[str]], unread: str, why: str, fix: str
) -> None:
    letters = lost = 0
    first = ""
    for number, row in enumerate(references, start=1):
        for text in row:
            here = len(regex.findall(unread, text))
            letters += len(regex.findall(r"\p{L}", text))
            lost += here
            if here and not first:
                first = f"example {number}: {text[:60]!r}"
    if letters and lost / letters > MOST_LOST:
        raise UserError(
            f"`{name}` {why}: {lost / letters:.0%} of the references' letters ({first}); {fix}"
        )


def entity_scheme(labels: Iterable[str]) -> str:
    """`IOB`, `IOBES` or `BILOU`, whichever has all `labels`. Raises UserError where none has."""
    seen = {*labels} - {"O", UNREAD}
    prefixes = {label[:2] for label in seen}
    for scheme, own in (("IOB", "BI"), ("IOBES", "BIES"), ("BILOU", "BILU")):
        if prefixes <= {f"{letter}-" for letter in own}:
            return scheme
    odd = sorted(seen, key=lambda label: (label[:2] in {"B-", "I-"}, label))[:3]
    raise UserError(
        "`entity_f1` reads labels of IOB (`B-X`, `I-X`, `O`), IOBES (also `E-X`, `S-X`) or BILOU "
        f"(also `L-X`, `U-X`), found {', '.join(f'`{label}`' for label in odd)}; name the labels "
        "so, or use `word_macro_f1`"
    )
