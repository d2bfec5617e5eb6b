"""Values that a key of a recipe takes in turn, in a sweep or a search."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ptkit.section import Section


class Range(Section):
    """Values from `low` to `high`."""

    low: float
    """Smallest value."""
    high: float
    """Largest value."""
    steps: Annotated[int, Field(ge=2)] | None = None
    """How many values, evenly spaced; a sweep needs it, a search draws from the whole range."""
    log: bool = False
    """Space them evenly on a logarithmic scale."""

    @model_validator(mode="after")
    def _rises(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"`low` must be below `high`, found {self.low} and {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range starts above zero, found {self.low}")
        return self


Values = Annotated[list[Any], Field(min_length=1)] | Range
