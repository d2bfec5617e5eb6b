"""What one task's adapter is worth as the start of another's: a map of transfer.

SPoT (Vu et al. 2022, https://arxiv.org/abs/2110.07904) trains a prompt on each source task. It
trains every target task from each of them (section 2.1), and compares prompts by the cosine of
their averaged tokens (section 4.1). The same is done here for any method with virtual tokens.

Folder of a map:
    transfer.json       what it is; a resumed one must match it
    sources/RECIPE/     the method trained once, a comparison of one cell
    targets/RECIPE/     a comparison: the method's own start and one from every source
    matrix.json, matrix.md, matrix.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptkit.comparison import figures
from ptkit.comparison.cells import cells, failures
from ptkit.comparison.drawing import paper, written
from ptkit.comparison.grid import run_grid
from ptkit.comparison.outputs import write_outputs
from ptkit.comparison.summary import MethodSummary, basis, shown_together
from ptkit.errors import AdapterError, PtkitError, UserError
from ptkit.extras import require
from ptkit.formats import atomic
from ptkit.formats.adapter_files import read_adapter
from ptkit.formats.folder_lock import held
from ptkit.methods import compile_files
from ptkit.methods.gate_files import without_gate
from ptkit.methods.prefix_tuning.settings import PrefixTuningSection
from ptkit.methods.prompt_settings import PromptMethodSection
from ptkit.prefix import KVPrefix
from ptkit.recipe.expansion import changed
from ptkit.recipe.load import LoadedRecipe
from ptkit.recipe.schema import Recipe
from ptkit.recipe.tasks import HeadedTask
from ptkit.runtime.base_model import Base, load_base
from ptkit.training.cell import cell_name
from ptkit.training.failure import Failure, failed_cells
from ptkit.training.observer import RunObserver
from ptkit.training.run_folder import delete_run_folder

#: The method's own start, in every target's comparison.
OWN_START = "own-start"


@dataclass(frozen=True)
class Plan:
    """What a map runs: recipes of one cell, and what a target's recipe is made of.

    sources: with the method alone and the first seed; targets: with the method alone, all seeds
    """

    sources: tuple[LoadedRecipe, ...]
    targets: tuple[LoadedRecipe, ...]

    @property
    def cells(self) -> int:
        """How many runs there are in all."""
        starts = 1 + len(self.sources)
        return len(self.sources) + sum(starts * len(t.recipe.seeds) for t in self.targets)

    def source(self, out: Path, loaded: LoadedRecipe) -> Path:
        """Where the adapter of a source lies, once it is trained."""
        folder = out / "sources" / loaded.recipe.name
        ((method, seed),) = cells(loaded.recipe)
        return (folder / "cells" / cell_name(method, seed) / "adapter").resolve()

    def target(self, out: Path, loaded: LoadedRecipe) -> LoadedRecipe:
        """A target's recipe: its method from its own start, and from every source."""
        (section,) = loaded.recipe.methods
        # A prefix that starts from an adapter has no embeddings that could learn, so none may here.
        same = {"learn_embeddings": False} if isinstance(section, PrefixTuningSection) else {}
        methods = [changed(section, same, OWN_START)]
        for source in self.sources:
            start = {
                "start": "adapter", "start_adapter": [str(self.source(out, source))],
                "start_text": None, "start_weights": None, **same,
            }  # fmt: skip
            methods.append(changed(section, start, f"from-{source.recipe.name}"))
        evaluate = loaded.recipe.evaluate.model_copy(update={"baseline": OWN_START})
        update = {"methods": methods, "evaluate": evaluate}
        return replace(loaded, recipe=loaded.recipe.model_copy(update=update))


@dataclass(frozen=True)
class Target:
    """A task, from its own start and from every source."""

    name: str
    own: MethodSummary
    starts: dict[str, MethodSummary]


