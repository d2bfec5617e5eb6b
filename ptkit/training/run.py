"""Cells: train a method with a seed (or several at once), measure it, write its record last.

Folder of a cell:
    cell.json           what this cell is; a resumed run must match it
    checkpoint-STEP/    while training
    adapter/ or model/  the result (PEFT's layout; transformers' for full fine-tuning)
    predictions.jsonl   one line per test row
    record.json         the measurements; its presence means the cell is finished
    failed.json         why there is none, until the next try succeeds (`ptkit.training.failure`)
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_seed

from ptkit.data.task import Example
from ptkit.data.templates import Template
from ptkit.errors import UserError
from ptkit.evaluation.latency import Latency, measure_latency
from ptkit.evaluation.predict import Prediction, predict, require_room
from ptkit.evaluation.retention import measure_retention, off_probe
from ptkit.evaluation.score import score_intervals
from ptkit.evaluation.statistics import Interval
from ptkit.formats import atomic
from ptkit.formats.adapter_files import (
    RECIPE,
    WEIGHTS,
    read_adapter,
    read_config,
    sha256,
    weights_path,
    write_adapter,
)
from ptkit.formats.folder_lock import held
from ptkit.methods import (
    ADAPTERS,
    Adapter,
    Demonstrations,
    create_adapter,
    require_same_base,
    restored,
)
from ptkit.methods.start import named_adapter
from ptkit.recipe.schema import ClassificationTask, HeadedTask
from ptkit.runtime.base_model import no_weights_bar
from ptkit.runtime.dropout import require_no_dropout
from ptkit.runtime.gate import Gate
from ptkit.section import MethodSection
from ptkit.training.adapter_trainer import Job, StepReport
from ptkit.training.autotune import Autotuned, autotune
from ptkit.training.checkpoint import Progress, remove_checkpoints
from ptkit.training.experiment import Experiment
from ptkit.training.failure import FAILED, Failure
from ptkit.training.gate import fit_gate, require_gate_fits, share_open
from ptkit.training.loop import fit
from ptkit.training.processes import processes, shared
from ptkit.training.provenance import adapter_info, hardware, recipe_of_cell, versions
from ptkit.training.record import CellRecord
from ptkit.training.run_folder import open_run_folder

if TYPE_CHECKING:
    from ptkit.training.forecast import Forecast


class RunObserver:
    """Told what a run is doing; every method does nothing unless overridden."""

    def prepared(self, data: Sequence[str]) -> None:
        """The data are read; `data`: what was decided about them, in lines."""

    def planned(self, measured: Callable[[], Forecast]) -> None:
        """A long run is about to begin; `measured` finds out what it will take, on a few steps."""

    def cell_started(self, cell: str, steps: int) -> None:
        """A cell begins; `steps` is 0 for methods that train nothing."""

    def writing(self, done: int, texts: int) -> None:
        """Texts are being written to learn from."""

    def stepped(self, report: StepReport) -> None:
        """An optimiser step was taken."""

    def predicting(self, done: int, rows: int) -> None:
        """Test rows are being predicted."""

    def trial_finished(self, cell: str, validation_loss: float) -> None:
        """A trial of a search is over."""

    def trial_failed(self, failure: Failure) -> None:
        """A trial of a search has no result; the search goes on."""

    def cell_finished(self, record: CellRecord, reused: bool) -> None:
        """The cell's record is on disk; `reused` when it was there already."""

    def cell_failed(self, failure: Failure) -> None:
        """A cell has no result; the others go on."""


#: What `cell.json` says of a cell since later versions.
ADDED = ("test_rows", "retention_text", "retain_text")


def cell_name(method: MethodSection, seed: int) -> str:
    """Name of a cell's folder."""
    return f"{folder_name(method.title)}-seed{seed}"


def folder_name(text: str) -> str:
    """`text` as one folder's name: what a shell would trip over becomes a comma."""
    return re.sub(r"[^\w.=+-]+", ",", text)


@dataclass(frozen=True)
class Cell:
    """One method with one seed of a recipe, and the folder it lives in.

    start_from: an adapter folder to train further instead of a fresh start
    variant, family, sweep, tuned: see `CellRecord`; the folder of the variant, "" for none
    """

    # Its lists (the adapters it starts from) have no hash; the folder tells cells apart.
    method: MethodSection = field(hash=False)
    seed: int
    folder: Path
    start_from: Path | None = None
    variant: str = ""
    family: str | None = None
    sweep: dict[str, Any] = field(default_factory=dict, hash=False)
    tuned: dict[str, Any] | None = field(default=None, hash=False)

    @property
    def name(self) -> str:
        """The cell's name in tables and logs, and its folder below `cells/`."""
        own = cell_name(self.method, self.seed)
        return f"{self.variant}/{own}" if self.variant else own

    @property
    def done(self) -> Path:
        """The record whose presence means that the cell is finished."""
        return self.folder / "record.json"


