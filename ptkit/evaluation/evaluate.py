"""Evaluating what is on disk: an exported adapter, a run's folder, a fully fine-tuned model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptkit.data.chat_template import ChatTemplate
from ptkit.data.lazy import Mapped
from ptkit.data.templates import filled
from ptkit.errors import UserError
from ptkit.evaluation.predict import predict
from ptkit.evaluation.prediction import Prediction
from ptkit.evaluation.retention import Retention, measure_retention
from ptkit.evaluation.score import score_intervals
from ptkit.formats.adapter_files import read_adapter
from ptkit.formats.adapter_folder import read_info
from ptkit.formats.adapter_info import ChatInfo
from ptkit.formats.figures import scored_rows
from ptkit.formats.places import find_adapter
from ptkit.methods import (
    ADAPTERS,
    Adapter,
    Demonstrations,
    base_of,
    create_adapter,
    load_adapter,
)
from ptkit.methods.head import labels_of_files
from ptkit.recipe.tasks import ConversationTask
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.model_names import TINY_EN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ptkit.data.examples import Example
    from ptkit.evaluation.statistics import Interval
    from ptkit.training.experiment import Experiment


def fill_template(
    text: str, adapter: Path | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> str:
    """`text` in the input template the adapter was trained with, if that has one column.

    tokenizer: puts `text` as one question into the chat template of an adapter that was trained on
        conversations; None where a conversation does that
    """
    chat = None if adapter is None else read_info(adapter).chat
    if chat is not None and tokenizer is not None:
        return ChatTemplate.of_record(tokenizer, chat).asked(text)
    return filled(input_template(adapter), text)


def input_template(adapter: Path | None) -> str | None:
    """The template of the inputs that an adapter was trained with; None where none is known."""
    if adapter is None:
        return None
    return read_info(adapter).template


@dataclass(frozen=True)
class Evaluation:
    """Scores of one adapter, each with its 95 % interval over the test rows.

    test_split: the source's name of the split these are from
    test_chose: they are the validation rows, which choose the checkpoint
    test_repeats: another split -> how many of them it has, too
    """

    name: str
    metrics: dict[str, Interval]
    predictions: list[Prediction]
    retention: Retention | None
    test_split: str = "test"
    test_chose: bool = False
    test_repeats: dict[str, int] = field(default_factory=dict)

    @property
    def rows_scored(self) -> str:
        """What the rows are that the scores are on, in words that follow a number."""
        return scored_rows(self.test_split, self.test_chose, self.test_repeats)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "adapter": self.name,
            "n": len(self.predictions),
            "test_split": self.test_split,
            "test_chose": self.test_chose,
            "test_repeats": self.test_repeats,
            "metrics": {name: i.recorded.model_dump() for name, i in self.metrics.items()},
            "retention": None if self.retention is None else self.retention.as_dict(),
        }


@contextmanager
def adapter_at(place: Path | None, model: str | None, base: Base | None) -> Iterator[Adapter]:
    """The adapter in `place` (None: no adapter) on its base while the context lasts.

    model: id of the base; default: the one the adapter names, `tiny-en` without one
    base: a loaded base to use where it is the right one
    """
    path = None if place is None else find_adapter(place)
    files = read_adapter(path) if path else None
    named = model or (files.base_id if files else None) or TINY_EN
    labels = labels_of_files(files) if files else None
    if base is None or base.id != named or (base.head is None) != (labels is None):
        if files is None or files.base_id is None:
            base = load_base(named, labels=labels)
        else:
            base = base_of(files, model, str(place))
    adapter = _on_base(path, base, chosen=model is not None)
    try:
        yield adapter
    finally:
        adapter.close()


def _on_base(path: Path | None, base: Base, *, chosen: bool = False) -> Adapter:
    """The adapter in the folder `path`, or none at all, on `base` (chosen: by the user for it)."""
    if path is not None:
        return load_adapter(path, base, chosen=chosen)
    section = ADAPTERS["base"].section_class(kind="base")
    return create_adapter(section, base, Demonstrations((), 0))


def asked_alike(adapters: Sequence[Path]) -> ChatInfo | None:
    """How all of `adapters` are asked in conversations; None where none of them says.

    Raises UserError where they are asked in different ways: nothing stands beside all of them.
    """
    chats = [read_info(find_adapter(path)).chat for path in adapters]
    for path, chat in zip(adapters, chats, strict=True):
        if chat != chats[0]:
            raise UserError(
                f"{adapters[0]} and {path} were trained in different chat templates or with "
                "different system prompts, so no one answer of the base stands beside both; score "
                "them one at a time, or without the base (--no-base)"
            )
    return chats[0] if chats else None


def evaluate_saved(
    experiment: Experiment, path: Path | None, *, chat: ChatInfo | None = None
) -> Evaluation:
    """Predict and score the experiment's test rows with the adapter in `path` (None: the base).

    chat: how the base is asked in conversations; an adapter is asked as in its training
    """
    folder = None if path is None else find_adapter(path)
    chat = chat if folder is None else read_info(folder).chat
    experiment = _in_own_template(experiment, chat, "base" if path is None else str(path))
    adapter = _on_base(folder, experiment.base)
    try:
        return evaluate(experiment, adapter, str(path) if path else "base")
    finally:
        adapter.close()


def _in_own_template(experiment: Experiment, chat: ChatInfo | None, name: str) -> Experiment:
    """The experiment with its conversations in the template and with the system prompt that an
    adapter was trained with. Raises UserError where the recipe has another system prompt."""
    recipe, data = experiment.recipe, experiment.data
    task = recipe.task
    if chat is None or not isinstance(task, ConversationTask):
        return experiment
    if task.system is not None and task.system != chat.system:
        raise UserError(
            f"{name} was trained with the system prompt {chat.system!r}, the recipe has "
            f"{task.system!r}: leave `task.system` out (--set task.system=null)"
        )
    system = chat.system
    asked = task.model_copy(update={"chat_template": chat.template, "system": system})

    def with_system(rows: Sequence[Example]) -> Sequence[Example]:
        return Mapped(lambda row: row.with_system(system), rows)

    # All splits, because it is told how many rows of one stand in another.
    data = replace(
        data,
        train=with_system(data.train),
        validation=with_system(data.validation),
        test=with_system(data.test),
    )
    return replace(experiment, recipe=recipe.model_copy(update={"task": asked}), data=data)


def evaluate(experiment: Experiment, adapter: Adapter, name: str) -> Evaluation:
    """Predict and score the experiment's test rows with `adapter`; `name` is what it is called.

    The processes of a run do a part each; all of them have the result.
    """
    recipe, share = experiment.recipe, experiment.parallel.map

    def predicted(rows: Sequence[Example]) -> list[Prediction]:
        return predict(adapter, rows, recipe.task, recipe.evaluate.batch_size)

    rows = share(experiment.data.test, predicted)
    retention = None
    if experiment.general is not None:
        retention = measure_retention(adapter, experiment.general, share)
    scored = score_intervals(rows, recipe.task.metrics, recipe.evaluate.bootstrap)
    data = experiment.data
    return Evaluation(
        name, scored, rows, retention, data.test_split, data.test_chose, data.test_repeats
    )
