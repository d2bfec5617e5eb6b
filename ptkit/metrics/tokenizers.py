"""Tokenisers of sacrebleu's, for languages whose words are not found at spaces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ptkit.errors import UserError


@contextmanager
def needs_a_tokenizer(name: str) -> Iterator[None]:
    """Tokenisers of some languages are packages, or files to fetch, of their own."""
    try:
        yield
    except (ImportError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the tokeniser of `{name}` is not there: {reason}") from error
