"""From a request to running answers, and from their updates to OpenAI's responses."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from ptkit.data.chat_template import ChatTemplate
from ptkit.data.templates import filled
from ptkit.data.tokens import text_ids
from ptkit.errors import DataError, UserError
from ptkit.serve.answer import Answer, FinishReason, Update
from ptkit.serve.engine import Engine
from ptkit.serve.library import Library
from ptkit.serve.protocol import (
    AnswerMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Delta,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from ptkit.serve.sampling import Sampling, Token
from ptkit.serve.token_bytes import CharacterOffsets, TokenBytes

#: The longest answer to a prompt that names none, as of `ptkit generate`.
USUAL_TOKENS = 64


@dataclass
class RequestLimits:
    """max_tokens: longest answer; timeout: seconds an answer may take from its request on."""

    max_tokens: int = 1024
    timeout: float = 600.0


@dataclass
class PartialChoice:
    """An answer as far as it is told."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: FinishReason | None = None


class CompletionStream:
    """The answers to one request. Built in a worker thread, read in the event loop.

    Answers are numbered as OpenAI numbers choices: the `n` of the first prompt, those of the
    second, and so on.
    """

    def __init__(
        self,
        library: Library,
        limits: RequestLimits,
        request: CompletionRequest | ChatRequest,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """Raises UserError when the request cannot be carried out as written."""
        self._engine: Engine = library.engine
        self._bytes = TokenBytes(library.bank.base.tokenizer, library.bank.base.frame)
        self._request = request
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        kind = "chatcmpl" if isinstance(request, ChatRequest) else "cmpl"
        self._head: dict[str, Any] = {
            "id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": request.model
        }  # fmt: skip
        adapters = library.adapters(request.model)
        template = library.chat_template(request.model)
        prompts = _prompts(library, request, template)
        ends = template.ends if _is_chat(request, template) else frozenset[int]()
        # A conversation's answer may take what is left. What was trained on single inputs may not
        # know an end in a conversation: a classifier writes labels without end.
        talks = template.trained or library.is_base(request.model)
        open_ended = isinstance(request, ChatRequest) and talks
        usual = limits.max_tokens if open_ended else min(limits.max_tokens, USUAL_TOKENS)
        virtual = max(adapter.positions for adapter in adapters)
        deadline = time.monotonic() + limits.timeout
        self.answers: list[Answer] = []
        for prompt in prompts:
            room = None
            if self._engine.longest is not None:
                room = self._engine.longest - virtual - len(prompt)
            for number in range(request.n):
                index = len(self.answers)
                sampling = _sampling(request, number, limits.max_tokens, usual, room)
                self.answers.append(
                    Answer(
                        prompt,
                        adapters,
                        sampling,
                        self._teller(loop, index),
                        each_piece=request.stream,
                        deadline=deadline,
                        ends=ends,
                    )
                )
        self.prompt_tokens = sum(map(len, prompts))

    def _teller(self, loop: asyncio.AbstractEventLoop, index: int) -> Callable[[Update], None]:
        def tell(update: Update) -> None:
            try:
                loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))
            except RuntimeError:  # the loop has ended, and with it everybody who could listen
                return

        return tell

    def submit(self) -> None:
        """Hand the answers to the engine. Raises what `Engine.submit` does."""
        self._engine.submit(self.answers)

    def cancel(self) -> None:
        """Nobody waits for the answers any more."""
        self._engine.cancel(self.answers)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(number of the answer, update) as they come, until all are finished.

        Raises the first answer's error. Who stops listening calls `cancel`.
        """
        left = len(self.answers)
        while left:
            index, update = await self._updates.get()
            if update.error is not None:
                raise update.error
            left -= update.last
            yield index, update

    async def whole(self) -> Completion | ChatCompletion:
        """The response, when all is written."""
        written = [PartialChoice() for _ in self.answers]
        async for index, update in self.updates():
            answer = written[index]
            answer.text += update.text
            answer.tokens += update.tokens
            answer.finish = update.finish
        if isinstance(self._request, ChatRequest):
            return ChatCompletion(
                choices=[
                    ChatChoice(
                        index=i,
                        message=AnswerMessage(content=answer.text),
                        logprobs=self._chat_logprobs(answer.tokens),
                        finish_reason=answer.finish,
                    )
                    for i, answer in enumerate(written)
                ],
                usage=self.usage(),
                **self._head,
            )
        return Completion(
            choices=[
                CompletionChoice(
                    index=i,
                    text=answer.text,
                    logprobs=self._completion_logprobs(answer.tokens, CharacterOffsets()),
                    finish_reason=answer.finish,
                )
                for i, answer in enumerate(written)
            ],
            usage=self.usage(),
            **self._head,
        )

    async def events(self) -> AsyncIterator[BaseModel]:
        """The stream's events, the last one with the usage where that was asked for."""
        chat = isinstance(self._request, ChatRequest)
        if chat:
            for index in range(len(self.answers)):
                yield self._chunk(index, Delta(role="assistant", content=""), None, None)
        offsets = [CharacterOffsets() for _ in self.answers]
        async for index, update in self.updates():
            if chat:
                delta = Delta(content=update.text)
                yield self._chunk(index, delta, self._chat_logprobs(update.tokens), update.finish)
            else:
                logprobs = self._completion_logprobs(update.tokens, offsets[index])
                yield Completion(
                    choices=[
                        CompletionChoice(
                            index=index,
                            text=update.text,
                            logprobs=logprobs,
                            finish_reason=update.finish,
                        )
                    ],
                    **self._head,
                )
        options = self._request.stream_options
        if options is not None and options.include_usage:
            kind: Any = ChatChunk if chat else Completion
            yield kind(choices=[], usage=self.usage(), **self._head)

    def as_json(self, event: BaseModel) -> str:
        """An event of the stream as OpenAI writes it: `usage` where it was asked for, and of a
        message's growth what there is."""
        options = self._request.stream_options
        counted = options is not None and options.include_usage
        told = event.model_dump(mode="json", exclude=None if counted else {"usage"})
        for choice in told["choices"]:
            if "delta" in choice:
                choice["delta"] = {k: v for k, v in choice["delta"].items() if v is not None}
        return json.dumps(told, ensure_ascii=False, separators=(",", ":"))

    def usage(self) -> Usage:
        """Tokens so far."""
        written = sum(answer.written for answer in self.answers)
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=written,
            total_tokens=self.prompt_tokens + written,
        )

    def _chunk(
        self, index: int, delta: Delta, logprobs: ChatLogprobs | None, finish: FinishReason | None
    ) -> ChatChunk:
        choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(choices=[choice], **self._head)

    def _chat_logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if not isinstance(self._request, ChatRequest) or not self._request.logprobs:
            return None

        def named(id: int, logprob: float) -> dict[str, Any]:
            shown = self._bytes.shown(id)
            return {
                "token": self._bytes.name(id),
                "logprob": logprob,
                "bytes": None if shown is None else [*shown],
            }

        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **named(token.id, token.logprob or 0.0),
                    top_logprobs=[TopLogprob(**named(*top)) for top in token.top],
                )
                for token in tokens
            ]
        )

    def _completion_logprobs(
        self, tokens: Sequence[Token], offsets: CharacterOffsets
    ) -> CompletionLogprobs | None:
        """offsets: of the answer, which took the tokens before these."""
        if not isinstance(self._request, CompletionRequest) or self._request.logprobs is None:
            return None
        name = self._bytes.long_name

        def top(token: Token) -> dict[str, float]:
            # The token itself is always there, as with OpenAI and vLLM: one more than was asked
            # for, where it is none of the likeliest. Of tokens with one name the first stands.
            likely = {name(token.id): token.logprob or 0.0}
            for id, logprob in token.top:
                likely.setdefault(name(id), logprob)
            return likely

        return CompletionLogprobs(
            tokens=[name(token.id) for token in tokens],
            token_logprobs=[token.logprob or 0.0 for token in tokens],
            top_logprobs=[top(token) for token in tokens] if self._request.logprobs else None,
            text_offset=[offsets.place(self._bytes.shown(token.id) or b"") for token in tokens],
        )


