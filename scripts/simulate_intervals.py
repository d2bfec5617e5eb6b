"""How often ptkit's intervals hold the truth, and how often it calls equal methods different.

Methods are simulated whose true scores are known: rows differ in how hard they are, seeds in how
good they became, and single rows under single seeds besides. All seeds are tested on the same rows.
The intervals and p values are those of `ptkit.evaluation.statistics` and
`ptkit.comparison.statistics`. Beside them stands the percentile bootstrap over seeds and rows that
earlier versions used. The table is that of docs/statistics.md.

python scripts/simulate_intervals.py [--trials 1000] [--write]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ptkit.comparison.statistics import in_family, paired_difference, share_of_way
from ptkit.evaluation.statistics import Resampled, mean_interval

Values = npt.NDArray[np.float64]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "statistics.md"
BEGIN, END = "<!-- made by scripts/simulate_intervals.py -->", "<!-- end -->"
RESAMPLES = 400
#: Spread of rows, and of single rows under single seeds, on the scale of a method's quality.
ROWS, BOTH = 1.0, 0.7
#: Rows from which a corpus metric's true score is computed.
POPULATION = 20_000


@dataclass(frozen=True)
class Side:
    """A method: how many seeds it has, how far they spread, and how good it is."""

    seeds: int
    spread: float
    quality: float = 0.8


class Accuracy:
    """Rows that are right or wrong."""

    name = "accuracy"

    def __init__(self, rows: int, generator: np.random.Generator) -> None:
        self.rows, self._generator = rows, generator
        self._drawn = generator.multinomial(rows, [1 / rows] * rows, size=RESAMPLES) / rows

    def truth(self, side: Side) -> float:
        """The score over all seeds and rows there are; quality is scaled, so it is one for all
        spreads."""
        return 100 * _normal_share(side.quality)

    def tested(self, side: Side, hardness: Values) -> Resampled:
        """The scores of one method on rows of this `hardness`."""
        spread = np.sqrt(ROWS**2 + BOTH**2 + side.spread**2)
        right = 100.0 * (_qualities(side, hardness, self._generator, spread) > 0)
        return Resampled(right.mean(axis=1), self._drawn @ right.T, self.rows)


class Bleu(Accuracy):
    """Rows of n-gram counts, as sacrebleu's: lengths, then matches and totals of four orders."""

    name = "BLEU"

    def __init__(self, rows: int, generator: np.random.Generator) -> None:
        super().__init__(rows, generator)
        self._truths: dict[Side, float] = {}

    def truth(self, side: Side) -> float:
        if side not in self._truths:
            nodes, weights = np.polynomial.hermite_e.hermegauss(15)
            hardness = self._generator.normal(0, ROWS, POPULATION)
            scores = [
                bleu(self._counts((_one(side, hardness, self._generator, node))[None])[0].sum(0))
                for node in nodes * side.spread
            ]
            self._truths[side] = float(np.average(scores, weights=weights))
        return self._truths[side]

    def tested(self, side: Side, hardness: Values) -> Resampled:
        counts = self._counts(_qualities(side, hardness, self._generator, 1.0))
        drawn = np.stack([bleu(self._drawn @ own) for own in counts], axis=1)
        return Resampled(np.array([bleu(own.sum(0)) for own in counts]), drawn, self.rows)

    def _counts(self, qualities: Values) -> Values:
        """`[seeds, rows]` qualities as counts `[seeds, rows, 10]`."""
        found = np.empty((*qualities.shape, 10))
        found[..., 0] = 4 + self._generator.poisson(10, qualities.shape)
        found[..., 1] = 14
        share = 1 / (1 + np.exp(-qualities))
        for order in range(4):
            total = found[..., 0] - order
            found[..., 2 + order] = self._generator.binomial(
                total.astype(int), share ** (0.5 + order / 2)
            )
            found[..., 6 + order] = total
        return found


def bleu(totals: Values) -> Values:
    """BLEU of summed counts `[..., 10]`, without smoothing: no count here is zero."""
    precisions = totals[..., 2:6] / totals[..., 6:]
    short = np.minimum(0.0, 1 - totals[..., 1] / totals[..., 0])
    return np.asarray(100 * np.exp(np.log(precisions).mean(-1) + short))


def _normal_share(value: float) -> float:
    from scipy import stats

    return float(stats.norm.cdf(value))


def _one(side: Side, hardness: Values, generator: np.random.Generator, shift: float) -> Values:
    return np.asarray(
        side.quality + shift + hardness + generator.normal(0, BOTH, len(hardness)), dtype=np.float64
    )


def _qualities(
    side: Side, hardness: Values, generator: np.random.Generator, scale: float
) -> Values:
    """How well each seed does on each row, `[seeds, rows]`; above zero is right."""
    shifts = generator.normal(0, side.spread, (side.seeds, 1))
    both = generator.normal(0, BOTH, (side.seeds, len(hardness)))
    return scale * side.quality + shifts + hardness + both


