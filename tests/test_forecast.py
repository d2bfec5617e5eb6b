"""What a run will take is said before it begins, and how far it is, with or without a terminal."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ptkit.api import plan_comparison, plan_training
from ptkit.api import train as run_training
from ptkit.cli import display
from ptkit.cli.display import LiveDisplay
from ptkit.cli.main import app
from ptkit.cli.serve import size
from ptkit.comparison import figures
from ptkit.errors import UserError
from ptkit.formats.sizes import in_bytes, in_money, read_bytes
from ptkit.recipe.load import load_recipe
from ptkit.training.adapter_trainer import StepReport
from ptkit.training.cell import Cell
from ptkit.training.experiment import prepare
from ptkit.training.forecast import forecast, in_time, is_long

SMALL = [
    "train.steps=6", "train.batch_size=2", "task.data.limits={train: 12, validation: 4, test: 4}",
    "task.max_target_tokens=6", "retention=null", "seeds=[0, 1]",
]  # fmt: skip


def small(*more: str) -> list[str]:
    return [part for setting in (*SMALL, *more) for part in ("--set", setting)]


def test_a_dry_run_counts_the_cells_and_writes_nothing(tmp_path: Path) -> None:
    told, found = plan_comparison("table-to-text", out=tmp_path / "out", overrides=SMALL)
    # base and text prompt once, five trained methods with two seeds
    assert (found.cells, found.finished) == (12, 0)
    assert found.values["prompt_tuning"] == 20 * 256
    assert found.values["base"] == 0
    assert found.seconds > 0
    assert told
    assert not (tmp_path / "out").exists()
    assert "auto" in found.lines()[-1], "starts are left open, and that costs something"


def test_values_are_those_the_run_reports(tmp_path: Path) -> None:
    _, found = plan_training("quickstart", overrides=SMALL[:-1], out=tmp_path / "run")
    record = run_training("quickstart", overrides=SMALL[:-1], out=tmp_path / "run").record
    assert found.values == {"prefix_tuning": record.trainable_parameters}
    _, after = plan_training("quickstart", overrides=SMALL[:-1], out=tmp_path / "run")
    assert (after.cells, after.finished) == (0, 1)
    assert after.lines() == ["nothing is left to run"]


def test_measuring_changes_nothing_about_the_run(tmp_path: Path) -> None:
    loaded = load_recipe("quickstart", SMALL[:-1])
    plain = run_training(loaded, out=tmp_path / "plain").record
    experiment = prepare(loaded)
    method = loaded.recipe.methods[0]
    forecast(experiment, [Cell(method, 0, tmp_path / "measured")])
    measured = run_training(loaded, out=tmp_path / "measured", base=experiment.base).record
    assert measured.curve == plain.curve
    assert measured.metrics == plain.metrics


def test_a_longer_run_is_forecast_to_take_longer() -> None:
    _, short = plan_training("quickstart", overrides=[*SMALL[:-1], "train.steps=20"])
    _, long = plan_training("quickstart", overrides=[*SMALL[:-1], "train.steps=2000"])
    assert long.seconds > 10 * short.seconds


def test_only_long_runs_are_measured_first() -> None:
    loaded = load_recipe("quickstart", SMALL[:-1])
    experiment = prepare(loaded)
    cell = Cell(loaded.recipe.methods[0], 0, Path("nowhere"))
    assert not is_long(experiment, [cell])
    assert is_long(experiment, [cell] * 40)


def test_dry_run_of_both_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(app, ["train", "quickstart", "--dry-run", *small()])
    assert said.exit_code == 0, said.output
    assert "1 run to go: about" in said.output
    assert "values trained: prefix_tuning" in said.output
    said = CliRunner().invoke(
        app, ["compare", "table-to-text", "--dry-run", "--json", *small("methods=[{kind: base}]")]
    )
    assert json.loads(said.stdout)["cells"] == 1
    assert not [*tmp_path.iterdir()]


def test_the_price_of_a_run_is_told_beside_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def said(command: str, *options: str) -> str:
        done = CliRunner().invoke(app, [command, *options, *small("seeds=[0]")])
        assert done.exit_code == 0, done.output
        return done.stdout

    few = ("--set", "methods=[{kind: base}]")
    monkeypatch.setenv("PTKIT_PRICE_PER_HOUR", "3600")
    plan = json.loads(said("train", "quickstart", "--dry-run", "--json"))
    assert plan["price_per_hour"] == 3600
    assert plan["price"] == pytest.approx(plan["seconds"])
    shown = said("train", "quickstart", "--dry-run", "--price-per-hour", "1.2")
    assert re.search(r"about \d+ s, a price of [\d.e-]+ at 1.2 an hour", shown)
    record = json.loads(said("train", "quickstart", "--json"))
    assert record["price"] == pytest.approx(record["train_seconds"] + record["eval_seconds"])
    (line,) = said("compare", "quickstart", *few, "--json").splitlines()
    assert json.loads(line)["price"] == pytest.approx(json.loads(line)["eval_seconds"])
    assert "a price of" in said("compare", "quickstart", *few)
    monkeypatch.delenv("PTKIT_PRICE_PER_HOUR")
    assert "price" not in said("train", "quickstart", "--json")
    for wrong in ("-1", "nan", "inf", "much"):
        done = CliRunner().invoke(app, ["train", "quickstart", "--price-per-hour", wrong])
        assert done.exit_code == 2


@given(st.floats(0, 1e9))
def test_a_price_is_written_to_two_digits_that_say_something(amount: float) -> None:
    read = float(in_money(amount).replace(",", ""))
    assert read == pytest.approx(amount, rel=0.06, abs=0.005 if amount >= 0.01 else 0)


def test_without_a_terminal_a_line_now_and_then_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])

    def told(quiet: bool) -> str:
        with LiveDisplay(1, quiet=quiet) as shown:
            shown.cell_started("prefix_tuning-seed0", 200)
            for step in range(1, 101):
                clock[0] += 1
                shown.stepped(StepReport(step, 200, 4 - step / 100, None if step < 50 else 2.25))
            shown.predicting(8, 64)
            clock[0] += LiveDisplay.EVERY
            shown.predicting(16, 64)
        return capsys.readouterr().err

    lines = told(quiet=False).splitlines()
    assert len(lines) == 100 // 15 + 1
    assert lines[0] == "prefix_tuning-seed0: step 15 of 200, loss 3.850, 3 min left"
    assert "step 60 of 200, loss 3.400, validation 2.250, 2 min left" in lines[3]
    assert lines[-1] == "prefix_tuning-seed0: 16 of 64 rows predicted"
    assert told(quiet=True) == ""


def test_times_and_sizes_are_written_for_people() -> None:
    assert [in_time(s) for s in (0.2, 40, 600, 12_600)] == ["1 s", "40 s", "10 min", "3.5 h"]
    assert [in_bytes(b) for b in (940, 2_000_000, 999_960, 1_250_000_000)] == [
        "940 B", "2.0 MB", "1.0 MB", "1.2 GB"
    ]  # fmt: skip


@given(st.integers(1, 10**13))
def test_a_size_is_read_as_it_is_written(count: int) -> None:
    """In tables as in forecasts, to three digits."""
    shown = in_bytes(count)
    assert figures.size(count) == shown
    assert read_bytes(shown) == pytest.approx(count, rel=0.055)
    assert float(shown.split()[0]) < 1000 or shown.endswith("GB")


@pytest.mark.parametrize(
    ("text", "count"),
    [("750000", 750_000), (" 2gb ", 2 * 10**9), ("1.5 GiB", 1_610_612_736), ("3K", 3000)],
)
def test_sizes_are_read_alike_by_every_command(text: str, count: int) -> None:
    assert read_bytes(text) == size(text) == count


@pytest.mark.parametrize("text", ["", "MB", "-1", "2TB", "1e9", "2 G B"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no size; write 500MB"):
        read_bytes(text)