def _sampling(
    request: CompletionRequest | ChatRequest, number: int, most: int, usual: int, room: int | None
) -> Sampling:
    """How answer `number` of a prompt is chosen.

    most: the server's limit on answers; usual: the limit where none is asked for; room: positions
        the prompt leaves
    """
    if isinstance(request, ChatRequest):
        asked = request.max_completion_tokens or request.max_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        if request.top_logprobs and not request.logprobs:
            raise UserError("`top_logprobs` needs `logprobs: true`")
    else:
        asked, logprobs = request.max_tokens, request.logprobs
    if asked is not None and asked > most:
        raise UserError(f"`max_tokens` is {asked}, this server writes at most {most}")
    if asked is None:
        asked = usual if room is None else max(1, min(usual, room))
    return Sampling(
        max_tokens=asked,
        temperature=request.used_temperature,
        top_p=request.top_p,
        seed=None if request.seed is None else (request.seed + number) % 2**63,
        stop=request.stops,
        logprobs=logprobs,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        ignore_eos=request.ignore_eos,
    )


def _is_chat(request: CompletionRequest | ChatRequest, template: ChatTemplate) -> bool:
    """Whether the prompts are conversations: they are, where a prompt is to be put into the
    template of an adapter that was trained on conversations."""
    if isinstance(request, ChatRequest):
        return True
    return request.template is not False and template.trained and request.is_text


