"""What an adapter is asked: in the template it was trained with, up to its marks of an end.

Every route of vLLM's server that takes messages has `preprocess_chat` render them, and every one
that takes texts `preprocess_completion`. What these make for an adapter carries the version whose
template was used, and the marks, for `PrefixRequests.generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from vllm.exceptions import VLLMValidationError

from ptkit.vllm_connector.files import ChatRecord
from ptkit.vllm_connector.library import PrefixVersion
from ptkit.vllm_connector.requests import ENDS, VERSION, PrefixRequests

#: What makes a request one that samples: parameters with values that do not.
_SAMPLING: dict[str, tuple[Any, ...]] = {
    "n": (None, 1), "seed": (None,), "top_p": (None, 1), "top_k": (None, 0, -1), "min_p": (None, 0),
    "use_beam_search": (None, False),
}  # fmt: skip
#: Roles of a message that stands for the system prompt.
_SYSTEM = ("system", "developer")


class AdapterPrompts:
    """What vLLM's renderer makes of requests, where it knows how adapters are asked."""

    def __init__(self, renderer: Any, requests: PrefixRequests) -> None:
        self._renderer, self._requests = renderer.renderer, requests
        self._chat, self._texts = renderer.preprocess_chat, renderer.preprocess_completion
        renderer.preprocess_chat = self.preprocess_chat
        renderer.preprocess_completion = self.preprocess_completion

    async def preprocess_chat(
        self, request: Any, messages: Sequence[Any], *args: Any, **settings: Any
    ) -> tuple[Any, list[Any]]:
        """See vLLM's. Raises VLLMError where the adapter cannot be served."""
        if not self._requests.serves(getattr(request, "model", None)):
            found: tuple[Any, list[Any]] = await self._chat(request, messages, *args, **settings)
            return found
        _greedily(request)
        version = self._requests.version(request.model)
        chat = version.chat
        if chat.question is not None and not _as_it_is(request) and _is_question(messages):
            settings |= {
                "default_template": chat.question,
                "default_template_content_format": "string",
            }
        else:
            messages = with_system(chat, messages)
            if chat.template is not None:
                settings["default_template"] = chat.template
        told, inputs = await self._chat(request, messages, *args, **settings)
        self._carry(inputs, version, chat.ends)
        return told, inputs

    async def preprocess_completion(
        self, request: Any, prompt_input: Any, prompt_embeds: Any, **settings: Any
    ) -> list[Any]:
        """See vLLM's. A text for an adapter is put into its template, as the question of a chat is;
        token ids are not. Raises VLLMError where the adapter cannot be served."""
        texts = [prompt_input] if isinstance(prompt_input, str) else prompt_input
        plain = prompt_embeds is not None or getattr(request, "suffix", None) is not None
        plain = plain or not texts or not all(isinstance(text, str) for text in texts)
        if not self._requests.serves(request.model):
            return await self._as_vllm(request, prompt_input, prompt_embeds, settings)
        _greedily(request)
        if plain or _as_it_is(request):
            return await self._as_vllm(request, prompt_input, prompt_embeds, settings)
        version = self._requests.version(request.model)
        chat = version.chat
        if chat.question is None and chat.template is None:
            return await self._as_vllm(request, prompt_input, prompt_embeds, settings)
        # Templates write begin-of-text themselves, or `led` does.
        once = request.model_copy(update={"add_special_tokens": False})
        asked = [self._asked(chat, text) for text in texts]
        inputs = await self._as_vllm(once, asked, None, settings)
        self._carry(inputs, version, chat.ends if chat.question is None else ())
        return inputs

    async def _as_vllm(
        self, request: Any, prompt_input: Any, prompt_embeds: Any, settings: dict[str, Any]
    ) -> list[Any]:
        found: list[Any] = await self._texts(request, prompt_input, prompt_embeds, **settings)
        return found

    def _asked(self, chat: ChatRecord, text: str) -> str:
        """`text` as the one question of a conversation."""
        messages: list[Any] = [{"role": "user", "content": text}]
        if chat.question is None:
            messages = with_system(chat, messages)
        try:
            written = self._renderer.get_tokenizer().apply_chat_template(
                messages, chat_template=chat.question or chat.template,
                add_generation_prompt=True, tokenize=False,
            )  # fmt: skip
        except TemplateError as error:
            raise VLLMValidationError(str(error), parameter="prompt") from error
        return str(written)

    def _carry(self, inputs: list[Any], version: PrefixVersion, ends: Sequence[int]) -> None:
        """Let prompts begin as every prompt does, and carry the version they were made for."""
        for one in inputs:
            if "prompt_token_ids" in one:
                ids = led(one["prompt_token_ids"], version.chat.lead)
                self._renderer.validate_token_ids(ids, parameter="model")
                one["prompt_token_ids"] = ids
                one[VERSION], one[ENDS] = version, ends


def _greedily(request: Any) -> None:
    """Let a request that says nothing of sampling be answered greedily, as `ptkit serve` does."""
    samples = any(getattr(request, name, None) not in usual for name, usual in _SAMPLING.items())
    if not samples and getattr(request, "temperature", 0) is None:
        request.temperature = 0.0


def _as_it_is(request: Any) -> bool:
    """Whether the request says that no template is wanted."""
    return (getattr(request, "model_extra", None) or {}).get("template") is False


def with_system(chat: ChatRecord, messages: Sequence[Any]) -> list[Any]:
    """`messages` with the adapter's system prompt, where they bring none."""
    brought = bool(messages) and _role(messages[0]) in _SYSTEM
    own = [] if brought or chat.system is None else [{"role": "system", "content": chat.system}]
    return [*own, *messages]


def led(ids: Sequence[int], lead: Sequence[int]) -> list[int]:
    """`ids` with what every prompt begins with, unless they begin with it."""
    begun = list(ids[: len(lead)]) == list(lead)
    return list(ids) if begun else [*lead, *ids]


def _is_question(messages: Sequence[Any]) -> bool:
    return len(messages) == 1 and _role(messages[0]) == "user"


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else getattr(message, "role", None)
