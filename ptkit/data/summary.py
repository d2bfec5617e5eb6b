"""What was decided about a task's data, in lines for whoever started a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ptkit.data.chat_rows import ChatNotes
from ptkit.data.encoded import EncodedExample
from ptkit.data.encoded_rows import Lengths
from ptkit.data.examples import Facts
from ptkit.data.splits import Origin
from ptkit.data.task import TaskData
from ptkit.recipe.tasks import (
    ClassificationTask,
    ConversationTask,
    GenerationTask,
    HeadedTask,
    PreferenceTask,
    Task,
)

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
    facts = {split: Facts.of(rows) for split, rows in splits.items()}
    lines = [
        f"{split}: {len(rows):,} rows{_from(split, data)}" + _labels(task, facts[split])
        for split, rows in splits.items()
    ]
    if data.form:
        what = "pairs" if isinstance(task, PreferenceTask) else "conversations"
        lines.insert(0, f"{what}: recognised as {data.form}")
    for split, found in facts.items():
        if found.empty_inputs:
            lines.append(f"{split}: {found.empty_inputs:,} inputs are empty")
        if isinstance(task, GenerationTask | ConversationTask) and found.empty_targets:
            lines.append(f"{split}: {found.empty_targets:,} targets are empty")
    for split, count in data.test_repeats.items():
        lines.append(
            f"warning: {count:,} of the {len(data.test):,} test rows are {split} rows too; every "
            "table says so"
        )
    for split, ids in (encoded or {}).items():
        lines += _cut(task, split, ids)
    return lines + [f"warning: {text}" for text in _warnings(task, facts)]


def chat_lines(task: ConversationTask, split: str, notes: ChatNotes) -> list[str]:
    """What was decided about the conversations of `split` as they became token ids."""
    lines = []
    if notes.shortened and not notes.dropped:  # of texts
        lines.append(
            f"{split}: {notes.shortened:,} prompts leave their answers no room within "
            f"`max_tokens` ({task.max_tokens}); their left ends are cut"
        )
    elif notes.shortened:
        lines.append(
            f"{split}: {notes.shortened:,} conversations exceed `max_tokens` ({task.max_tokens}); "
            f"{notes.dropped:,} early messages are left out"
        )
    if notes.unfolded:
        lines.append(
            f"{split}: {notes.unfolded:,} conversations are read once for each answer; the chat "
            "template or the tokenizer writes earlier answers otherwise when others follow"
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


def _labels(task: Task, facts: Facts) -> str:
    counts = facts.labels
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
    if isinstance(task, ConversationTask):  # nothing is cut within a turn (see `chat_lines`)
        return []
    limit, lengths = task.max_input_tokens, Lengths.of(ids)
    lines = []
    inputs = int((lengths.inputs >= limit).sum())
    if inputs:
        lines.append(
            f"{split}: {inputs:,} inputs fill `max_input_tokens` ({limit}); what is beyond is cut"
        )
    if isinstance(task, GenerationTask):
        targets = int((lengths.targets >= task.max_target_tokens).sum())
        if targets:
            lines.append(
                f"{split}: {targets:,} targets fill `max_target_tokens` "
                f"({task.max_target_tokens}); what is beyond is cut"
            )
    return lines


def _warnings(task: Task, facts: Mapping[str, Facts]) -> list[str]:
    known = known_labels(task)
    if not known:
        return []
    seen = {split: found.tags or set(found.labels) for split, found in facts.items()}
    told = []
    absent = [label for label in known if label not in seen["train"]]
    if absent:
        names = ", ".join(f"`{label}`" for label in absent)
        told.append(f"no training row has the label {names}; it cannot be learnt")
    for split in ("validation", "test"):
        if len(seen[split]) == 1 and len(seen["train"]) > 1:
            (only,) = seen[split]
            told.append(
                f"all {split} rows have the label `{only}`; if the file is sorted, leave "
                "`draw: first` out or give the split rows of its own"
            )
    return told
