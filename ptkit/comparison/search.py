"""The search for a method's settings: the same number of trials for each, judged on validation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptkit.errors import UserError
from ptkit.recipe.expansion import Settings, changed, values_of
from ptkit.recipe.schema import BudgetSection, MethodSection, Range, Values
from ptkit.training.experiment import Experiment
from ptkit.training.run import Cell, Observer, folder_name, run_trial


@dataclass(frozen=True)
class Trial:
    """Settings that were tried and the lowest validation loss they reached, nats per token."""

    settings: Settings
    loss: float


@dataclass(frozen=True)
class Tuned:
    """A method with the best settings found."""

    section: MethodSection
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial:
        """The trial with the lowest validation loss."""
        return min(self.trials, key=lambda trial: trial.loss)

    def as_dict(self, budget: BudgetSection) -> dict[str, Any]:
        """For a record: how many were tried, what was chosen."""
        return {
            "trials": len(self.trials),
            "sampler": budget.sampler,
            "seed": budget.seed,
            "settings": self.best.settings,
        }


def tune(
    experiment: Experiment,
    method: MethodSection,
    space: dict[str, Values],
    budget: BudgetSection,
    folder: Path,
    observer: Observer | None,
) -> Tuned:
    """Try `budget.trials` settings of `method` from `space`; finished trials are read back.

    folder: of the trials, one folder each. Raises UserError when the sampler is not installed.
    """
    suggest = _optuna if budget.sampler == "optuna" else _random
    trials: list[Trial] = []
    for number in range(budget.trials):
        settings = suggest(space, budget.seed, trials)
        section = changed(method, settings, method.label)
        cell = Cell(
            section, budget.seed, folder / folder_name(method.title) / f"trial{number}",
            variant=f"trial {number + 1} of {budget.trials}",
        )  # fmt: skip
        trials.append(Trial(settings, run_trial(experiment, cell, observer)))
    best = min(trials, key=lambda trial: trial.loss)
    return Tuned(changed(method, best.settings, method.label), tuple(trials))


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
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "`budget.sampler: optuna` needs Optuna: pip install optuna, or use `random`"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = dict(_distributions(space))
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed + len(before)))
    for trial in before:
        study.add_trial(
            optuna.trial.create_trial(
                params=trial.settings, distributions=distributions, value=trial.loss
            )
        )
    return dict(study.ask(distributions).params)


def _distributions(space: dict[str, Values]) -> Iterator[tuple[str, Any]]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    for key, values in space.items():
        if isinstance(values, Range) and values.steps is None:
            yield key, FloatDistribution(values.low, values.high, log=values.log)
        else:
            yield key, CategoricalDistribution(values_of(values))
