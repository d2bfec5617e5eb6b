"""`record.json` of a cell: everything a table, a report or a later reader needs to know.

Records are compared with each other. A key that this version does not know may change what the
figures beside it mean, so it is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from ptkit.errors import FolderError
from ptkit.formats.figures import RecordedRetention, scored_rows
from ptkit.formats.typed_file import FileKind, FileSection, Stated, unchanged


class CurvePoint(Stated):
    """One validation."""

    step: int
    """Optimiser steps taken."""
    train_loss: float
    """Since the validation before, nats per target token."""
    validation_loss: float
    """Nats per target token."""
    divergence: float | None = None
    """With `train.retain`: from the base on general text, nats per token."""
    retain_weight: float | None = None
    """With `train.retain`: what the divergence counts in the loss."""


class ScoredPoint(Stated):
    """The score at a validation, and what it took to get there."""

    step: int
    """Optimiser steps taken."""
    seconds: float
    """Wall clock of training and validation so far, without the scoring itself."""
    supervised_tokens: int
    """Target tokens read so far; with pairs of answers, pairs."""
    score: float
    """The task's leading metric, on the first `evaluate.curve_rows` validation rows."""


class RecordedSearch(Stated):
    """What a search chose (the recipe's `budget`)."""

    trials: int
    """Settings that were tried."""
    failed: int = 0
    """How many of them have no result."""
    sampler: str | None = None
    """What proposed them."""
    seed: int
    """Seed of the trials."""
    settings: dict[str, Any]
    """The settings that were chosen."""


class TriedStart(Stated):
    """A start that was tried, with its loss on some training rows."""

    start: str
    """As the method's `start`."""
    start_text: str | None = None
    """As the method's `start_text`."""
    loss: float
    """Nats per target token."""


class TriedRate(FileSection):
    """A learning rate that was tried in a short run."""

    rate: float
    """The rate."""
    loss: float
    """Validation loss at the end, nats per target token."""


class ChosenSettings(Stated):
    """What `start: auto` and `learning_rate: auto` chose before the run."""

    start: str | None = None
    """The start; null where the recipe named it."""
    start_text: str | None = None
    """Its text, for a start from a text."""
    starts: list[TriedStart] = Field(default_factory=list)
    """All that were tried; none where nothing could tell them apart."""
    start_rows: int = 0
    """Training rows that each start was scored on."""
    learning_rate: float | None = None
    """The rate; null where the recipe named it."""
    rates: list[TriedRate] = Field(default_factory=list)
    """All that were tried."""
    rate_loss_before: float | None = None
    """Validation loss before the short runs."""
    rate_steps: int = 0
    """Steps of each short run."""
    rate_batch: int = 0
    """Rows per step of each short run."""
    rate_judged: int = 0
    """Validation rows that the rates were judged on."""

    @property
    def settings(self) -> dict[str, Any]:
        """What it changes in the method's settings."""
        named = ("start", "start_text", "learning_rate")
        return {name: getattr(self, name) for name in named if name in self.model_fields_set}


class TrialRecord(FileSection):
    """What a trial of a search came to."""

    validation_loss: float
    """The lowest, nats per target token."""
    seconds: float
    """Wall clock of its training."""


