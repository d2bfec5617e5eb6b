"""Signs that a run learns nothing, with what is likely the cause."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence

from ptkit.evaluation.prediction import Prediction
from ptkit.recipe.tasks import ClassificationTask, SequenceClassificationTask, Task
from ptkit.training.adapter_trainer import StepReport

#: Steps whose losses are averaged at the beginning and at the end.
_AVERAGED = 10
#: Steps that a run is watched before anything is said of it, and the share of all its steps.
_FEWEST_STEPS, _SHARE = 40, 0.25
#: A loss that is still above this share of the first has not fallen.
_FLAT = 0.97
#: Fewer predictions are no sign of anything; this share of them is one.
_FEWEST_ROWS, _MOST = 4, 0.9


class FlatLoss:
    """Watches the losses of one run, and tells once when they do not fall."""

    def __init__(self) -> None:
        self._losses: list[float] = []
        self._decided = False

    def add(self, report: StepReport) -> str | None:
        """A warning where the losses up to this step have not fallen; None, most of the time."""
        self._losses.append(report.loss)
        seen = len(self._losses)
        if self._decided or seen < max(_FEWEST_STEPS, _SHARE * report.steps):
            return None
        self._decided = True
        first = statistics.fmean(self._losses[:_AVERAGED])
        last = statistics.fmean(self._losses[-_AVERAGED:])
        if last <= _FLAT * first:
            return None
        return (
            f"warning: the loss does not fall ({first:.3f} in the first {_AVERAGED} steps, "
            f"{last:.3f} at step {report.step}); likely the learning rate does not fit "
            "(`learning_rate: auto` finds one), or inputs do not tell their targets"
        )


def signs_of_nothing(predictions: Sequence[Prediction], task: Task) -> list[str]:
    """Warnings about predictions that show that nothing was learnt; mostly none."""
    count = len(predictions)
    expected = {prediction.references for prediction in predictions}
    if count < _FEWEST_ROWS or len(expected) < 2:
        return []
    answers = Counter(prediction.prediction.strip() for prediction in predictions)
    most, times = answers.most_common(1)[0]
    if isinstance(task, ClassificationTask | SequenceClassificationTask):
        if times < count:
            return []
        return [
            f"warning: all {count:,} test rows are given the label `{most}`; likely there were too "
            "few steps, or most training rows have that label"
        ]
    if answers[""] >= _MOST * count:
        return [
            f"warning: {answers['']:,} of {count:,} answers are empty; likely many targets are "
            "empty, or there were too few steps to learn more than where a text ends"
        ]
    if times >= _MOST * count:
        shown = most if len(most) <= 40 else f"{most[:37]}..."
        return [
            f"warning: {times:,} of {count:,} answers are the same ({shown!r}); likely "
            "`max_input_tokens` cuts what the inputs say, or there were too few steps"
        ]
    return []
