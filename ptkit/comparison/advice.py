"""Which method a comparison speaks for, in a sentence with its reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ptkit.comparison import figures
from ptkit.comparison.summary import MethodSummary, best_of
from ptkit.evaluation.statistics import Interval


@dataclass(frozen=True)
class Advice:
    """title: the method to take; sentence: why; reasons: what else speaks for or against it."""

    title: str
    sentence: str
    reasons: list[str]


def advice(summaries: Sequence[MethodSummary]) -> Advice | None:
    """The method with the fewest bytes of those level with the best; None without intervals.

    Two methods are level where each one's mean lies in the other's 95 % interval. That is a rule
    for choosing, not a test: it says which differences these runs are too small to show.
    """
    best = best_of(summaries)
    if best.leading.low is None:
        return None
    level = [s for s in summaries if s is best or _level(s.leading, best.leading)]
    taken = min(level, key=lambda s: (s.bytes_on_disk, s.trainable_parameters, -s.goodness))
    most = "highest" if best.higher_is_better else "lowest"
    score = f"its {taken.score} of {figures.score(taken.leading)}"
    if taken is best:
        sentence = f"{score} is the {most} here"
        if len(level) > 1:
            others = ", ".join(s.title for s in level if s is not best)
            sentence += f", level with {others}, and it is the smallest of them"
    else:
        sentence = (
            f"{score} is level with the {most} ({best.title}, {figures.score(best.leading)}), and "
            "it is the smallest of those that are"
        )
    return Advice(taken.title, f"{sentence}.", _reasons(taken, best, summaries))


def _level(one: Interval, other: Interval) -> bool:
    return _within(one.mean, other) and _within(other.mean, one)


def _within(mean: float, interval: Interval) -> bool:
    return interval.low is None or interval.high is None or interval.low <= mean <= interval.high


def _reasons(
    taken: MethodSummary, best: MethodSummary, summaries: Sequence[MethodSummary]
) -> list[str]:
    reasons = []
    if taken.trains:
        trained = figures.parameters(taken.trainable_parameters, taken.share)
        kept = figures.size(taken.bytes_on_disk)
        reasons.append(f"It trains {trained} values and keeps {kept} on disk.")
    else:
        reasons.append("It trains nothing.")
    if taken is not best and best.bytes_on_disk:
        reasons.append(f"{best.title} keeps {figures.size(best.bytes_on_disk)}.")
    if taken.forgetting is not None and taken.trains:
        lost = figures.forgetting(taken.forgetting)
        reasons.append(f"While it is on, general text costs {lost} nats per token more.")
    if taken.trains:
        reasons.append(
            "Switched off, it leaves the base as it was."
            if taken.off_exact
            else "It cannot be switched off."
            if taken.off_exact is None
            else "Switched off, it did not leave the base as it was."
        )
    trained_records = [r for s in summaries if s.trains for r in s.records]
    if len({record.seed for record in trained_records}) == 1:
        reasons.append("One seed was run, so how far seeds differ is not known.")
    falling = [s.title for s in summaries if s.trains and _still_falling(s)]
    if falling:
        reasons.append(f"Longer runs may change this: the best step of {_named(falling)} was last.")
    return reasons


def _still_falling(summary: MethodSummary) -> bool:
    """Whether the last step was the best one for every seed."""
    return all(r.train_steps and r.best_step == r.train_steps for r in summary.records)


def _named(titles: Sequence[str]) -> str:
    return titles[0] if len(titles) == 1 else f"{', '.join(titles[:-1])} and {titles[-1]}"
