"""Greedy answers of llama.cpp's server, with an adapter in its one slot."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from ptkit.errors import PtkitError, UserError
from ptkit.hub.engine_adapters import engine_adapters, engine_prefix
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.generation import end_ids
from ptkit.runtime.slot_file import cache_layout, placeholders, slot_file
from ptkit.serve.engines.llama_cpp.server import LlamaCppSettings, LlamaServer
from ptkit.serve.engines.llama_cpp.trial import require_same_answers


def greedy(
    source: Path,
    base: Base,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    gguf: Path | None = None,
    dtype: str = "float32",
    llama_server: str | None = None,
) -> list[list[int]]:
    """The answers to `prompts`.

    gguf: the file that the server loads; dtype: of its cache; llama_server: see `LlamaCppSettings`
    """
    if gguf is None:
        raise UserError("--engine llama-cpp needs --gguf FILE, the model's file")
    layout = cache_layout(gguf, dtype)
    (prefix,) = [engine_prefix(*read) for read in engine_adapters([source], base)]
    longest = max(map(len, prompts)) + prefix.virtual_tokens + max_new_tokens
    settings = LlamaCppSettings(gguf.resolve(), layout, 1, longest, where=llama_server)
    answers = asyncio.run(_answers(settings, base, prefix, prompts, max_new_tokens))
    ends = end_ids(base.model)
    return [
        answer[: next((i for i, token in enumerate(answer) if token in ends), len(answer))]
        for answer in answers
    ]


async def _answers(
    settings: LlamaCppSettings,
    base: Base,
    prefix: KVPrefix,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
) -> list[list[int]]:
    server = LlamaServer(settings)
    lead, answers = placeholders(prefix, base), []
    try:
        await server.ready()
        await require_same_answers(server, base)
        await server.restore(0, slot_file(prefix, lead, settings.layout))
        for prompt in prompts:
            told = await server.complete(
                0, [*lead, *prompt], n_predict=max_new_tokens, temperature=0.0,
                samplers=["temperature"],
            )  # fmt: skip
            if told["timings"]["cache_n"] < len(lead):
                raise PtkitError("llama.cpp's server did not keep the adapter in its slot")
            answers.append([int(token) for token in told["tokens"]])
    finally:
        await server.close()
    return answers
