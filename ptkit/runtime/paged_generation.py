"""Generation over blocks: transformers' `generate` with the decode loop in place of its own.

transformers merges and checks the settings, and builds the logits processors and the stopping
criteria. They see all rows of a call at every token, as in its own loop. So each option does what
it does there, and sampling takes the same random numbers. What the model runs is another matter: a
pass reads the rows that still write, without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptkit.prefix import KVPrefix
from ptkit.runtime.block_pool import BLOCK_SIZE, BlockPool
from ptkit.runtime.compile import kv_layout
from ptkit.runtime.decode_loop import DecodeLoop, LoopRow
from ptkit.runtime.facts import known
from ptkit.runtime.paged_batch import PagedBatch, PagedSequence, SequenceInput
from ptkit.runtime.row_adapters import row_adapters, rows_run_with


class _TextRow(LoopRow):
    """Row `number` of what a call of `generate` returns."""

    def __init__(self, sequence: PagedSequence, number: int, call: object) -> None:
        super().__init__(sequence)
        self.number, self.token, self._call = number, 0, call

    @property
    def last_token(self) -> int:
        return self.token

    @property
    def owner(self) -> object:
        """The call: all its rows write their first tokens together, as processors see them all."""
        return self._call


class BlockDecoding:
    """The argument `custom_generate` of transformers' `generate`: the loop that it runs.

    prompts, prefixes: of each row that `generate` is given; no prompt is empty
    streamer: is told of tokens; `generate` itself tells it of the prompt

    Rows that write several answers, and equal rows, are prefilled once. A row that is done leaves
    the batch. Rows run with the LoRA adapters that this thread's `row_adapters` names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[list[int]],
        prefixes: Sequence[KVPrefix | None],
        streamer: Any = None,
    ) -> None:
        self._model, self._streamer = model, streamer
        names = row_adapters()
        self._weights = (lambda rows: rows_run_with(tuple(rows))) if names else (
            lambda _: nullcontext()
        )  # fmt: skip
        loras = [(name, name) for name in names] if names else [None] * len(prompts)
        self._inputs = [
            SequenceInput(prompt, prefix, lora)
            for prompt, prefix, lora in zip(prompts, prefixes, loras, strict=True)
        ]

    def __call__(
        self,
        view: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **unused: Any,
    ) -> Tensor:
        """`input_ids` `[rows, columns]` and what is written after them, `[rows, columns + new]`.

        unused: what transformers' own loop hands to the model: mask, positions, an empty cache
        """
        loop = self._begun(len(input_ids), generation_config, input_ids.shape[1])
        pad = int(generation_config._pad_token_tensor)
        sampled = bool(generation_config.do_sample)
        plain = not (sampled or len(logits_processor))
        writer: Any = view  # transformers' stubs do not know what generates
        rows, numbers = None, input_ids.new_empty(0)  # of the last step
        with ExitStack() as decoding:
            while loop.rows:
                ready = loop.step()
                if not ready.rows:
                    continue
                if not ready.decoded:  # all that follows is decode
                    decoding.enter_context(writer._optimize_model_for_decode())
                if ready.rows is not rows:
                    rows, listed = ready.rows, [row.number for row in ready.rows]
                    numbers = torch.tensor(listed, device=input_ids.device)
                own = ready.logits.to(input_ids.device)
                if plain:
                    chosen = own.argmax(-1)
                else:
                    scores = logits_processor(input_ids, _of_all(own, numbers, len(input_ids)))
                    every = _drawn(scores) if sampled else scores.argmax(-1)
                    chosen = every[numbers]
                tokens = numbers.new_full((len(input_ids),), pad)
                tokens[numbers] = chosen
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                done = stopping_criteria(input_ids, None).tolist()
                if self._streamer is not None:
                    self._streamer.put(tokens.cpu())
                for row, token in zip(ready.rows, chosen.tolist(), strict=True):
                    row.token = token
                loop.remove([row for row in ready.rows if done[row.number]])
        if self._streamer is not None:
            self._streamer.end()
        return input_ids

    def _begun(self, count: int, config: Any, columns: int) -> DecodeLoop[_TextRow]:
        """A loop of `count` rows: every input as often in a row as it has answers.

        columns: of the ids that `generate` begins with, from which `max_length` counts
        """
        new, times = config.max_length - columns, count // len(self._inputs)
        pool = BlockPool(known(self._model, kv_layout), reserved=_blocks(self._inputs, new, times))
        batch = PagedBatch(self._model, pool, self._weights)
        loop: DecodeLoop[_TextRow] = DecodeLoop(batch, config.prefill_chunk_size)
        for given in self._inputs:
            for _ in range(times):
                sequence = batch.begin(given, _own_positions(given, new))
                loop.prefilling.append(_TextRow(sequence, len(loop.prefilling), self))
        return loop


def _blocks(inputs: Sequence[SequenceInput], new: int, times: int) -> int:
    """Blocks that hold `inputs`, each `times` with `new` tokens after it, and every prefix once."""
    shared = {id(given.prefix): given.prefix.virtual_tokens for given in inputs if
              given.prefix is not None and not given.prefix.infix}  # fmt: skip
    held = [_own_positions(given, new) for given in inputs for _ in range(times)]
    return sum(-(-positions // BLOCK_SIZE) for positions in (*held, *shared.values()))


def _own_positions(given: SequenceInput, new: int) -> int:
    """Positions of `given` and of `new` tokens after it that are in blocks of its own."""
    own = given.prefix is not None and given.prefix.infix
    virtual = given.prefix.virtual_tokens if given.prefix is not None and own else 0
    return virtual + len(given.prompt) + new


def _of_all(logits: Tensor, numbers: Tensor, rows: int) -> Tensor:
    """`logits` `[numbers, vocabulary]` in float32 at their places among `rows`, else zeros."""
    if len(numbers) == rows:
        return logits.float()
    whole = logits.new_zeros((rows, logits.shape[1]), dtype=torch.float32)
    whole[numbers] = logits.float()
    return whole


def _drawn(scores: Tensor) -> Tensor:
    """A token of every row, `[rows]`, with torch's random numbers, as transformers draws it."""
    return torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
