"""Generation: new tokens for rows, each behind its own KV prefix.

The decode loop of the package writes them, over blocks of keys and values, as in serving
(`ptkit.runtime.paged_generation`). transformers' own loop writes the rest, with the prefixes in its
cache or in the attention. `why_not_blocks` is the one place that chooses, and names the reason:

- beams, drafts (assisted decoding) and other searches that go back, and transformers' own caches;
- encoder-decoders, layers that keep a state or read the keys of others;
- rows longer than a layer's window, for blocks hold what no layer forgets;
- attention that reads no blocks, and the cache of an earlier turn of a conversation.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
    StaticCache,
)
from transformers.generation import GenerationMode

from ptkit.errors import ModelError
from ptkit.prefix import KVPrefix, prefixes_of
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.architecture import evaluating, places_in_table
from ptkit.runtime.attention import Repeats, prefixed_positions
from ptkit.runtime.attention_sites import require_attention, takes_positions
from ptkit.runtime.cache import cache_for, prefilled_cache, sees_everything
from ptkit.runtime.forward import pad_rows, require_tokens
from ptkit.runtime.infix import placed_before_last, read_before_last
from ptkit.runtime.locks import running
from ptkit.runtime.paged_attention import reads_blocks
from ptkit.runtime.paged_generation import BlockDecoding
from ptkit.runtime.paged_support import smallest_window, why_not_paged
from ptkit.runtime.placement import own_part
from ptkit.runtime.processors import DRAFTED, processors_read_text, require_chunks_behind, setting
from ptkit.runtime.row_adapters import row_adapters
from ptkit.runtime.runner import ModelRunner
from ptkit.runtime.soft_prompts import with_embeddings
from ptkit.runtime.views import twin

logger = logging.getLogger(__name__)

#: What is given to `generate` for its rows: one prefix each, or a batch of them.
Prefixes = PrefixBatch | Sequence[KVPrefix | None] | None


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    prefixes: Prefixes,
    *,
    pad_token_id: int,
    static_positions: int | None = None,
    read: DynamicCache | None = None,
    **generate_options: Any,
) -> list[list[int]]:
    """New token ids for each prompt, end-of-text and padding removed.

    prompts: token ids of each row, of any lengths
    prefixes: those of the rows, one each; or None for the plain base. Rows with the same object
        share its keys and values
    static_positions: use a static cache of this many positions (virtual tokens, prompt and new
        tokens), so that a compiled model sees one shape. Default: blocks, or a cache that grows
    read: the cache of an earlier turn, which holds the prefix and the beginning of the one prompt
    generate_options: anything transformers' `generate` takes (`max_new_tokens`, `num_beams`,
        `do_sample`, ...). Options that change the number of returned rows are multiplied out:
        with `num_return_sequences=k` row i's answers are at `[i * k, (i + 1) * k)`.

    A row of several gets the same greedy tokens as alone. It reads no other row's prefix. Logits
    processors and stopping criteria read the rows' own tokens, no padding and no placeholder.
    Sampling takes torch's random numbers: after `torch.manual_seed` the same call writes the same.

    Raises UserError for a prompt without tokens, and ModelError where `max_new_tokens` is more than
    the model's table of positions has left.
    """
    asked = _Asked(model, prompts, prefixes, pad_token_id, generate_options)
    if not all(prompts):  # `batch` is made only where it is needed
        require_tokens(prompts, asked.batch)
    _require_places(asked)
    with running(model), evaluating(model):
        reason = why_not_blocks(asked, static_positions, read)
        if reason is None:
            return _in_blocks(asked)
        logger.debug("transformers' own loop writes: %s", reason)
        return _in_cache(asked, static_positions, read)


def _require_places(asked: _Asked) -> None:
    """Raise ModelError where a row would be read beyond the end of a table of positions."""
    most, new = places_in_table(asked.model), asked.options.get("max_new_tokens")
    if most is None or not isinstance(new, int):
        return
    for row, (prompt, prefix) in enumerate(zip(asked.prompts, asked.rows, strict=True)):
        virtual = 0 if prefix is None else prefix.positions
        # The last new token is never read.
        if virtual + len(prompt) + new - 1 > most:
            raise ModelError(
                f"text {row + 1} has {len(prompt)} tokens behind {virtual} virtual ones, and "
                f"`max_new_tokens` asks for {new} more: the model has {most} positions; lower "
                "`max_new_tokens`, or shorten the text"
            )


@dataclass(frozen=True)
class _Asked:
    """What is asked of `generate`; its parameters."""

    model: PreTrainedModel
    prompts: list[list[int]]
    prefixes: Prefixes
    pad_token_id: int
    options: dict[str, Any]

    @cached_property
    def batch(self) -> PrefixBatch | None:
        """The rows' prefixes side by side, padded to the longest."""
        given = self.prefixes
        if given is None or isinstance(given, PrefixBatch):
            return given
        first = next((prefix for prefix in given if prefix is not None), None)
        if first is None:
            return None
        if all(prefix is first for prefix in given):
            return PrefixBatch.shared(first, len(given))
        return PrefixBatch.gathered(given, first.layout)

    @cached_property
    def rows(self) -> list[KVPrefix | None]:
        """Each row's own prefix; None where it has no virtual tokens."""
        given = self.prefixes
        if given is None:
            return [None] * len(self.prompts)
        rows = prefixes_of(given) if isinstance(given, PrefixBatch) else given
        return [None if row is None or not row.virtual_tokens else row for row in rows]

    def padded(self, *, left: bool) -> tuple[Tensor, Tensor]:
        """The prompts' ids and mask, `[rows, longest]`, on the model's device."""
        ids, mask = pad_rows(self.prompts, self.pad_token_id, left=left)
        return ids.to(self.model.device), mask.to(self.model.device)


