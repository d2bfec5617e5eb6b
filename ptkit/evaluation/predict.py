"""Predictions of an adapter: generated texts, the likeliest label, or the preferred answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ptkit.data.encode import encode_examples, label_token_ids, tokens_of_words
from ptkit.data.encoded import EncodedExample
from ptkit.data.encoded_rows import Lengths
from ptkit.data.examples import Example
from ptkit.errors import DataError
from ptkit.evaluation.dialogues import DialogueAnswers
from ptkit.evaluation.prediction import Prediction
from ptkit.evaluation.preferences import pair_details, preferred
from ptkit.methods import Adapter
from ptkit.metrics.registry import metric
from ptkit.metrics.scope import UNREAD
from ptkit.prefix import Compiled
from ptkit.recipe.tasks import (
    ChatTask,
    ClassificationTask,
    GenerationTask,
    HeadedTask,
    PreferenceTask,
    SequenceClassificationTask,
    Task,
    TokenClassificationTask,
)
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import (
    collate,
    head_logits,
    require_embedded,
    rows_for,
    supervised_losses,
)
from ptkit.runtime.generation import generate
from ptkit.runtime.scoring import continuation_scores


def predict(
    adapter: Adapter,
    examples: Sequence[Example],
    task: Task,
    batch_size: int,
    report: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Predictions for `examples`, in their order; rows of similar length run together.

    report: told (rows done, rows) after every batch. Raises ModelError when the inputs do not
    fit beside the adapter's virtual tokens.
    """
    base = adapter.base
    encoded = encode_examples(examples, base.tokenizer, task, pairs=base.encoder_decoder)
    require_embedded(base, encoded, task)
    whole, encoded = encoded, [row.with_inputs(adapter.behind) for row in encoded]
    require_room(adapter, encoded, task)
    require_inputs(encoded, task)
    compiled = adapter.compiled()
    compiled = None if compiled is None else compiled.detach()
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids))
    answers: dict[int, tuple[str, dict[str, Any]]] = {}
    wanted = {metric(name).needs for name in task.metrics}
    chats = DialogueAnswers(adapter, task, compiled) if isinstance(task, ChatTask) else None
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        details: list[dict[str, Any]]
        inputs = [encoded[i].input_ids for i in rows]
        if isinstance(task, ChatTask):
            assert chats is not None
            asked = [examples[i] for i in rows]
            texts = chats.last(asked, inputs)
            details = [{} for _ in rows]
            if "nats" in wanted:
                details = chats.nats(asked, lambda read: _target_nats(adapter, read, compiled))
        elif isinstance(task, PreferenceTask):
            details = pair_details(adapter, [whole[i] for i in rows], compiled, task)
            texts = [preferred(examples[i], d) for i, d in zip(rows, details, strict=True)]
        elif isinstance(task, GenerationTask):
            texts = _generated(adapter, inputs, compiled, task)
            details = [{} for _ in rows]
            if "nats" in wanted:
                details = _target_nats(adapter, [encoded[i] for i in rows], compiled)
        elif isinstance(task, TokenClassificationTask):
            texts = word_labels(
                adapter, [encoded[i] for i in rows], [examples[i] for i in rows], compiled, task
            )
            details = [{} for _ in rows]
        else:
            scores = label_scores(adapter, [encoded[i] for i in rows], compiled, task)
            texts = [max(row, key=row.__getitem__) for row in scores]
            kept = "label_scores" in wanted
            details = [{"label_scores": row} if kept else {} for row in scores]
        answers.update(zip(rows, zip(texts, details, strict=True), strict=True))
        if report is not None:
            report(len(answers), len(encoded))
    return [
        Prediction(example.input, answers[i][0], example.references, example.label, answers[i][1])
        for i, example in enumerate(examples)
    ]


def require_inputs(encoded: Sequence[EncodedExample], task: Task) -> None:
    """Raise DataError where one of the rows, which are to be answered, has no token to read."""
    inputs = Lengths.of(encoded).inputs
    if isinstance(task, GenerationTask | ClassificationTask) and not inputs.all():
        raise DataError(
            f"the input of row {int(inputs.argmin()) + 1:,} of {len(inputs):,} is empty: it has no "
            "tokens; leave such rows out, or write words around them in the task's `input`"
        )


def require_room(
    adapter: Adapter,
    encoded: Sequence[EncodedExample],
    task: Task,
) -> None:
    """Raise ModelError unless every example fits into the positions the adapter leaves."""
    title = f"`{adapter.section.title}`"
    require_positions(adapter.base, adapter.positions, title, encoded, task)


