"""Files that ptkit writes and reads back: every version is read, a newer one refused.

The files in `tests/files` are kept as builds of their day wrote them; none is made by these tests.
"""

from __future__ import annotations

import copy
import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ptkit.errors import AdapterError, FolderError
from ptkit.formats.adapter_info import ADAPTER_INFO, AdapterInfo, BaseInfo, MethodInfo
from ptkit.formats.cell_record import CELL_RECORD, CHOSEN_SETTINGS, TRIAL_RECORD, CellRecord
from ptkit.formats.typed_file import FORMAT, FileKind

ROOT = Path(__file__).resolve().parents[1]
KEPT = Path(__file__).parent / "files"
ADAPTERS = sorted([*(KEPT / "adapters").glob("*.json"), *(ROOT / "adapters").glob("*/ptkit.json")])
RECORDS = sorted((KEPT / "records").glob("*.json"))
KINDS = [*((ADAPTER_INFO, path) for path in ADAPTERS), *((CELL_RECORD, path) for path in RECORDS)]
KINDS.append((CHOSEN_SETTINGS, KEPT / "chosen.json"))

every_kept_file = pytest.mark.parametrize(
    ("kind", "path"), KINDS, ids=[f"{path.parent.name}/{path.stem}" for _, path in KINDS]
)


