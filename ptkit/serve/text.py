"""Tokens to text, piece by piece, with texts that end an answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ptkit.data.tokens import decoded, frame_ids

#: What a decoder writes for bytes that are not a whole character yet.
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Piece:
    """Text that will not change any more. stopped: a stop text was met; nothing follows."""

    text: str
    stopped: bool = False


class TextStream:
    """The text of one answer as its tokens come.

    frame: token ids that are not shown; default: the tokenizer's padding, begin and end

    A piece ends between characters, and never inside what may become a stop text: that is held
    back until it is clear.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        frame: Collection[int] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._frame = frame_ids(tokenizer) if frame is None else frame
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Tokens before `_from` are done with; those up to `_shown` are context for what follows,
        # since a tokenizer may write a word differently at the beginning of a text.
        self._from = self._shown = 0
        self._held = ""

    def add(self, token: int) -> None:
        """Add a token; its text is told with what follows, or by `finish`."""
        self._ids.append(token)

    def push(self, token: int) -> Piece:
        """Add a token; returns the text that became certain."""
        self.add(token)
        before = self._decoded(self._from, self._shown)
        after = self._decoded(self._from, len(self._ids))
        if after.endswith(_UNFINISHED) or len(after) <= len(before):
            return Piece("")
        self._from, self._shown = self._shown, len(self._ids)
        return self._certain(self._held + after[len(before) :])

    def finish(self) -> str:
        """The text still held back, at the end of the answer."""
        before = self._decoded(self._from, self._shown)
        after = self._decoded(self._from, len(self._ids))
        return self._certain(self._held + after[len(before) :]).text + self._rest()

    def _decoded(self, start: int, end: int) -> str:
        return decoded(self._tokenizer, self._ids[start:end], self._frame)

    def _rest(self) -> str:
        held, self._held = self._held, ""
        return held

    def _certain(self, text: str) -> Piece:
        """The part of `text` that no stop text can reach into; the rest is held."""
        ends = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            return Piece(text[: min(ends)], stopped=True)
        held = max((_begun(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - held :]
        return Piece(text[: len(text) - held])


def _begun(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, without being all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