@dataclass(frozen=True)
class TransferMap:
    """A finished map.

    similarity: cosine of the sources' adapters, `[sources, sources]`, see `cosine`
    """

    folder: Path
    sources: tuple[str, ...]
    targets: tuple[Target, ...]
    similarity: tuple[tuple[float, ...], ...]

    def as_dict(self) -> dict[str, Any]:
        """The map as JSON values."""
        return {
            "sources": list(self.sources),
            "targets": [
                {
                    "target": target.name,
                    "score": target.own.score,
                    "higher_is_better": target.own.higher_is_better,
                    "own_start": asdict(target.own.leading),
                    "from": {
                        source: {"score": asdict(summary.leading), **_difference(summary)}
                        for source, summary in target.starts.items()
                    },
                }
                for target in self.targets
            ],
            "similarity": [list(row) for row in self.similarity],
        }


def _difference(summary: MethodSummary) -> dict[str, Any]:
    found = summary.against
    if found is None:
        return {"difference": None, "p_value": None}
    return {"difference": asdict(found.interval), "p_value": found.corrected}


def plan(
    sources: Sequence[LoadedRecipe], targets: Sequence[LoadedRecipe], method: str | None
) -> Plan:
    """What to run for `method` (a label or kind; may be left out where a recipe trains only one).

    Raises UserError for recipes whose adapters cannot start each other. Reasons are two of one
    name, another base, another number of virtual tokens, a head, and a method without a start.
    """
    for recipes in (sources, targets):
        names = [loaded.recipe.name for loaded in recipes]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UserError(f"two recipes are called `{twice[0]}`; change the `name` of one")
    found = Plan(
        tuple(_alone(s, method, seeds=[s.recipe.seeds[0]]) for s in sources),
        tuple(_alone(t, method, seeds=t.recipe.seeds) for t in targets),
    )
    first, *others = (*found.sources, *found.targets)
    for loaded in others:
        for what, read in (("`model`", _model), ("`num_virtual_tokens`", _tokens)):
            mine, theirs = str(read(first.recipe)), str(read(loaded.recipe))
            if mine != theirs:
                raise UserError(
                    f"`{first.recipe.name}` has {what} {mine}, `{loaded.recipe.name}` {theirs}: an "
                    "adapter is a start for the same base and length only; make them equal (--set)"
                )
    return found


def _model(recipe: Recipe) -> str:
    model = recipe.model
    revision = f"@{model.revision}" if model.revision else ""
    return f"{model.id}{revision}" + (f" in {model.quantize}" if model.quantize else "")


def _tokens(recipe: Recipe) -> int:
    (section,) = recipe.methods
    assert isinstance(section, PromptMethodSection)
    return section.num_virtual_tokens


def _alone(loaded: LoadedRecipe, method: str | None, *, seeds: list[int]) -> LoadedRecipe:
    """`loaded` with one method and these seeds."""
    recipe = loaded.recipe
    if isinstance(recipe.task, HeadedTask):
        raise UserError(
            f"`{recipe.name}` has a task of `kind: {recipe.task.kind}`: each adapter has a head of "
            "its own labels, so it is no start for another task"
        )
    fitting = [m for m in recipe.methods if m.trains and method in (None, m.title, m.kind)]
    if len(fitting) != 1:
        names = ", ".join(m.title for m in recipe.methods if m.trains)
        raise UserError(f"`{recipe.name}`: choose one method with --method: {names}")
    (section,) = fitting
    if not isinstance(section, PromptMethodSection):
        raise UserError(f"`{section.title}` has no virtual tokens to start from another's")
    if not section.shares_batch:  # it is more than the one prefix that another could start from
        raise UserError(f"`{section.title}` is no start for another task: {section.alone}")
    section = changed(section, {}, section.kind)  # one name in all recipes
    evaluate = recipe.evaluate.model_copy(update={"baseline": None})
    update = {
        "methods": [section], "seeds": seeds, "sweep": {}, "budget": None, "evaluate": evaluate,
    }  # fmt: skip
    return replace(loaded, recipe=recipe.model_copy(update=update))


