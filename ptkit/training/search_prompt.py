"""The hard-prompt baseline: a text before the input, searched for word by word.

Greedy coordinate search after AutoPrompt (Shin et al. 2020, section 2.2,
https://arxiv.org/abs/2010.15980). For one position at a time, the gradient at its embedding
proposes tokens. The proposals are scored on training rows, all of them in one mixed batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ptkit.data.encoded import EncodedExample
from ptkit.data.tokens import part_ids, without_lead
from ptkit.errors import ModelError, UserError
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.compile import compile_embeddings, compile_tokens
from ptkit.runtime.forward import collate, supervised_counts, supervised_losses

#: Rows whose losses are computed in one forward pass, at most.
BATCH = 128


@dataclass(frozen=True)
class SearchedPrompt:
    """A searched prompt.

    loss: per target token of the rows searched on, in nats
    validation_loss: of the validation rows
    losses: after every position tried, the first of the text the search began with
    scored: prompts that were scored
    """

    text: str
    token_ids: tuple[int, ...]
    loss: float
    validation_loss: float
    losses: tuple[float, ...]
    scored: int
    rows: int


def search_prompt(
    base: Base,
    train: Sequence[EncodedExample],
    validation: Sequence[EncodedExample],
    text: str,
    *,
    rounds: int = 2,
    candidates: int = 16,
    rows: int = 32,
    seed: int = 0,
    report: Callable[[str, float], None] | None = None,
) -> SearchedPrompt:
    """The text found from `text`, of as many tokens, and its losses.

    rounds: how often every position is tried; it ends earlier when a round changes nothing
    candidates: tokens tried at a position; rows: training rows they are scored on
    report: told the text and its loss after every position

    Only texts that the tokenizer reads back as the same tokens are tried, so that the text is
    the prompt. Raises ModelError on an encoder-decoder, UserError for a text without tokens.
    """
    if base.encoder_decoder:
        raise ModelError(f"{base.id} is an encoder-decoder; text prompts are for causal models")
    ids = base.encode_part(text)
    if not ids:
        raise UserError("the search needs a text to begin with; give one (--text)")
    generator = random.Random(seed)
    drawn = _behind(base, generator.sample(list(train), min(rows, len(train))))
    validation = _behind(base, validation)
    (best,) = _losses(base, [_compiled(base, ids)], drawn)
    losses, scored = [best], 1
    for _ in range(rounds):
        before = list(ids)
        for position in generator.sample(range(len(ids)), len(ids)):
            tried = list(_replaced(base, ids, position, drawn, candidates))
            found = _losses(base, [_compiled(base, own) for own in tried], drawn) if tried else []
            scored += len(tried)
            if found and min(found) < best:
                best = min(found)
                ids = tried[found.index(best)]
            losses.append(best)
            if report is not None:
                report(str(base.tokenizer.decode(ids)), best)
        if ids == before:
            break
    (judged,) = _losses(base, [_compiled(base, ids)], validation)
    return SearchedPrompt(
        str(base.tokenizer.decode(ids)), tuple(ids), best, judged, tuple(losses), scored, len(drawn)
    )


def _behind(base: Base, rows: Sequence[EncodedExample]) -> list[EncodedExample]:
    """`rows` as they are read behind a prompt, which begins with the base's `lead`."""
    lead = base.lead
    return [replace(row, input_ids=without_lead(row.input_ids, lead)) for row in rows]


def _compiled(base: Base, ids: Sequence[int]) -> KVPrefix:
    return compile_tokens(base.model, torch.tensor([*base.lead, *ids]))


def _replaced(
    base: Base, ids: list[int], position: int, rows: Sequence[EncodedExample], count: int
) -> Iterator[list[int]]:
    """`ids` with other tokens at `position`: those that lower the loss most to first order."""
    tokenizer = base.tokenizer
    gain = base.word_vectors @ -_gradient(base, ids, rows)[position]
    left = count
    for token in gain.argsort(descending=True).tolist():
        other = [*ids[:position], token, *ids[position + 1 :]]
        if token == ids[position] or token in tokenizer.all_special_ids:
            continue
        if part_ids(tokenizer, str(tokenizer.decode(other))) != other:
            continue
        yield other
        left -= 1
        if not left:
            return


def _gradient(base: Base, ids: list[int], rows: Sequence[EncodedExample]) -> Tensor:
    """The gradient of the loss at the prompt's embeddings, `[tokens, hidden]`."""
    lead = base.lead
    embeddings = base.embedding(torch.tensor([*lead, *ids], device=base.model.device)).detach()
    with torch.enable_grad():
        embeddings = embeddings.float().requires_grad_(True)
        batch = PrefixBatch.shared(compile_embeddings(base.model, embeddings), len(rows))
        loss = supervised_losses(base.model, **collate(rows, base), batch=batch).mean()
        (gradient,) = torch.autograd.grad(loss, embeddings)
    return gradient[len(lead) :]


@torch.no_grad()
def _losses(
    base: Base, prefixes: Sequence[KVPrefix], rows: Sequence[EncodedExample]
) -> list[float]:
    """Cross-entropy per target token of `rows` behind each of `prefixes`, in mixed batches."""
    pairs = [(i, row) for i in range(len(prefixes)) for row in rows]
    total = [0.0] * len(prefixes)
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        together = collate([row for _, row in part], base)
        batch = PrefixBatch.gathered([prefixes[i] for i, _ in part], base.layout)
        losses = supervised_losses(base.model, **together, batch=batch)
        counts = supervised_counts(base.model, together["labels"]).tolist()
        for (i, _), own in zip(part, losses.split(counts), strict=True):
            total[i] += float(own.sum())
    tokens = sum(row.supervised for row in rows)
    return [value / tokens for value in total]
