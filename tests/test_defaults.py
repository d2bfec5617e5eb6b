"""docs/defaults.md is what the comparisons' records say, and the defaults are those compared."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import random_base
from test_compare import recipe_file as recipe_file

from ptkit.comparison import figures
from ptkit.comparison.grid import run_grid
from ptkit.comparison.outputs import write_outputs
from ptkit.comparison.summary import summarise
from ptkit.methods.catalogue import method_section
from ptkit.recipe.load import load_recipe
from ptkit.training import autotune

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import compare_defaults

METHODS = (
    "methods=[{kind: base},"
    "{kind: prefix_tuning, label: 'prefix, PEFT', num_virtual_tokens: 2, start: random},"
    "{kind: prefix_tuning, label: 'prefix, default', num_virtual_tokens: 2},"
    "{kind: prefix_tuning, label: 'prefix, auto', num_virtual_tokens: 2, start: auto,"
    " learning_rate: auto},"
    "{kind: full}]"
)


def test_the_tables_hold_the_records_figures(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What it finds in so short a run is no good, and kept like any other.
    monkeypatch.setattr(autotune, "FEWEST_STEPS", 4)
    monkeypatch.setattr(autotune, "FEWEST_ROWS", 4)
    loaded = load_recipe(recipe_file, [METHODS, "seeds=[0]", "train={steps: 60, batch_size: 8}"])
    folder = tmp_path / "task"
    records = run_grid(loaded, folder, base=random_base("llama"))
    write_outputs(folder, records, loaded.recipe)
    text = compare_defaults.tables([folder])
    for summary in summarise(folder, records, loaded.recipe):
        assert f"| {summary.family} | {figures.score(summary.leading)} |" in text
        assert f"| {summary.family} | {figures.forgetting(summary.forgetting)} |" in text
    assert f"n = {records[0].n_test} test rows, seed 0" in text
    base, peer, default, auto, full = (r.metrics[r.score] for r in records)
    assert f"| prefix | {default - peer:+.1f} [" in text
    assert f"| prefix | {auto - default:+.1f} [" in text
    way = figures.NONE if full == base else f"{(default - base) / (full - base):.0%}"
    assert f"| prefix, default | {way} |" in text.split("### Share of the way")[1]
    chosen = records[3].chosen
    assert chosen is not None
    assert f", rate {chosen.learning_rate:g} [1" in text, "what was chosen, and what share it cost"
    assert records[2].chosen is not None
    assert "| prefix, default | task [" in text
    assert text.count("| P-tuning | – |") == 2


def test_what_is_compared_is_what_users_get() -> None:
    """A row called `default` sets nothing but the length all rows of its method share."""
    methods = {m.title: m for m in load_recipe(compare_defaults.METHODS).recipe.methods}
    checked = 0
    for prompt in compare_defaults.PROMPTS:
        peer, default, auto = (methods[f"{prompt}, {n}"] for n in ("PEFT", "default", "auto"))
        plain = method_section({"kind": default.kind, "label": default.label})
        changed = {"num_virtual_tokens": default.num_virtual_tokens}  # type: ignore[attr-defined]
        assert default == plain.model_copy(update=changed)
        same = {
            "label": default.label,
            "start": default.start,  # type: ignore[attr-defined]
            "learning_rate": default.learning_rate,
        }  # type: ignore[attr-defined]
        assert auto.model_copy(update=same) == default
        assert (auto.start, auto.learning_rate) == ("auto", "auto")  # type: ignore[attr-defined]
        peers = {"start": "random", "learning_rate": 3e-2, "beta2": 0.999, "label": peer.label}
        assert peer == default.model_copy(update=peers)
        checked += 1
    assert checked == 3
