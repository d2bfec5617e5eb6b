"""One method of one program on one model, and the checks that properties are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ptkit.families.candidate import Candidate
from ptkit.families.model_under_test import ModelUnderTest, NotApplicable, TokenRow

#: Largest difference of two logits in float32, of the largest logit.
TOLERANCE = 2e-4
#: Longer than the window of small models.
LENGTHS = ((9, 6), (4, 3), (14, 5))
EQUAL = ((9, 6), (9, 6))
NEW_TOKENS = 8


class Mismatch(Exception):
    """The program answered, and the oracle says otherwise."""


@dataclass(frozen=True)
class PropertyCase:
    """One method of one program on one model under test.

    make: a fresh candidate on another model under test (of the same family)
    """

    tested: ModelUnderTest
    make: Callable[[ModelUnderTest], Candidate]

    def candidate(self) -> Candidate:
        """A fresh one, which no earlier check has touched."""
        return self.make(self.tested)


def require_close(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise Mismatch where logits differ by more than rounding."""
    worst = float((found.float() - expected.float()).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.float().abs().max()))
    if not worst <= allowed:  # also for NaN
        raise Mismatch(f"{what}: logits differ by {worst:.2g}, allowed {allowed:.1g}")


def require_equal(found: Sequence[list[int]], expected: Sequence[list[int]], what: str) -> None:
    """Raise Mismatch that names the first row and token that differ."""
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        if one != other:
            first = next(
                (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
                min(len(one), len(other)),
            )
            raise Mismatch(f"{what}: row {i} differs at token {first}")


def check_logits(candidate: Candidate, rows: Sequence[TokenRow], *, left: bool, what: str) -> None:
    """Raise Mismatch unless the logits of `rows`, padded at the left or right, are the oracle's."""
    found = candidate.logits(rows, left=left)
    for row, logits in zip(rows, found, strict=True):
        require_close(logits, candidate.oracle.logits(row), what)


def require_words(trial: PropertyCase) -> None:
    """Raise NotApplicable for a model that writes no words."""
    if trial.tested.kind.head is not None:
        raise NotApplicable("a classification head writes no words")


def require_going_on(trial: PropertyCase) -> None:
    """Raise NotApplicable for a model that does not go on after its answer."""
    require_words(trial)
    if not trial.tested.kind.goes_on:
        raise NotApplicable(f"an {trial.tested.kind.name} answers one input")


def require_of_base(trial: PropertyCase, **options: object) -> None:
    """Raise NotApplicable for what the model cannot do without any adapter, either."""
    model: Any = trial.tested.base().model
    read = torch.tensor([trial.tested.rows((6, 1))[0].input], device=model.device)
    try:
        model.generate(
            input_ids=read, max_new_tokens=2, do_sample=False, eos_token_id=None, **options
        )
    except (ValueError, RuntimeError, TypeError) as error:
        raise NotApplicable(f"the plain base raises {str(error).splitlines()[0]}") from error


def check_tokens(
    trial: PropertyCase, what: str, lengths: Sequence[tuple[int, int]] = EQUAL, **options: object
) -> None:
    """Raise Mismatch unless greedy answers to rows of `lengths` are the oracle's."""
    require_words(trial)
    candidate = trial.candidate()
    inputs = [row.input for row in trial.tested.rows(*lengths)]
    found = candidate.generate(inputs, max_new_tokens=NEW_TOKENS, **options)
    expected = [candidate.oracle.greedy(read, NEW_TOKENS) for read in inputs]
    require_equal(found, expected, what)


def trained(trial: PropertyCase) -> Candidate:
    """A fresh candidate. Raises NotApplicable for one that trains nothing."""
    candidate = trial.candidate()
    if not candidate.parameters():
        raise NotApplicable("nothing is trained")
    return candidate
