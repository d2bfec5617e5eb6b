"""Labels by HTTP: `POST /v1/classify`, in the form of vLLM's `/classify`."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, ValidationError

from ptkit.data.encode import encode_examples, label_token_ids
from ptkit.data.examples import Example
from ptkit.data.templates import filled
from ptkit.errors import AdapterError, UserError
from ptkit.recipe.tasks import ClassificationTask
from ptkit.serve.library import ENSEMBLE, Library
from ptkit.serve.protocol import MAX_PROMPTS, ModelName, Text, Usage
from ptkit.serve.request_part import RequestPart


class ClassifyRequest(RequestPart):
    """`POST /v1/classify`. input: texts as a person writes them, not in the adapter's template"""

    model: ModelName
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
    user: str | None = Field(default=None, description="Taken and not used.")


class LabelChoice(BaseModel):
    """What one text was labelled. probs: of all labels, in the order of `labels`"""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classification(BaseModel):
    """The response. labels: what `probs` are of"""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    labels: list[str]
    data: list[LabelChoice]
    usage: Usage


def labelled(library: Library, request: ClassifyRequest) -> Classification:
    """The labels that an adapter gives to texts, as `ptkit classify` does.

    Raises UserError for a model that was not trained to classify, and for texts that do not fit.
    """
    adapters = library.adapters(request.model)  # refuses what is unknown, or has bad files
    task = _task(library, request.model)
    base, name = library.bank.base, request.model
    words = label_token_ids(task, base.tokenizer)
    labels = list(words)
    texts = [request.input] if isinstance(request.input, str) else request.input
    examples = [Example(filled(task.input, text), labels[0], (), labels[0]) for text in texts]
    contexts = [row.input_ids for row in encode_examples(examples, base.tokenizer, task)]
    longest = max(map(len, contexts)) + max(map(len, words.values()))
    most, virtual = library.engine.longest, max(adapter.positions for adapter in adapters)
    if most is not None and virtual + longest > most:
        raise UserError(
            f"the request needs {virtual + longest} positions, of which there are {most} here; "
            "shorten the texts"
        )
    scores = library.bank.continuation_scores(contexts, list(words.values()), [name] * len(texts))
    rows = torch.softmax(scores, dim=-1).tolist()
    data = [
        LabelChoice(
            index=index, label=labels[max(range(len(row)), key=row.__getitem__)], probs=row,
            num_classes=len(row),
        )
        for index, row in enumerate(rows)
    ]  # fmt: skip
    read = sum(map(len, contexts))
    return Classification(
        id=f"classify-{uuid.uuid4().hex}", created=int(time.time()), model=name, labels=labels,
        data=data, usage=Usage(prompt_tokens=read, completion_tokens=0, total_tokens=read),
    )  # fmt: skip


def _task(library: Library, model: str) -> ClassificationTask:
    """What the adapter `model` was trained for. Raises UserError where that are no labels."""
    if library.is_base(model) or ENSEMBLE in model:
        raise UserError(f"`{model}` has no labels; name one adapter that was trained to classify")
    recorded = library.task(model)
    if recorded is None or recorded.kind != "classification":
        raise UserError(
            f"`{model}` was not trained to classify in words; ask it at /v1/completions"
        )
    settings = {**recorded.model_dump(), "data": {"builtin": "not-recorded"}}
    try:
        return ClassificationTask.model_validate(settings)
    except ValidationError as error:
        raise AdapterError(f"`{model}` does not say what its labels are: {error}") from error
