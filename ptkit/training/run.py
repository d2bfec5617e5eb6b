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

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from ptkit.data.encoded import EncodedExample, each_pass
from ptkit.data.examples import Example
from ptkit.data.lazy import Mapped
from ptkit.data.task import task_words
from ptkit.errors import UserError
from ptkit.evaluation.predict import require_room
from ptkit.evaluation.retention import measure_retention
from ptkit.formats import atomic
from ptkit.formats.adapter_files import read_adapter
from ptkit.formats.cell_record import TRIAL_RECORD, CellRecord, TrialRecord
from ptkit.formats.folder_lock import held
from ptkit.methods import (
    ADAPTERS,
    Adapter,
    Demonstrations,
    create_adapter,
    require_same_base,
    restored,
)
from ptkit.recipe.tasks import ClassificationTask, HeadedTask
from ptkit.runtime.dropout import require_no_dropout
from ptkit.runtime.gate import Gate
from ptkit.section import MethodSection
from ptkit.training.adapter_trainer import Job
from ptkit.training.autotune import Autotuned, autotune
from ptkit.training.cell import Cell
from ptkit.training.cell_folder import leave_unstarted, open_cell_folder
from ptkit.training.checkpoint import Progress, remove_checkpoints
from ptkit.training.experiment import Experiment
from ptkit.training.failure import FAILED
from ptkit.training.gate import fit_gate
from ptkit.training.learnt import signs_of_nothing
from ptkit.training.loop import fit
from ptkit.training.measure import (
    Results,
    measured,
    predicted,
    scores_of,
    validation_score,
    written,
)
from ptkit.training.observer import RunObserver
from ptkit.training.preference import preference_of


def run_cells(
    experiment: Experiment, cells: Sequence[Cell], observer: RunObserver | None = None
) -> list[CellRecord]:
    """Train `cells` in one batch, measure and save each; finished ones are read back, killed
    ones go on where they were.

    Raises FolderError when a folder holds a cell of another recipe, seed, base or data, or another
    process works in it. Raises UserError when several cells cannot share a batch.
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
        with _refused_at_once([cell]):
            method = _chosen(experiment, cell).section
            set_seed(cell.seed)
            adapter = new_adapter(experiment, cell, method)
        try:
            (progress,) = _fit(experiment, [cell], [adapter], observer)
        finally:
            adapter.close()
        loss, seconds = progress.best_loss, progress.seconds
        TRIAL_RECORD.write(done, TrialRecord(validation_loss=loss, seconds=seconds))
        observer.trial_finished(cell.name, progress.best_loss)
    _tidy(cell.folder)
    return TRIAL_RECORD.read_file(done).validation_loss


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
        with _refused_at_once(cells):
            choices = [_chosen(experiment, cell) for cell in cells]
            for cell, choice in zip(cells, choices, strict=True):
                set_seed(cell.seed)
                adapters.append(new_adapter(experiment, cell, choice.section))
        progresses = [Progress() for _ in cells]
        if trains:
            progresses = _fit(experiment, cells, adapters, observer, scored=True)
        parallel = experiment.parallel
        for i, (cell, adapter) in enumerate(zip(cells, adapters, strict=True)):
            if trains:
                adapter.input_gate = _gate(experiment, cell)
            clock = time.perf_counter()
            predictions = predicted(experiment, adapter, observer)
            seconds = time.perf_counter() - clock
            retention = None
            if experiment.general is not None:
                retention = measure_retention(adapter, experiment.general, parallel.map).recorded
            if not parallel.measures:
                continue
            scores = scores_of(experiment, predictions)
            results = Results(predictions, scores, seconds, retention)
            record = measured(experiment, adapter, cell, progresses[i], results, started)
            # Reading it off the adapter runs the base, too: a soft start is compiled.
            files = adapter.files() if trains and adapter.has_off else None
            if not parallel.state.is_main_process:  # the first one writes for all
                continue
            record = written(experiment, adapter, cell, record, results, files)
            record = record.updated(trained_together=len(cells), chosen=choices[i].record)
            record.write(cell.done)
            _tidy(cell.folder)
            signs = signs_of_nothing(predictions, experiment.recipe.task) if trains else []
            if signs:
                observer.noticed(cell.name, signs)
            observer.cell_finished(record, reused=False)
            records.append(record)
        parallel.state.wait_for_everyone()
        if not parallel.state.is_main_process:
            records = [CellRecord.read(cell.done) for cell in cells]
    finally:
        for adapter in adapters:
            adapter.close()
    return records


@contextmanager
def _refused_at_once(cells: Sequence[Cell]) -> Iterator[None]:
    """Where the user's mistake shows while adapters are made, it leaves nothing behind."""
    try:
        yield
    except UserError:
        for cell in cells:
            leave_unstarted(cell)
        raise


