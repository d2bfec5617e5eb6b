"""docs/engines.md says what the engines are given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def test_the_page_is_what_the_script_writes() -> None:
    from make_engines_table import page

    assert page() == (ROOT / "docs/engines.md").read_text(encoding="utf-8")


def test_every_engine_has_a_row() -> None:
    from make_engines_table import ROWS

    from ptkit.hub.engines import engines

    assert {*engines()} <= {row.engine for row in ROWS}


def test_runs_say_what_was_compared() -> None:
    kept = json.loads((ROOT / "docs/engines.json").read_text())["llama-cpp"]
    assert kept["versions"].keys() >= {"xllamacpp", "transformers", "torch"}
    assert kept["runs"]
    for run in kept["runs"]:
        assert 0 <= run["equal"] <= run["prompts"]
        assert len(run["gaps"]) == run["prompts"] - run["equal"]
