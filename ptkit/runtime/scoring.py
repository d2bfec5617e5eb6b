"""Log-probabilities of given continuations, the context being read once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.cache import prefilled_cache, sees_everything
from ptkit.runtime.forward import IGNORED, pad_rows, require_tokens, supervised_losses
from ptkit.runtime.infix import read_before_last
from ptkit.runtime.locks import running
from ptkit.runtime.runner import ModelRunner, Tokens, Want


@torch.no_grad()
def continuation_scores(
    model: PreTrainedModel,
    contexts: list[list[int]],
    continuations: list[list[int]],
    batch: PrefixBatch | None,
    *,
    pad_token_id: int,
) -> Tensor:
    """Log-probability of each continuation after each context, `[contexts, continuations]`.

    contexts, continuations: token ids; every continuation has at least one token.
    batch: the contexts' prefixes, or None for the plain base.

    Raises UserError for a context without tokens.
    """
    require_tokens(contexts, batch)
    scores = _read_once_scores
    if model.config.is_encoder_decoder:
        scores = _written_scores
    elif not sees_everything(model):
        scores = _scores_of_whole_rows
    with running(model):
        return scores(model, contexts, continuations, batch, pad_token_id)


def _read_once_scores(
    model: PreTrainedModel,
    contexts: list[list[int]],
    continuations: list[list[int]],
    batch: PrefixBatch | None,
    pad_token_id: int,
) -> Tensor:
    """`continuation_scores` of models whose cache can hold a prefix."""
    ids, mask = (t.to(model.device) for t in pad_rows(contexts, pad_token_id, left=True))
    cache = DynamicCache()
    counted = mask  # what takes a position
    if batch is not None and batch.longest:
        if batch.infix is not None:
            read_before_last(model, ids, mask, batch, cache)
            ids = ids[:, -1:]
        else:
            prefilled_cache(model, batch, cache)
        counted = torch.cat([batch.placed.long().to(mask.device), mask], dim=1)
        mask = torch.cat([batch.visible.long().to(mask.device), mask], dim=1)
    positions = counted.cumsum(-1).sub(1).clamp(min=0)
    runner = ModelRunner(model)
    end = torch.zeros_like(ids, dtype=torch.bool)
    end[:, -1] = True
    tokens = Tokens(ids, mask, positions[:, -ids.shape[1] :])
    first = _log_probs(runner.forward(tokens, kv=cache, want=Want("logits", end)))
    longest = max(map(len, continuations))
    scores = torch.stack([first[:, c[0]] for c in continuations], dim=1)
    if longest == 1:
        return scores
    count = len(continuations)
    cache.batch_repeat_interleave(count)
    tails, tail_mask = pad_rows([c[:-1] for c in continuations], pad_token_id, left=False)
    tails = tails.repeat(len(contexts), 1).to(model.device)
    tail_mask = tail_mask.repeat(len(contexts), 1).to(model.device)
    counted, mask = (
        torch.cat([t.repeat_interleave(count, 0), tail_mask], dim=1) for t in (counted, mask)
    )
    positions = counted.cumsum(-1).sub(1).clamp(min=0)[:, -tails.shape[1] :]
    log_probs = _log_probs(runner.forward(Tokens(tails, mask, positions), kv=cache))
    following = log_probs.view(len(contexts), count, tails.shape[1], -1)
    for i, continuation in enumerate(continuations):
        for at, token in enumerate(continuation[1:]):
            scores[:, i] += following[:, i, at, token]
    return scores


def _scores_of_whole_rows(
    model: PreTrainedModel,
    contexts: list[list[int]],
    continuations: list[list[int]],
    batch: PrefixBatch | None,
    pad_token_id: int,
) -> Tensor:
    """`continuation_scores` of models whose cache cannot hold a prefix: contexts are read once for
    every continuation."""
    scores = []
    for continuation in continuations:
        rows = [[*context, *continuation] for context in contexts]
        ids, mask = (t.to(model.device) for t in pad_rows(rows, pad_token_id, left=False))
        labels = torch.full_like(ids, IGNORED)
        for i, context in enumerate(contexts):
            labels[i, len(context) : len(rows[i])] = ids[i, len(context) : len(rows[i])]
        losses = supervised_losses(model, ids, mask, labels, batch)
        scores.append(-losses.view(len(contexts), len(continuation)).sum(-1))
    return torch.stack(scores, dim=1)


def _written_scores(
    model: PreTrainedModel,
    contexts: list[list[int]],
    continuations: list[list[int]],
    batch: PrefixBatch | None,
    pad_token_id: int,
) -> Tensor:
    """`continuation_scores` of an encoder-decoder: the encoder reads every context once."""
    writer: Any = model
    ids, mask = (t.to(model.device) for t in pad_rows(contexts, pad_token_id, left=False))
    runner = ModelRunner(model)
    encoded = runner.encode(ids, mask, batch)
    scores = []
    for continuation in continuations:
        labels = torch.tensor([continuation] * len(contexts), device=model.device)
        written = writer.prepare_decoder_input_ids_from_labels(labels=labels)
        logits = runner.forward(Tokens(ids, mask, written=written, encoded=encoded), batch)
        said = _log_probs(logits).gather(-1, labels[..., None])
        scores.append(said.sum(dim=(1, 2)))
    return torch.stack(scores, dim=1)


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)
