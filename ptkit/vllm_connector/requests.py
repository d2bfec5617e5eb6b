"""Requests for adapters: placeholder ids before the prompt on the way in, and none on the way out.

Every route of vLLM's server asks `engine_client.generate`. A request for an adapter arrives there
with a `PrefixRequest`, because vLLM looks the `model` up among its LoRA adapters. It leaves as a
request of the base with placeholder ids before its prompt. The scheduler counts the placeholders
as computed elsewhere, so the model never reads them.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import os
from collections import Counter
from collections.abc import AsyncGenerator, MutableMapping, Sequence
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from vllm.exceptions import (
    GracefulHTTPError,
    VLLMError,
    VLLMNotFoundError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from ptkit.errors import AdapterError, PtkitError, UserError
from ptkit.vllm_connector.library import PrefixLibrary, PrefixVersion, UnknownAdapterError

#: In a request's `kv_transfer_params`: what the connector loads.
KEY = "ptkit"
#: In a prompt that was put into an adapter's template: its version, and where an answer ends, too.
VERSION, ENDS = "ptkit_version", "ptkit_ends"
#: Far from the numbers that vLLM counts LoRA adapters with.
_FIRST_ID = 1_000_000_000


class PrefixRequest(LoRARequest):
    """An adapter as vLLM's server lists and looks it up; `generate` takes it out again."""


class PrefixRequests:
    """`generate` of an engine client that knows adapters.

    listed: vLLM's own names of LoRA adapters, where those of `library` are entered
    """

    def __init__(
        self, engine_client: Any, library: PrefixLibrary, listed: MutableMapping[str, LoRARequest]
    ) -> None:
        self.library = library
        self._generate = engine_client.generate
        self._listed = listed
        self._base = library.running.name
        self._longest = library.running.longest
        self._ids = itertools.count(_FIRST_ID)
        # Who knows the salt of an adapter could put other blocks where it looks for its own.
        self._secret = os.urandom(32)
        # How often requests of a version failed, or ended before they were told anything.
        self._failed: Counter[str] = Counter()
        for name in library.names():
            self.enter(name)
        engine_client.generate = self.generate

    def enter(self, name: str) -> None:
        """List the adapter `name`."""
        self._listed[name] = PrefixRequest(
            lora_name=name, lora_int_id=next(self._ids), lora_path=name, base_model_name=self._base
        )

    def strike(self, name: str) -> None:
        """List the adapter `name` no longer."""
        self._listed.pop(name, None)

    def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        **others: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """See vLLM's. What is wrong with the request, or the adapter, is raised by the call itself.
        At that time no stream has begun, and the scheduler has not seen the request."""
        if (sampling_params.extra_args or {}).get("kv_transfer_params") is not None:
            raise VLLMValidationError(
                "this server takes no `kv_transfer_params`: its connector is ptkit's",
                parameter="kv_transfer_params",
            )
        if not isinstance(lora_request, PrefixRequest):
            return self._generate(
                prompt, sampling_params, request_id, lora_request=lora_request, **others
            )
        carried = prompt if isinstance(prompt, dict) else {}
        version = carried.get(VERSION) or self.version(lora_request.lora_name)
        _require_plain(prompt, sampling_params, version.name)
        sampling_params = _ending(sampling_params, carried.get(ENDS, ()))
        prompt, sampling_params = self._with_prefix(prompt, sampling_params, version)
        return self._answers(version, prompt, sampling_params, request_id, others)

    def serves(self, name: str | None) -> bool:
        """Whether `name` is an adapter's."""
        return isinstance(self._listed.get(name or ""), PrefixRequest)

    def version(self, name: str) -> PrefixVersion:
        """The adapter `name` as it is now. Raises VLLMError where it cannot be served."""
        try:
            return self.library.version(name)
        except PtkitError as error:
            raise as_vllm_error(error) from error

    async def _answers(
        self,
        version: PrefixVersion,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        others: dict[str, Any],
    ) -> AsyncGenerator[RequestOutput, None]:
        told = self._generate(prompt, sampling_params, request_id, **others)
        loaded = False
        try:
            with self.library.held(version):
                async with aclosing(told) as outputs:
                    async for output in outputs:
                        loaded = not any(o.finish_reason == "error" for o in output.outputs)
                        hide(output, version.virtual_tokens)
                        yield output
        finally:
            if not loaded:
                # Its load may have failed. vLLM takes such blocks out of its prefix cache, unless
                # the request was given up in that step.
                self._failed[version.digest] += 1

    def _with_prefix(
        self, prompt: dict[str, Any], params: SamplingParams, version: PrefixVersion
    ) -> tuple[dict[str, Any], SamplingParams]:
        ids = prompt["prompt_token_ids"]
        virtual, name = version.virtual_tokens, version.name
        room = self._longest - virtual - len(ids)
        if not ids or room < 1:
            raise VLLMValidationError(
                f"a prompt for `{name}` has 1 to {self._longest - virtual - 1} tokens, this one "
                f"{len(ids)}; the server's {self._longest} positions hold {virtual} virtual tokens "
                "too",
                parameter="prompt",
            )
        params = params.clone()
        params.max_tokens = min(params.max_tokens or room, room)
        if params.min_tokens > params.max_tokens:
            raise VLLMValidationError(
                f"`min_tokens` is {params.min_tokens}, behind this prompt there is room for "
                f"{params.max_tokens}",
                parameter="min_tokens",
            )
        loaded = {"digest": version.digest, "tokens": virtual}
        params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": {KEY: loaded}}
        own = str(prompt.get("cache_salt") or "")
        if params.prompt_logprobs is not None:
            # vLLM would compute all of the prompt again, the placeholders as if they were text.
            # Without blocks of earlier requests, all of what is no placeholder is computed anyway.
            params.skip_reading_prefix_cache = False
            own += f" {os.urandom(16).hex()}"
        salted = f"{version.digest} {self._failed[version.digest]} {own}"
        salt = hmac.new(self._secret, salted.encode(), hashlib.sha256)
        # The penalty for repetition looks at the prompt too: there, a token that it holds anyway.
        placeholder = ids[0] if params.repetition_penalty != 1.0 else 0
        without = ("prompt_token_offsets", VERSION, ENDS)
        told = {key: value for key, value in prompt.items() if key not in without}
        told |= {
            "prompt_token_ids": [placeholder] * virtual + list(ids),
            "cache_salt": salt.hexdigest(),
        }
        return told, params