def run_transfer(
    planned: Plan, out: Path, *, observer: RunObserver | None = None, base: Base | None = None
) -> TransferMap:
    """Train what is not there yet and write the map; killed, the next call goes on from there.

    base: a loaded one, instead of loading the recipes'.

    Raises FolderError when `out` holds another map. Raises PtkitError when cells failed: the cells
    that depend on them are not run, the others are. There is no map until the next call has all.
    """
    require("report", "`ptkit transfer`")
    with held(out):
        _open_folder(planned, out)
        loaded_bases: dict[str, Base] = {}

        def base_of(loaded: LoadedRecipe) -> Base:
            """One per setting of `model`: recipes of one base may differ in its precision."""
            if base is not None:
                return base
            key = loaded.recipe.model.model_dump_json()
            if key not in loaded_bases:
                loaded_bases[key] = load_base(**loaded.recipe.model.model_dump())
            return loaded_bases[key]

        names = tuple(source.recipe.name for source in planned.sources)
        prefixes = []
        failed: list[Failure] = []
        for source in planned.sources:
            own, folder = base_of(source), out / "sources" / source.recipe.name
            run_grid(source, folder, observer=observer, base=own)
            failed += failures(source.recipe, folder)
            if not failed:
                prefixes.append(_compiled(planned.source(out, source), own))
        if failed:  # every target starts from every source
            raise PtkitError(failed_cells(failed))
        ended = []
        for loaded in planned.targets:
            folder, target = out / "targets" / loaded.recipe.name, planned.target(out, loaded)
            ended.append((
                loaded, folder, target,
                run_grid(target, folder, observer=observer, base=base_of(loaded)),
            ))  # fmt: skip
            failed += failures(target.recipe, folder)
        if failed:
            raise PtkitError(failed_cells(failed))
        summaries = [
            write_outputs(folder, records, target.recipe) for _, folder, target, records in ended
        ]
        targets = [
            Target(loaded.recipe.name, own[0], dict(zip(names, own[1:], strict=True)))
            for (loaded, *_), own in zip(ended, shown_together(summaries), strict=True)
        ]
        similarity = tuple(tuple(cosine(a, b) for b in prefixes) for a in prefixes)
        done = TransferMap(out, names, tuple(targets), similarity)
        atomic.write_json(out / "matrix.json", done.as_dict())
        atomic.write_text(out / "matrix.md", as_markdown(done))
        atomic.write_bytes(out / "matrix.png", _drawn(done))
        return done


def start_over(out: Path) -> None:
    """Delete the map in `out`. Raises UserError when it holds something else."""
    delete_run_folder(out / "transfer.json", "map of transfer")


def _open_folder(planned: Plan, out: Path) -> None:
    """Write what the map is to `out`, or raise UserError when another one is there."""
    path = out / "transfer.json"
    identity = {
        part: [loaded.recipe.model_dump(mode="json", exclude={"description"}) for loaded in own]
        for part, own in (("sources", planned.sources), ("targets", planned.targets))
    }
    if not path.exists():
        atomic.write_json(path, identity)
    elif json.loads(path.read_text(encoding="utf-8")) != identity:
        raise UserError(
            f"{out} holds a map of other recipes (or of these before they were changed); choose "
            "another --out, or pass --fresh to start over"
        )


def _compiled(path: Path, base: Base) -> KVPrefix:
    prefix = compile_files(without_gate(read_adapter(path)), base)
    if not isinstance(prefix, KVPrefix):
        raise AdapterError(f"{path} holds no prefix that could be compared with another")
    return prefix


def cosine(first: KVPrefix, second: KVPrefix) -> float:
    """How alike two adapters are, -1..1: the cosine of their averaged virtual tokens (Vu et al.
    2022, section 4.1). It is the mean over all layers' keys and values, whose sizes differ too much
    for one vector. For an encoder's soft prompt it is that of its embeddings."""

    def averages(prefix: KVPrefix) -> list[Tensor]:
        if prefix.embeddings is not None:
            return [prefix.embeddings.float().mean(0)]
        return [t.float().mean(1).flatten() for t in (*prefix.keys, *prefix.values)]

    pairs = zip(averages(first), averages(second), strict=True)
    return float(torch.stack([torch.cosine_similarity(a, b, dim=0) for a, b in pairs]).mean())


