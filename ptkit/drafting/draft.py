"""A recipe for a data file: the task, the lengths, the metrics and the method that fit it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ptkit.data.chat_formats import recognised
from ptkit.data.chat_template import with_template_read
from ptkit.data.templates import Template
from ptkit.data.tokens import listed
from ptkit.drafting.base_facts import BaseFacts, base_facts
from ptkit.drafting.columns import Column
from ptkit.drafting.files import DraftRows, Source, read_splits
from ptkit.drafting.goal import Chosen, Goal, choose
from ptkit.drafting.label_checks import rare_labels, require_apart_as_written
from ptkit.drafting.label_words import label_words
from ptkit.drafting.lengths import SAMPLED, Lengths, chat_lengths, text_lengths
from ptkit.drafting.metrics_for import label_metrics, text_metrics, word_metrics
from ptkit.drafting.plan import Plan, planned
from ptkit.drafting.written import commented, yaml_with_comments
from ptkit.errors import DataError, RecipeError, UserError
from ptkit.recipe.faults import recipe_faults
from ptkit.recipe.load import LoadedRecipe
from ptkit.recipe.tasks import ChatTask
from ptkit.recipe.yaml_source import parse_yaml
from ptkit.runtime.base_model import Base
from ptkit.training.checked import checked


@dataclass(frozen=True)
class Draft:
    """A recipe that was made for rows, and checked.

    reasons: why it is so, in lines; told: what was decided about the rows, as a run tells it
    """

    loaded: LoadedRecipe
    reasons: tuple[str, ...]
    told: tuple[str, ...]

    @property
    def method(self) -> str:
        """The method to train; the others are for a comparison."""
        return self.loaded.recipe.methods[-1].title


@dataclass(frozen=True)
class _Task:
    """The `task` of a recipe, with what is said of its keys."""

    settings: dict[str, Any]
    comments: dict[str, str]
    lengths: Lengths
    warnings: tuple[str, ...] = ()


def draft_recipe(
    data: Source,
    out: Path | None = None,
    *,
    model: str | Path | Base = "tiny-en",
    goal: Goal = "auto",
    label: str | None = None,
    text: str | Sequence[str] = (),
    target: str | None = None,
    validation: Source | None = None,
    test: Source | None = None,
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
) -> Draft:
    """A recipe that fits the rows of `data`. Nothing is written.

    data: a file (CSV, JSONL, JSON or Parquet) or its folder; or rows of a program. Those are a
        `datasets.Dataset`, a data frame, a list of mappings, or a mapping from splits to these
    out: where the recipe will lie, from which its paths are relative; default: NAME.yaml in the
        current folder
    model: the base, by name or loaded; only its settings and tokenizer are read
    goal, label, text, target: what is to be learnt, where the columns do not tell
    validation, test: rows of the other splits; default: the files that lie beside `data`
    method: kind of the method to train; default: by the number of rows and the base
    settings: keys of that method and of `train`, in place of those that would fit
    overrides: `key.path=value` assignments to the recipe

    Raises DataError for rows that training would refuse, and ModelError for a base that is not
    here. Raises UserError for a method, or a setting of it, that there is not.
    """
    rows = read_splits(data, validation=validation, test=test)
    chosen = choose(rows.train, goal, label=label, text=listed(text), target=target)
    base = base_facts(model if isinstance(model, Base) else str(model))
    name = _name(rows.paths["train"]) if rows.paths else "mine"
    out = out or Path(f"{name}.yaml")
    task = _task(chosen, rows, base, rows.as_written(out.parent))
    kind = task.settings["kind"]
    held_out = len(rows.tables["validation"]) if "validation" in rows.tables else None
    plan = planned(base, kind, len(rows.train), task.lengths, method, settings, held_out)
    reasons = (
        *chosen.reasons, *task.warnings, *_splits_told(rows), task.lengths.told, *plan.reasons
    )  # fmt: skip
    recipe_text = _text(name, out, rows, base, task, plan, reasons)
    source = parse_yaml(recipe_text, str(out))
    for assignment in overrides:
        source.set(assignment)
    recipe, faults = recipe_faults(source)
    if recipe is None:
        raise RecipeError("the recipe that was drafted is not valid:\n" + "\n".join(faults))
    given = None if rows.paths else rows.tables
    loaded = LoadedRecipe(recipe, out.resolve(), recipe_text, given)
    told = checked(loaded, None if base.loaded is None else base.tokenizer)
    return Draft(loaded, reasons, tuple(told))


def _name(data: Path) -> str:
    """A recipe's name from the name of its file; of `train.csv`, from its folder's."""
    stem = data.stem
    if re.fullmatch(r"(train|training|data)", stem, re.IGNORECASE):
        stem = data.resolve().parent.name or stem
    slug = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("-._")
    return slug or "mine"


def _splits_told(rows: DraftRows) -> list[str]:
    told = [
        f"`{rows.paths[split].name}` lies beside the file and is the {split} split"
        for split in rows.found if rows.paths
    ]  # fmt: skip
    if "test" not in rows.tables:
        told.append(
            "there is no test file, so the validation rows are scored, which also choose the "
            "checkpoint; rows of their own (`test:`) give an honest score"
        )
    return told


def _task(chosen: Chosen, rows: DraftRows, base: BaseFacts, data: dict[str, Any]) -> _Task:
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
    if chosen.goal == "classification":
        return _classification(chosen, rows, base, data)
    return _generation(chosen, rows, base, data)


def _classification(
    chosen: Chosen, rows: DraftRows, base: BaseFacts, data: dict[str, Any]
) -> _Task:
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
    return _Task(settings, comments, lengths, (*rare_labels(counts), *_empty(chosen, rows)))


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


def _tagging(chosen: Chosen, rows: DraftRows, base: BaseFacts, data: dict[str, Any]) -> _Task:
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
    return _Task(settings, {
        "task.kind": f"{kind}.",
        "task.words": "Column with the list of words.",
        "task.tags": "Column with the list of their labels.",
        "task.max_input_tokens": f"{_capital(lengths.told)}.",
        "task.metrics": f"The first is the score: {why}.",
    }, lengths)  # fmt: skip


def _generation(chosen: Chosen, rows: DraftRows, base: BaseFacts, data: dict[str, Any]) -> _Task:
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
    return _Task(settings, {
        "task.kind": "The model writes the target after the input.",
        "task.input": _INPUT,
        "task.target": "Template of what the model learns to write.",
        "task.references": "Column with the list of acceptable texts of each row.",
        "task.max_input_tokens": f"{_capital(lengths.told)}.",
        "task.max_target_tokens": "Targets, and answers, end after this many tokens.",
        "task.metrics": f"The first is the score: {why}.",
    }, lengths, _empty(chosen, rows))  # fmt: skip


def _chat(chosen: Chosen, rows: DraftRows, base: BaseFacts, data: dict[str, Any]) -> _Task:
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
    placed = form.dialogues(rows.train, "train")
    dialogues = [dialogue for _, dialogue in islice(placed, SAMPLED)]
    lengths = chat_lengths(dialogues, base.tokenizer, task, _room(base))
    settings |= {"max_tokens": lengths.input, "max_target_tokens": lengths.target,
                 "metrics": ["chrf", "perplexity"]}  # fmt: skip
    return _Task(settings, {
        "task.kind": "The model answers in conversations, in its chat template.",
        "task.format": f"Recognised as {form}.",
        "task.chat_template": "The model has no chat template of its own; `plain` fits every base.",
        "task.references": "Column with the list of acceptable last answers.",
        "task.max_tokens": f"{_capital(lengths.told)}.",
        "task.max_target_tokens": "Answers end after this many tokens.",
        "task.metrics": "The first is the score; `perplexity` is that of all answers.",
    }, lengths)  # fmt: skip


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


def _text(
    name: str,
    out: Path,
    rows: DraftRows,
    base: BaseFacts,
    task: _Task,
    plan: Plan,
    reasons: Sequence[str],
) -> str:
    head = [f"Made for {rows.title} by `ptkit init`. Every line may be changed.", ""]
    for what, command in (
        ("check", "recipes validate"),
        ("train", "train"),
        ("compare", "compare"),
    ):
        head.append(f"  {what + ':':<10}ptkit {command} {out.name}")
    head.append("")
    if not rows.paths:
        head = ["Made for rows of a program, which hands them over again: `dataset=`.", ""]
    head += ["Why it is so:", *(f"  - {reason}" for reason in reasons)]
    values = {
        "name": name, "description": f"Drafted from {rows.title}.", "model": base.section,
        "task": task.settings, "methods": plan.methods, "seeds": [0], "train": plan.train,
    }  # fmt: skip
    comments = {
        "name": "Names the output folder runs/NAME.",
        "model": "The frozen base model: a Hub id, a folder, a GGUF file or a name of ptkit's.",
        "task": "What is learnt, from which data.",
        "task.data": "CSV, JSONL, JSON or Parquet; paths start at this file's folder."
        if rows.paths else "The rows are in memory.",
        "seeds": "One run per method and seed; three or more show the spread.",
        **task.comments, **plan.comments,
    }  # fmt: skip
    return (
        "\n".join(line for part in head for line in commented(part))
        + "\n\n"
        + (yaml_with_comments(values, comments))
    )
