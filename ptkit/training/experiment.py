"""Everything the cells of one recipe share: base, data, and the base's own measurements."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import torch

from ptkit.data.chat_template import ChatTemplate, with_template_read
from ptkit.data.dialogue import Dialogue
from ptkit.data.encoded import EncodedExample
from ptkit.data.examples import Example
from ptkit.data.general_text import GENERAL_EN, general_texts
from ptkit.data.lazy import picked
from ptkit.data.leaks import require_unlearnt, texts_of
from ptkit.data.summary import chat_lines, data_lines
from ptkit.data.task import TaskData, load_task
from ptkit.data.token_cache import encode_cached, encode_conversations
from ptkit.errors import ModelError, UserError
from ptkit.evaluation.retention import GeneralProbe, off_probe, probe_base
from ptkit.evaluation.score import require_metrics
from ptkit.launched import require_supported_launch
from ptkit.metrics.registry import metric
from ptkit.recipe.load import LoadedRecipe
from ptkit.recipe.schema import Recipe
from ptkit.recipe.tasks import ConversationTask, HeadedTask, Task, TokenClassificationTask
from ptkit.runtime.architecture import HeadKind
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.devices import resolve_device
from ptkit.runtime.forward import require_embedded
from ptkit.runtime.heads import Labels
from ptkit.training.own_recipe import found_from_here
from ptkit.training.processes import DataParallel, processes
from ptkit.training.retain import general_windows


@dataclass(frozen=True)
class TrainingRows:
    """The rows a cell is trained on, as text and as token ids, in one order."""

    examples: Sequence[Example]
    encoded: Sequence[EncodedExample]


@dataclass(frozen=True)
class Experiment:
    """A recipe made ready to run.

    rows: of the training split; the cells of a seed take `training(seed)` of them
    test: the test rows as token ids
    general: the base's own results on general text; None when retention is not measured
    probe: the base's logits on `probe_ids` `[1, tokens]`, before anything was attached to it
    chat_told: what was decided about conversations, in lines
    folder: where the recipe's relative paths start
    """

    recipe: Recipe
    base: Base
    data: TaskData
    rows: TrainingRows
    validation: Sequence[EncodedExample]
    test: Sequence[EncodedExample]
    general: GeneralProbe | None
    probe_ids: torch.Tensor
    probe: torch.Tensor
    folder: Path = Path()
    chat_told: tuple[str, ...] = ()

    @cached_property
    def parallel(self) -> DataParallel:
        """Which rows this process reads, where the run has several."""
        return DataParallel.of(self.base)

    @cached_property
    def retain_windows(self) -> torch.Tensor | None:
        """General text for `train.retain`, `[pieces, tokens]`; the base may have to write it.

        Raises UserError for text that cannot be had.
        """
        retain = self.recipe.train.retain
        if retain is None:
            return None
        return general_windows(retain, self.recipe.retention, self.base, self.folder)

    @property
    def chat_template(self) -> ChatTemplate | None:
        """What the rows' conversations are written in; None where they are no conversations."""
        task = self.recipe.task
        if not isinstance(task, ConversationTask) or self.data.train[0].dialogue is None:
            return None
        return ChatTemplate.of_task(self.base.tokenizer, task)

    def training(self, seed: int) -> TrainingRows:
        """The training rows of the cells with `seed`: all, or a random draw (`task.data.draw`)."""
        data = self.recipe.task.data
        if data.draw != "seed":
            return self.rows
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.rows.examples), generator=generator).numpy()
        drawn = order[: data.limits.train]
        return TrainingRows(picked(self.rows.examples, drawn), picked(self.rows.encoded, drawn))

    def data_lines(self) -> list[str]:
        """What was decided about the data (see `ptkit.data.summary`), and about the head of a
        checkpoint that has labels of its own."""
        encoded = {"train": self.rows.encoded, "validation": self.validation}
        head = self.base.head
        told = [head.told] if head is not None and head.told else []
        return data_lines(self.recipe.task, self.data, encoded) + list(self.chat_told) + told

    def data_fingerprint(self, seed: int) -> str:
        """16 hex digits over the training and validation rows of `seed` as token ids. Where a chat
        template writes the day into them, they are over the conversations."""
        if self.recipe.task.data.draw != "seed":
            return self.rows_fingerprint()  # whatever the seed, the rows are the same
        return self._fingerprint(self.training(seed))

    def rows_fingerprint(self) -> str:
        """The same over all training and validation rows, which every seed draws from."""
        return self._all_rows

    @cached_property
    def _all_rows(self) -> str:
        return self._fingerprint(self.rows)

    def _fingerprint(self, rows: TrainingRows) -> str:
        template = self.chat_template
        if template is not None and template.dated:  # a run may end on another day
            return _of_conversations(chain(rows.examples, self.data.validation))
        return _of_rows(chain(rows.encoded, self.validation))

    def metric_signatures(self) -> dict[str, str]:
        """Metric -> library, version and settings, of your own function its source."""
        references = [example.references for example in self.data.test]
        return {name: metric(name).signature(references) for name in self.recipe.task.metrics}

    def test_fingerprint(self) -> str:
        """16 hex digits over all that the test rows are: inputs, targets, references, labels."""
        digest = hashlib.sha256()
        for row in self.data.test:
            told = (row.input, row.target, row.references, row.label, row.words)
            digest.update(repr(told).encode())
            if row.rejected is not None:
                digest.update(repr(row.rejected.target).encode())
            for own in _dialogues(row):  # tools are not in the text
                digest.update(repr((own.messages, own.tools)).encode())
        return digest.hexdigest()[:16]

    def retention_fingerprint(self) -> str | None:
        """16 hex digits over the windows of general text that retention is measured on, as token
        ids; None when it is not measured."""
        if self.general is None:
            return None
        digest = hashlib.sha256()
        for name, windows in self.general.windows.items():
            digest.update(repr((name, windows.tolist())).encode())
        return digest.hexdigest()[:16]

    def retain_fingerprint(self) -> str | None:
        """The same over the general text that training reads (`train.retain`)."""
        if self.retain_windows is None:
            return None
        return hashlib.sha256(repr(self.retain_windows.tolist()).encode()).hexdigest()[:16]