def why_not_blocks(
    asked: _Asked, static_positions: int | None = None, read: DynamicCache | None = None
) -> str | None:
    """Why transformers' own loop writes what is `asked`; None: the decode loop over blocks does."""
    model: Any = asked.model
    reason = why_not_paged(model)
    if reason is not None:
        return f"{type(model).__name__} {reason}"
    if static_positions is not None:
        return "a static cache is asked for"
    if read is not None:
        return "a conversation goes on from its cache, as beams do"
    if not reads_blocks(model):
        return f"the attention of {type(model).__name__} reads no blocks"
    if row_adapters() and hasattr(model.get_output_embeddings(), "base_layer"):
        return "LoRA adapters of single rows change the output head"
    call = {*inspect.signature(GenerationMixin.generate).parameters}
    own = {name: asked.options[name] for name in asked.options.keys() - call - {"tokenizer"}}
    given = asked.options.get("generation_config")
    config, inputs = model._prepare_generation_config(given, **own)
    mode = config.get_generation_mode(asked.options.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"`{mode.value}` keeps several continuations, or goes back"
    special = [name for name in ("synced_gpus", "custom_generate") if asked.options.get(name)]
    special += [name for name in ("token_healing", "return_dict_in_generate") if
                getattr(config, name)]  # fmt: skip
    if config.use_cache is False:
        special.append("use_cache=False")
    if config.cache_implementation not in (None, "dynamic"):
        special.append("cache_implementation")
    if special or inputs:
        return "the call has " + ", ".join(f"`{name}`" for name in (*special, *inputs))
    window = smallest_window(model)
    new = config.max_new_tokens or config.max_length
    rows = zip(asked.prompts, asked.rows, strict=True)
    if window is not None and any(
        (0 if prefix is None else prefix.virtual_tokens) + len(ids) + new > window
        for ids, prefix in rows
    ):
        return f"a row may get longer than the window of {window} tokens"
    return None


def _in_blocks(asked: _Asked) -> list[list[int]]:
    """What the decode loop over blocks writes; transformers prepares the call."""
    ids, mask = asked.padded(left=True)
    streamer = asked.options.get("streamer")
    decoding = BlockDecoding(asked.model, asked.prompts, asked.rows, streamer)
    inputs = {"input_ids": ids, "attention_mask": mask, "custom_generate": decoding}
    return _written(asked, None, inputs, None, ids.shape[1])


def _in_cache(
    asked: _Asked, static_positions: int | None, read: DynamicCache | None
) -> list[list[int]]:
    """What transformers' own loop writes."""
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
        if batch.placeless is not None or not _kept_in_cache(model, generate_options):
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
    require_chunks_behind(asked.model, asked.options, cache)
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
