"""What logits processors and stopping criteria read: the ids of the text, and nothing else.

transformers hands them all columns of a batch: padding, and the placeholders that stand for a
prefix in the cache. Neither was said by anybody, so a repetition penalty must not count them. Here
they get each row's own prompt and what was written after it, as if the row were alone and had no
prefix. Rows with prompts of one length are handed over together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ptkit.errors import ModelError

#: Options of `generate` under which transformers reads the tokens before the cache's end again.
DRAFTED = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit")
#: Whether transformers' chunked prefill goes on from what a cache holds.
CHUNKS_COUNT_THE_CACHE = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 21)
#: Settings by which the encoder's input is read, too.
_OF_INPUTS = ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size")


def setting(model: PreTrainedModel, options: dict[str, Any], name: str) -> Any:
    """What `name` is in a call of `generate` with `options`: given by itself, in the call's
    `generation_config`, or in the model's."""
    given = options.get("generation_config")
    for value in (
        options.get(name), getattr(given, name, None), getattr(model.generation_config, name, None)
    ):  # fmt: skip
        if value is not None:
            return value
    return None


def require_chunks_behind(model: PreTrainedModel, options: dict[str, Any], cache: Any) -> None:
    """Raise ModelError where transformers would read the input in chunks as if nothing were in
    `cache`: releases before 5.21 count its positions from zero."""
    if CHUNKS_COUNT_THE_CACHE or not setting(model, options, "prefill_chunk_size"):
        return
    if cache is not None and cache.get_seq_length():
        raise ModelError(
            f"transformers {transformers.__version__} cannot read an input in chunks behind a "
            "prefix; leave out `prefill_chunk_size`, or install transformers>=5.21"
        )


