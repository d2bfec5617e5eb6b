"""Predictions of an adapter: generated texts, or the likeliest label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ptkit.data.encode import EncodedExample, encode_examples, label_token_ids
from ptkit.data.task import Example
from ptkit.evaluation.metrics import Metric, Statistics, metric
from ptkit.methods import Adapter
from ptkit.prefix import KVPrefix, PrefixBatch
from ptkit.recipe.schema import ClassificationTask, GenerationTask
from ptkit.runtime.forward import collate, supervised_losses
from ptkit.runtime.generation import generate
from ptkit.runtime.scoring import continuation_scores


@dataclass(frozen=True)
class Prediction:
    """One test row and what the model made of it.

    prediction, references: generated text and the acceptable texts; for classification, labels.
    details: what metrics ask for beside the text (`Metric.needs`)
    """

    input: str
    prediction: str
    references: tuple[str, ...]
    label: str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The row as written to `predictions.jsonl`."""
        return asdict(self)


def predict(
    adapter: Adapter,
    examples: Sequence[Example],
    task: GenerationTask | ClassificationTask,
    batch_size: int,
    report: Callable[[int, int], None] | None = None,
) -> list[Prediction]:
    """Predictions for `examples`, in their order; rows of similar length run together.

    report: told (rows done, rows) after every batch. Raises ModelError when the inputs do not
    fit beside the adapter's virtual tokens.
    """
    base = adapter.base
    encoded = encode_examples(examples, base.tokenizer, task, pairs=base.encoder_decoder)
    require_room(adapter, encoded, task)
    compiled = adapter.prefix()
    prefix = None if compiled is None else compiled.detach()
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].input_ids))
    answers: dict[int, tuple[str, dict[str, Any]]] = {}
    wanted = {metric(name).needs for name in task.metrics}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = [encoded[i].input_ids for i in rows]
        if isinstance(task, GenerationTask):
            texts = _generated(adapter, inputs, prefix, task)
            details: list[dict[str, Any]] = [{} for _ in rows]
            if "nats" in wanted:
                details = _target_nats(adapter, [encoded[i] for i in rows], prefix)
        else:
            texts, details = _likeliest(adapter, inputs, prefix, task)
            if "label_scores" not in wanted:
                details = [{} for _ in rows]
        answers.update(zip(rows, zip(texts, details, strict=True), strict=True))
        if report is not None:
            report(len(answers), len(encoded))
    classification = isinstance(task, ClassificationTask)
    return [
        Prediction(
            example.input,
            answers[i][0],
            (str(example.label),) if classification else example.references,
            example.label,
            answers[i][1],
        )
        for i, example in enumerate(examples)
    ]


def statistics_of(measure: Metric, rows: Sequence[Prediction]) -> Statistics:
    """What `measure` makes of predictions, one row per example (see `Metric.statistics`)."""
    return measure.statistics(
        [r.prediction for r in rows], [r.references for r in rows], [r.details for r in rows]
    )


def require_room(
    adapter: Adapter,
    encoded: Sequence[EncodedExample],
    task: GenerationTask | ClassificationTask,
) -> None:
    """Raise ModelError unless every example fits into the positions the adapter leaves."""
    base, title = adapter.base, f"`{adapter.section.title}`"
    inputs = max(len(e.input_ids) for e in encoded)
    targets = max(len(e.target_ids) for e in encoded)
    if isinstance(task, GenerationTask):
        targets = task.max_target_tokens
    if base.encoder_decoder:  # each side has positions of its own, virtual tokens have none
        base.require_positions(0, max(inputs, targets), title)
        return
    longest = inputs + targets if isinstance(task, GenerationTask) else max(map(len, encoded))
    adapter.base.require_positions(adapter.virtual_tokens, longest, f"`{adapter.section.title}`")


def _shared(prefix: KVPrefix | None, rows: int) -> PrefixBatch | None:
    return None if prefix is None else PrefixBatch.shared(prefix, rows)


def _generated(
    adapter: Adapter, inputs: list[list[int]], prefix: KVPrefix | None, task: GenerationTask
) -> list[str]:
    tokens = generate(
        adapter.model,
        inputs,
        _shared(prefix, len(inputs)),
        pad_token_id=adapter.base.pad_token_id,
        max_new_tokens=task.max_target_tokens,
        num_beams=task.num_beams,
        do_sample=False,
    )
    texts = adapter.base.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    if adapter.answer_end is not None:
        texts = [text.split(adapter.answer_end)[0] for text in texts]
    return [text.strip() for text in texts]


def _likeliest(
    adapter: Adapter, inputs: list[list[int]], prefix: KVPrefix | None, task: ClassificationTask
) -> tuple[list[str], list[dict[str, Any]]]:
    """The likeliest label of every row, and the log-probability of each label's words."""
    words = label_token_ids(task, adapter.base.tokenizer)
    scores = continuation_scores(
        adapter.model,
        inputs,
        list(words.values()),
        _shared(prefix, len(inputs)),
        pad_token_id=adapter.base.pad_token_id,
    )
    labels = list(words)
    details = [{"label_scores": dict(zip(labels, r, strict=True))} for r in scores.tolist()]
    return [labels[i] for i in scores.argmax(-1).tolist()], details


@torch.no_grad()
def _target_nats(
    adapter: Adapter, rows: Sequence[EncodedExample], prefix: KVPrefix | None
) -> list[dict[str, Any]]:
    """Cross-entropy of every row's target after its input, in nats, and its tokens."""
    batch = collate(rows, adapter.base)
    adapter.model.eval()
    losses = supervised_losses(adapter.model, **batch, batch=_shared(prefix, len(rows)))
    counts = [len(row.target_ids) for row in rows]
    by_row = losses.double().split(counts)
    return [
        {"nats": float(loss.sum()), "tokens": count}
        for loss, count in zip(by_row, counts, strict=True)
    ]
