"""Losses reach the trackers people already watch, through accelerate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_cli import QUICK, ptkit, refused


def test_tensorboard_gets_every_validation(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    ptkit("train", "quickstart", *QUICK, "--set", "train.report_to=[tensorboard]", "--out", "run",
          "--quiet", cwd=tmp_path)  # fmt: skip
    (log,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")
              if "validation_loss" in path.read_bytes().decode(errors="ignore")}  # fmt: skip
    events = accumulator.EventAccumulator(str(log)).Reload()
    curve = json.loads((tmp_path / "run/record.json").read_text())["curve"]
    for name in ("train_loss", "validation_loss"):
        logged = [(e.step, e.value) for e in events.Scalars(name)]
        assert [step for step, _ in logged] == [entry["step"] for entry in curve]
        assert [v for _, v in logged] == pytest.approx([e[name] for e in curve], rel=1e-5)


def test_tracker_that_is_not_installed_is_named_before_training(tmp_path: Path) -> None:
    said = refused("train", "quickstart", *QUICK, "--set", "train.report_to=[mlflow]", "--out",
                   "run", cwd=tmp_path)  # fmt: skip
    assert "`mlflow` is not installed" in said
