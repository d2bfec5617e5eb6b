"""What the command line does, from Python.

`train` and `compare` are here, `load_adapter` in `ptkit.loaded_adapter`; `push`, `pull` and
`verify` are in `ptkit.hub`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptkit.comparison.cells import failures
from ptkit.comparison.figures import parameters, seconds, size
from ptkit.comparison.grid import Experiments, forecast_grid, require_grid, run_grid
from ptkit.comparison.notebook import shown_in_notebook
from ptkit.comparison.on_ray import run_on_ray
from ptkit.comparison.outputs import write_outputs
from ptkit.comparison.summary import MethodSummary, summarise
from ptkit.comparison.table import html_table
from ptkit.data.in_memory import Rows, with_rows
from ptkit.drafting.draft import draft_recipe
from ptkit.drafting.files import Source
from ptkit.drafting.goal import Goal
from ptkit.errors import PtkitError, UserError, did_you_mean
from ptkit.extras import require
from ptkit.formats import atomic
from ptkit.formats.adapter_folder import CONFIG
from ptkit.formats.cell_record import CellRecord
from ptkit.formats.folder_lock import held, require_free
from ptkit.formats.places import find_adapter
from ptkit.launched import is_first, world_size
from ptkit.methods.catalogue import method_sections
from ptkit.options import SEEDS
from ptkit.recipe.load import LoadedRecipe, load_recipe
from ptkit.recipe.one_method import one_method
from ptkit.recipe.schema import Recipe, TrainSection
from ptkit.runtime.base_model import Base
from ptkit.runtime.devices import resolve_device
from ptkit.runtime.given_base import given_base
from ptkit.runtime.model_names import TINY_EN
from ptkit.section import MethodSection
from ptkit.training.cell import IDENTITY, Cell, cell_name
from ptkit.training.checked import checked
from ptkit.training.experiment import prepare
from ptkit.training.failure import Failure, failed_cells
from ptkit.training.forecast import Forecast, forecast, is_long
from ptkit.training.observer import RunObserver
from ptkit.training.processes import processes
from ptkit.training.ready import require_ready, require_supported
from ptkit.training.run import run_cells


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, what was measured, and the recipe it is of.

    `recipe.text` is the recipe as YAML with its comments, one that was drafted included.
    """

    folder: Path
    record: CellRecord
    recipe: LoadedRecipe

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter, in PEFT's layout. Raises AdapterError for full
        fine-tuning, which trains a whole model."""
        return find_adapter(self.folder)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        record = self.record
        row = {
            "method": record.method,
            **{name: f"{value:.1f}" for name, value in record.metrics.items()},
            "seed": str(record.seed),
            "trained": parameters(
                record.trainable_parameters, record.trainable_parameters / record.base_parameters
            ),
            "on disk": size(record.bytes_on_disk),
            "time": seconds(record.train_seconds, record.train_steps > 0),
        }
        scored = f"{record.recipe}: n = {record.n_test} {record.rows_scored}; {self.folder}"
        return shown_in_notebook([row], scored)


@dataclass(frozen=True)
class Comparison:
    """A finished comparison: its folder, every cell's record, and one summary per method.

    failed: the cells without a record, and why; the same call tries them again
    """

    folder: Path
    records: list[CellRecord]
    summaries: list[MethodSummary]
    failed: list[Failure]

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.folder / "report.html"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return html_table(self.summaries, self.failed)


def train(
    recipe: str | Path | Mapping[str, Any] | LoadedRecipe | None = None,
    *,
    data: Source | None = None,
    model: str | Path | Base | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    goal: Goal = "auto",
    label: str | None = None,
    text: str | Sequence[str] = (),
    target: str | None = None,
    validation: Source | None = None,
    test: Source | None = None,
    method: str | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    start_from: str | Path | None = None,
    overrides: Sequence[str] = (),
    dataset: Rows | None = None,
    fresh: bool = False,
    base: Base | None = None,
    observer: RunObserver | None = None,
    **settings: Any,
) -> Run:
    """Train one method of a recipe and measure it, as `ptkit train` does.

    recipe: a file, the name of a shipped recipe, a mapping of a recipe's keys, or a loaded one;
        none with `data`
    data: what a recipe is drafted for, as `ptkit train --data` does: a file or its folder, or rows
        (see `draft_recipe`). `Run.recipe` is the draft
    model: with `data`: the base; a name, a folder, a GGUF file, what `load_base` gave, or a model
        of transformers with its `tokenizer`; default: `tiny-en`
    goal, label, text, target, validation, test: with `data`: see `draft_recipe`
    settings: with `data`: keys of the method and of a recipe's `train`, such as
        `num_virtual_tokens=20`, `learning_rate=0.1`, `steps=200`, `batch_size=8`
    method: which of the recipe's methods (label or kind); may be left out where only one is
        trained. With `data`: the kind of the method; default: by the number of rows and the base
    seed: default: the recipe's first
    out: default `runs/RECIPE/METHOD-seedN`; a run that was stopped there goes on
    start_from: an adapter folder to train further
    overrides: `key.path=value` assignments to the recipe
    dataset: rows in place of those the recipe names: a `datasets.Dataset` or `DatasetDict`, a list
        of mappings, or a mapping from splits to either
    fresh: delete what is in the folder and start over
    base: a loaded base to use instead of loading the recipe's

    Raises RecipeError, DataError, ModelError or UserError, before anything is trained, for what
    cannot be carried out.
    """
    if data is None:
        about = {
            "model": model, "tokenizer": tokenizer, "goal": None if goal == "auto" else goal,
            "label": label, "text": text or None, "target": target, "validation": validation,
            "test": test,
        }  # fmt: skip
        others = [name for name, value in about.items() if value is not None]
        loaded = _loaded(_only_recipe(recipe, [*others, *settings]), overrides, dataset)
    else:
        _require_no_other(recipe=recipe, dataset=dataset, base=base)
        if isinstance(model, Base | PreTrainedModel):
            base = given_base(model, tokenizer, "train(model=model, tokenizer=tokenizer, ...)")
            model = base
        draft = draft_recipe(
            data, model=TINY_EN if model is None else model, goal=goal, label=label, text=text,
            target=target, validation=validation, test=test, method=method, settings=settings,
            overrides=overrides,
        )  # fmt: skip
        loaded, method = draft.loaded, draft.method
    section, used_seed, folder = _chosen(loaded, method, seed, out)
    require_supported(loaded.recipe, [section])
    if fresh:
        require_own(folder)
    cell = _cell(section, used_seed, folder, start_from)
    experiment = prepare(loaded, base)
    require_ready(experiment, [cell])  # what cannot be carried out leaves nothing behind
    if fresh:  # nor does it delete anything
        _start_over(folder, loaded)
    if observer is not None:
        observer.prepared(experiment.data_lines())
        if is_long(experiment, [cell]):
            observer.planned(lambda: forecast(experiment, [cell]))
    (record,) = run_cells(experiment, [cell], observer)
    return Run(folder, record, loaded)


def _only_recipe(
    recipe: str | Path | Mapping[str, Any] | LoadedRecipe | None, others: Sequence[str]
) -> str | Path | Mapping[str, Any] | LoadedRecipe:
    """The recipe. Raises UserError where there is none, or something beside it that drafts one."""
    if recipe is None:
        raise UserError("nothing to train: give a recipe, or `data=` with rows to draft one for")
    for name in others:
        raise UserError(
            f"`{name}=` is for a recipe that is drafted for `data=`, and one was given: change it "
            f'there, or with overrides=["{_key(name)}=..."]'
        )
    return recipe


def _key(name: str) -> str:
    """The key of a recipe that an argument of `train` stands for. Raises UserError for none."""
    if name in _KEYS:
        return _KEYS[name]
    if name in TrainSection.model_fields:
        return f"train.{name}"
    if any(name in section.model_fields for section in method_sections().values()):
        return f"methods.N.{name}"
    raise UserError(f"`train` has no argument `{name}`; {did_you_mean(name, _ARGUMENTS)}")


def _require_no_other(**others: object) -> None:
    """Raise UserError for what cannot stand beside `data`."""
    for name, value in others.items():
        if value is not None:
            fix = {
                "recipe": "hand rows to a recipe with `dataset=`",
                "dataset": "leave `dataset=` out, which hands rows to a recipe",
                "base": "name the base with `model=`, which takes a loaded one, too",
            }[name]
            raise UserError(f"`data=` drafts a recipe, and `{name}` was given beside it; {fix}")


def _loaded(
    recipe: str | Path | Mapping[str, Any] | LoadedRecipe,
    overrides: Sequence[str],
    dataset: Rows | None,
) -> LoadedRecipe:
    """The recipe that the arguments of `train` and `compare` ask for."""
    if isinstance(recipe, LoadedRecipe):
        if overrides:
            raise UserError("the recipe is loaded already; give `overrides` to `load_recipe`")
        loaded = recipe
    else:
        loaded = load_recipe(recipe, overrides)
    return loaded if dataset is None else with_rows(loaded, dataset)


def _chosen(
    loaded: LoadedRecipe, method: str | None, seed: int | None, out: str | Path | None
) -> tuple[MethodSection, int, Path]:
    """The method, the seed and the folder that the arguments of `train` ask for."""
    section = one_method(loaded.recipe, method)
    used_seed = loaded.recipe.seeds[0] if seed is None else _seed(seed)
    return section, used_seed, run_folder(loaded.recipe, section, used_seed, out)


def _seed(given: Any) -> int:
    """The seed as Python's own number; NumPy's are taken, too. Raises UserError for another."""
    try:
        seed = -1 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        seed = -1
    if not 0 <= seed < SEEDS:
        raise UserError(f"the seed is {given!r}; it is a whole number from 0 to {SEEDS - 1}")
    return seed


def _cell(section: MethodSection, seed: int, folder: Path, start_from: str | Path | None) -> Cell:
    origin = None if start_from is None else find_adapter(Path(start_from))
    return Cell(section, seed, folder, origin)


#: What may be said of `data`, and the key of a recipe that says it.
_KEYS = {
    "model": "model.id", "tokenizer": "model.id", "goal": "task.kind", "label": "task.label",
    "text": "task.input", "target": "task.target", "validation": "task.data.files.validation",
    "test": "task.data.files.test",
}  # fmt: skip
_ARGUMENTS = [name for name in signature(train).parameters if name != "settings"]


def plan_training(
    recipe: str | Path | Mapping[str, Any] | LoadedRecipe,
    *,
    method: str | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    start_from: str | Path | None = None,
    overrides: Sequence[str] = (),
    dataset: Rows | None = None,
    fresh: bool = False,
) -> tuple[list[str], Forecast]:
    """What `train` with these arguments would do. It tells what was decided about the data, in
    lines, and what the run would take, measured on a few steps. Nothing is written to its
    folder."""
    loaded = _loaded(recipe, overrides, dataset)
    section, used_seed, folder = _chosen(loaded, method, seed, out)
    require_supported(loaded.recipe, [section])
    if fresh:
        require_own(folder)
    cell = _cell(section, used_seed, folder, start_from)
    experiment = prepare(loaded)
    require_ready(experiment, [cell])
    return experiment.data_lines(), forecast(experiment, [cell], fresh=fresh)


def plan_comparison(
    recipe: str | Path | Mapping[str, Any] | LoadedRecipe,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    dataset: Rows | None = None,
    fresh: bool = False,
) -> tuple[list[str], Forecast]:
    """What `compare` with these arguments would do; see `plan_training`."""
    loaded = _loaded(recipe, overrides, dataset)
    folder = Path("comparisons") / loaded.recipe.name if out is None else Path(out)
    if fresh:
        require_own(folder)
    return forecast_grid(loaded, folder, fresh=fresh)


def compare(
    recipe: str | Path | Mapping[str, Any] | LoadedRecipe,
    *,
    out: str | Path | None = None,
    overrides: Sequence[str] = (),
    dataset: Rows | None = None,
    fresh: bool = False,
    ray: str | bool = False,
    cell_cpus: float = 1,
    cell_gpus: float = 0,
    observer: RunObserver | None = None,
) -> Comparison:
    """Run every method of a recipe with every seed, as `ptkit compare` does.

    out: default `comparisons/RECIPE`; a comparison that was stopped there goes on
    ray: run the cells as tasks of a Ray cluster: its address `ray://HOST:PORT`, or True for one on
        this machine
    cell_cpus, cell_gpus: what one cell needs there

    A cell that fails, for its loss is not finite, say, leaves the others alone and is in the
    result's `failed`. Raises PtkitError where none has a result. For the other arguments, and what
    else is raised, see `train`.
    """
    loaded = _loaded(recipe, overrides, dataset)
    if ray and loaded.given is not None:
        raise UserError("cells of a cluster read their data themselves; name it in `task.data`")
    folder = Path("comparisons") / loaded.recipe.name if out is None else Path(out)
    require("report", "`ptkit compare`")
    experiments = Experiments(loaded)
    if fresh:
        require_own(folder)
        if ray:  # whose nodes load the base
            checked(loaded)
        else:
            require_grid(loaded, folder, experiments)
        _start_over(folder, loaded)
    with held(folder):
        if ray:
            address = ray if isinstance(ray, str) else None
            records = run_on_ray(
                loaded, folder, address, cpus=cell_cpus, gpus=cell_gpus, observer=observer
            )
        else:
            records = run_grid(loaded, folder, observer=observer, experiments=experiments)
        failed = failures(loaded.recipe, folder)
        if not records:
            raise PtkitError(failed_cells(failed))
        shown = write_outputs if is_first() else summarise
        return Comparison(folder, records, shown(folder, records, loaded.recipe), failed)


def run_folder(recipe: Recipe, method: MethodSection, seed: int, out: str | Path | None) -> Path:
    """The folder of a run: `out`, or the default one."""
    return Path("runs") / recipe.name / cell_name(method, seed) if out is None else Path(out)


def require_own(folder: Path) -> None:
    """Raise UserError when `folder` is there, and no run or comparison of ptkit's, or in use."""
    if not folder.exists():
        return
    comparison = (folder / "recipe.yaml").exists() and not (folder / CONFIG).exists()
    if not comparison and not (folder / IDENTITY).exists():
        raise UserError(f"{folder} is not a run of ptkit's; --fresh does not delete it")
    require_free(folder)


def _start_over(folder: Path, loaded: LoadedRecipe) -> None:
    """Delete `folder`, a run or comparison, once for all processes."""
    if is_first():
        require_own(folder)  # again: somebody may work in it by now
        atomic.remove(folder)  # what a killed call left of it, too
    if world_size() > 1:  # none looks for finished cells before the old ones are deleted
        processes(resolve_device(loaded.recipe.model.device)).wait_for_everyone()
