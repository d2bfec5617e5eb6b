"""Generation with KV prefixes: a pre-filled cache handed to the plain model's `generate`."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache

from ptkit.errors import ModelError
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.architecture import evaluating
from ptkit.runtime.attention import Repeats, prefixed_positions
from ptkit.runtime.attention_sites import require_attention, takes_positions
from ptkit.runtime.cache import cache_for, prefilled_cache, sees_everything
from ptkit.runtime.forward import pad_rows
from ptkit.runtime.infix import placed_before_last, read_before_last
from ptkit.runtime.locks import running
from ptkit.runtime.placement import own_part
from ptkit.runtime.processors import DRAFTED, processors_read_text, setting
from ptkit.runtime.runner import ModelRunner
from ptkit.runtime.soft_prompts import with_embeddings
from ptkit.runtime.views import twin


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    batch: PrefixBatch | None,
    *,
    pad_token_id: int,
    static_positions: int | None = None,
    read: DynamicCache | None = None,
    **generate_options: Any,
) -> list[list[int]]:
    """New token ids for each prompt, end-of-text and padding removed.

    prompts: token ids of each row, of any lengths (they are left-padded here)
    batch: the rows' prefixes, or None for the plain base
    static_positions: use a static cache of this many positions (virtual tokens, prompt and new
        tokens), so that a compiled model sees one shape. Default: a cache that grows
    generate_options: anything transformers' `generate` takes (`max_new_tokens`, `num_beams`,
        `do_sample`, ...). Options that change the number of returned rows are multiplied out:
        with `num_return_sequences=k` row i's answers are at `[i * k, (i + 1) * k)`.

    A row of several gets the same greedy tokens as alone. Every row has its own position ids
    (derived from its own mask), and reads no other row's prefix. Logits processors and stopping
    criteria read the rows' own tokens, no padding and no placeholder.
    """
    asked = _Asked(model, prompts, batch, pad_token_id, generate_options)
    with running(model), evaluating(model):
        return _generated(asked, static_positions, read)


@dataclass(frozen=True)
class _Asked:
    """What is asked of `generate`; its parameters."""

    model: PreTrainedModel
    prompts: list[list[int]]
    batch: PrefixBatch | None
    pad_token_id: int
    options: dict[str, Any]

    def padded(self, *, left: bool) -> tuple[Tensor, Tensor]:
        """The prompts' ids and mask, `[rows, longest]`, on the model's device."""
        ids, mask = pad_rows(self.prompts, self.pad_token_id, left=left)
        return ids.to(self.model.device), mask.to(self.model.device)


def _generated(
    asked: _Asked, static_positions: int | None, read: DynamicCache | None
) -> list[list[int]]:
    model, batch, generate_options = asked.model, asked.batch, asked.options
    if model.config.is_encoder_decoder:
        return _of_pair(asked)
    repeats = _repeats(model, generate_options)
    if static_positions is not None and (setting(model, generate_options, "num_beams") or 1) > 1:
        raise ModelError("a static cache cannot be reordered: use num_beams=1 with it")
    if batch is not None and batch.embeddings is not None:
        _require_read_once(model, static_positions, read, generate_options)
        return _attending(asked, batch, None, None)
    if batch is not None and batch.longest:
        require_attention(model)
        if not _kept_in_cache(model, generate_options):
            return _attending(asked, batch, static_positions, read)
    input_ids, attention_mask = asked.padded(left=True)
    positions = input_ids.shape[1] + int(generate_options.get("max_new_tokens") or 0)
    cache: Any
    if static_positions is not None:
        cache = StaticCache(model.config, static_positions)
    elif read is not None:
        cache = read
    elif generate_options.get("use_cache") is False:
        cache = None
    else:
        cache = cache_for(model, batch, positions)
    skipped = input_ids.shape[1]
    if batch is not None and batch.longest:
        # The prefix region of input_ids is never read (the cache says it is done); the mask
        # over it is, and gives each row its own lengths and positions.
        if batch.infix is not None and read is not None:
            raise ModelError("a conversation cannot go on with an infix: it belongs to one input")
        if batch.infix is not None:
            read_before_last(model, input_ids, attention_mask, batch, cache)
        elif read is None:
            prefilled_cache(model, batch, cache)
        dummy = input_ids.new_full((len(input_ids), batch.longest), asked.pad_token_id)
        input_ids = torch.cat([dummy, input_ids], dim=1)
        attention_mask = torch.cat([batch.visible.to(attention_mask), attention_mask], dim=1)
        skipped += batch.longest
    _repeat(cache, repeats)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    return _written(asked, None, inputs, cache, skipped)


def _cached(cache: Any) -> dict[str, Any]:
    """The argument of `generate` for `cache`: none at all without one, which a beam search would
    try to put in order."""
    return {} if cache is None else {"past_key_values": cache}


def _repeats(model: PreTrainedModel, options: dict[str, Any]) -> int:
    """The rows that `generate` makes of each: its beams, or its answers."""
    asked = (setting(model, options, name) for name in ("num_beams", "num_return_sequences"))
    return max(count or 1 for count in asked)


def _repeat(cache: Any, times: int) -> None:
    """Let `cache` hold every row `times` in a row, as `generate` will."""
    if cache is not None and times > 1 and cache.get_seq_length():
        cache.batch_repeat_interleave(times)


def _kept_in_cache(model: PreTrainedModel, options: dict[str, Any]) -> bool:
    """Whether the rows' prefixes can be part of the cache: the cheapest way, as they are then put
    before the text once, not at every token."""
    drafted = any(options.get(name) for name in DRAFTED)
    return options.get("use_cache") is not False and not drafted and sees_everything(model)


def _require_read_once(
    model: PreTrainedModel, static_positions: int | None, read: Any, options: dict[str, Any]
) -> None:
    """Raise ModelError for ways of generating that have no place for a soft prompt's embeddings."""
    drafted = [name for name in DRAFTED if options.get(name)]
    if static_positions is None and read is None and not drafted:
        return
    what = "a static cache" if static_positions is not None else (
        "the cache of an earlier turn" if read is not None else f"`{drafted[0]}`"
    )  # fmt: skip
    raise ModelError(
        f"{type(model).__name__} has layers with a running state, so its soft prompts are read as "
        f"embeddings with every input, which {what} has no place for; use prefix_tuning for that"
    )


