"""Whether text that is measured on was learnt from: by its content, whatever its file is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ptkit.data.examples import Example
from ptkit.errors import DataError

#: Characters of a line from which on it is not found in two texts by chance.
LONG = 40
#: The share of a measured text's long lines that may have been learnt: a heading, a licence.
MOST_SHARED = 0.01


def require_unlearnt(measured: Mapping[str, str], learnt: Iterable[str], what: str) -> None:
    """Raise DataError where `learnt` texts have lines of a `measured` one (name -> text).

    what: the learnt texts, for the message

    Lines are compared without their spaces at the ends, and long ones only. A text without long
    lines is compared as a whole. Forgetting would say how well the text was learnt.
    """
    # Of the learnt texts, which may be many, only what is measured too is kept.
    measured_lines = {line for text in measured.values() for line in _lines(text)}
    measured_wholes = {" ".join(text.split()) for text in measured.values()}
    lines: set[str] = set()
    wholes: set[str] = set()
    for text in learnt:
        lines.update(measured_lines.intersection(_lines(text)))
        wholes.update(measured_wholes & {" ".join(text.split())})
    for name, text in measured.items():
        own = _lines(text)
        shared = [line for line in own if line in lines]
        share = sum(map(len, shared)) / sum(map(len, own)) if own else 0.0
        if not own and " ".join(text.split()) in wholes:
            shared, share = [text.strip()], 1.0
        if share > MOST_SHARED:
            raise DataError(
                f"`retention.text`: {share:.0%} of `{name}` is in {what} too ({shared[0][:60]!r}, "
                "say): forgetting must be measured on text that was not learnt; give another file"
            )


def texts_of(examples: Iterable[Example]) -> Iterable[str]:
    """What training reads of `examples`, as text."""
    for example in examples:
        yield example.input
        yield example.target
        if example.rejected is not None:
            yield example.rejected.target


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= LONG]
