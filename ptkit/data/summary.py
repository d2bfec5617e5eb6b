"""What was decided about a task's data, in lines for whoever started a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ptkit.data.chat_rows import ChatNotes
from ptkit.data.encoded import EncodedExample
from ptkit.data.splits import Origin
from ptkit.data.task import Example, TaskData
from ptkit.recipe.tasks import ChatTask, ClassificationTask, GenerationTask, HeadedTask, Task

#: Labels that are listed with their counts; of more, only how many there are.
MOST_LISTED = 20


def data_lines(
    task: Task, data: TaskData, encoded: Mapping[str, Sequence[EncodedExample]] | None = None
) -> list[str]:
    """Rows per split and where they are from, counts of labels, what was empty, what was cut.

    encoded: of some splits the rows as token ids, by which is told what was cut

    Lines that begin with `warning: ` name what is likely a mistake.
    """
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    lines = [
        f"{split}: {len(rows):,} rows{_from(split, data)}" + _labels(task, rows)
        for split, rows in splits.items()
    ]
    if data.form:
        lines.insert(0, f"conversations: recognised as {data.form}")
    for split, rows in splits.items():
        empty = sum(not example.input.strip() for example in rows)
        if empty:
            lines.append(f"{split}: {empty:,} inputs are empty")
        unsaid = sum(not example.target.strip() for example in rows)
        if isinstance(task, GenerationTask | ChatTask) and unsaid:
            lines.append(f"{split}: {unsaid:,} targets are empty")
    for split, count in data.test_repeats.items():
        lines.append(
            f"warning: {count:,} of the {len(data.test):,} test rows are {split} rows too; every "
            "table says so"
        )
    for split, ids in (encoded or {}).items():
        lines += _cut(task, split, ids)
    return lines + [f"warning: {text}" for text in _warnings(task, data)]


def chat_lines(task: ChatTask, split: str, notes: ChatNotes) -> list[str]:
    """What was decided about the conversations of `split` as they became token ids."""
    lines = []
    if notes.shortened:
        lines.append(
            f"{split}: {notes.shortened:,} conversations exceed `max_tokens` ({task.max_tokens}); "
            f"{notes.dropped:,} early messages are left out"
        )
    if notes.unfolded:
        lines.append(
            f"{split}: the chat template changes earlier answers when others follow; "
            f"{notes.unfolded:,} conversations are read once for each answer"
        )
    if notes.endless:
        lines.append(
            f"warning: {split}: no mark ends the answer of {notes.endless:,} conversations, so "
            "where to stop cannot be learnt; use a chat template whose end of turn is a token of "
            "the model (`plain`, say)"
        )
    return lines


def _from(split: str, data: TaskData) -> str:
    origin: Origin | None = data.origins.get(split)
    if origin is None:
        return ""
    count = len(getattr(data, split))
    kept = f", {count:,} of {origin.of:,} kept by `limits`" if count < origin.of else ""
    if split == "test" and data.test_chose:
        return f" (no test split: the validation rows, which also choose the checkpoint{kept})"
    if origin.held_out:
        return f" (held out of `{origin.source}`{kept})"
    named = "" if origin.source == split else f"the source's split `{origin.source}`"
    told = f"{named}{kept}".removeprefix(", ")
    return f" ({told})" if told else ""


def _labels(task: Task, rows: Sequence[Example]) -> str:
    counts = Counter(example.label for example in rows if example.label is not None)
    if not counts:
        return ""
    if len(counts) > MOST_LISTED:
        return f"; {len(counts)} labels, {min(counts.values()):,} to {max(counts.values()):,} each"
    return "; " + ", ".join(f"{label} {counts[label]:,}" for label in known_labels(task))


def known_labels(task: Task) -> list[str]:
    """The labels of a classification task, in its order."""
    if isinstance(task, ClassificationTask):
        return list(task.verbalizer)
    return list(task.labels) if isinstance(task, HeadedTask) else []


def _cut(task: Task, split: str, ids: Sequence[EncodedExample]) -> list[str]:
    if isinstance(task, ChatTask):  # nothing is cut within a turn (see `chat_lines`)
        return []
    limit = task.max_input_tokens
    lines = []
    inputs = sum(len(row.input_ids) >= limit for row in ids)
    if inputs:
        lines.append(
            f"{split}: {inputs:,} inputs fill `max_input_tokens` ({limit}); what is beyond is cut"
        )
    if isinstance(task, GenerationTask):
        targets = sum(len(row.target_ids) >= task.max_target_tokens for row in ids)
        if targets:
            lines.append(
                f"{split}: {targets:,} targets fill `max_target_tokens` "
                f"({task.max_target_tokens}); what is beyond is cut"
            )
    return lines


def _warnings(task: Task, data: TaskData) -> list[str]:
    known = known_labels(task)
    if not known:
        return []

    def seen(rows: Sequence[Example]) -> set[str]:
        if any(example.words for example in rows):
            return {tag for example in rows for tag in example.target.split()}
        return {example.label for example in rows if example.label is not None}

    trained, told = seen(data.train), []
    absent = [label for label in known if label not in trained]
    if absent:
        names = ", ".join(f"`{label}`" for label in absent)
        told.append(f"no training row has the label {names}; it cannot be learnt")
    for split, rows in (("validation", data.validation), ("test", data.test)):
        only = seen(rows)
        if len(only) == 1 and len(trained) > 1:
            told.append(
                f"all {split} rows have the label `{only.pop()}`; if the file is sorted, leave "
                "`draw: first` out or give the split rows of its own"
            )
    return told
