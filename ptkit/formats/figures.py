"""Figures that adapters' and cells' files share: scores, forgetting, which rows were scored."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from pydantic import Field

from ptkit.formats.typed_file import FileSection


def scored_rows(
    split: str, chose: bool, repeats: Mapping[str, int], unlike: Collection[str] = ()
) -> str:
    """What scored rows are, in words that follow a number.

    split: the source's name of the split; chose: its rows also chose the checkpoint
    repeats: another split -> how many of the rows stand in it, too
    unlike: those of them whose number is the most of several
    """
    if chose:
        told = "validation rows, which also chose the checkpoint"
    else:
        told = "test rows" if split == "test" else f"test rows (the source's split `{split}`)"
    named = {"train": "training rows", "validation": "validation rows"}
    seen = [
        f"{'up to ' * (other in unlike)}{count:,} are {named[other]} too"
        for other, count in repeats.items()
        if count
    ]
    return f"{told}, of which {' and '.join(seen)}" if seen else told


def bracketed(low: float | None, high: float | None, form: str) -> str:
    """An interval as it stands behind its figure: nothing where it is not known."""
    return "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"


class RecordedScore(FileSection):
    """A figure with its 95 % interval."""

    value: float
    """The figure, over all rows."""
    low: float | None
    """The interval's lower end; null where none was measured."""
    high: float | None
    """Its upper end."""

    @property
    def shown(self) -> str:
        """The figure, and its interval where it has one."""
        return self.written(".2f")

    def written(self, form: str) -> str:
        """`shown`, with the numbers in the format `form`."""
        return f"{self.value:{form}}{bracketed(self.low, self.high, form)}"


class TextFigures(FileSection):
    """What is left of the base on general text while the adapter is on."""

    tokens: int
    """Predicted tokens."""
    base_nats: float
    """The base's cross-entropy, nats per token."""
    adapter_nats: float
    """The same with the adapter on."""
    forgetting: float
    """`adapter_nats` minus `base_nats`."""
    base_accuracy: float
    """Share of tokens that the base predicts first."""
    adapter_accuracy: float
    """The same with the adapter on."""
    retention: float | None
    """`adapter_accuracy / base_accuracy`; null where the base predicts no token."""


class RecordedRetention(TextFigures):
    """What is left of the base: over all general texts together, and for each text."""

    drift: float | None
    """KL(base || adapter), nats per token; null where it was not measured."""
    drift_tokens: int
    """Tokens that `drift` was measured on."""
    lead: int
    """Begin-of-text tokens before each window of text."""
    domains: dict[str, TextFigures] = Field(default_factory=dict)
    """The figures of each text, by its name."""
