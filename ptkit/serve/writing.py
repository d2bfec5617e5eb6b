"""An answer under way: its sampler and its text, token by token."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ptkit.runtime.base_model import Base
from ptkit.serve.answer import Answer, FinishReason, Update
from ptkit.serve.sampling import Sampler, Token
from ptkit.serve.text import TextStream


class Writing:
    """The state of an answer under way: its sampler, its text and the rows it has."""

    def __init__(self, answer: Answer, base: Base, ends: frozenset[int]) -> None:
        """ends: ids of the tokens that end a text on `base`"""
        self.answer = answer
        self.sampler = Sampler(answer.sampling, base.model.device)
        self._stream = TextStream(base.tokenizer, answer.sampling.stop, base.frame)
        self._ends = frozenset() if answer.sampling.ignore_eos else ends
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
            piece = self._stream.push(token.id)
            text = piece.text
            if piece.stopped:
                finish = "stop"
            elif answer.written >= answer.sampling.max_tokens:
                finish, text = "length", text + self._stream.finish()
        self._text.append(text)
        if finish or (answer.each_piece and text):
            answer.tell(Update("".join(self._text), tuple(self._tokens), finish))
            self._text, self._tokens = [], []
        return finish

    @property
    def length(self) -> int:
        """Positions its longest row takes by now."""
        return self.answer.virtual_tokens + len(self.answer.prompt) + self.answer.written


def together(logits: Tensor) -> Tensor:
    """One row of scores from an answer's rows, `[rows, vocabulary]`."""
    if len(logits) == 1:
        return logits[0]
    return torch.log_softmax(logits.float(), -1).mean(0)
