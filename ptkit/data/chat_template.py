"""Conversations in a model's chat template: what is rendered, and which of it are the answers.

Transformers renders; here is decided which characters a model learns. A template may mark them
itself (`{% generation %}`). Otherwise the conversation is rendered turn by turn. What a rendering
adds to the question before it is the answer, as long as every rendering begins the next.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ptkit.data.dialogue import Dialogue, Message
from ptkit.data.tokens import part_ids, text_ids
from ptkit.errors import DataError, UserError, did_you_mean
from ptkit.formats.adapter_info import ChatInfo
from ptkit.recipe.tasks import ConversationTask
from ptkit.section import resolve_path

#: Templates for models that have none. `chatml` needs its two marks among the model's tokens;
#: `plain` writes roles as words, and an answer ends with the model's own end-of-text token.
NAMED = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
        "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "plain": (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token "
        "+ '\\n' }}{% elif message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
        "{% elif message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\\n' }}"
        "{% else %}{{ raise_exception('`plain` has no ' + message['role'] + ' turns') }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
}
#: Stands for an answer where the mark behind it is looked for; no mark holds it.
_ANSWER = "Qz7"
Conversations = TypeVar("Conversations", bound=ConversationTask)
#: Ends the reasoning that an answer may have before its text.
_REASONED = "</think>"
#: What a message says, by its role.
_CONTENTS = {
    "system": "the system prompt", "user": "the question", "assistant": "the answer",
    "tool": "the result of a tool",
}  # fmt: skip
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as one text.

    spans: first character and end of each answer, by the index of its message. Where a template
        marks other pieces than answers, the index is that of the piece, below zero
    asked: where the question of each learnt answer ends, by the index of the answer
    """

    text: str
    spans: Mapping[int, tuple[int, int]]
    asked: Mapping[int, int]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer with the template it writes conversations in.

    given: the template's text, where it is not the tokenizer's own
    system: the system prompt of conversations that bring none
    trained: whether an adapter was trained with it
    """

    tokenizer: PreTrainedTokenizerBase
    given: str | None = None
    system: str | None = None
    trained: bool = False

    @classmethod
    def of_task(cls, tokenizer: PreTrainedTokenizerBase, task: ConversationTask) -> ChatTemplate:
        """The template of a task, whose file was read (see `with_template_read`).

        Raises DataError where the task names none and the tokenizer has none.
        """
        chosen = task.chat_template
        if chosen is None and tokenizer.chat_template is None:
            raise DataError(
                "the model has no chat template; give one with `task.chat_template`: a Jinja file, "
                + ", ".join(f"`{name}`" for name in NAMED)
            )
        given = None if chosen is None else NAMED.get(chosen, chosen)
        assert given is None or "{" in given, "the template's file was not read"
        return cls(tokenizer, None if given == tokenizer.chat_template else given, task.system)

    @classmethod
    def of_record(
        cls, tokenizer: PreTrainedTokenizerBase, chat: ChatInfo | None
    ) -> ChatTemplate:  # fmt: skip
        """The template that an adapter was trained with, and the tokenizer's own where it records
        none."""
        if chat is None:
            return cls(tokenizer)
        given = None if chat.template == tokenizer.chat_template else chat.template
        return cls(tokenizer, given, chat.system, trained=True)

    @property
    def record(self) -> ChatInfo:
        """What an adapter's record says of it."""
        return ChatInfo(template=self._text(()), system=self.system)

    @property
    def exists(self) -> bool:
        """Whether there is one at all."""
        return self.given is not None or self.tokenizer.chat_template is not None

    @property
    def dated(self) -> bool:
        """Whether it writes the day into a conversation, as Llama 3.2's does."""
        return "strftime_now" in json.dumps(self.given or self.tokenizer.chat_template)

    def with_system(self, messages: Sequence[Message]) -> list[Message]:
        """`messages` with the system prompt, where they bring none."""
        brought = bool(messages) and messages[0]["role"] == "system"
        own = [] if brought or self.system is None else [{"role": "system", "content": self.system}]
        return [*own, *messages]

    def ids(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """The token ids of a conversation up to where the answer begins. They are those of the
        rendered text, so the begin-of-text token is there once, whoever writes it.

        Raises whatever the template raises.
        """
        return text_ids(self.tokenizer, self.render(messages, tools, ask=True))

    def asked(self, question: str | Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """A conversation with the system prompt, as a text to go on with.

        question: its messages; a text is one question

        Raises UserError where the template refuses it.
        """
        alone: Sequence[Message] = [{"role": "user", "content": question}]
        messages = alone if isinstance(question, str) else question
        try:
            return self.render(self.with_system(messages), tools, ask=True)
        except Exception as error:  # templates raise what they like (jinja2's, TypeError, ...)
            raise UserError(f"the chat template refuses the question: {error}") from error

    @cached_property
    def marks(self) -> frozenset[int]:
        """Token ids that stand for no text of a speaker: special and added ones."""
        return frozenset({*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder})

    @cached_property
    def ends(self) -> frozenset[int]:
        """The token id at which an answer ends; empty where the template writes no mark there."""
        question = {"role": "user", "content": "a"}
        try:
            asked = self.render([question], ask=True)
            said = self.render([question, {"role": "assistant", "content": _ANSWER}])
        except Exception:  # a template that insists on more than a question and an answer
            return frozenset()
        answer = said.removeprefix(asked)
        if answer == said or _ANSWER not in answer:
            return frozenset()
        tail = part_ids(self.tokenizer, answer.rpartition(_ANSWER)[2])[:1]
        return self.marks & {*tail}

    def render(
        self, messages: Sequence[Message], tools: Sequence[Any] = (), *, ask: bool = False,
        go_on: bool = False,
    ) -> str:  # fmt: skip
        """The messages as text; with `ask` up to where the next answer begins.

        go_on: leave out what the template writes after the last message

        Raises whatever the template raises.
        """
        (text,), _ = self._rendered(messages, tools, ask=ask, go_on=go_on)
        return str(text)

    def rendered(self, dialogue: Dialogue) -> Rendered | None:
        """The conversation with the places of its answers. None where a later turn changes what
        was rendered before it: some templates leave reasoning out of a history.

        Raises DataError naming the row, where the template refuses it, leaves out what it has, or
        asks for another beginning than the answer has.
        """
        read = self._rendered_with_marks if self.marked else self._turn_by_turn
        found: Rendered | None = read(dialogue)
        if found is not None:
            self.require_whole(dialogue, found.text)
        return found

    @cached_property
    def marked(self) -> bool:
        """Whether the template itself marks what the model writes."""
        return _MARK.search(self._text(())) is not None

    def _rendered_with_marks(self, dialogue: Dialogue) -> Rendered | None:
        (text,), (marked,) = self._tried(dialogue, dialogue.messages, marks=True)
        answers = dialogue.answers
        asked = {}
        for i in answers:
            if dialogue.learnt[i]:
                question = self._question(dialogue, i)
                if not text.startswith(question):
                    self._require_beginning(dialogue, i, question)
                    return None
                asked[i] = len(question)
        # What a question ends with is not learnt, though some templates mark it.
        spans = [
            (max([start, *(at for at in asked.values() if at <= end)]), end)
            for start, end in marked
        ]
        if len(spans) == len(answers):
            return Rendered(text, dict(zip(answers, spans, strict=True)), asked)
        if not all(dialogue.learnt[i] for i in answers):
            raise DataError(
                f"{dialogue.where}: the chat template marks {len(spans)} pieces in {len(answers)} "
                "answers, so one answer cannot be told from the others; use `loss: assistant` "
                "without weights, or a template without `{% generation %}`"
            )
        return Rendered(text, {-1 - n: span for n, span in enumerate(spans)}, asked)

    def _turn_by_turn(self, dialogue: Dialogue) -> Rendered | None:
        (text,), _ = self._tried(dialogue, dialogue.messages)
        spans = {}
        for i in dialogue.answers:
            asked = self._question(dialogue, i)
            said = self._require_beginning(dialogue, i, asked)
            if not text.startswith(said):
                return None
            spans[i] = (len(asked), len(said))
        learnt = {i: start for i, (start, _) in spans.items() if dialogue.learnt[i]}
        return Rendered(text, spans, learnt)

    def _question(self, dialogue: Dialogue, answer: int) -> str:
        """The conversation up to where the message `answer` begins."""
        (text,), _ = self._tried(dialogue, dialogue.messages[:answer], ask=True)
        return str(text)

    def _require_beginning(self, dialogue: Dialogue, answer: int, asked: str) -> str:
        """The conversation with the message `answer` as its end. Raises DataError where it does
        not begin as it is asked for."""
        (said,), _ = self._tried(dialogue, dialogue.messages[: answer + 1])
        if not said.startswith(asked):
            raise DataError(
                f"{dialogue.where}, turn {answer + 1}: the chat template asks for an answer with "
                f"{_end(asked, said)}, and writes the answer without it; give "
                "`task.chat_template` a template that writes both alike"
            )
        return str(said)

    def require_whole(self, dialogue: Dialogue, text: str) -> None:
        """Raise DataError for what a message says, tool calls, reasoning or tools that the template
        leaves out of `text`, the conversation as it writes it."""
        last = dialogue.messages[-1]
        calls = [c["function"] for m in dialogue.messages for c in m.get("tool_calls", ())]
        wanted = {
            "the tool call": [call["name"] for call in calls],
            "the argument": [key for call in calls for key in call["arguments"]],
            "the reasoning": [last.get("reasoning_content", "").strip()],
            "the tool": [str(t.get("function", t).get("name", "")) for t in dialogue.tools],
        }
        absent = [(what, p) for what, pieces in wanted.items() for p in pieces if p not in text]
        absent += [
            (_CONTENTS[m["role"]], m["content"]) for m in dialogue.messages if not _is_in(text, m)
        ]
        if absent:
            what, piece = absent[0]
            raise DataError(
                f"{dialogue.where}: the chat template leaves out {what} "
                f"`{' '.join(str(piece).split())[:40]}`; give `task.chat_template` a template that "
                "has a place for it, or leave it out of the data"
            )

    def _tried(self, dialogue: Dialogue, messages: Sequence[Message], **how: Any) -> Any:
        try:
            return self._rendered(messages, dialogue.tools, **how)
        except Exception as error:  # templates raise what they like (jinja2's, TypeError, ...)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{dialogue.where}: the chat template refuses the conversation at turn "
                f"{len(messages)}: {reason}"
            ) from error

    def _rendered(
        self, messages: Sequence[Message], tools: Sequence[Any], *, ask: bool = False,
        marks: bool = False, go_on: bool = False,
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:  # fmt: skip
        named: dict[str, Any] = {**self.tokenizer.special_tokens_map}
        found: Any = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=self._text(tools),
            return_assistant_tokens_mask=marks,
            add_generation_prompt=ask,
            continue_final_message=go_on,
            **named,
        )  # fmt: skip
        return found

    def _text(self, tools: Sequence[Any]) -> str:
        """The template; some tokenizers have one of their own for conversations with tools."""
        found: Any = self.tokenizer.get_chat_template(self.given, tools=[*tools] or None)
        return str(found)


def _is_in(text: str, message: Message) -> bool:
    """Whether `text` has what `message` says. Templates leave out reasoning and white space, and
    write results of tools as JSON; so one whole line is enough."""
    said = str(message["content"]).rpartition(_REASONED)[2].strip()
    if said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text:
        return True
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return any(line in text for line in (lines[-1], max(lines, key=len)))


def _end(asked: str, said: str) -> str:
    """What `asked` ends with and `said` has not."""
    same = next((i for i, (a, b) in enumerate(zip(asked, said, strict=False)) if a != b), len(said))
    return repr(asked[same:][-60:])


def with_template_read(task: Conversations, folder: Path) -> Conversations:
    """`task` with the text of the template's file in place of its name, so that it is complete
    wherever it is kept. Raises DataError for a file that is not there, empty, or no template."""
    chosen = task.chat_template
    if chosen is None or chosen in NAMED or "{" in chosen:
        return task
    path = resolve_path(chosen, folder)
    if not path.is_file():
        hint = did_you_mean(chosen, NAMED)
        raise DataError(f"`task.chat_template`: no such file: {path}, nor a template; {hint}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"`task.chat_template`: {path} is not UTF-8 text") from error
    if "{" not in text:
        raise DataError(f"`task.chat_template`: {path} is no Jinja template: nothing is filled in")
    return task.model_copy(update={"chat_template": text})
