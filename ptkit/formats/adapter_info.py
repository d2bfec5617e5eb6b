"""`ptkit.json`, beside an adapter's weights: what PEFT's settings have no place for.

It travels with the adapter, so other tools and people may add to it. Keys that this version does
not know are kept, and written back by whatever writes the adapter again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field

from ptkit.errors import AdapterError
from ptkit.formats.figures import RecordedRetention, RecordedScore, scored_rows
from ptkit.formats.typed_file import FileKind, Open, unchanged


class BaseInfo(Open):
    """The base model that the adapter was made for."""

    id: str | None = None
    """The base's id, on the Hub or a built-in one, or its folder."""
    revision: str | None = None
    """Its commit or tag on the Hub."""
    fingerprint: str | None = None
    """16 hex digits over its weights. Without a `sketch`, over the names of its modules too."""
    sketch: str | None = None
    """A coarse description of its weights, which survives rounding to another precision."""
    precision: str | None = None
    """The precision it was loaded in."""
    tokenizer: str | None = None
    """16 hex digits over its vocabulary."""
    parameters: int | None = None
    """How many it has."""


class MethodInfo(Open):
    """The method, with its settings as a recipe has them. The method itself checks those."""

    kind: str
    """The method."""

    @property
    def settings(self) -> dict[str, Any]:
        """Its other settings."""
        return dict(self.model_extra or {})


class TaskInfo(Open):
    """The task, as the recipe's `task` has it, without where its rows come from."""

    kind: str
    """The kind of task."""
    input: str | None = None
    """The template of its inputs."""
    labels: list[str] | None = None
    """Labels of a classification head, in the order of its outputs."""
    verbalizer: dict[str, str] | None = None
    """Label -> the words that stand for it."""


class ChatInfo(Open):
    """How it is asked in conversations: as it was in training."""

    template: str
    """The chat template, as Jinja's text."""
    system: str | None = None
    """The system prompt of conversations that bring none."""


@dataclass(frozen=True)
class Asked:
    """How an adapter is asked, as its files say: what a request needs of its record.

    template: of the inputs it was trained with; task: for the labels of one that classifies
    """

    chat: ChatInfo | None = None
    template: str | None = None
    task: TaskInfo | None = None


class DataInfo(Open):
    """The data set that it was trained on; paths of this machine are not kept."""

    hub: str | None = None
    """Its id on the Hub."""
    config: str | None = None
    """Its configuration there."""
    revision: str | None = None
    """Its revision there."""
    builtin: str | None = None
    """Its name, where it ships with ptkit."""
    files: str | None = None
    """`not published`, for files of whoever trained it."""


class DocumentInfo(Open):
    """The text that a prefix was distilled from; the text itself is not kept."""

    sha256: str
    """Digest of the text."""
    tokens: int
    """Its length."""
    chunks: int
    """How many parts it was read in."""


class ClosenessInfo(Open):
    """How close the base comes to itself with the document in view."""

    kl: RecordedScore
    """KL divergence, nats per token."""
    agreement: RecordedScore
    """Share of tokens where both predict the same one."""
    tokens: int
    """Tokens that were compared."""


class DistilledInfo(Open):
    """How a prefix was distilled from a text."""

    document: DocumentInfo
    """The text."""
    texts: dict[str, int]
    """Split -> how many texts the base wrote about it."""
    bytes: int
    """Of the prefix's keys and values."""
    document_bytes: int
    """Of the text's own."""
    figures: dict[str, ClosenessInfo]
    """What stands before the texts -> how close the base comes."""


class MultitaskInfo(Open):
    """The multi-task prompt that it is a part of."""

    tasks: list[str]
    """The recipes it was trained on."""
    rank: int
    """Of each task's matrix."""
    task_learning_rate: float
    """Of the tasks' matrices."""


class CardInfo(Open):
    """What its card says that no measurement does."""

    license: str | None = None
    """The Hub's identifier."""
    language: str | None = None
    """The Hub's identifier."""


class WeightsInfo(Open):
    """The weights' file that this record was written for."""

    file: str
    """Its name."""
    sha256: str
    """Its digest."""