class CellRecord(FileSection):
    """One method with one seed, trained and measured."""

    recipe: str
    """Name of the recipe."""
    cell: str
    """The cell's folder below `cells/`."""
    method: str
    """Its name in tables, with the values of its own swept keys."""
    kind: str
    """The method."""
    family: str
    """The recipe's entry that it comes from."""
    sweep: dict[str, Any]
    """All swept keys, those outside the methods too."""
    tuned: RecordedSearch | None
    """What a search chose; null where there was none."""
    seed: int
    """Seed of the run."""
    settings: dict[str, Any]
    """The method's settings, by the recipe's keys."""
    n_train: int
    """Training rows; 0 for baselines that learn nothing."""
    n_test: int
    """Rows that were scored."""
    metrics: dict[str, float]
    """Metric -> value over all rows."""
    score: str
    """The metric that leads."""
    trainable_parameters: int
    """Values that were trained."""
    base_parameters: int
    """Of the base model."""
    bytes_on_disk: int
    """Of the weights that were saved."""
    train_seconds: float
    """Wall clock; with `trained_together` above 1, an equal share of the batch's time."""
    train_steps: int
    """Optimiser steps taken."""
    best_step: int
    """The step whose parameters were kept."""
    tokens_per_second: float
    """Tokens read in training, per second."""
    peak_memory_bytes: int | None
    """Above what was in use before, of the whole batch; null for baselines."""
    eval_seconds: float
    """Wall clock of the predictions."""
    curve: list[CurvePoint]
    """The validations."""
    scored: list[ScoredPoint] = Field(default_factory=list)
    """The score over seconds and supervised tokens; empty without `evaluate.curve_rows`."""
    retention: RecordedRetention | None
    """Forgetting; null where it was not measured."""
    decode_ms: float | None
    """Milliseconds per generated token of one row; null for classifiers, which write nothing."""
    added_ms: float | None
    """What the adapter adds to `decode_ms`."""
    adapter_off_exact: bool | None
    """Whether the base's logits were the same, bit for bit, with the adapter off; null where it
    cannot be switched off."""
    adapter_path: str | None
    """The folder of the result within the cell's; null for baselines."""
    test_split: str = "test"
    """The source's name of the split that was scored."""
    test_chose: bool = False
    """Whether these rows are the validation rows, which also chose the checkpoint and a search's
    settings."""
    test_repeats: dict[str, int] = Field(default_factory=dict)
    """Another split, `train` or `validation` -> how many of these rows it has, too."""
    test_rows: str | None = None
    """Fingerprint of the rows that were scored; null in records of earlier versions."""
    learnt_rows: str | None = None
    """Fingerprint of all training and validation rows, before a draw; null in earlier records."""
    scored_by: dict[str, str] | None = None
    """Metric -> library, version and settings, of your own function its source; null in earlier
    records."""
    retention_text: str | None = None
    """Fingerprint of the general text; null without `retention`, and in earlier records."""
    base_fingerprint: str | None = None
    """Fingerprint of the base's weights; null in records of earlier versions."""
    gate: dict[str, float] | None = None
    """For which share of inputs a gate opens: of `task`, the validation rows, and of each general
    text; null without a gate."""
    trained_together: int = 1
    """Cells in the training batch."""
    chosen: ChosenSettings | None = None
    """What `auto` settings became; null where there were none."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Package -> version."""
    hardware: str = ""
    """The machine, in words."""
    started: str = ""
    """When, ISO 8601."""

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON values, without the file's version."""
        return self.model_dump(mode="json")

    def as_line(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(self.as_dict(), ensure_ascii=False)

    @property
    def rows_scored(self) -> str:
        """What the rows are that the scores are on, in words that follow a number."""
        return scored_rows(self.test_split, self.test_chose, self.test_repeats)

    def write(self, path: Path) -> None:
        """Write `record.json`; it appears complete or not at all."""
        CELL_RECORD.write(path, self)

    @classmethod
    def read(cls, path: Path) -> CellRecord:
        """Read `record.json`. Raises FolderError where it is damaged, or of a newer version."""
        return CELL_RECORD.read_file(path)


def _says_what_was_scored(values: dict[str, Any]) -> dict[str, Any]:
    """0 -> 1: a record says which rows, texts and base its figures are of.

    Versions that said nothing scored the split `test`, trained one cell at a time, and put nothing
    before the texts of forgetting. Fingerprints that they did not keep stay unknown.
    """
    said = {
        "test_split": "test", "test_chose": False, "test_rows": None, "retention_text": None,
        "base_fingerprint": None, "gate": None, "trained_together": 1, "chosen": None,
    }  # fmt: skip
    changed = {**said, **values}
    if isinstance(retention := values.get("retention"), dict):
        changed["retention"] = {"lead": 0, **retention}
    return changed


def _says_what_was_learnt(values: dict[str, Any]) -> dict[str, Any]:
    """1 -> 2: a record says which rows were learnt from, what its metrics are, and which test rows
    stand in another split. Versions that did not count those are taken to have had none."""
    return {"test_repeats": {}, "learnt_rows": None, "scored_by": None, **values}


CELL_RECORD = FileKind(
    CellRecord,
    (_says_what_was_scored, _says_what_was_learnt),
    FolderError,
    "delete the cell's folder to run it again",
)


#: `chosen.json` in a cell's folder, from which a run that goes on reads what it had chosen.
CHOSEN_SETTINGS = FileKind(
    ChosenSettings,
    (unchanged,),
    FolderError,
    "delete it to choose again, or the cell's folder to run the cell again",
)

#: `trial.json` in a trial's folder, from which a search that goes on reads it.
TRIAL_RECORD = FileKind(
    TrialRecord, (unchanged,), FolderError, "delete the trial's folder to try it again"
)
