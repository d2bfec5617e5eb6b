"""A running answer: its sampler and its text, token by token."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ptkit.runtime.base_model import Base
from ptkit.serve.answer import Answer, FinishReason, Update
from ptkit.serve.sampling import SamplerState, Token
from ptkit.serve.text import TextStream


class DecodeState:
    """The state of a running answer: its sampler, its text and its tokens."""

    def __init__(self, answer: Answer, base: Base, ends: frozenset[int]) -> None:
        """ends: ids of the tokens that end a text on `base`"""
        self.answer = answer
        self.sampler = SamplerState(answer.sampling)
        self._stream = TextStream(base.tokenizer, answer.sampling.stop, base.frame)
        self._ends = frozenset() if answer.sampling.ignore_eos else ends | answer.ends
        #: Whether text is looked at before the answer has ended.
        self._streams = answer.each_piece or bool(answer.sampling.stop)
        self._text: list[str] = []
        self._tokens: list[Token] = []
        self.last_token = 0

    def take(self, token: Token) -> FinishReason | None:
        """Add a token to the answer and tell of what is new. Returns why it ended, if it did."""
        answer = self.answer
        if answer.first_token is None:
            answer.first_token = time.monotonic()
        finish: FinishReason | None = None
        text = ""
        self.last_token = token.id
        answer.written += 1
        if token.id in self._ends:
            finish, text = "stop", self._stream.finish()
        else:
            self._tokens.append(token)
            if self._streams:
                piece = self._stream.push(token.id)
                text = piece.text
                finish = "stop" if piece.stopped else None
            else:
                self._stream.add(token.id)
            if finish is None and answer.written >= answer.sampling.max_tokens:
                finish, text = "length", text + self._stream.finish()
        self._text.append(text)
        if finish or (answer.each_piece and text):
            answer.tell(Update("".join(self._text), tuple(self._tokens), finish))
            self._text, self._tokens = [], []
        return finish

    def end(self, finish: FinishReason) -> None:
        """End the answer where no token ends it."""
        self._text.append(self._stream.finish())
        self.answer.tell(Update("".join(self._text), tuple(self._tokens), finish))


def together(logits: Tensor) -> Tensor:
    """One row of scores from an answer's rows, `[rows, vocabulary]`."""
    if len(logits) == 1:
        return logits[0]
    return torch.log_softmax(logits.float(), -1).mean(0)