def run_cells(
    experiment: Experiment, cells: Sequence[Cell], observer: RunObserver | None = None
) -> list[CellRecord]:
    """Train `cells` in one batch, measure and save each; finished ones are read back, killed
    ones go on where they were.

    Raises FolderError when a folder holds a cell of another recipe, seed, base or data, or another
    process works in it, UserError when several cells cannot share a batch.
    """
    with ExitStack() as locks:
        for cell in cells:
            locks.enter_context(held(cell.folder))
        return _run_cells(experiment, cells, observer or RunObserver())


def _run_cells(
    experiment: Experiment, cells: Sequence[Cell], observer: RunObserver
) -> list[CellRecord]:
    records: dict[Cell, CellRecord] = {}
    for cell in cells:
        open_cell_folder(experiment, cell)
        if cell.done.exists():
            records[cell] = CellRecord.read(cell.done)
            _tidy(cell.folder)  # it may have been killed just after its record
            observer.cell_finished(records[cell], reused=True)
    todo = [cell for cell in cells if cell not in records]
    if todo:
        records |= zip(todo, _train_and_measure(experiment, todo, observer), strict=True)
    return [records[cell] for cell in cells]


def run_trial(experiment: Experiment, cell: Cell, observer: RunObserver | None = None) -> float:
    """Train `cell` and return its lowest validation loss; nothing is measured on the test rows.

    The result stays in `trial.json`, from which the next call reads it.
    """
    with held(cell.folder):
        return _run_trial(experiment, cell, observer)


def _run_trial(experiment: Experiment, cell: Cell, observer: RunObserver | None) -> float:
    done = cell.folder / "trial.json"
    open_cell_folder(experiment, cell)
    if not done.exists():
        observer = observer or RunObserver()
        observer.cell_started(cell.name, experiment.recipe.train.steps)
        method = _chosen(experiment, cell).section
        set_seed(cell.seed)
        adapter = new_adapter(experiment, cell, method)
        try:
            (progress,) = _fit(experiment, [cell], [adapter], observer)
        finally:
            adapter.close()
        atomic.write_json(
            done, {"validation_loss": progress.best_loss, "seconds": progress.seconds}
        )
        remove_checkpoints(cell.folder)
        observer.trial_finished(cell.name, progress.best_loss)
    return float(json.loads(done.read_text())["validation_loss"])


def _train_and_measure(
    experiment: Experiment, cells: Sequence[Cell], observer: RunObserver
) -> list[CellRecord]:
    trains = cells[0].method.trains
    title = " + ".join(cell.name for cell in cells)
    observer.cell_started(title, experiment.recipe.train.steps if trains else 0)
    started = datetime.now(UTC)
    adapters: list[Adapter] = []
    records = []
    try:
        choices = [_chosen(experiment, cell) for cell in cells]
        for cell, choice in zip(cells, choices, strict=True):
            set_seed(cell.seed)
            adapters.append(new_adapter(experiment, cell, choice.section))
        progresses = [Progress() for _ in cells]
        if trains:
            progresses = _fit(experiment, cells, adapters, observer)
        state = processes(experiment.base.model.device)
        for i, (cell, adapter) in enumerate(zip(cells, adapters, strict=True)):
            if trains:
                adapter.input_gate = _gate(experiment, cell)
            clock = time.perf_counter()
            predictions = _predicted(experiment, adapter, observer)
            seconds = time.perf_counter() - clock
            retention = None
            if experiment.general is not None:
                share = partial(shared, state=state)
                retention = measure_retention(adapter, experiment.general, share).as_dict()
            if not state.is_main_process:  # the first process measures the rest and writes for all
                continue
            record = _measure(
                experiment, adapter, cell, progresses[i], predictions, seconds, retention, started
            )
            record = record.updated(trained_together=len(cells), chosen=choices[i].record)
            atomic.write_json(cell.done, record.as_dict())
            _tidy(cell.folder)
            observer.cell_finished(record, reused=False)
            records.append(record)
        state.wait_for_everyone()
        if not state.is_main_process:
            records = [CellRecord.read(cell.done) for cell in cells]
    finally:
        for adapter in adapters:
            adapter.close()
    return records


