"""Labels for new text from a saved adapter, whether it answers with a head or in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter, ValidationError

from ptkit.data.encode import encode_examples
from ptkit.data.encoded import EncodedExample
from ptkit.data.examples import Example
from ptkit.data.templates import filled
from ptkit.data.tokens import listed
from ptkit.errors import AdapterError, UserError
from ptkit.evaluation.predict import label_scores, require_room, word_labels
from ptkit.formats.adapter_files import AdapterFiles, read_adapter
from ptkit.formats.places import find_adapter
from ptkit.methods import Adapter, adapter_from_files, base_of, require_same_base
from ptkit.methods.head import labels_of_files
from ptkit.recipe.tasks import (
    ClassificationTask,
    SequenceClassificationTask,
    Task,
    TokenClassificationTask,
)
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import require_embedded

#: Rows read at a time.
ROWS = 32


class Classifier:
    """An adapter and the labels it was trained to choose among.

    Raises AdapterError for an adapter that was trained to write.
    """

    def __init__(self, adapter: Adapter, files: AdapterFiles, where: str) -> None:
        self.adapter = adapter
        self.task = _task_of(files, where)
        compiled = adapter.compiled()
        self._compiled = None if compiled is None else compiled.detach()

    @property
    def labels(self) -> list[str]:
        """What it chooses among."""
        if isinstance(self.task, ClassificationTask):
            return list(self.task.verbalizer)
        return list(self.task.labels)

    @property
    def of_words(self) -> bool:
        """Whether every word gets a label of its own."""
        return isinstance(self.task, TokenClassificationTask)

    def probabilities(
        self, texts: str | Sequence[str], *, raw: bool = False
    ) -> list[dict[str, float]]:
        """For every text the probability of each label.

        raw: the texts stand in the adapter's template already
        """
        if isinstance(self.task, TokenClassificationTask):
            raise AdapterError("this adapter labels words; use `words`")
        texts = listed(texts)
        template = None if raw else self.task.input
        first = self.labels[0]
        examples = [Example(filled(template, text), first, (first,), first) for text in texts]
        found = []
        for part in _parts(examples):
            rows = self._encoded(part)
            for row in label_scores(self.adapter, rows, self._compiled, self.task):
                shares = torch.tensor([*row.values()]).softmax(-1).tolist()
                found.append(dict(zip(row, shares, strict=True)))
        return found

    def words(self, sentences: Sequence[Sequence[str]]) -> list[list[str]]:
        """For every sentence, given as its words, the label of each word. Raises UserError for
        sentences that are not lists of words."""
        if not isinstance(self.task, TokenClassificationTask):
            raise AdapterError("this adapter labels whole texts; use `probabilities`")
        if isinstance(sentences, str) or any(isinstance(words, str) for words in sentences):
            raise UserError(
                "`words` takes sentences, each a list of its words: [text.split()] for one text"
            )
        first = self.task.labels[0]
        examples = []
        for words in sentences:
            target = " ".join([first] * len(words))
            examples.append(Example(" ".join(words), target, (target,), words=tuple(words)))
        found = []
        for part in _parts(examples):
            rows = self._encoded(part)
            answers = word_labels(self.adapter, rows, part, self._compiled, self.task)
            found += [answer.split() for answer in answers]
        return found

    def _encoded(self, examples: list[Example]) -> list[EncodedExample]:
        base = self.adapter.base
        rows = encode_examples(examples, base.tokenizer, self.task)
        require_embedded(base, rows, self.task)
        require_room(self.adapter, rows, self.task)
        return rows


@contextmanager
def classifier(
    source: str | Path, model: str | None = None, base: Base | None = None
) -> Iterator[Classifier]:
    """The classifier in `source`, an adapter folder, a run or a hub id, while the context lasts.

    model: id of its base, default the one it names; base: a loaded one instead

    Raises AdapterError when it is damaged, for another base, or no classifier.
    """
    path = find_adapter(Path(source))
    files = read_adapter(path)
    if base is None:
        base = base_of(files, model, str(source))
    require_same_base(files, base, str(source), chosen=model is not None)
    adapter = adapter_from_files(files, base)
    try:
        yield Classifier(adapter, files, str(source))
    finally:
        adapter.close()


def _task_of(
    files: AdapterFiles, where: str
) -> ClassificationTask | SequenceClassificationTask | TokenClassificationTask:
    recorded = None if files.info.task is None else files.info.task.model_dump()
    labels = labels_of_files(files)
    if recorded is None and labels is not None:  # plain PEFT's: any text, as many labels
        kind = f"{labels.kind}_classification"
        recorded = {"kind": kind, "labels": list(labels.names)}
        recorded |= {"input": "{text}"} if labels.kind == "sequence" else {}
    # The record leaves out where the rows came from; nothing here reads any.
    settings = {**(recorded or {}), "data": {"builtin": "not-recorded"}}
    try:
        task = TypeAdapter(Annotated[Task, Field(discriminator="kind")]).validate_python(settings)
    except ValidationError as error:
        raise AdapterError(f"{where} does not say what it was trained for: {error}") from error
    if not isinstance(
        task, ClassificationTask | SequenceClassificationTask | TokenClassificationTask
    ):
        raise AdapterError(
            f"{where} was trained to write text, not to choose a label; use `ptkit generate`"
        )
    return task


def _parts(examples: list[Example]) -> Iterator[list[Example]]:
    for start in range(0, len(examples), ROWS):
        yield examples[start : start + ROWS]
