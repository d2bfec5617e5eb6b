"""Pairs of answers as token ids: what is read, what is scored, what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from ptkit.data.chat_rows import ChatEncoder, ChatNotes, ChatRows
from ptkit.data.encoded import EncodedExample, PairExample
from ptkit.data.examples import Example
from ptkit.data.tokens import cut_left, lead_ids, texts_ids
from ptkit.errors import DataError
from ptkit.recipe.tasks import ChatTask, PreferenceTask


class PairEncoder:
    """Encodes the pairs of a task for one model.

    Texts: prompt and answers are tokenised separately, so that training sees what generation will,
    and answers end with the end-of-text token, once. Raises DataError for a tokenizer without one.
    Messages: as `ChatEncoder` encodes them, and raises.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: PreferenceTask) -> None:
        self.task, self.tokenizer = task, tokenizer
        self._lead = lead_ids(tokenizer)

    def rows(self, examples: Sequence[Example]) -> ChatRows:
        """A row for each pair, and what was decided on the way. Raises DataError, with the place of
        the pair, for one that does not fit."""
        notes, encoded = ChatNotes(), list[EncodedExample]()
        texts = iter(self._of_texts([e for e in examples if e.dialogue is None], notes))
        for example in examples:
            if example.dialogue is None:
                encoded.append(next(texts))
                continue
            assert example.rejected is not None
            assert example.rejected.dialogue is not None
            both = (example.dialogue, example.rejected.dialogue)
            encoded.append(_pair(*self._chats.together(both, notes)))
        return ChatRows(examples, encoded, notes)

    @cached_property
    def _chats(self) -> ChatEncoder:
        task = self.task
        chat = ChatTask(
            kind="chat", data=task.data, system=task.system, chat_template=task.chat_template,
            max_tokens=task.max_tokens, max_target_tokens=1, too_long=task.too_long,
        )  # fmt: skip
        return ChatEncoder(self.tokenizer, chat)

    def _of_texts(self, examples: Sequence[Example], notes: ChatNotes) -> list[PairExample]:
        if not examples:
            return []
        prompts = texts_ids(self.tokenizer, [e.input for e in examples])
        chosen = self._answers([e.target for e in examples])
        rejected = self._answers([e.rejected.target for e in examples if e.rejected is not None])
        rows = []
        for example, prompt, own, other in zip(examples, prompts, chosen, rejected, strict=True):
            kept = self._fitted(prompt, max(len(own), len(other)), example.where)
            notes.shortened += len(kept) < len(prompt)
            rows.append(_pair(EncodedExample(kept, own), EncodedExample(kept, other)))
        return rows

    def _answers(self, texts: list[str]) -> list[list[int]]:
        end = self.tokenizer.eos_token_id
        if end is None:
            raise DataError(
                "the tokenizer names no end token, so a model cannot learn where an answer ends; "
                "set `eos_token` in the base's tokenizer_config.json"
            )
        found = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [list(ids) if ids and ids[-1] == end else [*ids, end] for ids in found]

    def _fitted(self, prompt: list[int], answer: int, where: str) -> list[int]:
        """The prompt, cut on the left where the longer answer leaves no room for all of it."""
        most = self.task.max_tokens
        if not prompt:
            raise DataError(f"{where}: the tokenizer makes nothing of the prompt")
        if len(prompt) + answer <= most:
            return prompt
        told = "`task.too_long: drop_turns` cuts the prompt"
        if self.task.too_long != "refuse":
            if answer < most:
                return cut_left(prompt, most - answer, self._lead)
            told = "an answer alone is too long"
        raise DataError(
            f"{where}: the prompt with its longer answer has {len(prompt) + answer:,} tokens, more "
            f"than {most:,} (`task.max_tokens`); {told}; raise the limit, or leave the row out"
        )


def _pair(chosen: EncodedExample, rejected: EncodedExample) -> PairExample:
    return PairExample(chosen.input_ids, chosen.target_ids, chosen.learnt, rejected=rejected)