def _of_rows(rows: Iterable[EncodedExample]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row.content).encode())
    return digest.hexdigest()[:16]


def _of_conversations(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        told = [(own.messages, own.tools, own.learnt) for own in _dialogues(example)]
        digest.update(repr(told).encode())
    return digest.hexdigest()[:16]


def _dialogues(example: Example) -> list[Dialogue]:
    """The conversation of an example, and that with its rejected answer, as far as it has them."""
    both = (example, example.rejected)
    return [own.dialogue for own in both if own is not None and own.dialogue is not None]


def _require_same_labels(base: Base, labels: Labels | None) -> None:
    """Raise UserError where `base`, loaded for something else, has not the head a task needs."""
    here = None if base.head is None else Labels(base.head.kind, base.head.labels)
    if here != labels:

        def told(found: Labels | None) -> str:
            if found is None:
                return "a language model"
            return f"a {found.kind} classifier of {', '.join(found.names)}"

        raise UserError(f"{base.id} is loaded as {told(here)}, the recipe needs {told(labels)}")


def _labels(task: Task) -> Labels | None:
    """What a classification head is asked for in `task`; None for one that is solved in words."""
    if not isinstance(task, HeadedTask):
        return None
    kind: HeadKind = "token" if isinstance(task, TokenClassificationTask) else "sequence"
    return Labels(kind, tuple(task.labels))


def read_data(loaded: LoadedRecipe) -> tuple[LoadedRecipe, TaskData, dict[str, str] | None]:
    """All that a run reads before its base: the recipe with its chat template read, the rows, and
    the general text, if any. Raises UserError for what a run would refuse of these."""
    loaded = _with_chat_template(found_from_here(loaded))
    recipe, retention = loaded.recipe, loaded.recipe.retention
    require_supported_launch()
    for tracker in recipe.train.report_to:  # accelerate would go on without it
        if find_spec(tracker) is None:
            raise UserError(
                f"`train.report_to` names `{tracker}`, but `{tracker}` is not installed; "
                f"`pip install {tracker}`"
            )
    for name in recipe.task.metrics:  # your own function, say: it should not fail after training
        metric(name)
    data = load_task(recipe.task, loaded.folder, loaded.given)
    require_metrics(recipe.task.metrics, [example.references for example in data.test])
    texts = general_texts(retention.text, loaded.folder) if retention else None
    _require_unlearnt(recipe, texts, data, loaded.folder)
    return loaded, data, texts


def prepare(loaded: LoadedRecipe, base: Base | None = None) -> Experiment:
    """Load the data, then the base (or use the given one), and measure the base on its own.

    The data comes first: a mistake in it should show before a large model is loaded.
    """
    loaded, data, texts = read_data(loaded)
    recipe, retention = loaded.recipe, loaded.recipe.retention
    labels = _labels(recipe.task)
    if base is None:
        processes(resolve_device(recipe.model.device))  # a split base needs all of them
        base = load_base(**recipe.model.model_dump(), labels=labels)
    _require_same_labels(base, labels)
    general = None
    if texts is not None and retention is not None:
        general = probe_base(base, texts, retention.max_tokens, DataParallel.of(base).map)
    encode = partial(
        encode_cached, tokenizer=base.tokenizer, task=recipe.task, pairs=base.encoder_decoder
    )
    told: list[str] = []
    training: TrainingRows
    validation: Sequence[EncodedExample]
    if isinstance(recipe.task, ConversationTask):
        training, validation = _conversation_rows(base, recipe.task, data, told)
    else:
        training = TrainingRows(data.train, encode(data.train))
        validation = encode(data.validation)
    test = encode(data.test)
    rows = chain(training.encoded, validation, test)
    require_embedded(base, rows, recipe.task)
    probe_ids = torch.tensor([test[0].input_ids]) if general is None else general.drift_windows[:1]
    return Experiment(
        recipe,
        base,
        data,
        training,
        validation,
        test,
        general,
        probe_ids,
        off_probe(base.model, probe_ids),
        loaded.folder,
        tuple(told),
    )


def _require_unlearnt(
    recipe: Recipe, measured: dict[str, str] | None, data: TaskData, folder: Path
) -> None:
    """Raise DataError where text that forgetting is measured on is learnt from."""
    if measured is not None:
        require_unlearnt(measured, texts_of(data.train), "the training rows")
    retain = recipe.train.retain
    if retain is not None and retain.text is not None and retain.text != GENERAL_EN:
        texts = general_texts(retain.text, folder)
        ships = general_texts(GENERAL_EN, folder)
        require_unlearnt({**ships, **(measured or {})}, texts.values(), "`train.retain.text`")


def _with_chat_template(loaded: LoadedRecipe) -> LoadedRecipe:
    """`loaded` with the text of the file that its `task.chat_template` names."""
    task = loaded.recipe.task
    if not isinstance(task, ConversationTask):
        return loaded
    read = with_template_read(task, loaded.folder)
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"task": read}))


def _conversation_rows(
    base: Base, task: ConversationTask, data: TaskData, told: list[str]
) -> tuple[TrainingRows, Sequence[EncodedExample]]:
    """The conversations, or pairs, of the training and validation splits as rows; adds to `told`
    what was decided. Raises ModelError for an encoder-decoder."""
    if base.encoder_decoder:
        kind = getattr(task, "kind", "")
        raise ModelError(
            f"{base.id} is an encoder-decoder: it writes one target after one input; a task of "
            f"`kind: {kind}` needs a causal model"
        )
    train, validation = (
        encode_conversations(part, base.tokenizer, task) for part in (data.train, data.validation)
    )
    for split, rows in (("train", train), ("validation", validation)):
        told += chat_lines(task, split, rows.notes)
    return TrainingRows(train.examples, train.encoded), validation.encoded
