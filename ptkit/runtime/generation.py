"""Generation with KV prefixes: a pre-filled cache handed to the plain model's `generate`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ptkit.prefix import PrefixBatch
from ptkit.runtime.forward import pad_rows


def prefilled_cache(batch: PrefixBatch) -> DynamicCache:
    """A cache that already holds each row's prefix, as if its virtual tokens had been read."""
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True)):
        cache.update(keys, values, layer)
    return cache


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: list[list[int]],
    batch: PrefixBatch | None,
    *,
    pad_token_id: int,
    **generate_options: Any,
) -> list[list[int]]:
    """New token ids for each prompt, end-of-text and padding removed.

    prompts: token ids of each row, of any lengths (they are left-padded here)
    batch: the rows' prefixes, or None for the plain base
    generate_options: anything transformers' `generate` takes (`max_new_tokens`, `num_beams`,
        `do_sample`, ...). Options that change the number of returned rows are multiplied out:
        with `num_return_sequences=k` row i's answers are at `[i * k, (i + 1) * k)`.

    A row of several gets the same greedy tokens as alone: every row has its own position ids
    (derived from its own mask), and reads no other row's prefix.
    """
    input_ids, attention_mask = pad_rows(prompts, pad_token_id, left=True)
    extra: dict[str, Any] = {}
    skipped = input_ids.shape[1]
    if batch is not None and batch.longest:
        # The prefix region of input_ids is never read (the cache says it is done); the mask
        # over it is, and gives each row its own lengths and positions.
        dummy = torch.full((len(prompts), batch.longest), pad_token_id, dtype=torch.long)
        input_ids = torch.cat([dummy, input_ids], dim=1)
        attention_mask = torch.cat([batch.visible.long().cpu(), attention_mask], dim=1)
        cache = prefilled_cache(batch)
        beams = generate_options.get("num_beams", 1)
        if beams > 1:
            cache.batch_repeat_interleave(beams)
        returned = generate_options.get("num_return_sequences", 1)
        if returned > 1 and beams == 1:
            cache.batch_repeat_interleave(returned)
        extra["past_key_values"] = cache
        skipped += batch.longest
    generator: Any = model  # transformers' stubs do not know `generate` on every model class
    was_training = model.training
    model.eval()
    try:
        output = generator.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            pad_token_id=pad_token_id,
            **extra,
            **generate_options,
        )
    finally:
        model.train(was_training)
    ends = _end_ids(model, generate_options)
    return [_until_end(row, ends) for row in output[:, skipped:].tolist()]


def _end_ids(model: PreTrainedModel, options: dict[str, Any]) -> set[int]:
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    if isinstance(ends, Tensor):
        ends = ends.tolist()
    return {ends} if isinstance(ends, int) else set(ends or ())


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    return row[: next((i for i, token in enumerate(row) if token in ends), len(row))]
