"""Fitting an adapter's gate: the inputs of its task against general text."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ptkit.data.encoded import EncodedExample
from ptkit.errors import UserError
from ptkit.extras import extra, require
from ptkit.methods import ADAPTERS
from ptkit.runtime.base_model import Base
from ptkit.runtime.gate import Gate, gate_features
from ptkit.section import MethodSection

#: Training rows read at most, and pieces of general text: embeddings alone tell them apart.
ROWS, PIECES = 2000, 2000
#: Inverse weight of the L2 penalty; features have a length of 1.
_LOOSENESS = 100.0
_READ_AT_ONCE = 256
_WANTED_BY = "`train.retain: {by: gate}`"


def require_gate_fits(method: MethodSection) -> None:
    """Raise UserError for a method that acts by changing weights: no row can be spared it; and
    where what fits a gate is not installed."""
    require("gate", _WANTED_BY)
    if ADAPTERS[method.kind].changes_weights or not hasattr(method, "num_virtual_tokens"):
        raise UserError(
            f"`train.retain: {{by: gate}}` leaves a row its adapter or takes it away, and "
            f"`{method.title}` changes what the base computes for all rows; use prefix tuning, "
            "prompt tuning or P-tuning"
        )


def fit_gate(base: Base, rows: Sequence[EncodedExample], windows: Tensor, seed: int) -> Gate:
    """A gate that opens for inputs like those of `rows` and stays shut for text like `windows`.

    rows: training rows; windows: general text, `[pieces, lead + tokens]`

    Logistic regression on `gate_features`, both sides weighing as much; deterministic in `seed`.
    """
    draw = random.Random(seed)
    inputs = [row.input_ids for row in draw.sample(list(rows), min(ROWS, len(rows)))]
    lead = base.lead  # every input has it; it must not give inputs away
    texts = [[*lead, *_piece(window[len(lead) :], draw)] for window in _cycled(windows, PIECES)]
    features = np.concatenate([_features(base, inputs), _features(base, texts)])
    with extra("gate", _WANTED_BY):
        from sklearn.linear_model import LogisticRegression
    classifier = LogisticRegression(C=_LOOSENESS, class_weight="balanced", max_iter=1000)
    classifier.fit(features, [1] * len(inputs) + [0] * len(texts))
    device = base.model.device
    weight = torch.tensor(classifier.coef_[0], dtype=torch.float32, device=device)
    bias = torch.tensor(classifier.intercept_, dtype=torch.float32, device=device)
    return Gate(weight, bias, base.embedding)


def share_open(gate: Gate, inputs: Sequence[Sequence[int]]) -> float:
    """For which share of `inputs` (token ids) the gate opens."""
    opened = 0
    for part in _parts(inputs):
        opened += int(gate.opens(*_padded(part)).sum())
    return opened / len(inputs)


def _cycled(windows: Tensor, count: int) -> list[list[int]]:
    texts = windows.tolist()
    return [texts[i % len(texts)] for i in range(count)]


def _piece(window: list[int], draw: random.Random) -> list[int]:
    """A part of `window` from anywhere, of any length: length must not give inputs away."""
    length = draw.randint(1, len(window))
    first = draw.randint(0, len(window) - length)
    return window[first : first + length]


def _parts(inputs: Sequence[Sequence[int]]) -> list[Sequence[Sequence[int]]]:
    return [inputs[i : i + _READ_AT_ONCE] for i in range(0, len(inputs), _READ_AT_ONCE)]


def _padded(inputs: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Token ids `[rows, longest]`, and where they are real."""
    longest = max(map(len, inputs))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in inputs])
    lengths = torch.tensor([len(row) for row in inputs])
    return ids, torch.arange(longest) < lengths[:, None]


@torch.no_grad()
def _features(base: Base, inputs: Sequence[Sequence[int]]) -> np.ndarray:
    parts = [gate_features(base.embedding, *_padded(part)) for part in _parts(inputs)]
    return torch.cat(parts).cpu().numpy()
