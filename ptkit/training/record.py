"""The record of one cell: everything a table, a report or a later reader needs to know."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ptkit.errors import PtkitError


def scored_rows(split: str, chose: bool) -> str:
    """What scored rows are, in words that follow a number; see `CellRecord`."""
    if chose:
        return "validation rows, which also chose the checkpoint"
    return "test rows" if split == "test" else f"test rows (the source's split `{split}`)"


def written(value: Any) -> str:
    """A swept value as it is shown."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def titled(family: str, sweep: dict[str, Any]) -> str:
    """A method, with its swept values where there are any."""
    return f"{family} {' '.join(f'{key}={written(value)}' for key, value in sweep.items())}".strip()


@dataclass(frozen=True)
class CellRecord:
    """One method with one seed, trained and measured.

    cell: its folder below `cells/`; family: the recipe's entry, which `method` is with the values
    of its own swept keys; sweep: all swept keys, those outside the methods too
    tuned: what a search chose, `{trials, seed, settings}`; None where there was none
    test_split: the source's name of the split the scores are on; test_chose: its rows are the
    validation rows, which have also chosen the checkpoint and the settings of a search
    test_rows, retention_text, base_fingerprint: fingerprints of what was scored (see
    `ptkit.training.experiment.Experiment`) and of the base's weights; None in records of versions
    that kept none, and without retention
    metrics: name -> corpus value; score: the name of the leading one
    train_seconds, eval_seconds: wall clock; peak_memory_bytes: above what was in use before
    curve: `{step, train_loss, validation_loss}` in nats per target token
    chosen: what `start: auto` and `learning_rate: auto` found, with the loss of all that was tried;
    no `starts` where there was nothing to tell them apart by
    retention: see `ptkit.evaluation.retention.Retention.as_dict`; None when not measured
    gate: for which share of inputs a gate (`train.retain: {by: gate}`) opens: of `task`, the
    validation rows, and of each general text's windows; None without one
    decode_ms: milliseconds per generated token of one row, None for classifiers, which write
    nothing; added_ms: what the adapter adds to it
    trained_together: cells in the training batch; with more than one, train_seconds is an equal
    share of its time and peak_memory_bytes that of the whole batch
    adapter_off_exact: base logits bit-identical with the adapter off; None without an "off"
    """

    recipe: str
    cell: str
    method: str
    kind: str
    family: str
    sweep: dict[str, Any]
    tuned: dict[str, Any] | None
    seed: int
    settings: dict[str, Any]
    n_train: int
    n_test: int
    metrics: dict[str, float]
    score: str
    trainable_parameters: int
    base_parameters: int
    bytes_on_disk: int
    train_seconds: float
    train_steps: int
    best_step: int
    tokens_per_second: float
    peak_memory_bytes: int | None
    eval_seconds: float
    curve: list[dict[str, float]]
    retention: dict[str, Any] | None
    decode_ms: float | None
    added_ms: float | None
    adapter_off_exact: bool | None
    adapter_path: str | None
    test_split: str = "test"
    test_chose: bool = False
    test_rows: str | None = None
    retention_text: str | None = None
    base_fingerprint: str | None = None
    gate: dict[str, float] | None = None
    trained_together: int = 1
    chosen: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    started: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)

    def as_line(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(self.as_dict(), ensure_ascii=False)

    @property
    def rows_scored(self) -> str:
        """What the rows are that the scores are on, in words that follow a number."""
        return scored_rows(self.test_split, self.test_chose)

    def updated(self, **changes: Any) -> CellRecord:
        """The record with some fields replaced."""
        return replace(self, **changes)

    @classmethod
    def read(cls, path: Path) -> CellRecord:
        """Read `record.json`. Raises PtkitError when it is not a record of this version."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise PtkitError(
                f"{path} is not a record this version of ptkit reads ({error}); "
                "delete the cell's folder to run it again"
            ) from error
