"""What methods and swept values are called in tables and messages."""

from __future__ import annotations

from typing import Any


def written(value: Any) -> str:
    """A swept value as it is shown."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def titled(family: str, sweep: dict[str, Any]) -> str:
    """A method, with its swept values where there are any."""
    return f"{family} {' '.join(f'{key}={written(value)}' for key, value in sweep.items())}".strip()
