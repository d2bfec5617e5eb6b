"""Rendered conversations as token ids: the prompt that is learnt is the prompt that is asked.

A question is asked as the token ids of its own text. In the text of a conversation, a
tokenizer may join its end to the beginning of the answer: a line break to another one, say. Or it
writes that end in other tokens. Then question and answer are tokenised apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

from ptkit.data.chat_template import ChatTemplate, Rendered
from ptkit.data.dialogue import Dialogue
from ptkit.data.encoded import EncodedExample
from ptkit.data.tokens import lead_ids, part_ids, places, places_after
from ptkit.errors import DataError

#: Token ids, and first character and end of each.
Encoded = tuple[list[int], list[tuple[int, int]]]


@dataclass(frozen=True)
class Tokens:
    """A rendered conversation as token ids, with what is learnt.

    asked: how many tokens the first question has, whose answer is learnt
    """

    ids: list[int]
    learnt: list[bool]
    asked: int

    def row(self) -> EncodedExample:
        """The first question as input; all learnt tokens in one pass."""
        tail = tuple(self.learnt[self.asked :])
        learnt = None if all(tail) else tail
        return EncodedExample(self.ids[: self.asked], self.ids[self.asked :], learnt)


class ChatTokens:
    """Makes token ids of what a template has rendered."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._lead = lead_ids(tokenizer)
        # Most questions end alike: with the mark of a turn, and who is to speak.
        self._part = lru_cache(maxsize=1024)(lambda text: part_ids(tokenizer, text))

    def encoded(self, texts: list[str]) -> list[Encoded]:
        """The token ids of each text, and the characters that each token is of. The tokenizer
        reads many texts in parallel."""
        return places(self._tokenizer, texts)

    def read(
        self, dialogue: Dialogue, rendered: Rendered, loss: str, encoded: Encoded
    ) -> Tokens | None:
        """The tokens, of which those of a question are the ones that are asked. None where only a
        pass for each answer has such questions.

        encoded: the text of `rendered` in one piece

        Raises DataError where nothing is learnt.
        """
        everything = loss == "all"
        borders = sorted(rendered.asked.values())
        if everything:
            borders = borders[-1:]
        if not all(self._is_asked(rendered.text, encoded, border) for border in borders):
            if len(borders) > 1:
                return None
            encoded = self._apart(rendered.text, borders[0])
        ids, offsets = encoded
        if everything:
            learnt = [True] * len(ids)
        else:
            spans = [s for i, s in rendered.spans.items() if i < 0 or dialogue.learnt[i]]
            learnt = self._in_spans(rendered.text, encoded, spans)
        lead = [] if ids[: len(self._lead)] == self._lead else self._lead
        learnt = [False] * len(lead) + learnt
        learnt[0] = False  # nothing stands before it to predict it from
        if not any(learnt):
            raise DataError(
                f"{dialogue.where}: the template writes nothing of the answers, so there is "
                "nothing to learn"
            )
        asked = 1 if everything else len(lead) + _before(offsets, borders[0])
        return Tokens([*lead, *ids], learnt, asked)

    def _is_asked(self, text: str, encoded: Encoded, border: int) -> bool:
        """Whether the tokens before `border` are those of the question that ends there."""
        ids, offsets = encoded
        end = _before(offsets, border)
        if end < len(ids) and offsets[end][0] < border:
            return False  # a token of both
        # A mark is a token wherever it stands, and what follows it depends on nothing before it.
        marks = self._template.marks
        begin = next((i for i in reversed(range(end)) if ids[i] in marks), 0)
        first = offsets[begin][0] if begin else 0
        return self._part(text[first:border]) == ids[begin:end]

    def _apart(self, text: str, border: int) -> Encoded:
        """The tokens of a text that are of one side of `border` each."""
        (asked,) = self.encoded([text[:border]])
        ids, offsets = places_after(self._tokenizer, text[border:])
        moved = [(a + border, b + border) for a, b in offsets]
        return [*asked[0], *ids], [*asked[1], *moved]

    def _in_spans(
        self, text: str, encoded: Encoded, spans: Sequence[tuple[int, int]]
    ) -> list[bool]:
        """Which tokens have a character of a span."""
        ids, offsets = encoded
        marks = self._template.marks
        learnt = [False] * len(ids)
        for start, end in spans:
            inside = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
            for i in inside:
                learnt[i] = True
            # A template's own marks may leave out the token at which the model is to stop.
            said = [i for i in inside if text[slice(*offsets[i])].strip()]
            after = next((i for i, (a, _) in enumerate(offsets) if a >= end), None)
            if after is None or not self._template.marked or (said and ids[said[-1]] in marks):
                continue
            if ids[after] in marks and offsets[after][0] == end:
                learnt[after] = True
        return learnt


def _before(offsets: Sequence[tuple[int, int]], border: int) -> int:
    """How many tokens end at `border` or before it."""
    return next((i for i, (_, end) in enumerate(offsets) if end > border), len(offsets))
