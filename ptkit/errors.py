"""The errors ptkit raises, and the exit code each one gives the command line.

    PtkitError                exit 1   something failed that the user did not cause
    ├── HubError                       the Hub, or the way to it, failed
    └── UserError             exit 2   the request cannot be carried out as written
        ├── RecipeError                a recipe is malformed; lists every fault with its line
        ├── DataError                  a dataset, column, template or label does not fit
        ├── AdapterError               an adapter file is damaged, unsafe or of another base
        ├── FolderError                a folder is in use, or holds something else
        └── ModelError                 a base model cannot be loaded or does not fit the request

Every message is one or a few lines that name *what* is wrong, *where*, and *the fix*.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class PtkitError(Exception):
    """Base of every error ptkit raises on purpose."""

    exit_code = 1


class HubError(PtkitError):
    """The Hub, or the way to it, failed; the same request may succeed later."""


class UserError(PtkitError):
    """The request cannot be carried out as written; the message says how to change it."""

    exit_code = 2


class RecipeError(UserError):
    """A recipe file is malformed."""


class DataError(UserError):
    """A dataset, column, template or label does not fit the task."""


class AdapterError(UserError):
    """An adapter cannot be read, is unsafe, or belongs to another base model."""


class FolderError(UserError):
    """A folder of results is in use, or holds something else than what belongs there."""


class ModelError(UserError):
    """A base model cannot be loaded or cannot do what was asked."""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The entry of `known` closest to `word`, or None when nothing is close."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A clause to end an error message with: the nearest known name, else all of them."""
    names = sorted(known)
    close = nearest(word, names)
    return f"did you mean `{close}`?" if close else f"known: {', '.join(names)}"


#: Names among which a near one is searched, and that a message lists.
_SEARCHED, _LISTED = 1000, 10
#: Letters of a name that a message repeats.
_LETTERS = 130


def no_such_model(name: str, served: Sequence[str]) -> str:
    """That a server has no model `name`: the nearest of what is `served`, else its first names and
    where the whole list is."""
    close = nearest(name[:_LETTERS], served[:_SEARCHED])
    if close is not None:
        told = f"did you mean `{close}`?"
    else:
        told = f"known: {', '.join(served[:_LISTED])}"
        more = len(served) - _LISTED
        told += f" and {more:,} more" if more > 0 else ""
    return f"the model `{name[:_LETTERS]}` does not exist; {told} (GET /v1/models lists all)"
