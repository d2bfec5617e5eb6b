"""On the real E2E data the trained prefix must clearly beat what needs no training."""

from __future__ import annotations

from pathlib import Path

from ptkit.comparison.grid import run_grid
from ptkit.recipe.load import load_recipe

RECIPE = Path(__file__).parent / "recipes" / "e2e.yaml"


def test_prefix_tuning_beats_base_and_demonstrations_on_e2e(real_data, tmp_path) -> None:
    loaded = load_recipe(
        RECIPE,
        [
            f"task.data.files={{train: {real_data}/e2e/train.jsonl, "
            f"validation: {real_data}/e2e/validation.jsonl}}",
            "task.data.limits={train: 3000, validation: 48, test: 48}",
            "methods=[{kind: base}, {kind: text_prompt}, "
            "{kind: prefix_tuning, learning_rate: 0.3}]",
            "seeds=[0]",
            "train.steps=150",
            "train.eval_every=75",
            "retention=null",
        ],
    )
    records = {r.kind: r for r in run_grid(loaded, tmp_path)}
    untrained = max(records["base"].metrics["bleu"], records["text_prompt"].metrics["bleu"])
    assert records["prefix_tuning"].metrics["bleu"] > untrained + 5
