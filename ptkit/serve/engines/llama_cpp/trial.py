"""Whether llama.cpp's server reads slot files as they are meant, tried before it serves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ptkit.errors import PtkitError, UserError
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.slot_file import placeholders, slot_file
from ptkit.serve.answer import EngineDiedError
from ptkit.serve.engines.llama_cpp.server import LlamaServer, refused_restore

_TEXT = "The capital of France is Paris, and the capital of Italy is"
#: Tokens that are read after the restored ones.
_READ = 2
#: Likeliest tokens whose log-probabilities are compared.
_COMPARED = 50
#: Of how far the plain server's answer without the restored tokens is from the right one.
_ALLOWED = 0.5


async def require_same_answers(server: LlamaServer, base: Base) -> None:
    """Restore the keys and values that `base` has of a text, and compare what the server predicts.

    So the server has this model, and its state's version, rotary pairs, cache type and layout of
    values are those of slot files. Raises UserError where they are not.
    """
    ids = _ids(base)
    read, prefix = ids[-_READ:], _read_by(base, ids[:-_READ])
    with torch.no_grad():
        row = torch.tensor([ids], device=base.model.device)
        expected = base.model(row).logits[0, -1].float().log_softmax(-1).cpu()
    lead = placeholders(prefix, base)
    layout = server.settings.layout
    try:
        await server.restore(0, slot_file(prefix, lead, layout))
    except EngineDiedError:
        raise
    except PtkitError as error:
        raise refused_restore(error, layout) from error
    restored = await _distance(server, [*lead, *read], expected)
    await server.erase(0)
    without = await _distance(server, read, expected)
    if not restored < _ALLOWED * without:
        raise UserError(
            f"llama.cpp's server does not continue a restored text as {base.id} does: its "
            f"log-probabilities are {restored:.2f} away on average, and {without:.2f} without the "
            f"text. Either it has another model, or its cache is not {layout.cache_name} with "
            f"flash attention {'on' if layout.flash_attention else 'off'}"
        )


def _ids(base: Base) -> list[int]:
    """The text, as often as makes it long enough."""
    (ids,) = base.encode([_TEXT])
    return (ids * (2 * _READ + 1))[: max(len(ids), 4 * _READ)]


def _read_by(base: Base, ids: list[int]) -> KVPrefix:
    with torch.no_grad():
        row = torch.tensor([ids], device=base.model.device)
        layers = base.model(row, use_cache=True).past_key_values.layers
    return KVPrefix(
        tuple(layer.keys[0] for layer in layers), tuple(layer.values[0] for layer in layers)
    )


async def _distance(server: LlamaServer, ids: list[int], expected: Tensor) -> float:
    """How far the server's log-probabilities of its likeliest tokens are from `expected`
    `[vocabulary]`, on average."""
    told: dict[str, Any] = await server.complete(
        0, ids, n_predict=1, temperature=0.0, samplers=["temperature"], n_probs=_COMPARED
    )
    top = told["completion_probabilities"][0]["top_logprobs"]
    known = [one for one in top if one["id"] < len(expected)]
    if len(known) < len(top):
        return float("inf")
    found = torch.tensor([one["logprob"] for one in known])
    return float((found - expected[[one["id"] for one in known]]).abs().mean())
