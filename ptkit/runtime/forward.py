"""One forward pass with a prefix: losses and logits at the positions that carry a label."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ptkit.data.encoded import IGNORED, EncodedExample, each_pass
from ptkit.errors import UserError
from ptkit.prefix import Compiled
from ptkit.prefix_batch import PrefixBatch
from ptkit.recipe.tasks import HeadedTask, Task
from ptkit.runtime.architecture import head_kind, is_encoder
from ptkit.runtime.base_model import Base
from ptkit.runtime.fused import has_plain_head, head_divergences
from ptkit.runtime.runner import ModelRunner, Tokens, Want, token_losses


def supervised_logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    batch: PrefixBatch | None,
) -> tuple[Tensor, Tensor]:
    """Logits `[n, vocab]` and the token ids `[n]` they should predict.

    input_ids, attention_mask, labels: `[rows, tokens]`; a label stands at its own token and is
    predicted from the position before it (transformers' convention); `IGNORED` elsewhere.
    batch: the rows' prefixes, or None for the plain base.
    The last token of the longest rows predicts nothing: `input_ids` and `attention_mask` may leave
    it out, where the model has no position for it.

    In an encoder-decoder the encoder reads `input_ids`, and `labels` `[rows, target tokens]` are
    all that the decoder writes.
    """
    tokens, at, targets = _supervised(model, input_ids, attention_mask, labels)
    return ModelRunner(model).forward(tokens, batch, want=Want("logits", at)), targets


def _supervised(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tokens, Tensor, Tensor]:
    """What is read, the positions that predict something, and what they should predict."""
    if model.config.is_encoder_decoder:
        writer: Any = model
        written = writer.prepare_decoder_input_ids_from_labels(labels=labels)
        at = labels != IGNORED
        return Tokens(input_ids, attention_mask, written=written), at, labels[at]
    targets = labels[:, 1:]
    at, last = _predicting(labels)
    tokens = Tokens(input_ids, attention_mask, last=last)
    return tokens, at[:, : input_ids.shape[1]], targets[targets != IGNORED]


def head_logits(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, batch: PrefixBatch | None
) -> Tensor:
    """What a classification head makes of right-padded rows: `[rows, labels]`, or `[rows, tokens,
    labels]` where every token has a label.

    The head sees what it sees without an adapter: `[CLS]`, or the last token, stays where it is.
    """
    last = None if is_encoder(model) else attention_mask.sum(-1) - 1
    return ModelRunner(model).forward(Tokens(input_ids, attention_mask, last=last), batch)


def supervised_counts(model: PreTrainedModel, labels: Tensor) -> Tensor:
    """Supervised targets of each row, `[rows]`, as `supervised_losses` returns them in turn."""
    shifted = not model.config.is_encoder_decoder and head_kind(model) is None
    return ((labels[:, 1:] if shifted else labels) != IGNORED).sum(-1)


def input_tokens(model: PreTrainedModel, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """The tokens of each row's input, `[rows, tokens]` bool: those before the first one that is to
    be predicted, padding left out. Parameters as for `supervised_losses`.

    In a text of which every token is predicted that is the first token alone.
    """
    read = attention_mask.bool()
    if model.config.is_encoder_decoder or head_kind(model) is not None:
        return read
    _, last = _predicting(labels)
    return read & (torch.arange(read.shape[1], device=read.device) <= last[:, None])


def rows_for(compiled: Compiled | None, inputs: list[list[int]]) -> PrefixBatch | None:
    """The prefixes of rows whose inputs are these token ids; None for the plain base."""
    if compiled is None:
        return None
    return compiled.for_rows(*pad_rows(inputs, 0, left=False))


def supervised_losses(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    batch: PrefixBatch | None,
) -> Tensor:
    """Cross-entropy in nats of each supervised token, `[n]`, in float32; parameters as for
    `supervised_logits`, whose logits are not kept.

    For a classification head `labels` are numbers of labels, `[rows, 1]` or `[rows, tokens]`.
    """
    if head_kind(model) is not None:
        logits = head_logits(model, input_ids, attention_mask, batch)
        learnt = labels != IGNORED
        return token_losses(logits.view(*labels.shape, -1)[learnt], labels[learnt])
    tokens, at, targets = _supervised(model, input_ids, attention_mask, labels)
    if model.config.is_encoder_decoder:
        return token_losses(
            ModelRunner(model).forward(tokens, batch, want=Want("logits", at)), targets
        )
    want = Want("losses", at, targets, nothing_else=True)
    return ModelRunner(model).forward(tokens, batch, want=want)


def summed_by_row(losses: Tensor, counts: Tensor) -> Tensor:
    """The sum of each row's losses, `[rows]`.

    losses: of all supervised tokens, row by row, `[n]`; counts: how many each row has, `[rows]`
    """
    return torch.stack([part.sum() for part in losses.split(counts.tolist())])


def row_nats(
    base: Base, model: PreTrainedModel, rows: Sequence[EncodedExample], batch: PrefixBatch | None
) -> Tensor:
    """Cross-entropy in nats of each row's targets after its input, `[rows]`, in float32.

    model: the base's own, or the one an adapter runs; batch: the rows' prefixes
    """
    tensors = collate(rows, base)
    losses = supervised_losses(model, **tensors, batch=batch)
    return summed_by_row(losses, supervised_counts(model, tensors["labels"]))


def teacher_outputs(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    batch: PrefixBatch | None,
) -> Tensor:
    """What `supervised_divergences` compares a student with, `[n, width]`. It is what the output
    head of a causal model reads at each supervised token, or its logits where more than that head
    makes them. Parameters are those of `supervised_logits`."""
    tokens, at, _ = _supervised(model, input_ids, attention_mask, labels)
    what: Any = "hidden" if has_plain_head(model) else "logits"
    want = Want(what, at, nothing_else=True)
    return ModelRunner(model).forward(tokens, batch, want=want)


def supervised_divergences(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    batch: PrefixBatch | None,
    wanted: Tensor,
) -> Tensor:
    """KL(teacher || student) in nats at each supervised token of a causal model, `[n]`, in float32.

    wanted: the `teacher_outputs` of the same rows behind what the teacher has in view; the other
        parameters are the student's, as for `supervised_logits`. What the labels are plays no part,
        only where they are.
    """
    found = teacher_outputs(model, input_ids, attention_mask, labels, batch)
    if has_plain_head(model):
        head: Any = model.get_output_embeddings()
        return head_divergences(head, found, wanted)
    found, wanted = (logits.float().log_softmax(-1) for logits in (found, wanted))
    return nn.functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)


def _predicting(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that predict a labelled token, `[rows, tokens]` bool, and the index of the
    last token of each row's input, `[rows]`: it predicts the first."""
    positions = nn.functional.pad(labels[:, 1:] != IGNORED, (0, 1), value=False)
    return positions, positions.long().argmax(-1)


def all_logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    batch: PrefixBatch | None,
) -> Tensor:
    """Logits at every position, `[rows, tokens, vocab]`, with the rows' prefixes in place.

    The whole row counts as its input: an infix stands before its last token.
    """
    tokens = Tokens(input_ids, attention_mask, last=last_of_rows(attention_mask))
    return ModelRunner(model).forward(tokens, batch)


