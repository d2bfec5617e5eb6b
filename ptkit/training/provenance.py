"""Where a result comes from: the record beside an adapter, its recipe, versions and hardware."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ptkit.evaluation.statistics import Interval
from ptkit.extras import installed
from ptkit.formats.adapter_info import AdapterInfo, BaseInfo, DataInfo, MethodInfo, TaskInfo
from ptkit.formats.cell_record import CellRecord
from ptkit.recipe.load import recipe_as_yaml
from ptkit.recipe.schema import Recipe
from ptkit.recipe.tasks import DataSection, Task
from ptkit.runtime.base_model import Base
from ptkit.training.experiment import Experiment


def adapter_info(
    experiment: Experiment, record: CellRecord, metrics: Mapping[str, Interval]
) -> AdapterInfo:
    """What `ptkit.json` says about an adapter: where it comes from and what it scored.

    metrics: the record's, with their intervals over the test rows
    """
    task = experiment.recipe.task
    info = AdapterInfo(
        base=base_info(experiment.base),
        method=MethodInfo.model_validate(record.settings),
        recipe=record.recipe,
        seed=record.seed,
        task=task_info(task),
        data=data_info(task.data),
        metrics={name: interval.recorded for name, interval in metrics.items()},
        n_train=record.n_train,
        n_test=record.n_test,
        test_split=record.test_split,
        test_chose=record.test_chose,
        test_repeats=record.test_repeats,
        retention=record.retention,
        gate=record.gate,
        trainable_parameters=record.trainable_parameters,
        train_steps=record.train_steps,
        dtype="float32",
        versions=record.versions,
    )
    template = experiment.chat_template
    return info if template is None else info.updated(chat=template.record)


def base_info(base: Base) -> BaseInfo:
    """What an adapter's record says of the base it was made for."""
    return BaseInfo(
        id=base.id,
        revision=base.revision,
        fingerprint=base.fingerprint,
        sketch=base.identity.sketch,
        precision=base.precision,
        tokenizer=base.tokenizer_fingerprint,
        parameters=base.parameters,
    )


def task_info(task: Task) -> TaskInfo:
    """What an adapter's record says of its task."""
    return TaskInfo.model_validate(task.model_dump(mode="json", exclude={"data"}))


def data_info(data: DataSection) -> DataInfo:
    """The data set without the paths of whoever trained on it."""
    if data.hub:
        kept = {"hub": data.hub, "config": data.config, "revision": data.revision}
        return DataInfo(**{name: value for name, value in kept.items() if value is not None})
    return DataInfo(builtin=data.builtin) if data.builtin else DataInfo(files="not published")


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
    """Versions of the packages results depend on, of those that are installed."""
    names = ("ptkit", "torch", "transformers", "peft", "accelerate", "datasets", "sacrebleu")
    found = {name: told for name in names if (told := installed(name)) is not None}
    return {"python": platform.python_version(), **found}


def hardware(device: torch.device) -> str:
    """The machine a result was measured on, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((r.split(":")[1].strip() for r in rows if "model name" in r), processor)
    return f"{processor}, {torch.get_num_threads()} threads"
