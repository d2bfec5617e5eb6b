"""What is measured of a trained adapter, and what is kept of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from ptkit.data.examples import Example
from ptkit.evaluation.latency import Latency, measure_latency
from ptkit.evaluation.predict import predict
from ptkit.evaluation.prediction import Prediction
from ptkit.evaluation.retention import off_probe
from ptkit.evaluation.score import corpus_score, score_intervals
from ptkit.evaluation.statistics import Interval
from ptkit.formats import atomic
from ptkit.formats.adapter_files import AdapterFiles, write_adapter
from ptkit.formats.adapter_folder import RECIPE, WEIGHTS
from ptkit.formats.cell_record import CellRecord, CurvePoint, ScoredPoint
from ptkit.formats.figures import RecordedRetention
from ptkit.methods import Adapter
from ptkit.runtime.progress import no_weights_bar
from ptkit.training.cell import Cell
from ptkit.training.checkpoint import Progress
from ptkit.training.experiment import Experiment
from ptkit.training.gate import share_open
from ptkit.training.observer import RunObserver
from ptkit.training.provenance import adapter_info, hardware, recipe_of_cell, versions


def _openings(experiment: Experiment, adapter: Adapter) -> dict[str, float] | None:
    """For which share of validation inputs, and of windows of each general text, the gate opens."""
    if adapter.input_gate is None:
        return None
    shares = {
        "task": share_open(adapter.input_gate, [row.input_ids for row in experiment.validation])
    }
    if experiment.general is not None:
        for name, windows in experiment.general.windows.items():
            shares[name] = share_open(adapter.input_gate, windows.tolist())
    return shares


def predicted(experiment: Experiment, adapter: Adapter, observer: RunObserver) -> list[Prediction]:
    """Predictions for the test rows, in every process; each makes an equal part of them."""
    recipe = experiment.recipe

    def work(rows: Sequence[Example]) -> list[Prediction]:
        batch_size = recipe.evaluate.batch_size
        return predict(adapter, rows, recipe.task, batch_size, observer.predicting)

    return experiment.parallel.map(experiment.data.test, work)


def scores_of(experiment: Experiment, predictions: Sequence[Prediction]) -> dict[str, Interval]:
    """The task's metrics of the predictions of all test rows."""
    recipe = experiment.recipe
    return score_intervals(predictions, recipe.task.metrics, recipe.evaluate.bootstrap)


def validation_score(experiment: Experiment, adapter: Adapter) -> float:
    """The task's leading metric on the validation rows that a curve is of; the same in every
    process."""
    recipe = experiment.recipe
    rows = experiment.data.validation[: recipe.evaluate.curve_rows]

    def work(own: Sequence[Example]) -> list[Prediction]:
        return predict(adapter, own, recipe.task, recipe.evaluate.batch_size)

    return corpus_score(experiment.parallel.map(rows, work), recipe.task.metrics[0])


@dataclass(frozen=True)
class Results:
    """What all processes found out about a cell.

    These are predictions of the test rows, the metrics, how many seconds predicting took, and what
    is left of the base.
    """

    predictions: Sequence[Prediction]
    scores: Mapping[str, Interval]
    seconds: float
    retention: RecordedRetention | None


def measured(
    experiment: Experiment,
    adapter: Adapter,
    cell: Cell,
    progress: Progress,
    results: Results,
    started: datetime,
) -> CellRecord:
    """The record of a cell, before anything of it is written (see `written`)."""
    recipe, base, method = experiment.recipe, experiment.base, cell.method
    latency = Latency(None, None)
    if base.head is None:
        probe = experiment.probe_ids[0, :32].tolist()
        latency = measure_latency(adapter, probe, experiment.parallel.any)
    return CellRecord(
        recipe=recipe.name,
        cell=cell.name,
        method=method.title,
        kind=method.kind,
        family=cell.family or method.title,
        sweep=cell.sweep,
        tuned=cell.tuned,
        seed=cell.seed,
        settings=method.model_dump(mode="json"),
        n_train=len(experiment.training(cell.seed).encoded) if method.trains else 0,
        n_test=len(results.predictions),
        test_split=experiment.data.test_split,
        test_chose=experiment.data.test_chose,
        test_repeats=experiment.data.test_repeats,
        test_rows=experiment.test_fingerprint(),
        learnt_rows=experiment.rows_fingerprint(),
        scored_by=experiment.metric_signatures(),
        retention_text=experiment.retention_fingerprint(),
        base_fingerprint=base.fingerprint,
        metrics={name: interval.mean for name, interval in results.scores.items()},
        score=recipe.task.metrics[0],
        trainable_parameters=adapter.trainable_parameters,
        base_parameters=base.parameters,
        bytes_on_disk=0,
        train_seconds=progress.seconds,
        train_steps=progress.step,
        best_step=progress.best_step,
        tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
        peak_memory_bytes=progress.peak_memory_bytes if method.trains else None,
        eval_seconds=results.seconds,
        curve=[CurvePoint.model_validate(point) for point in progress.curve],
        scored=[ScoredPoint.model_validate(point) for point in progress.scored],
        retention=results.retention,
        gate=_openings(experiment, adapter),
        decode_ms=latency.adapter,
        added_ms=latency.added,
        adapter_off_exact=_off_exact(experiment, adapter),
        adapter_path=None,
        versions=versions(),
        hardware=hardware(base.model.device),
        started=started.isoformat(timespec="seconds"),
    )


def written(
    experiment: Experiment,
    adapter: Adapter,
    cell: Cell,
    record: CellRecord,
    results: Results,
    files: AdapterFiles | None,
) -> CellRecord:
    """`record` with what was written of the cell: its predictions and the adapter, as `files` hold
    it (None: the whole model was trained)."""
    folder = cell.folder
    lines = [json.dumps(p.as_dict(), ensure_ascii=False) for p in results.predictions]
    atomic.write_text(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    if not cell.method.trains:
        return record
    path, size = _save(adapter, files, folder, experiment, record, results.scores)
    return record.updated(bytes_on_disk=size, adapter_path=path)


def _off_exact(experiment: Experiment, adapter: Adapter) -> bool | None:
    """Whether the base's logits with the adapter off are bit for bit those from before."""
    if not adapter.has_off:
        return None
    off: AbstractContextManager[Any] = adapter.off()
    with off:
        return torch.equal(off_probe(experiment.base.model, experiment.probe_ids), experiment.probe)


def _save(
    adapter: Adapter,
    files: AdapterFiles | None,
    folder: Path,
    experiment: Experiment,
    record: CellRecord,
    scores: Mapping[str, Interval],
) -> tuple[str, int]:
    """Save the trained adapter (or model); returns its folder's name and its weights' bytes."""
    if files is None:
        with atomic.folder(folder / "model", replace=True) as scratch, no_weights_bar():
            adapter.model.save_pretrained(scratch)
            experiment.base.tokenizer.save_pretrained(scratch)
        return "model", sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
    info = adapter_info(experiment, record, scores)
    recipe = recipe_of_cell(experiment.recipe, record.settings, record.seed)
    files = replace(files, info=info, texts={RECIPE: recipe})
    write_adapter(folder / "adapter", files, replace=True)
    return "adapter", (folder / "adapter" / WEIGHTS).stat().st_size
