"""Conversations as token ids: what is read, what is learnt, what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from ptkit.data.chat_template import ChatTemplate, Rendered
from ptkit.data.chat_tokens import ChatTokens, Encoded, Tokens
from ptkit.data.dialogue import Dialogue
from ptkit.data.encoded import EncodedExample
from ptkit.data.examples import Example
from ptkit.errors import DataError
from ptkit.recipe.tasks import ChatTask


@dataclass
class ChatNotes:
    """What was decided about conversations as they became token ids.

    shortened: conversations that lost early turns; dropped: messages that they lost
    unfolded: conversations that became a row for each answer. The template renders a turn
        differently once another follows it, or the tokenizer joins an answer to its question
    endless: answers after which no token of the model's own vocabulary of marks stands
    """

    shortened: int = 0
    dropped: int = 0
    unfolded: int = 0
    endless: int = 0

    def add(self, more: ChatNotes) -> None:
        """Count what was decided about further conversations, too."""
        for name, count in vars(more).items():
            setattr(self, name, getattr(self, name) + count)


@dataclass(frozen=True)
class ChatRows:
    """Conversations as rows: mostly one each.

    examples, encoded: in one order, equally many
    """

    examples: Sequence[Example]
    encoded: Sequence[EncodedExample]
    notes: ChatNotes


class Cut(NamedTuple):
    """Which part of a conversation is a row.

    example: number of the conversation
    answer: index of the message that is the last and the only learnt one; -1: all are as they were
    exchanges: questions that are left out at the beginning, with their answers
    """

    example: int
    answer: int
    exchanges: int

    def of(self, whole: Dialogue) -> Dialogue:
        """That part of the conversation."""
        cut: Dialogue | None = whole if self.answer < 0 else whole.upto(self.answer)
        for _ in range(self.exchanges):
            assert cut is not None
            cut = cut.without_first_exchange()
        assert cut is not None
        return cut


def cut_example(examples: Sequence[Example], cut: Cut) -> Example:
    """The example that a row is a part of, with that part as its conversation."""
    example = examples[cut.example]
    assert example.dialogue is not None
    return replace(example, dialogue=cut.of(example.dialogue))


class ChatEncoder:
    """Encodes the conversations of a task for one model.

    Raises DataError for a tokenizer that cannot tell which characters a token is of, and without a
    chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: ChatTask) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"{type(tokenizer).__name__} does not tell which characters a token is of; "
                "conversations need a model with a fast tokenizer"
            )
        self.task, self.tokenizer = task, tokenizer
        self.template = ChatTemplate.of_task(tokenizer, task)
        self._texts = ChatTokens(tokenizer, self.template)

    def rows(self, examples: Sequence[Example]) -> ChatRows:
        """The rows that training reads, and what was decided on the way."""
        notes = ChatNotes()
        found = self.cuts(examples, notes)
        read = [cut_example(examples, cut) for cut, _ in found]
        return ChatRows(read, [row for _, row in found], notes)

    def cuts(
        self, examples: Sequence[Example], notes: ChatNotes, first: int = 0
    ) -> list[tuple[Cut, EncodedExample]]:
        """The rows that training reads of `examples`; adds to `notes` what was decided.

        first: number of the first one; they are rendered one by one, and tokenised together
        """
        asked = [
            (first + number, *part)
            for number, example in enumerate(examples)
            for part in self._passes(example, notes)
        ]
        together = self._texts.encoded([rendered.text for *_, rendered in asked])
        found = []
        for (number, answer, dialogue, rendered), encoded in zip(asked, together, strict=True):
            fitted = self._fitted(dialogue, rendered, encoded, notes)
            if fitted is not None:
                found.append((Cut(number, answer, fitted[0]), fitted[1].row()))
                continue
            notes.unfolded += 1
            for one, part in _each_answer(dialogue):
                exchanges, tokens = self._fitted_answer(part, notes)
                found.append((Cut(number, one, exchanges), tokens.row()))
        return found

    def asked(self, example: Example) -> EncodedExample:
        """The conversation up to its last answer as input, and that answer as target, with room
        for `max_target_tokens`."""
        assert example.dialogue is not None
        dialogue = example.dialogue.upto(len(example.dialogue.messages) - 1)
        room = self.task.max_tokens - self.task.max_target_tokens
        while True:
            tokens = self._read(dialogue, self._spans(dialogue), "last")
            assert tokens is not None
            row = tokens.row()
            if len(row.input_ids) <= room:
                return EncodedExample(row.input_ids, row.target_ids)
            dialogue = self._shorter(dialogue, len(row.input_ids), room, "before the last answer")

    def together(self, dialogues: Sequence[Dialogue], notes: ChatNotes) -> list[EncodedExample]:
        """Conversations that begin alike, in a pass each. All lose the early turns that the longest
        has to, and none loses what is learnt.

        Raises DataError where that is not enough, and for several answers to be learnt that are
        not read in one pass (see `ChatNotes.unfolded`).
        """
        whole, most = dialogues, self.task.max_tokens
        while True:
            tokens = [self._whole(d) for d in dialogues]
            longest = max(len(own.ids) for own in tokens)
            if longest <= most:
                break
            shorter = [self._shorter(d, longest, most, "in all") for d in dialogues]
            if any(sum(a.learnt) < sum(b.learnt) for a, b in zip(shorter, dialogues, strict=True)):
                raise DataError(
                    f"{dialogues[0].where}: the conversation has {longest:,} tokens with its last "
                    f"question alone, more than {most:,} (`task.max_tokens`); raise the limit, or "
                    "leave the row out"
                )
            dialogues = shorter
        lost = len(whole[0].messages) - len(dialogues[0].messages)
        self._note(notes, lost, tokens)
        return [own.row() for own in tokens]

    def _whole(self, dialogue: Dialogue) -> Tokens:
        """All of a conversation as tokens, in one pass. Raises DataError as `together` does."""
        found = self.template.rendered(dialogue)
        if found is None and sum(dialogue.learnt) > 1:
            raise DataError(
                f"{dialogue.where}: the chat template changes earlier answers when others follow, "
                "so several answers after a prompt cannot be scored in one pass; leave one answer"
            )
        rendered = self._spans(dialogue) if found is None else found
        tokens = self._read(dialogue, rendered, self.task.loss)
        if tokens is None:
            raise DataError(
                f"{dialogue.where}: the tokenizer joins the beginning of an answer to its "
                "question, so several answers after a prompt cannot be scored in one pass; leave "
                "one answer, or leave out the space or line break that the answer begins with"
            )
        return tokens

    def _read(self, dialogue: Dialogue, rendered: Rendered, loss: str) -> Tokens | None:
        """One conversation as tokens; None where it takes a pass for each answer."""
        return self._texts.read(dialogue, rendered, loss, *self._texts.encoded([rendered.text]))

    def question(self, dialogue: Dialogue, answer: int) -> list[int]:
        """The token ids up to where the message `answer` begins."""
        room = self.task.max_tokens - self.task.max_target_tokens
        cut = dialogue.upto(answer)
        while True:
            ids = self.template.ids(cut.messages[:-1], cut.tools)
            if len(ids) <= room:
                return ids
            cut = self._shorter(cut, len(ids), room, "before an answer")

    def _passes(self, example: Example, notes: ChatNotes) -> list[tuple[int, Dialogue, Rendered]]:
        """The conversation in as few passes as the template allows: each with its answer (see
        `Cut`)."""
        dialogue, answer = example.dialogue, -1
        assert dialogue is not None
        if self.task.loss == "last":
            if not dialogue.learnt[-1]:
                raise DataError(
                    f"{dialogue.where}: the last answer has the weight 0, and `loss: last` learns "
                    "no other; leave the row out"
                )
            answer = len(dialogue.messages) - 1
            dialogue = dialogue.upto(answer)
        rendered = self.template.rendered(dialogue)
        if rendered is not None or self.task.loss == "all":
            return [(answer, dialogue, rendered or self._spans(dialogue))]
        parts = _each_answer(dialogue)
        notes.unfolded += len(parts) > 1
        return [(i, part, self._spans(part)) for i, part in parts]

    def _fitted(
        self, dialogue: Dialogue, rendered: Rendered, encoded: Encoded, notes: ChatNotes
    ) -> tuple[int, Tokens] | None:
        """How many exchanges are left out, and the tokens of what then fits; None where that takes
        a pass for each answer."""
        whole, most, exchanges = dialogue, self.task.max_tokens, 0
        tokens = self._texts.read(dialogue, rendered, self.task.loss, encoded)
        while tokens is not None and len(tokens.ids) > most:
            dialogue = self._shorter(dialogue, len(tokens.ids), most, "in all")
            exchanges += 1
            tokens = self._read(dialogue, self._spans(dialogue), self.task.loss)
        if tokens is None:
            return None
        self._note(notes, len(whole.messages) - len(dialogue.messages), [tokens])
        return exchanges, tokens

    def _fitted_answer(self, dialogue: Dialogue, notes: ChatNotes) -> tuple[int, Tokens]:
        """The same of a conversation of which one answer is learnt: one pass is enough."""
        rendered = self._spans(dialogue)
        (encoded,) = self._texts.encoded([rendered.text])
        found = self._fitted(dialogue, rendered, encoded, notes)
        assert found is not None
        return found

    def _note(self, notes: ChatNotes, lost: int, rows: Sequence[Tokens]) -> None:
        """Note how many messages a row's conversations lost, and whether none of their answers
        ends with a mark."""
        notes.shortened += bool(lost)
        notes.dropped += lost
        notes.endless += not any(
            token in self.template.marks
            for tokens in rows
            for token, learnt in zip(tokens.ids, tokens.learnt, strict=True)
            if learnt
        )

    def _spans(self, dialogue: Dialogue) -> Rendered:
        """The text, with the places of learnt answers even where earlier ones have none."""
        found = self.template.rendered(dialogue)
        if found is not None:
            return found
        last = len(dialogue.messages) - 1
        text = self.template.render(dialogue.messages, dialogue.tools)
        asked = self.template.render(dialogue.messages[:last], dialogue.tools, ask=True)
        if not text.startswith(asked):
            raise DataError(
                f"{dialogue.where}: the chat template writes the conversation otherwise before its "
                "last answer is there than with it; give `task.chat_template` another"
            )
        self.template.require_whole(dialogue, text)
        border = {last: len(asked)}
        if all(dialogue.learnt[i] for i in dialogue.answers) and self.task.loss == "all":
            return Rendered(text, {}, border)
        return Rendered(text, {last: (len(asked), len(text))}, border)

    def _shorter(self, dialogue: Dialogue, tokens: int, most: int, what: str) -> Dialogue:
        """The conversation without its first exchange. Raises DataError where the task refuses
        that, or nothing would be left to learn."""
        shorter = dialogue.without_first_exchange()
        if self.task.too_long == "refuse":
            told = "`task.too_long: drop_turns` leaves early turns out"
        elif shorter is None:
            told = "its last question and answer alone are too long"
        elif not any(shorter.learnt):
            told = "the turns that would be left have nothing to learn"
        else:
            return shorter
        raise DataError(
            f"{dialogue.where}: the conversation has {tokens:,} tokens {what}, more than {most:,} "
            f"(`task.max_tokens`); {told}; raise the limit, or leave the row out"
        )


def _each_answer(dialogue: Dialogue) -> list[tuple[int, Dialogue]]:
    """Of each answer that is learnt, its index and the conversation up to it."""
    return [(i, dialogue.upto(i)) for i in dialogue.answers if dialogue.learnt[i]]
