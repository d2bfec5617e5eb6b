"""What an answer asks of llama.cpp's server, and what the server's events say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptkit.serve.answer import FinishReason
from ptkit.serve.sampling import Sampling, Token


@dataclass(frozen=True)
class Written:
    """One event of the server. written: tokens of the answer so far; missing: whether some were
    not told, as parts of the character `text`"""

    tokens: tuple[Token, ...]
    written: int
    finish: FinishReason | None = None
    missing: bool = False
    text: str = ""


def read_event(event: dict[str, Any], before: int, top: int) -> Written:
    """before: tokens that the events before it told of; top: how many likeliest ones to report"""
    probabilities = event.get("completion_probabilities") or [{}] * len(event["tokens"])
    tokens = tuple(
        Token(
            id, known.get("logprob"),
            tuple((one["id"], one["logprob"]) for one in known.get("top_logprobs", [])[:top]),
        )
        for id, known in zip(event["tokens"], probabilities, strict=True)
    )  # fmt: skip
    finish: FinishReason | None = None
    if event["stop"]:
        finish = "length" if event.get("stop_type") == "limit" else "stop"
    missing = event["tokens_predicted"] - before - len(tokens) > 0
    return Written(tokens, event["tokens_predicted"], finish, missing, event["content"])


def asked_of_server(sampling: Sampling) -> dict[str, Any]:
    """What the server calls the settings of `sampling`; everything else is off."""
    asked: dict[str, Any] = {
        "n_predict": sampling.max_tokens,
        "temperature": 0.0 if sampling.greedy else sampling.temperature,
        "top_p": sampling.top_p,
        "samplers": ["temperature", "top_p"],
    }
    if sampling.seed is not None:
        asked["seed"] = sampling.seed % (2**32 - 1)  # the largest number asks for a random one
    if sampling.logprobs is not None:
        asked["n_probs"] = max(1, sampling.logprobs)
    return asked
