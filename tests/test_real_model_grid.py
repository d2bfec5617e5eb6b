"""The script of the grid on SmolLM2: its recipes are right, and no rate was chosen on its task."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ptkit.recipe.load import load_recipe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import real_model_grid as grid


def test_a_rate_does_not_depend_on_its_own_task(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, best in grid.BEST_RATES.items():
        for task in grid.TASKS:
            chosen = grid.rate(kind, task)
            others = [rate for other, rate in best.items() if other != task]
            assert others.count(chosen) == max(map(others.count, others))
            monkeypatch.setitem(grid.BEST_RATES, kind, {**best, task: 123.0})
            assert grid.rate(kind, task) == chosen
            monkeypatch.setitem(grid.BEST_RATES, kind, best)
    assert grid.rate("prefix_tuning", "sst2") == 0.03  # its own best is 0.01
    assert grid.rate("lora", "trec") == 2e-3  # and 6e-3


def test_every_job_is_a_recipe(tmp_path: Path) -> None:
    known = {}
    for job in grid.jobs([*grid.PARTS]):
        if job.seed > 1:
            continue
        recipe = load_recipe(job.recipe, job.overrides(tmp_path)).recipe
        assert recipe.seeds == [job.seed]
        assert recipe.model.id == "smollm2-135m"
        # But for the seed, all of a part's recipes on one task are the same: they can be merged.
        same = recipe.model_copy(update={"seeds": []})
        assert known.setdefault((job.part, job.task), same) == same
    assert len(known) == sum(len(part.tasks) for part in grid.PARTS.values())


def test_shares_are_all_jobs_once_and_seeds_come_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def listed(*words: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["grid", "--list", "--out", "there", *words])
        assert grid.main() == 0
        return capsys.readouterr().out.split()

    whole = listed()
    assert len(whole) == len({*whole})
    shared = [listed("--share", f"{n}/3") for n in (1, 2, 3)]
    assert sorted(name for share in shared for name in share) == sorted(whole)
    way = listed("--part", "way")
    assert way[:5] == [
        str(Path("there", "way", task, f"seed{seed}"))
        for task, seed in [("trec", 0), ("sst2", 0), ("e2e", 0), ("webnlg", 0), ("trec", 1)]
    ]