def _ending(params: SamplingParams, ends: Sequence[int]) -> SamplingParams:
    """`params` of an answer that ends at `ends`, too."""
    if params.ignore_eos or not ends:
        return params
    params = params.clone()
    params.stop_token_ids = list(dict.fromkeys([*(params.stop_token_ids or ()), *ends]))
    params._all_stop_token_ids.update(ends)  # what `min_tokens` holds back
    return params


def hide(output: RequestOutput, virtual: int) -> None:
    """Take `virtual` placeholders out of what vLLM tells of a request's prompt."""
    if output.prompt_token_ids is not None:
        output.prompt_token_ids = output.prompt_token_ids[virtual:]
        scores = output.prompt_logprobs
        if scores:
            # Some runners count what was loaded, others do not. The first token of a prompt has no
            # score, as everywhere.
            output.prompt_logprobs = [None, *_last(scores, len(output.prompt_token_ids) - 1)]
    for count in ("num_cached_tokens", "num_cache_creation_tokens"):
        if (found := getattr(output, count)) is not None:
            setattr(output, count, max(0, found - virtual))


def _last(values: Sequence[Any], count: int) -> list[Any]:
    return list(values)[len(values) - count :]


def _require_plain(prompt: Any, params: SamplingParams, name: str) -> None:
    """Raise VLLMValidationError for what a prefix was not tried with."""
    if not isinstance(prompt, dict) or prompt.get("type") != "token":
        raise VLLMValidationError(
            f"`{name}` answers prompts of text or token ids; embeddings, images and streamed "
            "inputs were not tried behind a KV prefix",
            parameter="prompt",
        )
    for part in ("prompt_logprob_token_ids", "trace_decode_token_ids"):
        if getattr(params, part, None) is not None:
            raise VLLMValidationError(f"`{part}` was not tried with `{name}`", parameter=part)


def as_vllm_error(error: PtkitError) -> VLLMError:
    """What vLLM's server answers with: 404, 422, 400 or 503."""
    if isinstance(error, UnknownAdapterError):
        return VLLMNotFoundError(str(error))
    if isinstance(error, AdapterError):
        return VLLMUnprocessableEntityError(str(error), parameter="model")
    if isinstance(error, UserError):
        return VLLMValidationError(str(error))
    return GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE)
