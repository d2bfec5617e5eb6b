"""Requests and responses, in OpenAI's form.

What OpenAI's API has and this server does not do is refused by name, unless it asks for nothing
(`best_of: 1`, `tools: []`). So is what is not known: a request is never half understood.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictBool, field_validator, model_validator

from ptkit.serve.request_part import RequestPart

Text = Annotated[str, Field(max_length=1_000_000)]
ModelName = Annotated[str, Field(min_length=1, max_length=2000)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=1)]
MAX_PROMPTS = 64
MAX_STOPS = 16
MAX_TOP = 20


class _Choosing(RequestPart):
    """What completions and chat completions share."""

    model: ModelName = Field(
        description="The base, an adapter, or several (`A,B,C`) that answer together."
    )
    n: int = Field(default=1, ge=1, le=64, description="Answers per prompt.")
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(
        default=None,
        ge=0,
        le=2,
        description="0 is greedy; default: 0, or 1 with `top_p`, `seed` or `n` of several.",
    )
    template: StrictBool | None = Field(
        default=None,
        description="Put texts into the adapter's template; default: where it has one.",
    )
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    presence_penalty: float = Field(default=0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0, ge=-2, le=2)
    user: str | None = Field(default=None, description="Taken and not used.")
    metadata: dict[str, str] | None = Field(default=None, description="Taken and not used.")
    ignore_eos: StrictBool = Field(default=False, description="Go on after the end of text.")

    @property
    def used_temperature(self) -> float:
        """Greedy, as `ptkit generate` is, unless the request asks to sample in whatever way."""
        if self.temperature is not None:
            return self.temperature
        samples = self.n > 1 or self.seed is not None or self.top_p < 1
        return 1.0 if samples else 0.0

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stop if text)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_done(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = dict(values)
        for name in _NOT_DONE.keys() & values.keys():
            if values.pop(name) not in (None, *_NOT_DONE[name]):
                raise ValueError(f"`{name}` is not supported by this server")
        return values


#: OpenAI's parameters that are not done, and the values that ask for nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}


class StreamOptions(RequestPart):
    """include_usage: end the stream with the counts of tokens."""

    include_usage: StrictBool = False


class CompletionRequest(_Choosing):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Default: 64.")
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)

    @field_validator("prompt", mode="before")
    @classmethod
    def _not_too_many(cls, prompt: Any) -> Any:
        # Else it would be told what each of the other forms of a prompt should be.
        if isinstance(prompt, list) and len(prompt) > MAX_PROMPTS:
            if not all(isinstance(entry, int) for entry in prompt):
                raise ValueError(
                    f"`prompt` holds {len(prompt):,} prompts, a request takes at most "
                    f"{MAX_PROMPTS}; send the others in another request"
                )
        elif prompt == [] or prompt == [[]]:
            raise ValueError("`prompt` is an empty list")
        return prompt

    @property
    def is_text(self) -> bool:
        """Whether the prompts are texts, and not token ids."""
        return isinstance(self.prompts[0], str)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts one by one."""
        prompt: Any = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        return [prompt] if isinstance(prompt[0], int) else prompt


#: What messages of OpenAI's and vLLM's servers hold without a content of it. Clients send it back.
_EMPTY_IN_ANSWERS = ("annotations", "tool_calls")


class TextPart(RequestPart):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class Message(RequestPart):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_empty_lists(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        empty = {name for name in _EMPTY_IN_ANSWERS if values.get(name) == []}
        return {name: value for name, value in values.items() if name not in empty}

    def as_template_takes_it(self) -> dict[str, str]:
        """For the tokenizer's chat template."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Choosing):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: StrictBool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)


class Usage(BaseModel):
    """Tokens read and written; virtual tokens are not counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """The tokens of a completion and their log-probabilities."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """The response, or one event of the stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token that could have stood here. bytes: null where it is not shown, as an end of text"""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of a message."""

    content: list[TokenLogprob]


class AnswerMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(BaseModel):
    """The response."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What a message grows by."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class ChatChunk(BaseModel):
    """One event of the stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ServedModel(BaseModel):
    """The base, or an adapter; parent: the base an adapter is of."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ptkit"
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(BaseModel):
    """`GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ServedModel]


class ErrorDetail(BaseModel):
    """message: what is wrong and what to do; param: where; code: for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorDetail


class Health(BaseModel):
    """status: `ok`, `draining` or `failed`."""

    status: Literal["ok", "draining", "failed"]