def require_positions(
    base: Base,
    virtual_tokens: int,
    title: str,
    encoded: Sequence[EncodedExample],
    task: Task,
    *,
    asked: bool = False,
) -> None:
    """Raise ModelError, which names `title`, unless every example fits into the positions that as
    many virtual tokens leave on `base`.

    asked: the rows of conversations are answered, not read alone
    """
    lengths = Lengths.of(encoded)
    inputs, targets = int(lengths.inputs.max()), int(lengths.targets.max())
    if isinstance(task, GenerationTask):
        targets = task.max_target_tokens
    if base.encoder_decoder:  # each side has positions of its own
        base.require_positions(0, max(inputs, targets), title)
        return
    if isinstance(task, HeadedTask):
        base.require_positions(virtual_tokens, inputs, title)
        return
    longest = inputs + targets if isinstance(task, GenerationTask) else int(lengths.whole.max())
    if asked and isinstance(task, ChatTask):
        longest = max(longest, inputs + task.max_target_tokens)
    base.require_positions(virtual_tokens, longest, title)


def _generated(
    adapter: Adapter, inputs: list[list[int]], compiled: Compiled | None, task: GenerationTask
) -> list[str]:
    tokens = generate(
        adapter.model,
        inputs,
        rows_for(compiled, inputs),
        pad_token_id=adapter.base.pad_token_id,
        max_new_tokens=task.max_target_tokens,
        num_beams=task.num_beams,
        do_sample=False,
    )
    texts = adapter.base.decode(tokens)
    if adapter.answer_end is not None:
        texts = [text.split(adapter.answer_end)[0] for text in texts]
    return [text.strip() for text in texts]


#: Label -> its log-probability, of one row.
LabelScores = dict[str, float]


def label_scores(
    adapter: Adapter,
    rows: Sequence[EncodedExample],
    compiled: Compiled | None,
    task: ClassificationTask | SequenceClassificationTask,
) -> list[LabelScores]:
    """For every row the log-probabilities of the labels: those of their words, or those that the
    adapter's head gives.

    compiled: the compiled adapter
    """
    if isinstance(task, SequenceClassificationTask):
        found = _from_head(adapter, rows, compiled)
        return [dict(zip(task.labels, row, strict=True)) for row in found.tolist()]
    words = label_token_ids(task, adapter.base.tokenizer)
    inputs = [row.input_ids for row in rows]
    scores = continuation_scores(
        adapter.model,
        inputs,
        list(words.values()),
        rows_for(compiled, inputs),
        pad_token_id=adapter.base.pad_token_id,
    )
    return [dict(zip(words, row, strict=True)) for row in scores.tolist()]


def word_labels(
    adapter: Adapter,
    rows: Sequence[EncodedExample],
    examples: Sequence[Example],
    compiled: Compiled | None,
    task: TokenClassificationTask,
) -> list[str]:
    """The likeliest label of each row's every word, with spaces between; `UNREAD` for words the
    model has not seen."""
    best = _from_head(adapter, rows, compiled).argmax(-1).tolist()
    read = tokens_of_words(examples, adapter.base.tokenizer, task)
    found = []
    for labels, example, (_, starts) in zip(best, examples, read, strict=True):
        tags = [UNREAD] * len(example.words)
        for word, token in starts.items():
            tags[word] = task.labels[labels[token]]
        found.append(" ".join(tags))
    return found


@torch.no_grad()
def _from_head(
    adapter: Adapter, rows: Sequence[EncodedExample], compiled: Compiled | None
) -> torch.Tensor:
    """Log-probabilities of the labels: `[rows, labels]` or `[rows, tokens, labels]`."""
    tensors = collate(rows, adapter.base)
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    adapter.model.eval()
    batch = None if compiled is None else compiled.for_rows(ids, mask)
    logits = head_logits(adapter.model, ids, mask, batch)
    return logits.float().log_softmax(-1)


@torch.no_grad()
def _target_nats(
    adapter: Adapter, rows: Sequence[EncodedExample], compiled: Compiled | None
) -> list[dict[str, Any]]:
    """Cross-entropy of every row's target after its input, in nats, and its tokens."""
    adapter.model.eval()
    batch = rows_for(compiled, [row.input_ids for row in rows])
    losses = supervised_losses(adapter.model, **collate(rows, adapter.base), batch=batch)
    counts = [row.supervised for row in rows]
    by_row = losses.double().split(counts)
    return [
        {"nats": float(loss.sum()), "tokens": count}
        for loss, count in zip(by_row, counts, strict=True)
    ]
