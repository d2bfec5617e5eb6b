"""Sizes in bytes as people write and read them."""

from __future__ import annotations

import re

from ptkit.errors import UserError

MEGABYTE = 10**6
_FACTORS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*((?:[KMG]I?)?)B?\s*", re.IGNORECASE)


def in_bytes(count: float) -> str:
    """A size in the unit a reader would choose, in powers of ten: `940 B`, `1.2 GB`."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("KB", "MB"):
        count /= 1000
        if count < 999.5:  # what would be written as 1000 has the next unit
            return f"{count:.0f} {unit}" if count >= 99.95 else f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"


def in_money(amount: float) -> str:
    """A price in whatever currency, for people: `0.24`, and two digits where that is nothing."""
    return f"{amount:,.2f}" if amount >= 0.01 or not amount else f"{amount:.2g}"


def read_bytes(text: str) -> int:
    """`500MB`, `1.5 GiB`, `2G` or `750000` as bytes; decimal units, and binary ones with an i.

    Raises UserError for anything else.
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise UserError(f"`{text}` is no size; write 500MB, 2GiB or a number of bytes")
    return int(float(found[1]) * _FACTORS[found[2].upper()])