def _tidy(folder: Path) -> None:
    """Delete what a finished cell no longer needs."""
    (folder / FAILED).unlink(missing_ok=True)
    remove_checkpoints(folder)
    atomic.remove_leftovers(folder)


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
    parallel = experiment.parallel
    with nullcontext() if parallel.together else parallel.state.main_process_first():
        return autotune(method, make, experiment.recipe.task, examples, cell.folder)


def demonstrations(experiment: Experiment, seed: int) -> Demonstrations:
    """What the adapters of `seed` may start from. A head's labels are no words the base reads."""
    rows, task = experiment.training(seed).examples, experiment.recipe.task
    texts: Sequence[str]
    if isinstance(task, HeadedTask):
        texts = Mapped(lambda example: example.input, rows)
        return Demonstrations(texts, seed, folder=experiment.folder)
    template = experiment.chat_template
    if template is not None:
        # A demonstration stands within a text: what begins one is not there again.
        begin = str(template.tokenizer.decode(experiment.base.lead))

        def said(example: Example) -> str:
            assert example.dialogue is not None
            dialogue = example.dialogue
            return template.render(dialogue.messages, dialogue.tools).removeprefix(begin)

        texts = Mapped(said, rows)
        return Demonstrations(texts, seed, [], task_words(task), experiment.folder)
    texts = Mapped(lambda example: example.input + example.target, rows)
    labels = [*task.verbalizer.values()] if isinstance(task, ClassificationTask) else []
    return Demonstrations(texts, seed, labels, task_words(task), experiment.folder)


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
    *,
    scored: bool = False,
) -> list[Progress]:
    if len(cells) > 1:
        require_no_dropout(experiment.base)
    jobs = [new_job(experiment, cell, own) for cell, own in zip(cells, adapters, strict=True)]
    if experiment.recipe.evaluate.curve_rows is not None and scored:
        jobs = [replace(job, score=partial(validation_score, experiment)) for job in jobs]
    # One bar for all of them: they take their steps together.
    return fit([replace(jobs[0], report=observer.stepped), *jobs[1:]])


def new_job(experiment: Experiment, cell: Cell, adapter: Adapter) -> Job:
    """What trains `adapter` as the recipe says, in the cell's folder."""
    recipe, training = experiment.recipe, experiment.training(cell.seed).encoded
    for rows in (training, experiment.validation):
        require_room(adapter, rows, recipe.task)
        _require_one_input(adapter, rows)
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
        preference=preference_of(recipe.task),
    )


def _require_one_input(adapter: Adapter, rows: Sequence[EncodedExample]) -> None:
    """Raise UserError for an adapter that is placed by, or made from, the end of the one input,
    where rows have several answers in one pass."""
    several = any(row.learnt is not None for row in each_pass(rows))
    if several and (adapter.infix or adapter.depends_on_input):
        raise UserError(
            f"`{adapter.section.title}` depends on the whole input before an answer, and all "
            "answers of a conversation are learnt in one pass; use `task.loss: last`, or one "
            "answer after a prompt"
        )


def _gate(experiment: Experiment, cell: Cell) -> Gate | None:
    """The gate of a trained adapter, where the recipe asks for one."""
    retain = experiment.recipe.train.retain
    if retain is None or retain.by != "gate":
        return None
    assert experiment.retain_windows is not None
    rows = experiment.training(cell.seed).encoded
    return fit_gate(experiment.base, rows, experiment.retain_windows, cell.seed)
