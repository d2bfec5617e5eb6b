"""Conversations with an adapter: in the template it was trained with, up to its marks of an end.

Every route of vLLM's server that takes messages has `preprocess_chat` render them. What it makes
for an adapter carries the version whose template was used, for `PrefixRequests.generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptkit.vllm_connector.files import ChatRecord
from ptkit.vllm_connector.requests import VERSION, PrefixRequests

#: Roles of a message that stands for the system prompt.
_SYSTEM = ("system", "developer")


class ChatPrompts:
    """`preprocess_chat` of vLLM's renderer for requests, which knows how adapters are asked."""

    def __init__(self, renderer: Any, requests: PrefixRequests) -> None:
        self._renderer, self._requests = renderer.renderer, requests
        self._preprocess = renderer.preprocess_chat
        renderer.preprocess_chat = self.preprocess_chat

    async def preprocess_chat(
        self, request: Any, messages: Sequence[Any], *args: Any, **settings: Any
    ) -> tuple[Any, list[Any]]:
        """See vLLM's. Raises VLLMError where the adapter cannot be served."""
        if not self._requests.serves(getattr(request, "model", None)):
            found: tuple[Any, list[Any]] = await self._preprocess(
                request, messages, *args, **settings
            )
            return found
        version = self._requests.version(request.model)
        chat = version.chat
        as_it_is = (getattr(request, "model_extra", None) or {}).get("template") is False
        if chat.question is not None and not as_it_is and _is_question(messages):
            settings |= {
                "default_template": chat.question,
                "default_template_content_format": "string",
            }
        else:
            messages = with_system(chat, messages)
            if chat.template is not None:
                settings["default_template"] = chat.template
        told, inputs = await self._preprocess(request, messages, *args, **settings)
        for one in inputs:
            if "prompt_token_ids" in one:
                ids = led(one["prompt_token_ids"], chat.lead)
                self._renderer.validate_token_ids(ids, parameter="model")
                one["prompt_token_ids"] = ids
                one[VERSION] = version
        return told, inputs


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