@dataclass(frozen=True)
class _Prompts:
    """The prompts of a batch, and where their continuation begins.

    columns: of `input_ids` before the first new token; None where those are texts already (a
        decoder's, whose prompts an encoder reads)
    """

    prompts: list[list[int]]
    columns: int | None

    @property
    def lengths(self) -> list[int]:
        """The lengths that prompts have, each once."""
        return sorted({len(prompt) for prompt in self.prompts})

    def of_length(self, length: int) -> Tensor:
        """The prompts of `length` tokens, `[prompts, length]`."""
        return torch.tensor([p for p in self.prompts if len(p) == length], dtype=torch.long)

    def rows(self, length: int, count: int) -> list[int]:
        """The rows, of `count`, whose prompt has `length` tokens; beams of a row follow it."""
        times = count // len(self.prompts)
        return [row for row in range(count) if len(self.prompts[row // times]) == length]

    def ids(self, length: int, rows: list[int], input_ids: Tensor) -> Tensor:
        """What was read and written in `rows` of `input_ids`, `[rows, tokens]`."""
        if self.columns is None:
            return input_ids[rows]
        times = len(input_ids) // len(self.prompts)
        read = self.of_length(length).repeat_interleave(times, 0).to(input_ids.device)
        return torch.cat([read, input_ids[rows, self.columns :]], dim=1)


class _Processors(LogitsProcessorList):
    """Processors for the prompts of each length."""

    def __init__(self, texts: _Prompts, by_length: dict[int, LogitsProcessorList]) -> None:
        super().__init__(processor for some in by_length.values() for processor in some)
        self._texts, self._by_length = texts, by_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kw: Any) -> Tensor:
        processed = torch.empty_like(scores)
        for length, processors in self._by_length.items():
            rows = self._texts.rows(length, len(scores))
            ids: Any = self._texts.ids(length, rows, input_ids)
            processed[rows] = processors(ids, scores[rows], **kw).to(scores.dtype)
        return processed


class AcrossRows(LogitsProcessor):
    """A processor that reads all rows of a batch together, after all those that read single rows.

    Its rows may have prompts of any lengths. It gets no ids that say what was read.
    """


class _ThenAcross(LogitsProcessorList):
    """The processors `own` of single rows, then those that read all rows together."""

    def __init__(self, own: LogitsProcessorList, across: Sequence[AcrossRows]) -> None:
        super().__init__([*own, *across])
        self._own, self._across = own, across

    def __call__(self, input_ids: Any, scores: Any, **kw: Any) -> Any:
        scores = self._own(input_ids, scores, **kw)
        for processor in self._across:
            scores = processor(input_ids, scores)
        return scores


class _Criterion(StoppingCriteria):
    """`criterion`, asked about the text of the rows."""

    def __init__(self, texts: _Prompts, criterion: Any) -> None:
        self._texts, self._criterion = texts, criterion

    def __call__(self, input_ids: Tensor, scores: Any, **kw: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for length in self._texts.lengths:
            rows = self._texts.rows(length, len(input_ids))
            ids = self._texts.ids(length, rows, input_ids)
            own = scores and tuple(s[self._texts.rows(length, len(s))] for s in scores)
            done[rows] = self._criterion(ids, own, **kw)
        return done


@dataclass
class ProcessedCall:
    """A call of `generate` whose processors and criteria read text.

    options: to give to `generate`
    ends: of each row, tokens written until a criterion first said that it is done; empty for beams
    """

    options: dict[str, Any]
    ends: dict[int, int] = field(default_factory=dict)

    def cut(self, written: Sequence[list[int]], pad_token_id: int) -> list[list[int]]:
        """`written` up to where each row was done: transformers fills the rest of the batch up.

        written: new tokens of each row
        """
        if self.ends:
            return [row[: self.ends.get(i, len(row))] for i, row in enumerate(written)]
        # Of beams only the filling itself is left to tell by.
        return [_without_filling(row, pad_token_id) for row in written]


class _Criteria(StoppingCriteriaList):
    """Criteria that note in `ends` when each row was first done."""

    def __init__(self, criteria: Iterable[Any], columns: int, ends: dict[int, int] | None) -> None:
        super().__init__(criteria)
        self._columns, self._ends = columns, ends

    def __call__(self, input_ids: Tensor, scores: Any, **kw: Any) -> Tensor:
        done = super().__call__(input_ids, scores, **kw)
        if self._ends is not None:
            written = input_ids.shape[1] - self._columns
            for row in done.nonzero()[:, 0].tolist():
                self._ends.setdefault(row, written)
        return done


def processors_read_text(
    view: PreTrainedModel, prompts: Sequence[list[int]], width: int, options: dict[str, Any]
) -> ProcessedCall:
    """Let processors and criteria of `view.generate` read the rows' text.

    view: a view of a model, of this call alone (see `ptkit.runtime.views`)
    prompts: the token ids of each row's own prompt (an encoder-decoder: of its input)
    width: columns that `generate` is given, padding and placeholders included

    `min_length` and `max_length` count a row's own tokens. Processors of the caller's own are
    called once per length of prompts. Raises ModelError for `guidance_scale` on prompts of
    different lengths, and for a prompt beyond `max_length`.
    """
    inputs = bool(view.config.is_encoder_decoder)
    texts = _Prompts([*prompts], None if inputs else width)
    if any(options.get(name) for name in DRAFTED):  # one row, and calls of `generate` within
        return ProcessedCall(options)
    if setting(view, options, "guidance_scale") not in (None, 1) and len(texts.lengths) > 1:
        raise ModelError(
            "`guidance_scale` reads with the model itself, so all prompts of a batch must have one "
            "length; give them one by one"
        )
    most = None if inputs else _most(view, options, texts.lengths[-1])
    if most is not None:
        options = {**options, "max_length": most + width - texts.lengths[0]}
    call = ProcessedCall(options)
    whole = texts.lengths == [width]
    counted = not inputs or any(setting(view, options, name) for name in _OF_INPUTS)
    least = setting(view, options, "min_length")
    generator: Any = view  # transformers' stubs know no `generate`
    build_processors = generator._get_logits_processor
    build_criteria = generator._get_stopping_criteria
    #: What `generate` begins with: no column at all, with embeddings in place of ids.
    columns = width

    def processors(**kw: Any) -> LogitsProcessorList:
        given = kw.get("logits_processor") or []
        across = [each for each in given if isinstance(each, AcrossRows)]
        if not across:
            return of_rows(**kw)
        alone = LogitsProcessorList(each for each in given if each not in across)
        return _ThenAcross(of_rows(**{**kw, "logits_processor": alone}), across)

    def of_rows(**kw: Any) -> LogitsProcessorList:
        nonlocal columns
        columns = kw["input_ids_seq_length"]
        if not counted or (whole and (inputs or columns == width)):
            return build_processors(**kw)
        read = replace(texts, columns=None if inputs else columns)
        return _Processors(read, {length: of(length, kw) for length in read.lengths})

    def of(length: int, kw: dict[str, Any]) -> LogitsProcessorList:
        ids = texts.of_length(length).to(kw["device"])
        if inputs:
            return build_processors(**{**kw, "encoder_input_ids": ids})
        config = copy.copy(kw["generation_config"])
        config.max_length = most or config.max_length - columns + length
        new = config.min_new_tokens
        config.min_length = least if new is None else new + length
        # No mask: these rows have no padding that a penalty would have to leave out.
        changed = {
            "generation_config": config, "input_ids_seq_length": length, "encoder_input_ids": ids,
            "model_kwargs": None,
        }  # fmt: skip
        allowed = kw["prefix_allowed_tokens_fn"]
        if allowed is not None:
            numbers = [i for i, prompt in enumerate(texts.prompts) if len(prompt) == length]
            changed["prefix_allowed_tokens_fn"] = lambda i, ids: allowed(numbers[i], ids)
        return build_processors(**{**kw, **changed})

    def criteria(**kw: Any) -> StoppingCriteriaList:
        # transformers forgets it where it is given a loop to run.
        found = build_criteria(**{**kw, "tokenizer": kw["tokenizer"] or options.get("tokenizer")})
        read = replace(texts, columns=None if inputs else columns)
        if not inputs and not (whole and columns == width):
            own_ids = (EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria)
            found = [c if type(c) in own_ids else _Criterion(read, c) for c in found]
        if most is not None:
            found = [*found, _Criterion(read, MaxLengthCriteria(most))]
        beams = (kw["generation_config"].num_beams or 1) > 1
        return _Criteria(found, columns, None if beams else call.ends)

    generator.__dict__ |= {"_get_logits_processor": processors, "_get_stopping_criteria": criteria}
    return call


def _without_filling(row: list[int], pad_token_id: int) -> list[int]:
    end = len(row)
    while end and row[end - 1] == pad_token_id:
        end -= 1
    return row[:end]


def _most(model: PreTrainedModel, options: dict[str, Any], longest: int) -> int | None:
    """The `max_length` that is to hold for every row, if it does. Raises ModelError where a prompt
    leaves nothing of it."""
    most = setting(model, options, "max_length")
    if most is None or setting(model, options, "max_new_tokens") is not None:
        return None
    if longest >= most:
        raise ModelError(
            f"`max_length` is {most} and counts the prompt, which has {longest} tokens, so nothing "
            "is left to write; use `max_new_tokens`"
        )
    return int(most)