def _tidy(folder: Path) -> None:
    """Delete what a finished cell no longer needs."""
    (folder / FAILED).unlink(missing_ok=True)
    remove_checkpoints(folder)
    atomic.remove_leftovers(folder)


def open_cell_folder(experiment: Experiment, cell: Cell) -> None:
    """Write what `cell` is to its folder, or raise FolderError when it already is another."""
    recipe = experiment.recipe
    identity = {
        "model": recipe.model.model_dump(exclude={"device"}),
        "base_fingerprint": experiment.base.fingerprint,
        "data_fingerprint": experiment.data_fingerprint(cell.seed),
        "test_rows": experiment.test_fingerprint(),
        "retention_text": experiment.retention_fingerprint(),
        "retain_text": experiment.retain_fingerprint(),
        "task": recipe.task.model_dump(),
        "train": recipe.train.model_dump(exclude=recipe.train.NOT_OF_RESULT),
        "retention": recipe.retention and recipe.retention.model_dump(),
        "method": cell.method.model_dump(),
        "adapters": named_adapters(cell.method, experiment.folder),
        "seed": cell.seed,
        "start_from": str(cell.start_from) if cell.start_from else None,
    }
    open_run_folder(cell.folder / "cell.json", identity, "run", added=ADDED)


def named_adapters(method: MethodSection, folder: Path) -> dict[str, str]:
    """The adapters a method starts from or mixes in, with the SHA-256 of their weights: a run that
    goes on must find those it began with. Raises AdapterError where one is missing."""
    named = [*(getattr(method, "start_adapter", None) or ()), *getattr(method, "adapters", ())]
    found = {}
    for name in named:
        path = named_adapter(name, folder)
        read_config(path)
        found[name] = sha256(weights_path(path))
    return found


def _chosen(experiment: Experiment, cell: Cell) -> Autotuned:
    """The cell's method with nothing left to `auto`."""
    method = cell.method
    if cell.start_from is not None and getattr(method, "start", None) == "auto":
        method = method.model_copy(update={"start": "task"})  # not read: it starts elsewhere

    def make(section: MethodSection) -> Job:
        set_seed(cell.seed)
        return new_job(experiment, cell, new_adapter(experiment, cell, section))

    examples = experiment.training(cell.seed).examples
    # The others read what the first process found: rounding may tell two devices different things.
    with processes(experiment.base.model.device).main_process_first():
        return autotune(method, make, experiment.recipe.task, examples, cell.folder)


def demonstrations(experiment: Experiment, seed: int) -> Demonstrations:
    """What the adapters of `seed` may start from. A head's labels are no words the base reads."""
    rows, task = experiment.training(seed).examples, experiment.recipe.task
    if isinstance(task, HeadedTask):
        texts = [example.input for example in rows]
        return Demonstrations(texts, seed, folder=experiment.folder)
    texts = [example.input + example.target for example in rows]
    labels = [*task.verbalizer.values()] if isinstance(task, ClassificationTask) else []
    return Demonstrations(texts, seed, labels, Template(task.input).words, experiment.folder)


def new_adapter(experiment: Experiment, cell: Cell, method: MethodSection) -> Adapter:
    """An adapter of `method`, started where the cell says."""
    base = experiment.base
    if cell.start_from is None:
        return create_adapter(method, base, demonstrations(experiment, cell.seed))
    files = read_adapter(cell.start_from)
    require_same_base(files, base, str(cell.start_from))
    cls = ADAPTERS[method.kind]
    if files.peft_type not in cls.peft_types:
        raise UserError(
            f"{cell.start_from} is a {files.peft_type} adapter; `{method.kind}` cannot train it "
            "further"
        )
    adapter = restored(cls, files, method, base)
    adapter.input_gate = None  # it learns from all rows; a gate is fitted anew
    return adapter


def _fit(
    experiment: Experiment,
    cells: Sequence[Cell],
    adapters: Sequence[Adapter],
    observer: RunObserver,
) -> list[Progress]:
    if len(cells) > 1:
        require_no_dropout(experiment.base)
    jobs = [new_job(experiment, cell, own) for cell, own in zip(cells, adapters, strict=True)]
    # One bar for all of them: they take their steps together.
    return fit([replace(jobs[0], report=observer.stepped), *jobs[1:]])


