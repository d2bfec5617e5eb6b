"""The search for a method's settings: the same number of trials for each, judged on validation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ptkit.errors import PtkitError
from ptkit.extras import extra, require
from ptkit.formats import atomic
from ptkit.formats.cell_record import RecordedSearch
from ptkit.recipe.expansion import Settings, changed, values_of
from ptkit.recipe.schema import BudgetSection
from ptkit.recipe.values import Range, Values
from ptkit.section import MethodSection
from ptkit.training.cell import Cell, folder_name
from ptkit.training.cell_folder import open_cell_folder
from ptkit.training.experiment import Experiment
from ptkit.training.failure import FAILED, Failure, attempted
from ptkit.training.observer import RunObserver
from ptkit.training.run import run_trial

_OPTUNA = "`budget.sampler: optuna`"


class SearchFailedError(PtkitError):
    """No trial of a search has a result."""


@dataclass(frozen=True)
class Trial:
    """Settings that were tried and the lowest validation loss they reached, nats per token; None
    where the trial failed."""

    settings: Settings
    loss: float | None


@dataclass(frozen=True)
class Tuned:
    """A method with the best settings found. best: the trial with the lowest validation loss"""

    section: MethodSection
    trials: tuple[Trial, ...]
    best: Trial

    def recorded(self, budget: BudgetSection) -> RecordedSearch:
        """For a record: how many were tried, how many of those failed, what was chosen."""
        failed = sum(trial.loss is None for trial in self.trials)
        return RecordedSearch(
            trials=len(self.trials),
            **({"failed": failed} if failed else {}),
            sampler=budget.sampler,
            seed=budget.seed,
            settings=self.best.settings,
        )


class Searches:
    """The searches of a comparison in the folder `out`. Each is made once, and one that has failed
    is not made again while the comparison runs."""

    def __init__(self, out: Path, observer: RunObserver | None) -> None:
        self._out, self._observer = out, observer
        self._failed: dict[Path, str] = {}

    def tuned(self, experiment: Experiment, cell: Cell) -> Cell:
        """`cell` with the settings a search finds, where the recipe's budget asks for one.

        Raises SearchFailedError when no trial has a result.
        """
        budget = experiment.recipe.budget
        space = budget.search.get(cell.family or "") if budget else None
        if budget is None or not space:
            return cell
        folder = trials_folder(self._out, cell)
        if folder in self._failed:
            raise SearchFailedError(self._failed[folder])
        try:
            found = tune(experiment, cell.method, space, budget, folder, self._observer)
        except SearchFailedError as error:
            self._failed[folder] = str(error)
            raise
        return replace(cell, method=found.section, tuned=found.recorded(budget))


def trials_folder(out: Path, cell: Cell) -> Path:
    """Where the trials for the method of `cell` are, below the comparison's folder `out`."""
    # Below the variant's own folder: other data may want other settings.
    return out / "trials" / cell.variant / folder_name(cell.method.title)


def require_sampler(budget: BudgetSection | None) -> None:
    """Raise MissingExtraError when the sampler of `budget` is not installed."""
    asked = budget is not None and budget.search and budget.sampler == "optuna"
    if asked:
        require("optuna", _OPTUNA)


def tune(
    experiment: Experiment,
    method: MethodSection,
    space: dict[str, Values],
    budget: BudgetSection,
    folder: Path,
    observer: RunObserver | None,
) -> Tuned:
    """Try `budget.trials` settings of `method` from `space`; finished trials are read back.

    folder: of the trials, one folder each

    A trial that fails is out of the search. It stays so when the search is read back: later trials,
    and the cells, follow from those before. Where all have failed, the search begins anew. Raises
    SearchFailedError when they fail again.
    """
    suggest = _optuna if budget.sampler == "optuna" else _random
    places = [folder / f"trial{number}" for number in range(budget.trials)]
    if all((place / FAILED).exists() for place in places):
        for place in places:
            atomic.remove(place)
    trials: list[Trial] = []
    for number, place in enumerate(places):
        settings = suggest(space, budget.seed, trials)
        section = changed(method, settings, method.label)
        cell = Cell(
            section, budget.seed, place, variant=f"trial {number + 1} of {budget.trials}"
        )  # fmt: skip
        trials.append(Trial(settings, _tried(experiment, cell, observer or RunObserver())))
    best = min(trials, key=lambda trial: math.inf if trial.loss is None else trial.loss)
    if best.loss is None:
        raise SearchFailedError(
            f"all {len(trials)} trials of the search for `{method.title}` failed; the first: "
            f"{Failure.read(places[0]).reason}"
        )
    return Tuned(changed(method, best.settings, method.label), tuple(trials), best)


def _tried(experiment: Experiment, cell: Cell, observer: RunObserver) -> float | None:
    """The lowest validation loss of the trial `cell`; None where it failed."""
    if (cell.folder / FAILED).exists():
        open_cell_folder(experiment, cell)
        return None

    def run() -> float:
        loss = run_trial(experiment, cell, observer)
        if not math.isfinite(loss):
            raise PtkitError("no validation loss was finite")
        return loss

    loss = attempted(cell, run)
    if isinstance(loss, Failure):
        observer.trial_failed(loss)
        return None
    return loss


def _random(space: dict[str, Values], seed: int, before: Sequence[Trial]) -> Settings:
    """Settings drawn from `space`, the same for the same seed and number of trials before."""
    generator = np.random.default_rng((seed, len(before)))
    return {key: _drawn(values, generator) for key, values in space.items()}


def _drawn(values: Values, generator: np.random.Generator) -> Any:
    if not isinstance(values, Range) or values.steps is not None:
        listed = values_of(values)
        return listed[int(generator.integers(len(listed)))]
    low, high = (np.log(v) if values.log else v for v in (values.low, values.high))
    drawn = float(generator.uniform(low, high))
    return float(f"{np.exp(drawn) if values.log else drawn:.4g}")


def _optuna(space: dict[str, Values], seed: int, before: Sequence[Trial]) -> Settings:
    """What Optuna's TPE asks for after the trials before; it keeps no state between calls."""
    with extra("optuna", _OPTUNA):
        import optuna
        from optuna.trial import TrialState, create_trial

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = dict(_distributions(space))
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed + len(before)))
    for trial in before:
        state = TrialState.FAIL if trial.loss is None else TrialState.COMPLETE
        study.add_trial(
            create_trial(
                params=trial.settings, distributions=distributions, value=trial.loss, state=state
            )
        )
    return dict(study.ask(distributions).params)


def _distributions(space: dict[str, Values]) -> Iterator[tuple[str, Any]]:
    with extra("optuna", _OPTUNA):
        from optuna.distributions import CategoricalDistribution, FloatDistribution

    for key, values in space.items():
        if isinstance(values, Range) and values.steps is None:
            yield key, FloatDistribution(values.low, values.high, log=values.log)
        else:
            yield key, CategoricalDistribution(values_of(values))
