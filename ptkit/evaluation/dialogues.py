"""What an adapter answers in conversations, and how likely it finds their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from ptkit.data.chat_rows import ChatEncoder
from ptkit.data.dialogue import Dialogue
from ptkit.data.encoded import EncodedExample
from ptkit.data.examples import Example
from ptkit.methods import Adapter
from ptkit.prefix import Compiled
from ptkit.recipe.tasks import ChatTask
from ptkit.runtime.forward import rows_for
from ptkit.runtime.generation import generate
from ptkit.runtime.tokenization import own_ends

#: Ends the reasoning that some models write before an answer.
_REASONED = "</think>"


class DialogueAnswers:
    """Answers of `adapter` in the conversations of a task.

    compiled: the compiled adapter; None for the plain base
    """

    def __init__(self, adapter: Adapter, task: ChatTask, compiled: Compiled | None) -> None:
        self.adapter, self.task, self._compiled = adapter, task, compiled
        self._encoder = ChatEncoder(adapter.base.tokenizer, task)
        self._ends = sorted({*own_ends(adapter.base.model), *self._encoder.template.ends})

    def last(self, examples: Sequence[Example], inputs: Sequence[list[int]]) -> list[str]:
        """The last answer of each conversation.

        inputs: token ids up to where it begins, with the conversation's own earlier answers
        """
        if self.task.history == "reference":
            return self._written(inputs)
        return self._after_own_answers([e.dialogue for e in examples if e.dialogue is not None])

    def nats(
        self,
        examples: Sequence[Example],
        losses: Callable[[list[EncodedExample]], list[dict[str, Any]]],
    ) -> list[dict[str, Any]]:
        """Cross-entropy in nats of all that is learnt of each conversation, and its tokens.

        losses: the same of rows
        """
        rows: list[EncodedExample] = []
        ends = [0]
        for example in examples:
            rows += self._encoder.rows([example]).encoded
            ends.append(len(rows))
        read = [replace(row, input_ids=self.adapter.behind(row.input_ids)) for row in rows]
        found = losses(read)
        return [
            {key: sum(row[key] for row in found[a:b]) for key in ("nats", "tokens")}
            for a, b in pairwise(ends)
        ]

    def _after_own_answers(self, dialogues: Sequence[Dialogue]) -> list[str]:
        """The last answers, where the earlier ones are the model's, turn by turn in one batch."""
        own, texts = list(dialogues), [""] * len(dialogues)
        turns = [dialogue.answers for dialogue in dialogues]
        for step in range(max(map(len, turns))):
            rows = [n for n, answers in enumerate(turns) if step < len(answers)]
            asked = [self._encoder.question(own[n], turns[n][step]) for n in rows]
            said = self._written([self.adapter.behind(ids) for ids in asked])
            for n, text in zip(rows, said, strict=True):
                texts[n] = text
                messages = [*own[n].messages]
                messages[turns[n][step]] = {"role": "assistant", "content": text}
                own[n] = replace(own[n], messages=tuple(messages))
        return texts

    def _written(self, inputs: Sequence[list[int]]) -> list[str]:
        base, task = self.adapter.base, self.task
        longest = max(map(len, inputs)) + task.max_target_tokens
        base.require_positions(self.adapter.positions, longest, f"`{self.adapter.section.title}`")
        tokens = generate(
            self.adapter.model,
            list(inputs),
            rows_for(self._compiled, list(inputs)),
            pad_token_id=base.pad_token_id,
            max_new_tokens=task.max_target_tokens,
            num_beams=task.num_beams,
            do_sample=False,
            eos_token_id=self._ends,
        )
        # What is judged is the answer, as a reference has it: without the reasoning before it.
        return [text.rpartition(_REASONED)[2].strip() for text in base.decode(tokens)]