def earlier(
    found: Resampled, other: Resampled | None, generator: np.random.Generator
) -> tuple[float, float]:
    """The 95 % interval of earlier versions: percentiles over drawn seeds and rows."""

    def drawn(own: Resampled) -> Values:
        picked = generator.integers(own.seeds, size=own.replicates.shape)
        return np.asarray(np.take_along_axis(own.replicates, picked, axis=1).mean(axis=1))

    values = drawn(found) - (0.0 if other is None else drawn(other))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True)
class Rates:
    """Shares of trials, 0..1.

    score, difference, way: intervals that hold the truth; way: of the share of the way
    alarms: differences called significant at 5 % between methods of equal quality
    family: the same for any of four differences from one baseline, after Holm's correction
    score_before, difference_before: `score` and `difference` of earlier versions
    """

    score: float
    difference: float
    alarms: float
    family: float
    way: float
    score_before: float
    difference_before: float


def simulate(
    world: Accuracy, first: Side, second: Side, trials: int, *, also: int = 0, seed: int = 0
) -> Rates:
    """`trials` comparisons of two methods, of which both have the same quality.

    also: how many of them are of families of four and shares of the way, too; without any their
        rates are not numbers
    """
    generator = np.random.default_rng(seed)
    held: dict[str, list[bool]] = {name: [] for name in Rates.__annotations__}
    apart = world.truth(first) - world.truth(second)
    base = Side(1, 0.0, first.quality - 1.2)
    end = Side(second.seeds, second.spread, first.quality + 0.6)
    whole = world.truth(end) - world.truth(base)
    share = (world.truth(first) - world.truth(base)) / whole
    for trial in range(trials):
        hardness = generator.normal(0, ROWS, world.rows)
        one, other = world.tested(first, hardness), world.tested(second, hardness)
        interval = mean_interval(one)
        held["score"].append(_holds((interval.low, interval.high), world.truth(first)))
        found = paired_difference(one, other)
        held["difference"].append(_holds((found.interval.low, found.interval.high), apart))
        held["alarms"].append(found.p_value <= 0.05)
        held["score_before"].append(_holds(earlier(one, None, generator), world.truth(first)))
        held["difference_before"].append(_holds(earlier(one, other, generator), apart))
        if trial < also:
            others = [found, *(paired_difference(world.tested(first, hardness), other)
                               for _ in range(3))]  # fmt: skip
            held["family"].append(any(d.corrected <= 0.05 for d in in_family(others)))
            way = share_of_way(one, world.tested(base, hardness), world.tested(end, hardness))
            held["way"].append(way is not None and _holds((way.low, way.high), share))
    return Rates(**{name: float(np.mean(v)) if v else float("nan") for name, v in held.items()})


def _holds(bounds: tuple[float | None, float | None], truth: float) -> bool:
    low, high = bounds
    return low is not None and high is not None and low <= truth <= high


def grid() -> Iterator[tuple[type[Accuracy], int, Side, Side]]:
    """What is simulated: the metric, test rows, and the two sides."""
    for world, rows in ((Accuracy, 150), (Accuracy, 500), (Bleu, 150)):
        for seeds in (1, 2, 3, 5):
            for spread in (0.05, 0.15, 0.4) if seeds > 1 else (0.0,):
                yield world, rows, Side(seeds, spread), Side(seeds, spread)
    for seeds in (3, 5):  # one side varies more
        yield Accuracy, 500, Side(seeds, 0.4), Side(seeds, 0.08)
    for first, second in ((5, 1), (5, 2), (2, 5), (3, 5)):
        yield Accuracy, 500, Side(first, 0.3), Side(second, 0.1 if second > 1 else 0.0)


def table(trials: int) -> Iterator[str]:
    """The lines of the page's table."""
    yield (
        "| metric, rows | seeds | spread of seeds | score, before | score | difference, before | "
        "difference | false alarms | any of four (Holm) | share of the way |"
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
    for kind, rows, first, second in grid():
        world = kind(rows, np.random.default_rng(1))
        rest = rows == 500 and first.seeds == second.seeds and first.spread in (0.0, 0.15)
        r = simulate(world, first, second, trials, also=trials // 2 if rest else 0)
        seeds = f"{first.seeds}"
        seeds += "" if first.seeds == second.seeds else f" and {second.seeds}"
        spread = f"{first.spread:g}"
        spread += "" if first.spread == second.spread else f" and {second.spread:g}"
        shown = (r.score_before, r.score, r.difference_before, r.difference, r.alarms, r.family,
                 r.way)  # fmt: skip
        cells = " | ".join("–" if np.isnan(value) else f"{value:.1%}" for value in shown)
        yield f"| {kind.name}, {rows} | {seeds} | {spread} | {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--write", action="store_true", help=f"write the table to {PAGE.name}")
    given = parser.parse_args()
    lines = []
    for line in table(given.trials):
        print(line, flush=True)
        lines.append(line)
    if given.write:
        before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        _, after = rest.split(END)
        text = "\n".join(lines)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