def _attending(
    asked: _Asked, batch: PrefixBatch, static_positions: int | None, read: DynamicCache | None
) -> list[list[int]]:
    """`generate` with the prefixes in the attention, as in training: the cache, if there is one,
    holds the text only."""
    model, options = asked.model, asked.options
    ids, mask = asked.padded(left=True)
    if batch.infix is not None and read is not None:
        raise ModelError("a conversation cannot go on with an infix: it belongs to one input")
    last = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
    batch = placed_before_last(model, batch, mask, last)
    cache: Any = None
    if static_positions is not None:
        cache = StaticCache(model.config, static_positions)
    elif options.get("use_cache") is not False:
        cache = read if read is not None else DynamicCache(config=model.config)
    _repeat(cache, _repeats(model, options))
    positions = {"position_ids": prefixed_positions(batch, mask)} if takes_positions(model) else {}
    inputs = with_embeddings(model, ids, mask, batch)
    skipped = ids.shape[1]
    if "inputs_embeds" in inputs:  # transformers then returns what is new only
        skipped = 0
        positions = {"position_ids": prefixed_positions(batch, inputs["attention_mask"])}
    return _written(asked, batch, inputs | positions, cache, skipped)


def _of_pair(asked: _Asked) -> list[list[int]]:
    """`generate` of an encoder-decoder: the encoder reads each input once, beams share it."""
    model, batch, options = asked.model, asked.batch, asked.options
    ids, mask = asked.padded(left=False)
    inputs: dict[str, Any] = with_embeddings(model, ids, mask, batch)
    inputs["encoder_outputs"] = ModelRunner(model).encode(ids, mask, batch).outputs
    # The cache transformers makes by itself is as deep as the encoder.
    cached = options.get("use_cache") is not False
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cached else None
    # The first token is the decoder's start, the next one may be forced (a language's name).
    # Words that only frame a text are not the answer.
    forced = options.get("forced_bos_token_id", model.generation_config.forced_bos_token_id)
    return _written(asked, batch, inputs, cache, 1, forced)


def _written(
    asked: _Asked,
    batch: PrefixBatch | None,
    inputs: dict[str, Any],
    cache: Any,
    skipped: int,
    forced: int | None = None,
) -> list[list[int]]:
    """What transformers' `generate` writes, the rows attending to the prefixes of `batch`.

    batch: None where there are none, or `cache` holds them
    inputs: what is read, as arguments of `generate`
    skipped: columns of the output before the first new token
    forced: token that begins an answer and is not a part of it
    """
    view: Any = _generating(asked.model, batch)
    width = inputs["attention_mask"].shape[1]
    call = processors_read_text(view, asked.prompts, width, asked.options)
    output = view.generate(
        **inputs, pad_token_id=asked.pad_token_id, **_cached(cache), **call.options
    )
    ends = end_ids(asked.model, **asked.options)
    rows = call.cut(output[:, skipped:].tolist(), asked.pad_token_id)
    if forced is not None:
        rows = [row[1:] if row[:1] == [forced] else row for row in rows]
    return [_until_end(row, ends) for row in rows]


def _generating(model: PreTrainedModel, batch: PrefixBatch | None) -> PreTrainedModel:
    """A view of `model` for one call of its `generate`, whose forward passes attend to `batch`.

    What `generate` keeps in a model, and what is replaced in it, is of this call alone.
    """
    view = twin(model)
    if batch is None or not batch.longest:
        return view
    runner, prefixes = ModelRunner(model), Repeats(own_part(model, batch))

    @functools.wraps(model.forward)  # `generate` looks at its parameters
    def forward(**arguments: Any) -> Any:
        return runner.step(arguments, prefixes)

    view.__dict__["forward"] = forward
    return view


def end_ids(model: PreTrainedModel, **options: Any) -> set[int]:
    """Ids of the tokens that end a text: those in `options` of `generate`, else the model's."""
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    if isinstance(ends, Tensor):
        ends = ends.tolist()
    return {ends} if isinstance(ends, int) else set(ends or ())


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
