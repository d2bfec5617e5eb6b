"""Commands that use adapters take the base these were made for, and say where they lie instead."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_cli import refused

from ptkit.errors import AdapterError
from ptkit.formats.places import find_adapter
from ptkit.methods.own_base import own_base
from ptkit.runtime.model_names import WHEELS

SHIPPED = Path(__file__).resolve().parents[1] / "adapters"
SMOL = next(iter(WHEELS))


def of_base(path: Path, base: str | None) -> Path:
    """An adapter folder of plain PEFT that names `base`."""
    path.mkdir(parents=True)
    config = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": base}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_the_base_is_the_adapters(tmp_path: Path) -> None:
    known = [of_base(tmp_path / name, SMOL) for name in ("a", "b")]
    assert own_base(known) == SMOL
    assert own_base([*known, of_base(tmp_path / "c", None)]) == SMOL
    assert own_base(sorted(SHIPPED.glob("*-*"))) == "tiny-en"
    assert own_base([]) == "tiny-en"
    # One whose base is somewhere else does not choose for the others; loading it tells why.
    assert own_base([*known, of_base(tmp_path / "d", "org/elsewhere")]) == SMOL


def test_a_folder_that_cannot_be_read_has_no_say(tmp_path: Path) -> None:
    bad = of_base(tmp_path / "bad", SMOL)
    (bad / "adapter_config.json").write_text("{")
    assert own_base([bad, SHIPPED / "facts-prefix"]) == "tiny-en"


@pytest.mark.parametrize(
    ("bases", "told"),
    [
        ([SMOL, "tiny-en"], "several bases: `0` for `.*`, `1` for `tiny-en`; choose by --model"),
        (["org/far"], "is not on this machine: `0` for `org/far`; --model NAME loads it"),
    ],
)
def test_a_base_that_is_not_clear_is_asked_for(bases: list[str], told: str, tmp_path: Path) -> None:
    paths = [of_base(tmp_path / str(n), base) for n, base in enumerate(bases)]
    with pytest.raises(AdapterError, match=told):
        own_base(paths)


@pytest.mark.parametrize(
    "command",
    [["serve", "--adapters"], ["chat", "--adapters"], ["bank", "verify"], ["bank", "load"]],
)
def test_a_folder_of_runs_is_no_folder_of_adapters(command: list[str], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "tickets" / "prefix_tuning-seed0"
    shutil.copytree(SHIPPED / "facts-prefix", run / "adapter")
    (run / "cell.json").write_text("{}")
    said = refused(*command, "runs/tickets", cwd=tmp_path)
    assert "runs/tickets holds runs, not adapters; first: ptkit export runs/tickets/prefix_" in said
    for above in ("runs", "runs/tickets/prefix_tuning-seed0"):
        assert "holds runs, not adapters" in refused(*command, above, cwd=tmp_path)
    said = refused(*command, str(run / "adapter"), cwd=tmp_path)
    assert "is an adapter; give the folder that holds it" in said


def test_a_folder_of_runs_is_asked_for_one(tmp_path: Path) -> None:
    run = tmp_path / "tickets" / "prefix_tuning-seed0"
    shutil.copytree(SHIPPED / "facts-prefix", run / "adapter")
    assert find_adapter(run) == run / "adapter"
    with pytest.raises(AdapterError, match=r"holds runs, name one: `.*prefix_tuning-seed0`"):
        find_adapter(tmp_path / "tickets")
    with pytest.raises(AdapterError, match=r"did you mean `.*tickets/prefix_tuning-seed0`"):
        find_adapter(tmp_path / "ticket" / "prefix_tuning-seed0")
