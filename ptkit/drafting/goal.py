"""What a file is to teach: which columns are read, and which are learnt."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ptkit.data.chat_formats import recognised
from ptkit.data.pair_formats import pair_format
from ptkit.data.table import Table
from ptkit.drafting.columns import Column, columns_of, listed_columns
from ptkit.drafting.pairs import answer_columns, prompt_columns, require_no_verdicts
from ptkit.drafting.tagged_words import tagged_words
from ptkit.errors import DataError, UserError, did_you_mean
from ptkit.recipe.tasks import ChatTask, PreferenceTask

#: What a task can be drafted for; `auto` finds it from the columns.
Goal = Literal["auto", "classification", "token_classification", "generation", "chat", "preference"]

#: Names of labels that mostly say what kind of row it is.
_KINDS = "category|topic|tag|type|queue|department|priority|language|rating|stars"
_KIND_OF_ROW = re.compile(rf"({_KINDS})$", re.IGNORECASE)
_LABEL = re.compile(
    rf"(label|labels|class|intent|sentiment|{_KINDS}|is_\w+|has_\w+|\w+_label|label_\w+|gold|y)$",
    re.IGNORECASE,
)
#: Names of texts that are mostly learnt, whatever stands beside them.
_ANSWERS = (
    "target|output|answer|response|completion|summary|highlights|translation|reply|rewrite|"
    r"target_text|\w+_target"
)
_ANSWER = re.compile(rf"({_ANSWERS})$", re.IGNORECASE)
_TARGET = re.compile(
    rf"({_ANSWERS}|reference|expected|result|sql|code|title|headline)s?$", re.IGNORECASE
)
#: Names of what is likely to be learnt, whatever it holds.
_LEARNT = re.compile(
    rf"(({_ANSWERS}|solution|score|similarity|rating|stars|grade|reference|expected|result)s?"
    r"|labels?|class|sentiment|intent|(label|answer|correct)_\w+|\w+_(label|score|answer))$",
    re.IGNORECASE,
)
#: Names of lists of answers of which one is right.
_CHOICES = re.compile(r"(choices?|options?|candidates|endings|distractors|alternatives)$", re.I)
#: Names of what a model is told to do: it is read, also where it is the same in many rows.
_TOLD = re.compile(r"(system|system_?(prompt|message)|instructions?|prompt|question)$", re.I)
#: Columns that hold conversations, whatever else a file has.
_CHAT = ({"messages"}, {"conversations"}, {"instruction", "output"}, {"prompt", "completion"})


@dataclass(frozen=True)
class Chosen:
    """What is learnt from a file.

    inputs: columns that are read
    target: the label, the labels of words, the text to write, or the preferred answers; None for
        conversations
    rejected: of pairs the column of the other answers; `inputs` are empty where messages bring
        their prompt
    references: the column with lists of acceptable texts
    in_list: the target is the first text of `references`
    reasons: why, in lines
    """

    goal: Literal["classification", "token_classification", "generation", "chat", "preference"]
    inputs: tuple[Column, ...] = ()
    target: Column | None = None
    references: Column | None = None
    in_list: bool = False
    rejected: Column | None = None
    reasons: tuple[str, ...] = ()


def choose(
    table: Table,
    goal: Goal = "auto",
    *,
    label: str | None = None,
    text: Sequence[str] = (),
    target: str | None = None,
) -> Chosen:
    """What the rows of `table` are to teach.

    goal: found from the columns with `auto`; label, text, target: columns that were named

    Raises DataError where the columns do not tell, and UserError for names that contradict `goal`.
    """
    columns = {column.name: column for column in columns_of(table)}
    # Columns of a program's rows may have numbers for names, which are texts in a table.
    label, target = (None if name is None else str(name) for name in (label, target))
    text = [str(name) for name in text]
    for name in (label, target, *text):
        if name is not None and name not in columns:
            raise DataError(f"the data has no column `{name}`; {did_you_mean(name, columns)}")
    if label is not None and (target is not None or goal in ("generation", "chat", "preference")):
        raise UserError("a label is for `--goal classification`; leave out what is for another")
    given = [columns[name] for name in text]
    pair = answer_columns(columns)
    if goal == "preference" or (goal == "auto" and pair and label is None and target is None):
        if target is not None:
            raise UserError("a target is for `--goal generation`; leave out what is for another")
        return _preference(table, columns, pair, given)
    if goal == "token_classification" or (goal == "auto" and target is None and len(text) <= 1):
        tagged = tagged_words(table, columns, text[0] if text else None, label)
        if tagged is not None:
            return _tagging(*tagged)
    if goal == "token_classification":
        raise DataError(
            "no two columns hold the words of sentences and a label for each word, as lists of the "
            f"same length; there are {listed_columns([*columns.values()])}"
        )
    if target is not None and goal not in ("auto", "generation"):
        raise UserError("a target is for `--goal generation`; leave out what is for another")
    if goal == "chat":
        return _chat(table)
    if goal == "auto" and label is None and target is None and not text and _is_chat(table):
        require_no_verdicts(columns)
        return _chat(table)
    named = None if label is None else columns[label]
    if goal == "classification" or named is not None:
        return _classification(columns, named, given)
    wanted = None if target is None else columns[target]
    if goal == "generation" or wanted is not None:
        if pair is not None and wanted in (None, *pair):
            return _one_of(table, columns, pair, wanted, given)
        return _generation(table, columns, wanted, given)
    return _found(table, columns, given)


def _found(table: Table, columns: dict[str, Column], given: Sequence[Column]) -> Chosen:
    """The goal by the names and the contents of the columns."""
    rest = [column for column in columns.values() if column not in given]
    texts = [column for column in columns.values() if column.kind == "text"]
    labels = [c for c in rest if c.kind == "label" and _LABEL.match(c.name)]
    answers = [c for c in texts if _ANSWER.match(c.name) and c not in given]
    aside = labels and all(_KIND_OF_ROW.match(c.name) for c in labels)
    if aside and answers and len({*texts, *given}) > 1:
        found = _generation(table, columns, None, given)
        other = f"`--label {labels[-1].name}` learns the labels of `{labels[-1].name}` instead"
        return replace(found, reasons=(*found.reasons, other))
    if labels and (
        given or any(c.kind in ("text", "label") and not _LABEL.match(c.name) for c in rest)
    ):
        return _classification(columns, None, given)
    if any(c.kind == "texts" or (c.kind == "text" and _TARGET.match(c.name)) for c in rest):
        return _generation(table, columns, None, given)
    _require_usable(columns, given)
    if any(c.kind == "label" for c in rest) and (texts or given):
        return _classification(columns, None, given)
    if len({*texts, *given}) > 1:
        return _generation(table, columns, None, given)
    raise DataError(
        "the columns do not tell what is to be learnt; name the column with `--label` or "
        f"`--target`. There are {listed_columns([*columns.values()])}"
    )


def _require_usable(columns: dict[str, Column], given: Sequence[Column]) -> None:
    """Raise DataError where a column that is likely to be learnt cannot be: a guess among the other
    columns would teach something else."""
    for column in columns.values():
        name, kind = column.name, column.kind
        likely = kind in ("identifier", "nested", "empty", "constant") and _LEARNT.match(name)
        choices = kind == "texts" and _CHOICES.match(name)
        if column not in given and (likely or choices):
            why = (
                "holds several answers, of which one is right"
                if choices
                else "has no texts or labels"
            )
            raise DataError(
                f"the column {column} is named like what is to be learnt, and {why}; write the "
                "answers as texts or as a few labels, or name another column with `--target` or "
                f"`--label`. There are {listed_columns([*columns.values()])}"
            )


def _tagging(words: Column, tags: Column) -> Chosen:
    told = f"the column `{tags.name}` has a label for each word of the column `{words.name}`"
    return Chosen("token_classification", (words,), tags, reasons=(told,))


def _preference(
    table: Table,
    columns: dict[str, Column],
    pair: tuple[Column, Column] | None,
    given: Sequence[Column],
) -> Chosen:
    if pair is None:
        raise DataError(
            "no two columns hold a preferred and a rejected answer; expected `chosen` and "
            f"`rejected`, found {listed_columns([*columns.values()])}"
        )
    chosen, rejected = pair
    told = f"of two answers, that in `{chosen.name}` is preferred to that in `{rejected.name}`"
    empty = PreferenceTask.model_validate({"kind": "preference", "data": {"memory": True}})
    form = pair_format(empty, table)
    if form.messages:
        if given:
            raise UserError("answers that are lists of messages bring their prompt; leave out text")
        return Chosen("preference", (), chosen, rejected=rejected, reasons=(f"{told}: {form}",))
    inputs = _inputs(columns, given or prompt_columns(columns, pair), {c.name for c in pair})
    for column in pair:
        if not column.nameable:
            raise DataError(f"the column {column} cannot be named in a template; rename it")
    return Chosen("preference", inputs, chosen, rejected=rejected, reasons=(told, _read(inputs)))


def _one_of(
    table: Table,
    columns: dict[str, Column],
    pair: tuple[Column, Column],
    wanted: Column | None,
    given: Sequence[Column],
) -> Chosen:
    """Of two answers to one prompt, the preferred one or the one that was named is learnt; the
    model does not read the other one, which is not there when it has to answer."""
    target = wanted or pair[0]
    other = pair[1] if target == pair[0] else pair[0]
    rest = {name: c for name, c in columns.items() if c != other or c in given}
    found = _generation(table, rest, target, given)
    return replace(found, reasons=(*found.reasons, f"`{other.name}` is another answer, not read"))


def _is_chat(table: Table) -> bool:
    return any(needed <= {*table.columns} for needed in _CHAT)


def _chat(table: Table) -> Chosen:
    task = ChatTask.model_validate({"kind": "chat", "data": {"files": {"train": "-"}}})
    form = recognised(task, table)
    replies = [c for c in columns_of(table) if c.kind == "texts" and c.name != form.column]
    return Chosen(
        "chat", references=replies[0] if len(replies) == 1 else None,
        reasons=(f"the columns hold conversations: {form}",),
    )  # fmt: skip


def _classification(
    columns: dict[str, Column], label: Column | None, given: Sequence[Column]
) -> Chosen:
    if label is None:
        labels = [c for c in columns.values() if c.kind == "label" and c not in given]
        named = [c for c in labels if _LABEL.match(c.name)] or labels
        if not named:
            raise DataError(
                "no column holds labels, which are a few short texts that repeat; name it with "
                f"`--label`. There are {listed_columns([*columns.values()])}"
            )
        # The last one: labels mostly stand behind what they are of.
        label = named[-1]
    if len(label.values) < 2:
        raise DataError(
            f"the column {label} has no labels: expected 2 to 50 short texts that repeat; to "
            f"learn to write it, give `--target {label.name}` in place of `--label`"
        )
    inputs = _inputs(columns, given, {label.name})
    counted = f"the column `{label.name}` has {len(label.values)} labels"
    return Chosen("classification", inputs, label, reasons=(counted, _read(inputs)))


def _generation(
    table: Table, columns: dict[str, Column], target: Column | None, given: Sequence[Column]
) -> Chosen:
    lists = [c for c in columns.values() if c.kind == "texts" and c not in given]
    named = [c for c in columns.values() if c.kind == "text" and _TARGET.match(c.name)]
    if target is None and not [c for c in named if c not in given]:
        _require_usable(columns, given)
    lists = [c for c in lists if not _CHOICES.match(c.name)]
    references = lists[0] if len(lists) == 1 else None
    if target is not None and target.kind == "texts":
        references, target = target, None
        return _first_of(references, columns, given)
    texts = [c for c in columns.values() if c.kind in ("text", "label") and c not in given]
    if target is None and references is not None:
        target = next((c for c in texts if _is_listed(table, c, references)), None)
        if target is None:
            return _first_of(references, columns, given)
    if target is None:
        named = [c for c in texts if _TARGET.match(c.name)]
        free = named or [c for c in texts if c.kind == "text"]
        if not free or (not named and not given and len(free) < 2):
            raise DataError(
                "no column holds a text to write beside the one to read; name it with `--target`. "
                f"There are {listed_columns([*columns.values()])}"
            )
        target = free[-1]
    if not target.nameable:
        raise DataError(f"the column {target} cannot be named in a template; rename it")
    inputs = _inputs(columns, given, {target.name})
    reasons = [f"the text to write is in the column `{target.name}`", _read(inputs)]
    if references is not None:
        reasons.append(f"each row has several acceptable texts, in the column `{references.name}`")
    return Chosen("generation", inputs, target, references, reasons=tuple(reasons))


def _first_of(references: Column, columns: dict[str, Column], given: Sequence[Column]) -> Chosen:
    inputs = _inputs(columns, given, {references.name})
    if not references.nameable:
        raise DataError(f"the column {references} cannot be named in a template; rename it")
    learnt = f"the first text of each list in the column `{references.name}` is learnt"
    judged = "all texts of the list are acceptable when answers are scored"
    reasons = (learnt, judged, _read(inputs))
    return Chosen("generation", inputs, None, references, in_list=True, reasons=reasons)


def _is_listed(table: Table, column: Column, references: Column) -> bool:
    """Whether the texts of `column` stand in the lists of `references`."""
    rows = [row for _, row in zip(range(50), table, strict=False)]
    held = [row[column.name] in (row[references.name] or ()) for row in rows if row[column.name]]
    return bool(held) and all(held)


def _inputs(
    columns: dict[str, Column], given: Sequence[Column], used: set[str]
) -> tuple[Column, ...]:
    """The columns that are read: those that were named, else all that hold texts."""
    for column in given:
        if column.name in used:
            raise UserError(f"`{column.name}` is to be read and learnt; name another column")
        if not column.nameable:
            raise DataError(f"the column {column} cannot be named in a template; rename it")
    if given:
        return tuple(given)
    found = [c for c in columns.values() if c.kind == "text" and c.name not in used and c.nameable]
    if found:
        told = [c for c in columns.values() if _TOLD.match(c.name) and c.nameable
                and c.kind in ("label", "constant") and c.name not in used]  # fmt: skip
        found = [c for c in columns.values() if c in found or c in told]
    if not found:  # short texts that repeat may be read, too
        found = [c for c in columns.values() if c.kind in ("label", "texts") and c.nameable
                 and c.name not in used]  # fmt: skip
    if not found:
        raise DataError(
            "no column holds texts to read; name it with `--text`. There are "
            + listed_columns([*columns.values()])
        )
    return tuple(found)


def _read(inputs: Sequence[Column]) -> str:
    names = ", ".join(f"`{column.name}`" for column in inputs)
    return f"the model reads the column{'' if len(inputs) == 1 else 's'} {names}"
