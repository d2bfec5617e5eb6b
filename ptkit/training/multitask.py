"""One soft prompt for several tasks, trained on the rows of all of them (Wang et al. 2023).

Folder of a multi-task prompt:
    multitask.json      what it is; a resumed one must match it
    checkpoint-STEP/    while training
    adapter/            all tasks in one file, PEFT's MULTITASK_PROMPT_TUNING
    tasks/NAME/adapter  one task's soft prompt, an adapter like any other
    tasks/NAME/predictions.jsonl
    mean/adapter        the mean of the tasks' prompts, a start for another task
    record.json         the measurements; its presence means that it is finished
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from pydantic import Field

from ptkit.errors import FolderError, ModelError, UserError
from ptkit.evaluation.predict import predict, require_room
from ptkit.evaluation.score import score_intervals
from ptkit.evaluation.statistics import Interval
from ptkit.formats import atomic
from ptkit.formats.adapter_files import write_adapter
from ptkit.formats.adapter_info import AdapterInfo, MethodInfo, MultitaskInfo
from ptkit.formats.cell_record import CurvePoint
from ptkit.formats.figures import scored_rows
from ptkit.formats.folder_lock import held
from ptkit.formats.typed_file import FileKind, FileSection, unchanged
from ptkit.methods import Adapter
from ptkit.methods.multitask_prompt.adapter import MultitaskPrompt
from ptkit.methods.multitask_prompt.settings import MultitaskSection
from ptkit.methods.prompt_tuning.settings import PromptTuningSection
from ptkit.methods.start import start_embeddings, start_tokens
from ptkit.recipe.load import LoadedRecipe
from ptkit.recipe.tasks import HeadedTask, PreferenceTask
from ptkit.runtime.base_model import Base, load_base
from ptkit.training.adapter_trainer import Job
from ptkit.training.checkpoint import Progress, remove_checkpoints
from ptkit.training.experiment import Experiment, prepare
from ptkit.training.loop import fit
from ptkit.training.observer import RunObserver
from ptkit.training.provenance import base_info, data_info, task_info, versions
from ptkit.training.run import demonstrations
from ptkit.training.run_folder import delete_run_folder, open_run_folder
from ptkit.training.task_rows import TaskRows

#: The file that says what a folder is, and what that is called.
IDENTITY, WHAT = "multitask.json", "multi-task prompt"


class TaskScores(FileSection):
    """What the prompt of one task makes of its test rows; the first metric is the score.

    test_split, test_chose, test_repeats: what these rows are (see
    `ptkit.formats.cell_record.CellRecord`)
    """

    metrics: dict[str, Interval]
    n_train: int
    n_test: int
    test_split: str = "test"
    test_chose: bool = False
    test_repeats: dict[str, int] = Field(default_factory=dict)

    @property
    def rows_scored(self) -> str:
        """What the rows are that the scores are on, in words that follow a number."""
        return scored_rows(self.test_split, self.test_chose, self.test_repeats)


class Multitask(FileSection):
    """A finished multi-task prompt: `record.json` in its folder.

    tasks: recipe's name -> scores; trainable_parameters: of all tasks together
    curve: `{step, train_loss, validation_loss}`, nats per target token, every task's tokens
        weighed to count by its rows
    """

    folder: Path = Field(default=Path(), exclude=True)
    tasks: dict[str, TaskScores]
    virtual_tokens: int
    rank: int
    trainable_parameters: int
    base_parameters: int
    steps: int
    best_step: int
    seconds: float
    seed: int
    curve: list[CurvePoint]

    def adapter(self, task: str | None = None) -> Path:
        """The adapter of one task; without its name the file of all of them."""
        return (self.folder / "tasks" / task if task else self.folder) / "adapter"

    @property
    def mean(self) -> Path:
        """The mean of the tasks' prompts, to start another task from (`start: adapter`)."""
        return self.folder / "mean" / "adapter"

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON values, without its folder."""
        return self.model_dump(mode="json")

    @classmethod
    def read(cls, folder: Path) -> Multitask:
        """The record in `folder`. Raises FolderError where it is damaged, or of a newer version."""
        return _RECORD.read_file(folder / "record.json").updated(folder=folder)


def _says_which_rows(values: dict[str, Any]) -> dict[str, Any]:
    """0 -> 1: each task says which rows were scored; versions that did not scored `test`."""
    tasks = values.get("tasks")
    if not isinstance(tasks, dict):
        return dict(values)
    said = {"test_split": "test", "test_chose": False}
    named = {n: {**said, **task} if isinstance(task, dict) else task for n, task in tasks.items()}
    return {**values, "tasks": named}


# 1 -> 2 brought `test_repeats`; versions that did not count are taken to have none.
_RECORD = FileKind(
    Multitask, (_says_which_rows, unchanged), FolderError, "pass --fresh to train it again"
)


def multitask(
    recipes: Sequence[LoadedRecipe],
    out: Path | str,
    *,
    rank: int = 1,
    task_learning_rate: float = 0.1,
    fresh: bool = False,
    observer: RunObserver | None = None,
    base: Base | None = None,
) -> Multitask:
    """Train one multi-task prompt on the tasks of `recipes` and measure each task's prompt on its
    test rows. It has the settings of their prompt tuning and their first seed.

    rank: of each task's matrix; task_learning_rate: of the matrices
    fresh: delete what is in the folder and start over
    base: a loaded one, instead of loading the recipes'

    A killed run goes on when it is called again. Raises UserError for recipes that do not belong
    together, or when `out` holds something else.
    """
    observer, out = observer or RunObserver(), Path(out)
    section, seed = _common(recipes, rank, task_learning_rate)
    first = recipes[0].recipe
    base = base or load_base(**first.model.model_dump())
    if base.encoder_decoder:
        raise ModelError(
            f"{base.id} is an encoder-decoder; a multi-task prompt is trained on causal language "
            "models"
        )
    experiments = {r.recipe.name: prepare(_without_retention(r), base) for r in recipes}
    if fresh:  # not before all that may be refused
        start_over(out)
    with held(out):
        _open_folder(out, section, seed, experiments)
        if (out / "record.json").exists():
            remove_checkpoints(out)  # it may have been killed just after its record
            return Multitask.read(out)
        rows = {name: e.training(seed).encoded for name, e in experiments.items()}
        adapter = _created(section, base, seed, experiments)
        for name, experiment in experiments.items():
            for part in (rows[name], experiment.validation):
                require_room(adapter, part, experiment.recipe.task)
        observer.cell_started(" + ".join(experiments), first.train.steps)
        (progress,) = fit([
            Job(
                adapter,
                TaskRows([*rows.values()]),
                TaskRows([e.validation for e in experiments.values()]),
                first.train, float(section.learning_rate), seed, out, observer.stepped,
                beta2=section.beta2,
            )
        ])  # fmt: skip
        return _measured(out, adapter, progress, experiments, seed, observer)


def start_over(folder: Path) -> None:
    """Delete the multi-task prompt in `folder`. Raises UserError when it holds something else."""
    delete_run_folder(folder / IDENTITY, WHAT)


def _common(
    recipes: Sequence[LoadedRecipe], rank: int, task_learning_rate: float
) -> tuple[MultitaskSection, int]:
    """The settings of prompt tuning that all recipes have, and their seed."""
    if len(recipes) < 2:
        raise UserError("a multi-task prompt needs the recipes of at least two tasks")
    names = [loaded.recipe.name for loaded in recipes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two recipes are called `{twice[0]}`; change the `name` of one")
    sections = [_prompt_tuning(loaded) for loaded in recipes]
    first = recipes[0].recipe
    for name, own, loaded in zip(names, sections, recipes, strict=True):
        compared = (
            ("model", loaded.recipe.model, first.model),
            ("train", loaded.recipe.train, first.train),
            ("prompt_tuning", own, sections[0]),
        )
        for what, mine, theirs in compared:
            a, b = mine.model_dump(exclude={"label"}), theirs.model_dump(exclude={"label"})
            if key := next((key for key in a if a[key] != b[key]), None):
                raise UserError(
                    f"`{names[0]}` has `{key}: {b[key]}` in its `{what}`, `{name}` has `{a[key]}`; "
                    "one prompt is trained one way: make them equal (--set)"
                )
    if first.train.retain is not None:
        raise UserError("`train.retain` is for single tasks; remove it (--set train.retain=null)")
    settings = sections[0].model_dump(exclude={"kind", "label"})
    own = MultitaskSection(**settings, rank=rank, task_learning_rate=task_learning_rate)
    return own, first.seeds[0]


def _prompt_tuning(loaded: LoadedRecipe) -> PromptTuningSection:
    recipe = loaded.recipe
    if isinstance(recipe.task, HeadedTask):
        raise UserError(
            f"`{recipe.name}` has a task of `kind: {recipe.task.kind}`, whose head is of its own "
            "labels; a multi-task prompt is for tasks that answer in words"
        )
    if isinstance(recipe.task, PreferenceTask):
        raise UserError(
            f"`{recipe.name}` has a task of `kind: preference`, whose loss is of pairs; a "
            "multi-task prompt learns targets"
        )
    found = [m for m in recipe.methods if isinstance(m, PromptTuningSection)]
    if len(found) != 1:
        raise UserError(
            f"`{recipe.name}` has {len(found)} methods of `kind: prompt_tuning`; a multi-task "
            "prompt takes its settings from the one of each recipe"
        )
    (section,) = found
    if section.learning_rate == "auto" or section.start in ("adapter", "random"):
        raise UserError(
            f"`{recipe.name}`: a multi-task prompt takes a `learning_rate` in figures, and starts "
            "from tokens: `start` of task (`auto` is that), examples, labels, text or vocabulary"
        )
    # No run looks for the start of a prompt of several tasks.
    return section.model_copy(update={"start": "task"}) if section.start == "auto" else section


def _without_retention(loaded: LoadedRecipe) -> LoadedRecipe:
    return replace(loaded, recipe=loaded.recipe.model_copy(update={"retention": None}))


def _open_folder(
    out: Path, section: MultitaskSection, seed: int, experiments: dict[str, Experiment]
) -> None:
    """Write what the prompt is to `out`, or raise UserError when another one is there."""
    first = next(iter(experiments.values()))
    identity = {
        "base": first.base.fingerprint,
        "method": section.model_dump(),
        "train": first.recipe.train.model_dump(exclude=first.recipe.train.NOT_OF_RESULT),
        "seed": seed,
        "tasks": {
            name: {"task": e.recipe.task.model_dump(), "data": e.data_fingerprint(seed)}
            for name, e in experiments.items()
        },
        "test_rows": {name: e.test_fingerprint() for name, e in experiments.items()},
    }
    open_run_folder(out / IDENTITY, identity, WHAT, alone=True, added=("test_rows",))


def _created(
    section: MultitaskSection, base: Base, seed: int, experiments: dict[str, Experiment]
) -> MultitaskPrompt:
    """A fresh prompt whose shared part starts from the tasks' own, by turns."""
    set_seed(seed)
    starts = []
    for experiment in experiments.values():
        tokens = start_tokens(section, base, demonstrations(experiment, seed))
        assert tokens is not None
        starts.append(tokens)
    # Of each task's start the part that its turn leaves room for: all are in the shared one.
    count, tasks = section.num_virtual_tokens, len(starts)
    ends = [count * (n + 1) // tasks for n in range(tasks)]
    begins = [0, *ends[:-1]]
    mixed = [own[: end - begin] for own, begin, end in zip(starts, begins, ends, strict=True)]
    return MultitaskPrompt(section, base, tasks, start_embeddings(base, torch.cat(mixed)))


def _measured(
    out: Path,
    adapter: MultitaskPrompt,
    progress: Progress,
    experiments: dict[str, Experiment],
    seed: int,
    observer: RunObserver,
) -> Multitask:
    """Write the adapters and what they make of the test rows, then the record."""
    scores = {}
    for number, (name, experiment) in enumerate(experiments.items()):
        own, recipe = adapter.as_prompt(adapter.of_task(number)), experiment.recipe
        test = experiment.data.test
        predictions = predict(
            own, test, recipe.task, recipe.evaluate.batch_size, observer.predicting
        )
        found = score_intervals(predictions, recipe.task.metrics, recipe.evaluate.bootstrap)
        scores[name] = TaskScores(
            metrics=found,
            n_train=len(experiment.training(seed).encoded),
            n_test=len(predictions),
            test_split=experiment.data.test_split,
            test_chose=experiment.data.test_chose,
            test_repeats=experiment.data.test_repeats,
        )
        lines = [json.dumps(p.as_dict(), ensure_ascii=False) for p in predictions]
        folder = out / "tasks" / name
        atomic.write_text(folder / "predictions.jsonl", "\n".join(lines) + "\n")
        info = AdapterInfo(
            recipe=name,
            task=task_info(recipe.task),
            data=data_info(recipe.task.data),
            metrics={name: interval.recorded for name, interval in found.items()},
            n_train=scores[name].n_train,
            n_test=scores[name].n_test,
            test_split=scores[name].test_split,
            test_chose=scores[name].test_chose,
            test_repeats=scores[name].test_repeats,
        )
        _write(folder / "adapter", own, adapter, [*experiments], progress, seed, info)
        atomic.remove_leftovers(folder)
    mean, none = adapter.as_prompt(adapter.of_all()), AdapterInfo()
    _write(out / "mean" / "adapter", mean, adapter, [*experiments], progress, seed, none)
    _write(out / "adapter", adapter, adapter, [*experiments], progress, seed, none)
    done = Multitask(
        folder=out,
        tasks=scores,
        virtual_tokens=adapter.virtual_tokens,
        rank=adapter.section.rank,
        trainable_parameters=adapter.trainable_parameters,
        base_parameters=adapter.base.parameters,
        steps=progress.step,
        best_step=progress.best_step,
        seconds=progress.seconds,
        seed=seed,
        curve=[CurvePoint.model_validate(point) for point in progress.curve],
    )
    _RECORD.write(out / "record.json", done)
    remove_checkpoints(out)
    atomic.remove_leftovers(out)
    return done


def _write(
    folder: Path,
    adapter: Adapter,
    whole: MultitaskPrompt,
    tasks: Sequence[str],
    progress: Progress,
    seed: int,
    info: AdapterInfo,
) -> None:
    """Save `adapter`, a part of `whole`, with where it comes from; `info`: what its task adds."""
    section = whole.section
    settings = adapter.section.model_dump(mode="json", exclude={"start_text"})
    info = info.updated(
        base=base_info(whole.base),
        method=MethodInfo.model_validate(settings),
        multitask=MultitaskInfo(
            tasks=[*tasks], rank=section.rank, task_learning_rate=section.task_learning_rate
        ),
        seed=seed,
        trainable_parameters=adapter.trainable_parameters,
        train_steps=progress.step,
        dtype="float32",
        versions=versions(),
    )
    write_adapter(folder, replace(adapter.files(), info=info), replace=True)
