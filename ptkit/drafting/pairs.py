"""Columns that hold two answers to one prompt, of which one is preferred; and verdicts on one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ptkit.data.pair_formats import ANSWERS
from ptkit.drafting.columns import Column, listed_columns
from ptkit.errors import DataError

#: Words by which names of columns tell the preferred answer from the other one.
_WORDS = (
    ANSWERS, ("preferred", "rejected"), ("preferred", "dispreferred"), ("accepted", "rejected"),
    ("preferred", "non_preferred"), ("winner", "loser"), ("better", "worse"),
)  # fmt: skip
_ABOUT_ONE = re.compile(rf"(^|[\W_])({'|'.join({w for both in _WORDS for w in both})})($|[\W_])")
#: Names of texts that are asked, or stand before what is asked.
_PROMPT = re.compile(
    r"(prompt|instruction|question|query|request|input|context|history|conversation|post|document"
    r"|system|system_?prompt|system_?message)s?$",
    re.IGNORECASE,
)
#: The names of a column that says of each answer whether it is a good one, and what it then holds.
_VERDICT = re.compile(r"(label|labels|desirable|is_desirable|good|is_good|chosen)$", re.IGNORECASE)
_TRUTH = {"true", "false"}


def answer_columns(columns: Mapping[str, Column]) -> tuple[Column, Column] | None:
    """The columns of preferred and rejected answers; None where no two columns are those."""
    named = {name.lower(): column for name, column in columns.items()}
    own, other = (named.get(name) for name in ANSWERS)
    if own and other and "empty" not in (own.kind, other.kind):
        return own, other
    for good, bad in _WORDS:
        for name, own in named.items():
            changed = re.sub(rf"(?<![^\W_]){good}(?![^\W_])", bad, name)
            other = named.get(changed)
            if changed != name and other and (own.kind, other.kind) == ("text", "text"):
                return own, other
    return None


def prompt_columns(columns: Mapping[str, Column], answers: Sequence[Column]) -> tuple[Column, ...]:
    """The columns of what is asked where answers are texts. Raises DataError without any."""
    rest = [
        c for c in columns.values()
        if c not in answers and not _ABOUT_ONE.search(c.name.lower())
    ]  # fmt: skip
    asked = [c for c in rest if _PROMPT.match(c.name) and c.kind in ("text", "label", "constant")]
    exact = [c for c in asked if re.fullmatch(r"prompt|system\w*", c.name, re.IGNORECASE)]
    if any(c.name.lower() == "prompt" for c in exact):
        asked = exact
    found = asked if any(c.kind != "constant" for c in asked) else []
    found = found or [c for c in rest if c.kind == "text"]
    if not found:
        names = " and ".join(f"`{column.name}`" for column in answers)
        raise DataError(
            f"the pairs in {names} have no column with their prompt; write what both answers "
            "follow into a column `prompt` and leave it out of the answers, or give the answers as "
            f"lists of messages. There are {listed_columns([*columns.values()])}"
        )
    return tuple(found)


def require_no_verdicts(columns: Mapping[str, Column]) -> None:
    """Raise DataError where a column says of each answer whether it is a good one. Whoever learned
    from all rows would learn the bad answers too."""
    for column in columns.values():
        values = {value.lower() for value in column.values}
        if _VERDICT.match(column.name) and values and values <= _TRUTH and values != {"true"}:
            raise DataError(
                f"the column `{column.name}` is true where an answer is wanted and false where it "
                "is not, and both would be learnt; keep the rows that are true, without this "
                "column; or write the two answers to a prompt into a row, as `chosen` and "
                "`rejected`. `--goal chat` learns all answers, and "
                f"`--label {column.name}` learns to tell them apart"
            )
