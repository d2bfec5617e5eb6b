"""The task of a draft: its keys, why they are so, and how long its rows are."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ptkit.data.chat_formats import recognised
from ptkit.data.chat_template import with_template_read
from ptkit.data.dialogue import Dialogue
from ptkit.data.pair_formats import pair_format
from ptkit.data.task import pair_examples
from ptkit.data.templates import Template
from ptkit.drafting.base_facts import BaseFacts
from ptkit.drafting.columns import Column
from ptkit.drafting.files import DraftRows
from ptkit.drafting.goal import Chosen
from ptkit.drafting.label_checks import rare_labels, require_apart_as_written
from ptkit.drafting.label_words import label_words
from ptkit.drafting.lengths import SAMPLED, Lengths, chat_lengths, pair_lengths, text_lengths
from ptkit.drafting.metrics_for import label_metrics, text_metrics, word_metrics
from ptkit.errors import DataError, UserError
from ptkit.recipe.tasks import ChatTask, PreferenceTask


@dataclass(frozen=True)
class DraftTask:
    """The `task` of a recipe, with what is said of its keys."""

    settings: dict[str, Any]
    comments: dict[str, str]
    lengths: Lengths
    warnings: tuple[str, ...] = ()


def drafted_task(
    chosen: Chosen, rows: DraftRows, base: BaseFacts, data: dict[str, Any]
) -> DraftTask:
    """The task that teaches what was chosen of `rows`. data: `task.data` of the recipe

    Raises DataError for rows that it cannot be made of, and UserError for a base that cannot learn
    it.
    """
    if chosen.goal == "token_classification":
        return _tagging(chosen, rows, base, data)
    if chosen.goal != "classification" and base.kind == "encoder":
        raise UserError(
            f"`{base.id}` is an encoder, which writes no text; choose a model that does, or name "
            "a column of labels (`--label`)"
        )
    if chosen.goal == "chat":
        if base.kind == "encoder_decoder":
            raise UserError(f"`{base.id}` is an encoder-decoder; conversations need a causal model")
        return _chat(chosen, rows, base, data)
    if chosen.goal == "preference":
        if base.kind == "encoder_decoder":
            raise UserError(f"`{base.id}` is an encoder-decoder; pairs need a causal model")
        return _preference(chosen, rows, base, data)
    if chosen.goal == "classification":
        return _classification(chosen, rows, base, data)
    return _generation(chosen, rows, base, data)


def _classification(
    chosen: Chosen, rows: DraftRows, base: BaseFacts, data: dict[str, Any]
) -> DraftTask:
    assert chosen.target is not None
    label = chosen.target.name
    tables = rows.tables.values()
    counts = Counter(str(row[label]) for table in tables if label in table.columns
                     for row in table.only([label]) if row[label] not in (None, ""))  # fmt: skip
    called = {rows.called(split): table for split, table in rows.tables.items()}
    require_apart_as_written(counts, label, called)
    labels = sorted(counts)
    metrics, why = label_metrics([*counts.values()])
    headed = base.kind == "encoder"
    pattern = _frame(chosen.inputs, "" if headed else f"\n{_spoken(label)}:")
    inputs = _rendered(pattern, rows)
    settings: dict[str, Any] = {
        "kind": "sequence_classification" if headed else "classification",
        "data": data, "input": pattern, "label": label,
    }  # fmt: skip
    comments = {"task.input": _INPUT, "task.label": "Column with the label.",
                "task.metrics": f"The first is the score: {why}."}  # fmt: skip
    if headed:
        spaced = next((name for name in labels if re.search(r"\s", name)), None)
        if spaced is not None:
            raise DataError(
                f"the label `{spaced}` has a space, which labels of an encoder's head cannot "
                "have; write it in one word in the file"
            )
        settings["labels"] = labels
        targets = [""] * len(inputs)
        comments["task.kind"] = "The base is an encoder: a head that is trained chooses the label."
    else:
        words, why = label_words(labels, base.tokenizer)
        settings["verbalizer"] = words
        targets = [*words.values()]
        comments["task.kind"] = "The model chooses the label whose words are likeliest."
        comments["task.verbalizer"] = (
            f"Label -> the words that stand for it after the input: {why}. Other words may be "
            "better, if they fit the sentence."
        )
    lengths = text_lengths(inputs, targets, base.tokenizer, _room(base))
    settings |= {"max_input_tokens": lengths.input, "metrics": metrics}
    comments["task.max_input_tokens"] = f"{_capital(lengths.told)}."
    return DraftTask(settings, comments, lengths, (*rare_labels(counts), *_empty(chosen, rows)))


def _empty(chosen: Chosen, rows: DraftRows) -> tuple[str, ...]:
    """A line about training rows whose texts to read are all empty; none without any."""
    names = [column.name for column in chosen.inputs]
    empty = sum(
        not any(str(row[name] or "").strip() for name in names) for row in rows.train.only(names)
    )
    if not empty:
        return ()
    what = "1 training row has" if empty == 1 else f"{empty:,} training rows have"
    return (f"warning: {what} nothing to read in {', '.join(f'`{n}`' for n in names)}",)


def _tagging(chosen: Chosen, rows: DraftRows, base: BaseFacts, data: dict[str, Any]) -> DraftTask:
    if base.kind == "encoder_decoder":
        raise UserError(f"`{base.id}` is an encoder-decoder; labels of words need another base")
    assert chosen.target is not None
    words, tags = chosen.inputs[0].name, chosen.target.name
    tables = [table for table in rows.tables.values() if tags in table.columns]
    labels = sorted({str(tag) for table in tables for row in table.only([tags])
                     for tag in row[tags] or ()})  # fmt: skip
    metrics, why = word_metrics(labels)
    texts = [" ".join(row[words] or ()) for row in islice(rows.train.only([words]), SAMPLED)]
    lengths = text_lengths(texts, [""], base.tokenizer, _room(base))
    settings: dict[str, Any] = {
        "kind": "token_classification", "data": data, "words": words, "tags": tags,
        "labels": labels, "max_input_tokens": lengths.input, "metrics": metrics,
    }  # fmt: skip
    kind = "A head that is trained chooses a label for each word"
    if base.kind == "decoder":
        kind += ". This base reads from left to right: an encoder (`minilm-l6`) sees both sides"
    return DraftTask(settings, {
        "task.kind": f"{kind}.",
        "task.words": "Column with the list of words.",
        "task.tags": "Column with the list of their labels.",
        "task.max_input_tokens": f"{_capital(lengths.told)}.",
        "task.metrics": f"The first is the score: {why}.",
    }, lengths)  # fmt: skip


def _generation(
    chosen: Chosen, rows: DraftRows, base: BaseFacts, data: dict[str, Any]
) -> DraftTask:
    if chosen.in_list:
        assert chosen.references is not None
        learnt = f"{{{chosen.references.name}[0]}}"
    else:
        assert chosen.target is not None
        learnt = f"{{{chosen.target.name}}}"
    named = chosen.target or chosen.references
    assert named is not None
    several = len(chosen.inputs) > 1
    pattern = _frame(chosen.inputs, f"\n{_spoken(named.name)}:" if several else "\n")
    target = f" {learnt}" if several else learnt
    written = _rendered(target, rows)
    metrics, why = text_metrics(written, named.name)
    lengths = text_lengths(_rendered(pattern, rows), written, base.tokenizer, _room(base))
    settings: dict[str, Any] = {
        "kind": "generation", "data": data, "input": pattern, "target": target,
    }  # fmt: skip
    if chosen.references is not None:
        settings["references"] = chosen.references.name
    settings |= {"max_input_tokens": lengths.input, "max_target_tokens": lengths.target,
                 "metrics": metrics}  # fmt: skip
    return DraftTask(settings, {
        "task.kind": "The model writes the target after the input.",
        "task.input": _INPUT,
        "task.target": "Template of what the model learns to write.",
        "task.references": "Column with the list of acceptable texts of each row.",
        "task.max_input_tokens": f"{_capital(lengths.told)}.",
        "task.max_target_tokens": "Targets, and answers, end after this many tokens.",
        "task.metrics": f"The first is the score: {why}.",
    }, lengths, _empty(chosen, rows))  # fmt: skip


def _chat(chosen: Chosen, rows: DraftRows, base: BaseFacts, data: dict[str, Any]) -> DraftTask:
    settings: dict[str, Any] = {"kind": "chat", "data": data}
    asked = ChatTask.model_validate(settings)
    form = recognised(asked, rows.train)
    settings["format"] = form.name
    if form.column is not None:
        settings["column"] = form.column
    if chosen.references is not None:
        settings["references"] = chosen.references.name
    own = getattr(base.tokenizer, "chat_template", None) is not None
    if not own:
        settings["chat_template"] = "plain"
    task = with_template_read(ChatTask.model_validate(settings), Path())
    dialogues = [
        dialogue
        for split, table in rows.tables.items()
        for dialogue in _measured(d for _, d in form.dialogues(table, rows.called(split)))
    ]
    lengths = chat_lengths(dialogues, base.tokenizer, task, _room(base))
    settings |= {"max_tokens": lengths.input, "max_target_tokens": lengths.target,
                 "metrics": ["chrf", "perplexity"]}  # fmt: skip
    return DraftTask(settings, {
        "task.kind": "The model answers in conversations, in its chat template.",
        "task.format": f"Recognised as {form}.",
        "task.chat_template": "The model has no chat template of its own; `plain` fits every base.",
        "task.references": "Column with the list of acceptable last answers.",
        "task.max_tokens": f"{_capital(lengths.told)}.",
        "task.max_target_tokens": "Answers end after this many tokens.",
        "task.metrics": "The first is the score; `perplexity` is that of all answers.",
    }, lengths)  # fmt: skip


#: Conversations beyond the sampled ones that are tokenised too.
_LONGEST = 50


def _measured(dialogues: Iterator[Dialogue]) -> list[Dialogue]:
    """The first conversations, and of the others the longest: a short limit would refuse them."""
    first = [*islice(dialogues, SAMPLED)]
    return first + heapq.nlargest(
        _LONGEST, dialogues, key=lambda d: sum(len(str(m["content"])) for m in d.messages)
    )


def _preference(
    chosen: Chosen, rows: DraftRows, base: BaseFacts, data: dict[str, Any]
) -> DraftTask:
    assert chosen.target is not None
    assert chosen.rejected is not None
    settings: dict[str, Any] = {"kind": "preference", "data": data}
    if chosen.inputs:
        own, other = (f"{{{column.name}}}" for column in (chosen.target, chosen.rejected))
        pattern, space = _frame(chosen.inputs, ""), ""
        if len(chosen.inputs) > 1:
            pattern, space = pattern + "\nAnswer:", " "
        elif not _parted(pattern, own, rows):
            pattern += "\n"
        settings |= {"input": pattern, "chosen": space + own, "rejected": space + other}
    elif getattr(base.tokenizer, "chat_template", None) is None:
        settings["chat_template"] = "plain"
    task = with_template_read(PreferenceTask.model_validate(settings), Path())
    called = rows.called("train")
    pairs = pair_examples(task, pair_format(task, rows.train), rows.train, called)
    lengths = pair_lengths([*islice(pairs, SAMPLED)], base.tokenizer, task, _room(base))
    settings["max_tokens"] = lengths.input
    return DraftTask(settings, {
        "task.kind": "The model learns which of two answers is preferred; the base is the "
        "reference.",
        "task.input": _INPUT,
        "task.chosen": "Template of the preferred answer.",
        "task.rejected": "Template of the other answer.",
        "task.chat_template": "The model has no chat template of its own; `plain` fits every base.",
        "task.max_tokens": f"{_capital(lengths.told)}.",
    }, lengths)  # fmt: skip


def _parted(prompt: str, answer: str, rows: DraftRows) -> bool:
    """Whether white space parts prompts and answers already."""
    both = zip(_rendered(prompt, rows), _rendered(answer, rows), strict=True)
    return all(before[-1:].isspace() or after[:1].isspace() for before, after in both)


_INPUT = "Template of what the model reads, with the columns in braces."
#: Virtual tokens that may stand before a text.
_VIRTUAL = 20


def _room(base: BaseFacts) -> int | None:
    return None if base.positions is None else base.positions - _VIRTUAL


def _frame(inputs: Sequence[Column], end: str) -> str:
    """The template of the inputs: one column as it is, several with their names."""
    if len(inputs) == 1:
        return f"{{{inputs[0].name}}}{end}"
    return "\n".join(f"{_spoken(c.name)}: {{{c.name}}}" for c in inputs) + end


def _spoken(name: str) -> str:
    """A column's name as a word before a colon."""
    return _capital(re.sub(r"[_\W]+", " ", name).strip()) or "Answer"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _rendered(pattern: str, rows: DraftRows) -> list[str]:
    """The first rows in the template. Raises DataError for values without a text."""
    template, table = Template(pattern), rows.train
    template.require(table)
    return [
        template.render(row, f"{rows.called('train')}, row {number}")
        for number, row in islice(table.only(template.columns_of(table)).placed(), SAMPLED)
    ]