def values_of(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def lost(before: Any, after: Any, place: str = "") -> list[str]:
    """What `before` says and `after` does not."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            line for key in before for line in lost(before[key], after.get(key), f"{place}.{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [line for i, (a, b) in pairs for line in lost(a, b, f"{place}.{i}")]
    return [] if before == after else [f"{place}: {before!r}, then {after!r}"]


def test_files_of_every_version_are_kept() -> None:
    assert {values_of(path).get(FORMAT, 0) for path in ADAPTERS} >= {1}
    assert {values_of(path).get(FORMAT, 0) for path in RECORDS} >= {0}
    assert len(ADAPTERS) > 10
    assert len(RECORDS) > 5


@every_kept_file
def test_nothing_that_a_kept_file_says_is_lost(kind: FileKind[Any], path: Path) -> None:
    values = values_of(path)
    written = kind.as_file(kind.read(values, path))
    assert written[FORMAT] == kind.format
    if path.stem == "first":  # its scores were numbers
        scores = values.pop("metrics")
        assert {name: score["value"] for name, score in written["metrics"].items()} == scores
    values.pop(FORMAT, None)
    assert lost(values, written) == []


@every_kept_file
def test_what_is_written_is_read_back_the_same(kind: FileKind[Any], path: Path) -> None:
    section = kind.read(values_of(path), path)
    written = json.loads(json.dumps(kind.as_file(section)))
    assert kind.read(written, path) == section
    assert kind.as_file(kind.read(written, path)) == written


@every_kept_file
def test_migrations_leave_what_they_are_given_as_it_was(kind: FileKind[Any], path: Path) -> None:
    values = values_of(path)
    before = copy.deepcopy(values)
    kind.read(values, path)
    assert values == before


def test_what_earlier_adapters_did_not_say_is_what_their_versions_did() -> None:
    first = ADAPTER_INFO.read(values_of(KEPT / "adapters" / "first.json"), "it")
    assert first.metrics is not None
    assert [(s.low, s.high) for s in first.metrics.values()] == [(None, None)] * 2
    assert first.retention is not None
    assert (first.retention.drift, first.retention.lead, first.retention.domains) == (None, 0, {})
    shipped = ADAPTER_INFO.read(values_of(ROOT / "adapters/facts-prefix/ptkit.json"), "it")
    assert (shipped.test_split, shipped.test_chose) == ("test", False)
    assert shipped.rows_scored == "test rows"
    assert shipped.base.sketch is None
    assert shipped.retention is not None
    assert shipped.retention.lead == 0
    chose = ADAPTER_INFO.read(values_of(KEPT / "adapters" / "gate.json"), "it")
    assert chose.test_chose, "a file that says so is left alone"


def test_what_earlier_records_did_not_say_is_what_their_versions_did() -> None:
    values = values_of(KEPT / "records" / "lora.json")
    said = ("test_split", "test_chose", "test_rows", "retention_text", "base_fingerprint", "gate",
            "trained_together", "chosen")  # fmt: skip
    for key in said:
        del values[key]
    del values["retention"]["lead"]
    record = CELL_RECORD.read(values, "it")
    assert (record.test_split, record.test_chose, record.trained_together) == ("test", False, 1)
    assert record.test_rows is record.retention_text is record.base_fingerprint is None
    assert record.retention is not None
    assert record.retention.lead == 0
    with pytest.raises(FolderError, match=r"it: `retention.lead` is missing; delete the cell's"):
        CELL_RECORD.read({**values, FORMAT: 1}, "it")


@pytest.mark.parametrize(
    ("kind", "path"), [(ADAPTER_INFO, ADAPTERS[0]), (CELL_RECORD, RECORDS[0])], ids=["info", "cell"]
)
def test_a_newer_version_is_refused_with_what_to_do(kind: FileKind[Any], path: Path) -> None:
    newer = {**values_of(path), FORMAT: kind.format + 1}
    with pytest.raises(kind.error) as told:
        kind.read(newer, path)
    message = str(told.value)
    assert "\n" not in message
    assert str(path) in message
    assert f"format {kind.format + 1}" in message
    assert f"reads formats up to {kind.format}" in message
    assert "`pip install --upgrade ptkit`" in message
    for wrong in (True, -1, "1", 1.0, None):
        with pytest.raises(kind.error, match="`format` should be a whole number"):
            kind.read({**newer, FORMAT: wrong}, path)


def test_unknown_keys_of_an_adapter_are_kept_and_written_back() -> None:
    values = values_of(ROOT / "adapters/facts-prefix/ptkit.json")
    values["shown"] = {"by": ["another", None], "model_dump": 1}
    values["base"]["mirror"] = None
    info = ADAPTER_INFO.read(values, "it").updated(seed=7)
    written = ADAPTER_INFO.as_file(info.without("metrics"))
    assert written["shown"] == values["shown"]
    assert written["base"] == values["base"]
    assert written["seed"] == 7
    assert "metrics" not in written


def test_an_unknown_key_of_a_record_is_refused() -> None:
    values = {**values_of(RECORDS[0]), FORMAT: 1, "halved": True}
    with pytest.raises(FolderError, match="`halved` is not known to this version; delete the cell"):
        CELL_RECORD.read(values, "it")


def test_what_plain_peft_made_states_nothing_and_nothing_is_written_of_it() -> None:
    assert AdapterInfo().empty
    assert AdapterInfo().model_dump() == {}
    assert AdapterInfo() == ADAPTER_INFO.read({}, "it")
    made = AdapterInfo(base=BaseInfo(id="a"), method=MethodInfo(kind="lora"))
    assert ADAPTER_INFO.as_file(made) == {
        FORMAT: ADAPTER_INFO.format, "base": {"id": "a"}, "method": {"kind": "lora"},
    }  # fmt: skip


WRONG = [
    ({"base": 1}, "`base` should be an object"),
    ({"base": {"parameters": "5"}}, "`base.parameters` should be a valid integer"),
    ({"seed": True}, "`seed` should be a valid integer"),
    ({"task": {"kind": "generation", "input": 3}}, "`task.input` should be a valid string"),
    ({"weights": {"file": "a"}}, "`weights.sha256` is missing"),
    ({"metrics": {"bleu": {"value": 3.0}}}, "`metrics.bleu.low` is missing"),
    ([], "should hold a JSON object, found list"),
]


@pytest.mark.parametrize(("values", "said"), WRONG)
def test_a_damaged_file_says_what_is_wrong_where_and_the_fix(values: Any, said: str) -> None:
    with pytest.raises(AdapterError) as told:
        ADAPTER_INFO.read(values, "a/ptkit.json")
    message = str(told.value)
    assert message.startswith("a/ptkit.json")
    assert said in message
    assert message.endswith("; fetch or export the adapter again")


def test_a_record_that_is_no_json_names_the_file_and_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for text in ("{", "[" * 100_000, "\udcff".encode("utf-8", "surrogateescape").decode("latin-1")):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(FolderError) as told:
            CellRecord.read(path)
        assert str(told.value).startswith(f"{path} is not valid JSON")
        assert "delete the cell's folder" in str(told.value)


def test_figures_that_are_not_finite_are_read_back_as_they_were(tmp_path: Path) -> None:
    values = values_of(KEPT / "records" / "lora.json")
    record = CELL_RECORD.read(values, "it").updated(train_seconds=float("inf"))
    record.write(tmp_path / "record.json")
    assert CellRecord.read(tmp_path / "record.json") == record
    trial = TRIAL_RECORD.read({"validation_loss": float("inf"), "seconds": 1.0}, "it")
    TRIAL_RECORD.write(tmp_path / "trial.json", trial)
    assert TRIAL_RECORD.read_file(tmp_path / "trial.json") == trial


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda own: st.lists(own, max_size=3) | st.dictionaries(st.text(max_size=5), own, max_size=3),
    max_leaves=5,
)


def places(values: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value within `values`."""
    found = [here] if here else []
    items: Any = values.items() if isinstance(values, dict) else []
    for key, own in enumerate(values) if isinstance(values, list) else items:
        found += places(own, (*here, key))
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_anywhere_is_refused_by_name_or_written_back(data: st.DataObject) -> None:
    kind, path = data.draw(st.sampled_from(KINDS))
    values = values_of(path)
    *parents, last = data.draw(st.sampled_from([*places(values), ("another",), (FORMAT,)]))
    place = values
    for key in parents:
        place = place[key]
    place[last] = data.draw(VALUES)
    refused = ""
    try:
        section = kind.read(values, path)
    except kind.error as error:
        refused = str(error)
    if refused:
        assert refused.startswith(str(path))
        return
    written = kind.as_file(section)
    again = kind.read(json.loads(json.dumps(written)), path)
    assert json.dumps(kind.as_file(again)) == json.dumps(written)


#: What a cell's record says since its second format.
ADDED = {"test_repeats", "scored_by", "learnt_rows"}


def test_tables_of_results_are_those_that_were_written_and_what_was_added() -> None:
    from ptkit.comparison.outputs import _csv

    lines = (KEPT / "results.jsonl").read_text().splitlines()
    records = [CELL_RECORD.read(json.loads(line), "it") for line in lines]
    assert len(records) > 3
    for record, line in zip(records, lines, strict=True):
        written, before = json.loads(record.as_line()), json.loads(line)
        assert written.keys() - before.keys() == ADDED | {"scored"}  # a table has no curve
        assert written.pop("scored") == []
        kept = {name: value for name, value in written.items() if name not in ADDED}
        assert [*kept.items()] == [*before.items()]
    written = csv.DictReader(io.StringIO(_csv(records, [])))
    with (KEPT / "results.csv").open(newline="") as file:
        before = csv.DictReader(file)
        for row, was in zip(written, before, strict=True):
            assert row.keys() - was.keys() == ADDED
            assert [*was.items()] == [item for item in row.items() if item[0] not in ADDED]


def test_other_files_of_a_run_are_read_as_they_were_written(tmp_path: Path) -> None:
    from ptkit.training.distill import Distilled
    from ptkit.training.failure import Failure
    from ptkit.training.multitask import Multitask

    folders = {}
    for name in ("distilled", "multitask", "failed"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        file = "failed.json" if name == "failed" else "record.json"
        (folders[name] / file).write_bytes((KEPT / f"{name}.json").read_bytes())
    distilled = Distilled.read(folders["distilled"])
    assert (distilled.folder, distilled.adapter.parent) == (folders["distilled"],) * 2
    assert lost(values_of(KEPT / "distilled.json"), distilled.as_dict()) == []
    multitask = Multitask.read(folders["multitask"])
    assert multitask.folder == folders["multitask"]
    assert lost(values_of(KEPT / "multitask.json"), multitask.as_dict()) == []
    failed = Failure.read(folders["failed"])
    assert lost(values_of(KEPT / "failed.json"), failed.model_dump()) == []
    for name, read, newest in (
        ("distilled", Distilled.read, 1),
        ("multitask", Multitask.read, 2),
    ):
        path = folders[name] / "record.json"
        path.write_text(json.dumps({**values_of(path), FORMAT: newest + 1}))
        with pytest.raises(FolderError, match=f"reads formats up to {newest}: update it with"):
            read(folders[name])