def _prompts(
    library: Library, request: CompletionRequest | ChatRequest, chat: ChatTemplate
) -> list[list[int]]:
    """The token ids of every prompt. Raises UserError for ids the model does not have."""
    base = library.bank.base
    template = library.template(request.model) if request.template is not False else None
    if isinstance(request, ChatRequest):
        messages = [message.as_template_takes_it() for message in request.messages]
        if template is not None and not chat.trained and _is_question(messages):
            # It was trained on inputs, not on conversations: the one question is its input.
            (ids,) = base.encode([_filled(template, messages[0]["content"])])
        else:
            ids = chat_prompt(chat, messages)
        base.require_embedded([ids])
        return [ids]
    prompts: list[list[int]] = []
    for prompt in request.prompts:
        if isinstance(prompt, str):
            asked = chat.asked(prompt) if _is_chat(request, chat) else _filled(template, prompt)
            (ids,) = base.encode([asked])
            if not ids:
                raise UserError("the prompt is empty: it has no tokens")
        else:
            ids, vocabulary = prompt, base.embedding.num_embeddings
            if max(ids) >= vocabulary:
                raise UserError(
                    f"the prompt has the token {max(ids)}; the model knows 0 to {vocabulary - 1}"
                )
        prompts.append(ids)
    return prompts


def _is_question(messages: Sequence[Mapping[str, str]]) -> bool:
    return len(messages) == 1 and messages[0]["role"] == "user"


def _filled(template: str | None, text: str) -> str:
    """`text` in an adapter's template. Raises UserError for a template of several columns."""
    try:
        return filled(template, text)
    except DataError as error:
        raise UserError(f"{error}; here that is `template: false`") from error


def chat_prompt(template: ChatTemplate, messages: list[dict[str, str]]) -> list[int]:
    """The ids of a conversation, up to where the answer begins.

    By the chat template, with one begin-of-text token, whoever writes it. Without a
    template the messages follow each other line by line, as in `ptkit chat`. Raises UserError when
    the template refuses them.
    """
    if not template.exists:
        ids = text_ids(template.tokenizer, "\n".join(message["content"] for message in messages))
    else:
        try:
            ids = template.ids(template.with_system(messages))
        except Exception as error:  # templates raise what they like (jinja2's, TypeError, ...)
            raise UserError(f"the model's chat template refuses the messages: {error}") from error
    if not ids:
        raise UserError("the messages are empty: they have no tokens")
    return ids