def new_job(experiment: Experiment, cell: Cell, adapter: Adapter) -> Job:
    """What trains `adapter` as the recipe says, in the cell's folder."""
    recipe, training = experiment.recipe, experiment.training(cell.seed).encoded
    if recipe.train.retain is not None and recipe.train.retain.by == "gate":
        require_gate_fits(adapter)
    for rows in (training, experiment.validation):
        require_room(adapter, rows, recipe.task)
    section: Any = adapter.section
    return Job(
        adapter,
        training,
        experiment.validation,
        recipe.train,
        section.learning_rate,
        cell.seed,
        cell.folder,
        general=experiment.retain_windows,
        beta2=getattr(section, "beta2", Job.beta2),
    )


def _gate(experiment: Experiment, cell: Cell) -> Gate | None:
    """The gate of a trained adapter, where the recipe asks for one."""
    retain = experiment.recipe.train.retain
    if retain is None or retain.by != "gate":
        return None
    assert experiment.retain_windows is not None
    rows = experiment.training(cell.seed).encoded
    return fit_gate(experiment.base, rows, experiment.retain_windows, cell.seed)


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


def _predicted(experiment: Experiment, adapter: Adapter, observer: RunObserver) -> list[Prediction]:
    """Predictions for the test rows, in every process; each makes an equal part of them."""
    recipe = experiment.recipe

    def work(rows: Sequence[Example]) -> list[Prediction]:
        batch_size = recipe.evaluate.batch_size
        return predict(adapter, rows, recipe.task, batch_size, observer.predicting)

    return shared(experiment.data.test, work, processes(experiment.base.model.device))


def _measure(
    experiment: Experiment,
    adapter: Adapter,
    cell: Cell,
    progress: Progress,
    predictions: Sequence[Prediction],
    eval_seconds: float,
    retention: dict[str, Any] | None,
    started: datetime,
) -> CellRecord:
    recipe, base, method, folder = experiment.recipe, experiment.base, cell.method, cell.folder
    scores = score_intervals(predictions, recipe.task.metrics, recipe.evaluate.bootstrap)
    latency = Latency(None, None)
    if base.head is None:
        latency = measure_latency(adapter, experiment.probe_ids[0, :32].tolist())
    lines = [json.dumps(p.as_dict(), ensure_ascii=False) for p in predictions]
    atomic.write_text(folder / "predictions.jsonl", "\n".join(lines) + "\n")
    record = CellRecord(
        recipe=recipe.name,
        cell=cell.name,
        method=method.title,
        kind=method.kind,
        family=cell.family or method.title,
        sweep=cell.sweep,
        tuned=cell.tuned,
        seed=cell.seed,
        settings=method.model_dump(),
        n_train=len(experiment.training(cell.seed).encoded) if method.trains else 0,
        n_test=len(predictions),
        test_split=experiment.data.test_split,
        test_chose=experiment.data.test_chose,
        test_rows=experiment.test_fingerprint(),
        retention_text=experiment.retention_fingerprint(),
        base_fingerprint=base.fingerprint,
        metrics={name: interval.mean for name, interval in scores.items()},
        score=recipe.task.metrics[0],
        trainable_parameters=adapter.trainable_parameters,
        base_parameters=base.parameters,
        bytes_on_disk=0,
        train_seconds=progress.seconds,
        train_steps=progress.step,
        best_step=progress.best_step,
        tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
        peak_memory_bytes=progress.peak_memory_bytes if method.trains else None,
        eval_seconds=eval_seconds,
        curve=progress.curve,
        retention=retention,
        gate=_openings(experiment, adapter),
        decode_ms=latency.adapter,
        added_ms=latency.added,
        adapter_off_exact=_off_exact(experiment, adapter),
        adapter_path=None,
        versions=versions(),
        hardware=hardware(base.model.device),
        started=started.isoformat(timespec="seconds"),
    )
    if not method.trains:
        return record
    path, size = _save(adapter, folder, experiment, record, scores)
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
    folder: Path,
    experiment: Experiment,
    record: CellRecord,
    scores: Mapping[str, Interval],
) -> tuple[str, int]:
    """Save the trained adapter (or model); returns its folder's name and its weights' bytes."""
    if not adapter.has_off:
        with atomic.folder(folder / "model", replace=True) as scratch, no_weights_bar():
            adapter.model.save_pretrained(scratch)
            experiment.base.tokenizer.save_pretrained(scratch)
        return "model", sum(f.stat().st_size for f in (folder / "model").glob("*.safetensors"))
    info = adapter_info(experiment, record, scores)
    recipe = recipe_of_cell(experiment.recipe, record.settings, record.seed)
    files = replace(adapter.files(), info=info, texts={RECIPE: recipe})
    write_adapter(folder / "adapter", files, replace=True)
    return "adapter", (folder / "adapter" / WEIGHTS).stat().st_size