class AdapterInfo(Open):
    """Where an adapter comes from and what it scored. A plain PEFT adapter's states nothing."""

    base: BaseInfo = BaseInfo()
    """The base model."""
    method: MethodInfo | None = None
    """The method."""
    recipe: str | None = None
    """Name of the recipe."""
    seed: int | None = None
    """Seed of the run."""
    task: TaskInfo | None = None
    """The task."""
    chat: ChatInfo | None = None
    """For an adapter that was trained on conversations."""
    data: DataInfo = DataInfo()
    """The data set."""
    metrics: dict[str, RecordedScore] | None = None
    """Metric -> score on the rows of `test_split`; the first one leads."""
    n_train: int | None = None
    """Training rows."""
    n_test: int | None = None
    """Rows that were scored."""
    test_split: str = "test"
    """The source's name of the split that was scored."""
    test_chose: bool = False
    """Whether these rows are the validation rows, which also chose the checkpoint."""
    test_repeats: dict[str, int] = Field(default_factory=dict)
    """Another split, `train` or `validation` -> how many of these rows it has, too."""
    retention: RecordedRetention | None = None
    """Forgetting; null where it was not measured."""
    gate: dict[str, float] | None = None
    """For which share of inputs a gate opens: of `task`, and of each general text."""
    distilled: DistilledInfo | None = None
    """For a prefix that was distilled from a text."""
    multitask: MultitaskInfo | None = None
    """For a multi-task prompt, and its parts."""
    trainable_parameters: int | None = None
    """Values that were trained."""
    train_steps: int | None = None
    """Optimiser steps taken."""
    dtype: str | None = None
    """Type of the weights' values."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Package -> version."""
    converted_from: MethodInfo | None = None
    """The method it was trained as, before it became another kind of file."""
    part_of: MethodInfo | None = None
    """The method that it is one part of (`ptkit export --as parts`)."""
    int8_lost: dict[str, float] | None = None
    """Metric -> what was lost when the weights became 8-bit integers."""
    card: CardInfo = CardInfo()
    """For its card."""
    weights: WeightsInfo | None = None
    """The weights' file."""

    @property
    def empty(self) -> bool:
        """Whether it states nothing, as for an adapter made by plain PEFT."""
        return not self.model_fields_set

    @property
    def rows_scored(self) -> str:
        """What the rows are that the scores are on, in words that follow a number."""
        return scored_rows(self.test_split, self.test_chose, self.test_repeats)

    @property
    def figures(self) -> dict[str, Any]:
        """What servers list of it: its size, and what it scored in the metric that leads."""
        metric, score = next(iter((self.metrics or {}).items()), (None, None))
        return {
            "parameters": self.trainable_parameters,
            "recipe": self.recipe,
            "metric": metric,
            "score": score and score.value,
            "low": score and score.low,
            "high": score and score.high,
            "n": self.n_test,
            "rows": None if self.n_test is None else self.rows_scored,
            "forgetting": self.retention and self.retention.forgetting,
        }

    @property
    def method_kind(self) -> str | None:
        """The method's `kind`; None where no method is recorded."""
        return None if self.method is None else self.method.kind

    @property
    def asked(self) -> Asked:
        """How it is asked."""
        return Asked(self.chat, self.template, self.task)

    @property
    def template(self) -> str | None:
        """The template of the inputs it was trained with; None where none is known."""
        return None if self.task is None else self.task.input


def _complete(values: dict[str, Any]) -> dict[str, Any]:
    """1 -> 2: scores are objects with an interval; it says which rows were scored, and what stood
    before the texts of forgetting.

    Versions that did not say scored the split `test`, and put nothing before a text. The first ones
    measured no drift, and no interval.
    """
    changed = dict(values)
    if "n_test" in values:
        changed = {"test_split": "test", "test_chose": False, **values}
    if isinstance(metrics := values.get("metrics"), dict):
        changed["metrics"] = {name: _score(found) for name, found in metrics.items()}
    if isinstance(retention := values.get("retention"), dict):
        unsaid: dict[str, Any] = {"drift": None, "drift_tokens": 0, "lead": 0, "domains": {}}
        changed["retention"] = {**unsaid, **retention}
    return changed


def _score(found: Any) -> Any:
    number = isinstance(found, int | float) and not isinstance(found, bool)
    return {"value": found, "low": None, "high": None} if number else found


ADAPTER_INFO = FileKind(
    AdapterInfo,
    # 2 -> 3 brought `chat`: whoever does not know it would ask in another template.
    (unchanged, _complete, unchanged),
    AdapterError,
    "fetch or export the adapter again",
)