def last_of_rows(attention_mask: Tensor) -> Tensor:
    """Index of the last real token of each row, `[rows]`; padding may be on either side."""
    index = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return (attention_mask * index).argmax(-1)


def pad_rows(rows: list[list[int]], pad_id: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token id lists as `(input_ids, attention_mask)`, both `[rows, longest]`."""
    longest = max(len(r) for r in rows)
    ids = torch.full((len(rows), longest), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, at] = torch.tensor(row, dtype=torch.long)
        mask[i, at] = 1
    return ids, mask


def require_tokens(rows: Sequence[Sequence[int]], batch: PrefixBatch | None) -> None:
    """Raise UserError where one of `rows`, which are to be gone on with, has no token.

    Keys and values predict nothing before a token reads them. Padding would be read in its place,
    and the row would get another answer beside other rows than alone. Soft prompts that are read
    as embeddings are tokens enough.
    """
    read = [0] * len(rows)
    if batch is not None and batch.embeddings is not None:
        read = batch.visible.sum(-1).tolist()
    for number, (row, soft) in enumerate(zip(rows, read, strict=True), start=1):
        if not row and not soft:
            which = "the prompt" if len(rows) == 1 else f"prompt {number} of {len(rows)}"
            raise UserError(f"{which} is empty: it has no tokens")


def collate(rows: Sequence[EncodedExample], base: Base) -> dict[str, Tensor]:
    """Right-padded `input_ids`, `attention_mask` and `labels` on the base's device.

    Each `[rows, longest]`: inputs and targets in one row. In an encoder-decoder, and with a
    classification head, the inputs are `[rows, longest input]` and the labels `[rows, longest
    target]`.
    """
    apart = base.encoder_decoder or base.head is not None
    tensors = (_pairs if apart else _joined)(rows, base.pad_token_id)
    return {name: tensor.to(base.model.device) for name, tensor in tensors.items()}


def require_embedded(base: Base, rows: Iterable[EncodedExample], task: Task) -> None:
    """Raise ModelError when rows of `task` have a token that the base has no embedding for.

    rows: not gone through where the base has one for all tokens of its tokenizer
    """
    headed = isinstance(task, HeadedTask)  # whose targets are numbers of labels
    base.require_embedded(
        row.input_ids if headed else [*row.input_ids, *row.target_ids] for row in each_pass(rows)
    )


def _pairs(rows: Sequence[EncodedExample], pad_token_id: int) -> dict[str, Tensor]:
    ids, mask = pad_rows([row.input_ids for row in rows], pad_token_id, left=False)
    labels, written = pad_rows([row.target_ids for row in rows], pad_token_id, left=False)
    return {
        "input_ids": ids, "attention_mask": mask,
        "labels": labels.masked_fill(written == 0, IGNORED),
    }  # fmt: skip


def _joined(rows: Sequence[EncodedExample], pad_token_id: int) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    shape = (len(rows), longest)
    ids = torch.full(shape, pad_token_id, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens = torch.tensor(row.input_ids + row.target_ids)
        ids[i, : len(row)] = tokens
        mask[i, : len(row)] = 1
        labels[i, len(row.input_ids) : len(row)] = torch.tensor(row.labels)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
