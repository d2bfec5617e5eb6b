"""What a run will take, measured on a few of its own steps before it begins.

Each method takes a few steps and predicts a few rows, in a folder that is deleted afterwards. What
a method leaves to `auto` is measured with the method's own start and rate. Finding it takes
additional time (`ptkit.training.autotune` says how much at most).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path

from accelerate.utils import set_seed

from ptkit.data.encode import length_grouped_batches
from ptkit.data.encoded_rows import Lengths
from ptkit.evaluation.predict import predict
from ptkit.formats.sizes import in_bytes, in_money
from ptkit.launched import world_size
from ptkit.methods import Adapter
from ptkit.section import MethodSection
from ptkit.training.adapter_trainer import Job, validate_every
from ptkit.training.autotune import is_open
from ptkit.training.cell import Cell
from ptkit.training.experiment import Experiment
from ptkit.training.loop import fit
from ptkit.training.memory import PeakMemory
from ptkit.training.run import new_adapter, new_job

#: Steps that are timed, after one that is not: the first one allocates.
TIMED_STEPS = 3
#: Rows that are predicted.
PREDICTED_ROWS = 8


@dataclass(frozen=True)
class Costs:
    """What one cell of a method takes.

    values: numbers that are trained; seconds: training with its validations, and predictions;
    memory: peak beyond what was in use, bytes, or None where the system does not tell
    """

    values: int
    seconds: float
    memory: int | None


@dataclass(frozen=True)
class Forecast:
    """What the cells that are still to run will take together.

    cells: their number; finished: how many are on disk already
    values: method -> numbers it trains; open_methods: methods with something left to `auto`
    """

    cells: int
    finished: int
    seconds: float
    memory: int | None
    values: dict[str, int]
    open_methods: tuple[str, ...]

    def lines(self, price_per_hour: float | None = None) -> list[str]:
        """What a person is told. price_per_hour: of the machine, in any currency."""
        if not self.cells:
            return ["nothing is left to run"]
        what = "1 run" if self.cells == 1 else f"{self.cells} cells"
        done = f" ({self.finished} are finished)" if self.finished else ""
        peak = "" if self.memory is None else f", {in_bytes(self.memory)} beyond the base"
        price = "" if price_per_hour is None else f", {priced(self.seconds, price_per_hour)}"
        lines = [f"{what} to go{done}: about {in_time(self.seconds)}{price}{peak}"]
        trained = [f"{name} {values:,}" for name, values in self.values.items() if values]
        if trained:
            lines.append("values trained: " + ", ".join(trained))
        if self.open_methods:
            lines.append(f"what `auto` tries comes on top: {', '.join(self.open_methods)}")
        return lines


def forecast(experiment: Experiment, cells: Sequence[Cell], *, fresh: bool = False) -> Forecast:
    """Measure what those of `cells` that have no record yet will take, method by method.

    fresh: their records will be deleted

    Raises what a run raises at its beginning: UserError and ModelError for what does not fit.
    """
    todo = [cell for cell in cells if fresh or not cell.done.exists()]
    costs: dict[str, Costs] = {}
    for cell in todo:
        if cell.method.title not in costs:
            costs[cell.method.title] = _costs(experiment, cell)
    memory = [c.memory for c in costs.values() if c.memory is not None]
    return Forecast(
        len(todo),
        len(cells) - len(todo),
        sum(costs[cell.method.title].seconds for cell in todo),
        max(memory, default=None),
        {title: c.values for title, c in costs.items()},
        tuple(dict.fromkeys(c.method.title for c in todo if is_open(c.method))),
    )


def _costs(experiment: Experiment, cell: Cell) -> Costs:
    method = _closed(cell.method)
    peak = PeakMemory(experiment.base.model.device)
    set_seed(cell.seed)
    adapter = new_adapter(experiment, cell, method)
    try:
        values = adapter.trainable_parameters if method.trains else 0
        seconds = _predicting(experiment, adapter)
        if method.trains:
            seconds += _training(experiment, replace(cell, method=method), adapter)
        return Costs(values, seconds, peak.known())
    finally:
        adapter.close()


def _closed(method: MethodSection) -> MethodSection:
    """`method` with its own start and rate where it leaves them to `auto`."""
    fields = type(method).model_fields
    own = {}
    if getattr(method, "start", None) == "auto":
        own["start"] = "task"
    if getattr(method, "learning_rate", None) == "auto":
        own["learning_rate"] = fields["learning_rate"].default
    return method.model_copy(update=own)


def _training(experiment: Experiment, cell: Cell, adapter: Adapter) -> float:
    """Seconds that all steps of `cell` and their validations take.

    Time is counted per token read: a few batches say little about how long the others are.
    """
    settings = experiment.recipe.train
    with tempfile.TemporaryDirectory(prefix="ptkit-forecast-") as scratch:
        job = new_job(experiment, replace(cell, folder=Path(scratch)), adapter)
        steps = min(1 + TIMED_STEPS, settings.steps)
        times: list[float] = []
        held_out = job.validation[: settings.batch_size * 2]
        few = replace(
            job,
            validation=held_out,
            settings=settings.model_copy(
                update={"steps": steps, "eval_every": steps, "save_every": steps, "report_to": []}
            ),
            report=lambda _: times.append(time.perf_counter()),
        )
        clock = time.perf_counter()
        fit([few])
        done = time.perf_counter()
    marks = [clock, *times]
    tokens = [*islice(_tokens(job), steps)]
    # Between the first report and the last but one; the last one's step was validated and saved.
    timed = slice(1, -1) if steps > 2 else slice(0, None)
    spent = [b - a for a, b in pairwise(marks)]
    per_token = sum(spent[timed]) / max(1, sum(tokens[timed]))
    mean = float(Lengths.of(job.train).whole.mean())
    a_step = per_token * mean * settings.batch_size * settings.gradient_accumulation
    validating = max(0.0, done - marks[-2] - per_token * tokens[-1]) / max(
        1, sum(map(len, held_out))
    )
    times_validated = -(-settings.steps // validate_every(job, 1))
    judged = float(Lengths.of(job.validation).whole.sum())
    return settings.steps * a_step + times_validated * validating * judged


def _tokens(job: Job) -> Iterator[int]:
    """Tokens of the batches of each step, in the order in which `job` reads them."""
    lengths = Lengths.of(job.train).whole
    order = length_grouped_batches(lengths, job.settings.batch_size, job.seed)
    while True:
        batches = islice(order, job.settings.gradient_accumulation)
        yield sum(int(lengths[batch].sum()) for batch in batches)


def _predicting(experiment: Experiment, adapter: Adapter) -> float:
    """Seconds that predicting all test rows takes, at most: an adapter that has learnt nothing yet
    writes up to the longest answer."""
    recipe, rows = experiment.recipe, experiment.data.test
    some = rows[:PREDICTED_ROWS]
    clock = time.perf_counter()
    predict(adapter, some, recipe.task, len(some))
    spent = time.perf_counter() - clock
    # Rows of a batch share its steps: of twice as many rows, each takes less.
    full = min(recipe.evaluate.batch_size, len(rows))
    return spent * len(rows) / len(some) * (len(some) / full) ** 0.5 if full else 0.0


def price_of(seconds: float, per_hour: float) -> float:
    """What `seconds` of a machine cost."""
    return seconds / 3600 * per_hour


def priced(seconds: float, per_hour: float) -> str:
    """What `seconds` of a machine cost, for people."""
    return f"a price of {in_money(price_of(seconds, per_hour))} at {per_hour:g} an hour"


def in_time(seconds: float) -> str:
    """A duration for people: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


#: Steps in all cells together from which a run is long enough to say beforehand what it takes.
LONG_STEPS = 200


def is_long(experiment: Experiment, cells: Sequence[Cell]) -> bool:
    """Whether what is left of a run is worth the few steps that measuring it takes. Of several
    processes one would measure, and the others know nothing of it: they begin at once."""
    if world_size() > 1:
        return False
    todo = [cell for cell in cells if cell.method.trains and not cell.done.exists()]
    return len(todo) * experiment.recipe.train.steps >= LONG_STEPS