def as_markdown(done: TransferMap) -> str:
    """The two matrices as tables."""
    head = ["target", "score", "own start [95 %]", *(f"from {name}" for name in done.sources)]
    lines = [_line(head), _line(["---", "---", *(["---:"] * (len(head) - 2))])]
    for target in done.targets:
        shown = [figures.difference(summary.against) for summary in target.starts.values()]
        lines.append(_line([target.name, target.own.score, figures.score(target.own.leading),
                            *shown]))  # fmt: skip
    lines += ["", _note(done), ""]
    lines += [_line(["adapters", *done.sources]), _line(["---", *["---:"] * len(done.sources)])]
    for name, row in zip(done.sources, done.similarity, strict=True):
        lines.append(_line([name, *(f"{value:.2f}" for value in row)]))
    lines += ["", "Cosine of the sources' averaged virtual tokens, the mean over layers' keys and "
              "values."]  # fmt: skip
    return "\n".join(lines) + "\n"


def _line(cells_: Sequence[str]) -> str:
    return f"| {' | '.join(cells_)} |"


def _note(done: TransferMap) -> str:
    sizes = ", ".join(
        f"{t.name} {t.own.leading.n_examples} rows and {len(t.own.records)} "
        f"seed{'s' * (len(t.own.records) > 1)}"
        for t in done.targets
    )
    lower = [t.name for t in done.targets if not t.own.higher_is_better]
    less = f" Less is better for {', '.join(lower)}." if lower else ""
    return (
        "From a source: the score minus that from the target's own start after as many steps, "
        f"on the same rows. Intervals: 95 %, {basis([t.own for t in done.targets])}. p values are "
        "corrected for all differences of the table (Holm). Tested on: "
        f"{sizes}. A source's adapter is of one seed; where source and target are one task, it "
        f"has been trained for both runs' steps.{less}"
    )


def _drawn(done: TransferMap) -> bytes:
    """The two matrices as a heat map, PNG."""
    from matplotlib.figure import Figure

    gains = [
        [0.0 if s.against is None else s.against.interval.mean for s in t.starts.values()]
        for t in done.targets
    ]
    # Blue is better, whatever the metric.
    signs = [1 if t.own.higher_is_better else -1 for t in done.targets]
    colours = [[sign * g for g in row] for sign, row in zip(signs, gains, strict=True)]
    most = max(1e-9, *(abs(g) for row in gains for g in row))
    stars = [
        [s.against is not None and s.against.corrected < 0.05 for s in t.starts.values()]
        for t in done.targets
    ]
    names, count = list(done.sources), len(done.sources)
    rows = [f"{t.name} ({t.own.score})" for t in done.targets]
    with paper():
        figure = Figure(
            figsize=(3.2 + 1.8 * count, 1.6 + 0.6 * max(count, len(rows))), layout="constrained"
        )
        left, right = figure.subplots(1, 2)
        left.imshow(colours, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        left.set(title="score minus own start (* p < 0.05)", xlabel="source", ylabel="target")
        left.set_yticks(range(len(rows)), rows)
        right.imshow(done.similarity, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        right.set(title="cosine of the sources' adapters")
        right.set_yticks(range(count), names)
        for axes in (left, right):
            axes.grid(visible=False)
            axes.set_xticks(range(count), names, rotation=30, ha="right")
        for y, row in enumerate(gains):
            for x, gain in enumerate(row):
                dark = abs(gain) > 0.6 * most
                left.text(
                    x, y, f"{gain:+.1f}{'*' * stars[y][x]}", ha="center", va="center",
                    color="white" if dark else "black",
                )  # fmt: skip
        for y, row_ in enumerate(done.similarity):
            for x, value in enumerate(row_):
                right.text(
                    x, y, f"{value:.2f}", ha="center", va="center",
                    color="white" if value > 0.6 else "black",
                )  # fmt: skip
        return written(figure, "png")
