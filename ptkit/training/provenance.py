"""Where a result comes from: the record beside an adapter, its recipe, versions and hardware."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ptkit.evaluation.statistics import Interval
from ptkit.recipe.load import recipe_as_yaml
from ptkit.recipe.schema import Recipe
from ptkit.recipe.tasks import DataSection
from ptkit.runtime.base_model import Base
from ptkit.training.experiment import Experiment
from ptkit.training.record import CellRecord

#: Of the layout of `ptkit.json`.
FORMAT = 1


def adapter_info(
    experiment: Experiment, record: CellRecord, metrics: Mapping[str, Interval]
) -> dict[str, Any]:
    """What `ptkit.json` says about an adapter: where it comes from and what it scored.

    metrics: the record's, with their intervals over the test rows
    """
    base, task = experiment.base, experiment.recipe.task
    return {
        "format": FORMAT,
        "base": base_info(base),
        "method": record.settings,
        "recipe": record.recipe,
        "seed": record.seed,
        "task": task.model_dump(mode="json", exclude={"data"}),
        "data": described_data(task.data),
        "metrics": {name: as_recorded(interval) for name, interval in metrics.items()},
        "n_train": record.n_train,
        "n_test": record.n_test,
        "test_split": record.test_split,
        "test_chose": record.test_chose,
        "retention": record.retention,
        "gate": record.gate,
        "trainable_parameters": record.trainable_parameters,
        "train_steps": record.train_steps,
        "dtype": "float32",
        "versions": record.versions,
    }


def base_info(base: Base) -> dict[str, Any]:
    """What an adapter's record says of the base it was made for."""
    return {
        "id": base.id,
        "revision": base.revision,
        "fingerprint": base.fingerprint,
        "sketch": base.identity.sketch,
        "precision": base.precision,
        "tokenizer": base.tokenizer_fingerprint,
        "parameters": base.parameters,
    }


def as_recorded(interval: Interval) -> dict[str, float | None]:
    """A score as an adapter's record states it."""
    values = asdict(interval)
    return {"value": values["mean"], "low": values["low"], "high": values["high"]}


def described_data(data: DataSection) -> dict[str, Any]:
    """The data set without the paths of whoever trained on it."""
    if data.hub:
        kept = {"hub": data.hub, "config": data.config, "revision": data.revision}
        return {name: value for name, value in kept.items() if value is not None}
    return {"builtin": data.builtin} if data.builtin else {"files": "not published"}


def recipe_of_cell(recipe: Recipe, record_settings: Mapping[str, Any], seed: int) -> str:
    """The YAML of a recipe that makes one cell of `recipe` again, and nothing else."""
    single = recipe.model_copy(
        update={
            "methods": [type(method)(**record_settings) for method in recipe.methods
                        if method.kind == record_settings["kind"]][:1],
            "seeds": [seed],
            "sweep": {},
            "budget": None,
            "evaluate": recipe.evaluate.model_copy(update={"baseline": None}),
        }
    )  # fmt: skip
    return recipe_as_yaml(single)


def versions() -> dict[str, str]:
    """Versions of the packages results depend on."""
    names = ("ptkit", "torch", "transformers", "peft", "accelerate", "datasets", "sacrebleu")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def hardware(device: torch.device) -> str:
    """The machine a result was measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((r.split(":")[1].strip() for r in rows if "model name" in r), processor)
    return f"{processor}, {torch.get_num_threads()} threads"
