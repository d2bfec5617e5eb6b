"""What a file says is what is learnt: no reader's convenience changes a value on the way."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import refused

from ptkit.api import train
from ptkit.cli.options import input_lines
from ptkit.comparison.same_rows import read_predictions
from ptkit.data.read_files import READERS, read_files
from ptkit.data.splits import drawn
from ptkit.data.summary import data_lines
from ptkit.data.task import load_task
from ptkit.data.templates import Template, filled
from ptkit.errors import DataError, UserError
from ptkit.formats.places import ROW_FILES
from ptkit.recipe.tasks import ClassificationTask, GenerationTask
from ptkit.recipe.yaml_source import parse_yaml

ODD = ["NA", "null", "None", "nan", "02108", "3.10", "+4722334455", "TRUE", "12E4", "1996-12-19",
       "1996-12-19T03:04:05+02:00", " padded ", "n/a", "1_000"]  # fmt: skip
CELL = st.text(
    st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="\ufeff"), max_size=8
)


def task(train: str, **changes: Any) -> GenerationTask:
    settings = {"kind": "generation", "input": "{a}", "target": "{b}"}
    data = {"files": {"train": train, "validation": train}}
    return GenerationTask(**{**settings, "data": data, **changes})


def lines(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")
    return path.name


def targets(task: Any, folder: Path) -> list[str]:
    return [example.target for example in load_task(task, folder).train]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json"])
def test_every_cell_is_learnt_as_it_is_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    rows = [{"a": value, "b": value} for value in ODD]
    if suffix in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["a", "b"], delimiter="\t" if suffix == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "jsonl":
        lines(path, *rows)
    else:
        path.write_text(json.dumps(rows))
    data = load_task(task(path.name), tmp_path)
    assert [e.target for e in data.train] == ODD
    assert [e.input for e in data.train] == ODD


@given(st.lists(st.tuples(CELL.filter(str.strip), CELL), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_any_text_survives_a_csv_file(tmp_path_factory, cells) -> None:
    path = tmp_path_factory.mktemp("csv") / "t.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("a", "b"), *cells])
    assert [(row["a"], row["b"] or "") for row in read_files([path])] == cells


def test_numbers_of_json_stay_as_written(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(
        '{"a": 1, "b": 2.50}\n{"a": 2.5, "b": true}\n{"a": 12345678901234567890123, "b": 1e5}\n'
    )
    data = load_task(task("t.jsonl"), tmp_path)
    assert [e.input for e in data.train] == ["1", "2.5", "12345678901234567890123"]
    assert [e.target for e in data.train] == ["2.50", "true", "1e5"]


@pytest.mark.parametrize("missing", [{"a": None, "b": "x"}, {"b": "x"}])
def test_what_is_missing_is_nothing_in_an_input(tmp_path: Path, missing: dict) -> None:
    name = lines(tmp_path / "t.jsonl", {"a": "1", "b": "x"}, missing)
    found = load_task(task(name, input="<{a}>"), tmp_path).train
    assert [e.input for e in found] == ["<1>", "<>"]


@pytest.mark.parametrize("text", ["a,b\n1,x\n2,\n", "a,b\n1,x\n2\n"])
def test_what_is_missing_in_a_target_is_refused_with_row_and_column(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=r"t.csv, row 2: `task.target` names `b`, which is missing"):
        load_task(task("t.csv"), tmp_path)
    labelled = ClassificationTask(
        kind="classification", data={"files": {"train": "t.csv", "validation": "t.csv"}},
        input="{a}", label="b", verbalizer={"x": " x", "y": " y"},
    )  # fmt: skip
    with pytest.raises(DataError, match=r"t.csv, row 2: the label in the column `b` is missing"):
        load_task(labelled, tmp_path)


def test_all_unknown_labels_are_told_at_once_with_lines_to_paste(tmp_path: Path) -> None:
    name = lines(tmp_path / "t.jsonl", *({"a": "q", "b": v} for v in ("01", "NA", "NA", "1")))
    labelled = ClassificationTask(
        kind="classification", data={"files": {"train": name, "validation": name}},
        input="{a}", label="b", verbalizer={"1": " one", "2": " two"},
    )  # fmt: skip
    with pytest.raises(DataError) as told:
        load_task(labelled, tmp_path)
    # Rows of one file are counted once, though it is several splits.
    assert ":1: the label `01`" in str(told.value)
    assert ":2 (and in 1 more): the label `NA`" in str(told.value)
    assert '    "01": " 01"\n    "NA": " NA"' in str(told.value)


@pytest.mark.parametrize("name", ["run [v2].jsonl", "train[1].jsonl", "train*.jsonl", "a?.jsonl"])
def test_a_path_is_no_pattern(tmp_path: Path, name: str) -> None:
    for other in ("train1.jsonl", "trainX.jsonl", "ab.jsonl"):
        lines(tmp_path / other, {"a": "other", "b": "other"})
    lines(tmp_path / name, {"a": "own", "b": "own"})
    assert targets(task(name), tmp_path) == ["own"]


SQUAD = {
    "a": "q", "answers": {"text": ["Lima", "lima"], "start": [0, 3]}, "x.1": "dot",
    "messages": [{"role": "user", "content": "hi"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "expected"),
    [("{answers.text}", "Lima\nlima"), ("{answers.text[0]}", "Lima"), ("{answers.start[-1]}", "3"),
     ("{x.1}", "dot"), ("{messages[0].content}", "hi")],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_path_names_what_is_nested(
    tmp_path: Path, suffix: str, template: str, expected: str
) -> None:
    if suffix == "jsonl":
        lines(tmp_path / "t.jsonl", SQUAD)
    else:
        Dataset.from_list([SQUAD]).to_parquet(tmp_path / "t.parquet")
    assert targets(task(f"t.{suffix}", target=template), tmp_path) == [expected]


@pytest.mark.parametrize(
    ("template", "message"),
    [("{answers}", r"`answers`, which holds a mapping \(text, start\).*`{answers.text}`"),
     ("{messages}", r"a list of mappings \(role, content\).*`{messages\[0\].role}`"),
     ("{answers.txt}", "no field `txt`; did you mean `text`"),
     ("{answers.text.x}", r"`.x` is of a mapping, and there is a list")],
)  # fmt: skip
def test_what_has_no_text_is_refused_with_its_type(
    tmp_path: Path, template: str, message: str
) -> None:
    name = lines(tmp_path / "t.jsonl", SQUAD)
    for key in ("input", "target"):
        with pytest.raises(DataError, match=message):
            load_task(task(name, **{"input": "{a}", "target": "{a}", key: template}), tmp_path)


def test_parquet_labels_are_names_and_bytes_are_refused(tmp_path: Path) -> None:
    features = Features(
        {"a": ClassLabel(names=["good", "bad"]), "b": Value("binary"), "c": Value("timestamp[s]")}
    )
    rows = {"a": [1, 0], "b": [b"x", b"y"], "c": [0, 1]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    assert targets(task("t.parquet", target="{a}"), tmp_path) == ["bad", "good"]
    with pytest.raises(DataError, match=r"`b`, which holds .*bytes"):
        load_task(task("t.parquet"), tmp_path)
    with pytest.raises(DataError, match="timestamp"):
        load_task(task("t.parquet", target="{c}"), tmp_path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(DataError, match="two columns are called `a`"):
        load_task(task("t.csv"), tmp_path)


def test_a_text_for_a_template_of_two_columns_is_refused() -> None:
    assert filled("{a}!", "x") == "x!"
    with pytest.raises(DataError, match=r"`a`, `b`.*--raw"):
        filled("{a}: {b}", "x")


@pytest.mark.parametrize("key", ["01", "True", "true", "3.10", "NA", "0x1F", "1_000", "null"])
def test_a_label_in_a_recipe_is_its_text(tmp_path: Path, key: str) -> None:
    from ptkit.recipe.load import load_recipe

    lines(tmp_path / "t.jsonl", *({"a": "q", "label": v} for v in (key, "other", key)))
    (tmp_path / "r.yaml").write_text(
        "name: r\nmethods: [{kind: base}]\ntask:\n  kind: classification\n  input: '{a}'\n"
        "  data: {files: {train: t.jsonl}}\n"
        f"  verbalizer:\n    {key}: ' one'\n    other: ' two'\n"
    )
    loaded = load_recipe(tmp_path / "r.yaml")
    assert list(loaded.recipe.task.verbalizer) == [key, "other"]
    data = load_task(loaded.recipe.task, tmp_path)
    assert {e.label for e in (*data.train, *data.validation)} == {key, "other"}
    (tmp_path / "again.yaml").write_text(loaded.resolved())
    assert load_recipe(tmp_path / "again.yaml").recipe == loaded.recipe
    own = load_recipe("message-routing", [f"task.verbalizer={{{key}: ' one', b: ' two'}}"]).recipe
    assert list(own.task.verbalizer) == [key, "b"]


def test_one_label_written_in_two_ways_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="`1` is written twice"):
        parse_yaml('a: {1: x, "1": y}', "r.yaml")


def sorted_file(folder: Path, **data: Any) -> ClassificationTask:
    """75 rows each of three labels, 25 of a fourth, one label after another."""
    names = ["billing"] * 75 + ["delivery"] * 75 + ["fault"] * 75 + ["praise"] * 25
    name = lines(folder / "s.jsonl", *({"a": f"{i}", "label": n} for i, n in enumerate(names)))
    return ClassificationTask(
        kind="classification", data={"files": {"train": name}, **data}, input="{a}",
        verbalizer={n: f" {n}" for n in sorted(set(names))},
    )  # fmt: skip


def test_a_sorted_file_loses_no_label(tmp_path: Path) -> None:
    data = load_task(sorted_file(tmp_path), tmp_path)
    assert (len(data.train), len(data.validation)) == (225, 25)
    for part in (data.train, data.validation):
        assert {e.label for e in part} == {"billing", "delivery", "fault", "praise"}
    assert not {e.input for e in data.train} & {e.input for e in data.validation}
    assert load_task(sorted_file(tmp_path), tmp_path) == data
    limited = load_task(sorted_file(tmp_path, limits={"train": 20}), tmp_path)
    assert len(limited.train) == 20
    assert {e.label for e in limited.train} == {"billing", "delivery", "fault", "praise"}
    ordered = load_task(sorted_file(tmp_path, draw="first"), tmp_path)
    assert {e.label for e in ordered.validation} == {"praise"}


@given(st.lists(st.sampled_from("aabc"), min_size=2, max_size=60), st.data())
@settings(deadline=None)
def test_a_draw_gives_every_group_its_share(groups: list[str], data) -> None:
    count = data.draw(st.integers(1, len(groups)))
    rows = drawn(groups, count)
    assert rows == sorted(set(rows))
    assert len(rows) == count
    for group in set(groups):
        share = groups.count(group) * count / len(groups)
        assert abs(sum(groups[i] == group for i in rows) - share) <= 1.5


@pytest.mark.parametrize(
    ("files", "splits", "chose", "source"),
    [
        ({"train": "x.jsonl"}, {}, True, "train"),
        ({"train": "x.jsonl", "validation": "y.jsonl"}, {}, True, "validation"),
        ({"train": "x.jsonl", "validation": "y.jsonl", "test": "y.jsonl"}, {}, True, "test"),
        ({"train": "x.jsonl", "validation": "y.jsonl"}, {"test": "validation"}, True, "validation"),
        ({"train": "x.jsonl", "validation": "y.jsonl"},
         {"test": "validation", "validation": None}, False, "validation"),
        ({"train": "x.jsonl", "validation": "y.jsonl", "test": "x.jsonl"}, {}, False, "test"),
    ],
)  # fmt: skip
def test_rows_that_chose_are_known_as_such(
    tmp_path: Path, files: dict, splits: dict, chose: bool, source: str
) -> None:
    for name in ("x.jsonl", "y.jsonl"):
        lines(tmp_path / name, *({"a": f"{name}{i}", "b": "b"} for i in range(12)))
    own = task("", data={"files": files, "splits": splits})
    data = load_task(own, tmp_path)
    assert (data.test_chose, data.origins["test"].source) == (chose, source)
    assert (data.test == data.validation) == chose
    # The recipe that is kept says what was taken.
    if "test" not in files and "test" not in splits:
        assert own.data.splits.test is None


def test_a_baseline_alone_is_the_method_of_a_run() -> None:
    from ptkit.api import one_method
    from ptkit.recipe.load import load_recipe

    recipe = load_recipe("quickstart", ["methods=[{kind: base}]"]).recipe
    assert one_method(recipe, None).kind == "base"
    with pytest.raises(UserError, match="several"):
        one_method(load_recipe("quickstart", ["methods=[{kind: lora}, {kind: full}]"]).recipe, None)


def test_templates_know_no_other_syntax() -> None:
    for text in ("{}", "{a!r}", "{a:>9}", "{", "}"):
        with pytest.raises(DataError, match="not a template"):
            Template(text)


@pytest.mark.parametrize("own_test", [False, True])
def test_scores_say_which_rows_they_are_on(tmp_path: Path, own_test: bool) -> None:
    """In the record, the table, the report, the card and the kept recipe."""
    from ptkit.api import compare
    from ptkit.formats.adapter_files import read_adapter
    from ptkit.hub.card import card_text
    from ptkit.recipe.load import load_recipe

    files = {"train": "t.jsonl", "validation": "v.jsonl", "dev": "d.jsonl"}
    for number, name in enumerate(files.values()):
        lines(tmp_path / name, *({"a": f"{number} {i}", "b": f"{i}"} for i in range(4)))
    if not own_test:
        del files["dev"]
    splits = "splits: {test: dev}," if own_test else ""
    (tmp_path / "r.yaml").write_text(
        "name: r\nretention: null\ntrain: {steps: 1, batch_size: 2, warmup_steps: 0}\n"
        "methods: [{kind: prefix_tuning, num_virtual_tokens: 2, start: random, "
        "learning_rate: 0.1}]\n"
        "budget: {trials: 1, search: {prefix_tuning: {learning_rate: [0.1]}}}\n"
        f"task:\n  kind: generation\n  data: {{{splits} files: {json.dumps(files)}}}\n"
        "  input: '{a}'\n  target: ' {b}'\n  max_target_tokens: 2\n  metrics: [exact_match]\n"
    )
    done = compare(tmp_path / "r.yaml", out=tmp_path / "out")
    (record,) = done.records
    assert (record.test_split, record.test_chose) == (
        ("dev", False) if own_test else ("validation", True)
    )
    report, table = done.report.read_text(), (tmp_path / "out" / "table.md").read_text()
    adapter = next((tmp_path / "out" / "cells").glob("*/adapter"))
    card = card_text("x", read_adapter(adapter), 1)
    said = (
        "test rows (the source's split `dev`)"
        if own_test
        else "validation rows, which also chose the checkpoint"
    )
    assert said in table
    assert said.replace("'", "&#39;") in report
    assert said in card
    assert f"split: {'dev' if own_test else 'validation'}" in card
    assert ("the test rows played no part" in report) == own_test
    assert ("There was no test split" in report) == (not own_test)
    kept = load_recipe(tmp_path / "out" / "recipe.yaml").recipe.task.data.splits
    assert kept.test == ("dev" if own_test else None)


def test_what_was_decided_about_the_data_is_told(tmp_path: Path) -> None:
    data = load_task(sorted_file(tmp_path, limits={"train": 20}), tmp_path)
    own = sorted_file(tmp_path)
    told = data_lines(own, data)
    assert told[0] == (
        "train: 20 rows (20 of 225 kept by `limits`); billing 6, delivery 6, fault 6, praise 2"
    )
    assert told[1].startswith("validation: 25 rows (held out of `train`); billing ")
    assert "no test split: the validation rows, which also choose" in told[2]
    assert len(told) == 3
    ordered = load_task(sorted_file(tmp_path, draw="first"), tmp_path)
    warned = [line for line in data_lines(own, ordered) if line.startswith("warning: ")]
    assert "no training row has the label `praise`" in warned[0]
    assert "all validation rows have the label `praise`" in warned[1]
    few = load_task(sorted_file(tmp_path, draw="first", limits={"train": 50}), tmp_path)
    assert "no training row has the label `delivery`" in " ".join(data_lines(own, few))


def test_validate_and_a_run_tell_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from typer.testing import CliRunner

    from ptkit.cli.display import LiveDisplay
    from ptkit.cli.main import app

    name = lines(tmp_path / "t.jsonl", *({"a": f"{i}" * (i > 0), "b": "x"} for i in range(30)))
    text = (
        "name: r\nretention: null\nmethods: [{kind: base}]\ntask:\n  kind: generation\n"
        f"  data: {{files: {{train: {name}}}}}\n  input: '{{a}}'\n  target: '{{b}}'\n"
        "  max_target_tokens: 1\n  metrics: [exact_match]\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    (tmp_path / "bad.yaml").write_text(text.replace("{b}", "{c}"))
    found = CliRunner().invoke(app, ["recipes", "validate", str(tmp_path / "r.yaml")])
    assert "train: 27 rows" in found.stdout
    assert "1 inputs are empty" in found.stdout
    faulty = CliRunner().invoke(app, ["recipes", "validate", str(tmp_path / "bad.yaml")])
    assert "`task.target` names the column `c`" in str(faulty.exception)
    lines(tmp_path / "zh.jsonl", *({"a": "x", "b": "今天的会议改到下午三点。"} for _ in range(9)))
    unread = text.replace(name, "zh.jsonl").replace("exact_match", "bleu")
    (tmp_path / "unread.yaml").write_text(unread)
    faulty = CliRunner().invoke(app, ["recipes", "validate", str(tmp_path / "unread.yaml")])
    assert "use `bleu-zh`" in str(faulty.exception)
    for quiet in (False, True):
        display = LiveDisplay(1, quiet=quiet)
        train(tmp_path / "r.yaml", out=tmp_path / f"run{quiet}", observer=display)
        told = capsys.readouterr().err
        assert ("train: 27 rows" in told) != quiet
        assert ("targets fill `max_target_tokens` (1)" in told) != quiet


@pytest.mark.parametrize("bad", [3, 17, 40])
@pytest.mark.parametrize("column", ["b", "l"])
def test_a_refused_row_is_named_as_it_stands_in_the_file(
    tmp_path: Path, bad: int, column: str
) -> None:
    """Rows are drawn for validation, and by limits: the number is not that of the draw."""
    name = lines(
        tmp_path / "t.jsonl",
        *({"a": f"{i}", "b": "x", "l": "yn"[i % 2]} for i in range(1, bad)),
        {"a": "bad", "b": None, "l": None},
        *({"a": f"{i}", "b": "x", "l": "yn"[i % 2]} for i in range(bad + 1, 44)),
    )
    data = {"files": {"train": name}}
    generated = GenerationTask(kind="generation", input="{a}", target="{b}", data=data)
    labelled = ClassificationTask(
        kind="classification", data=data, input="{a}", label="l", verbalizer={"y": " y", "n": " n"}
    )
    with pytest.raises(DataError, match=f":{bad}: .*missing"):
        load_task(generated if column == "b" else labelled, tmp_path)


def test_drawn_rows_of_drawn_rows_keep_their_places(tmp_path: Path) -> None:
    table = read_files([tmp_path / lines(tmp_path / "t.jsonl", *({"a": f"{i}"} for i in range(9)))])
    drawn_twice = table.select([1, 4, 7, 8]).only(["a"]).select([0, 2])
    assert [(place, row["a"]) for place, row in drawn_twice.placed()] == [(2, "1"), (8, "7")]


@pytest.mark.parametrize("kind", ["float16", "float32", "float64"])
def test_a_number_of_a_parquet_file_has_the_digits_of_its_type(tmp_path: Path, kind: str) -> None:
    features = Features({"a": Value(kind), "b": [Value(kind)]})
    rows = {"a": [0.1, 2.5], "b": [[0.1, 3.0], [0.3]]}
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    found = load_task(task("t.parquet"), tmp_path).train
    assert [(e.input, e.target) for e in found] == [("0.1", "0.1\n3.0"), ("2.5", "0.3")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": "x \\ud83d", "b": "y"}', r"\.jsonl:2: .*`\\ud83d` is half of a character"),
        ('{"a": "x", "\\uDE00": "y"}', r"\.jsonl:2: .*half of a character"),
        ('{"a": "x", "b": ' + "[" * 5000 + "]" * 5000 + "}", r"\.jsonl:2: .*nested too deeply"),
    ],
)
def test_json_that_no_text_can_be_made_of_is_refused_with_its_line(
    tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "t.jsonl").write_text('{"a": "\\ud83d\\ude00 \\\\ud83d", "b": "z"}\n')
    assert load_task(task("t.jsonl"), tmp_path).train[0].input == "\U0001f600 \\ud83d"
    with (tmp_path / "t.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        load_task(task("t.jsonl"), tmp_path)


#: What Python's `splitlines` takes for the end of a line, and no file format does.
NO_ENDS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def test_separators_within_a_text_end_no_line_of_a_file(tmp_path: Path) -> None:
    text = "a".join(NO_ENDS)
    name = lines(tmp_path / "t.jsonl", {"a": text, "b": text}, {"a": "1", "b": "2"})
    raw = json.dumps({"a": text, "b": text}, ensure_ascii=False)
    (tmp_path / name).write_text(f'{raw}\n{{"a": "1", "b": "2"}}\n', encoding="utf-8")
    assert [e.target for e in load_task(task(name), tmp_path).train] == [text, "2"]
    row = {"input": text, "prediction": text, "references": [text]}
    row = json.dumps(row, ensure_ascii=False)
    (tmp_path / "predictions.jsonl").write_text(f"{row}\n{row}\n", encoding="utf-8")
    assert [r.input for r in read_predictions(tmp_path)] == [text] * 2
    (tmp_path / "in.txt").write_text(f"{text}\r\n\ntwo", encoding="utf-8")
    assert input_lines(None, tmp_path / "in.txt") == [text, "two"]


@pytest.mark.parametrize("ending", READERS)
def test_rows_and_columns_are_not_taken_for_lines_of_input(tmp_path: Path, ending: str) -> None:
    """A header, or a label beside its text, would be answered as if it were a question."""
    (tmp_path / f"t{ending}").write_text("text,label\nhello,good\n")
    with pytest.raises(UserError, match="one input per line"):
        input_lines(None, tmp_path / f"t{ending}")


def test_an_input_file_of_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text"):
        input_lines(None, tmp_path / "in.txt")


@pytest.mark.parametrize("command", ["generate", "classify", "chat"])
def test_standard_input_of_another_encoding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    adapter = ["-a", Path(__file__).resolve().parents[1] / "adapters" / "routing-prefix"]
    given = io.TextIOWrapper(io.BytesIO(b"\n\xff\xfe\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", given)
    told = refused(command, *adapter, cwd=tmp_path)
    assert told == "Error: standard input is not UTF-8 text (byte 1)\n"


def test_standard_input_is_read_as_a_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = "\ufeffdrei Äpfel\r\n\nzwei\rvier\u2028fünf".encode()
    (tmp_path / "in.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))
    expected = ["drei Äpfel", "zwei", "vier\u2028fünf"]
    assert input_lines(None, tmp_path / "in.txt") == expected
    assert input_lines(None, None) == expected


def test_an_argument_of_another_encoding_is_refused(tmp_path: Path) -> None:
    bad = os.fsdecode(b"caf\xe9")
    assert "the prompt is not UTF-8 text (character 3)" in refused("generate", bad, cwd=tmp_path)
    assert "prompt 2 is not UTF-8" in refused("generate", "a", bad, cwd=tmp_path)
    assert "--system is not UTF-8" in refused("chat", "--system", bad, cwd=tmp_path)


def test_the_endings_that_messages_name_are_those_that_are_read() -> None:
    assert (*READERS,) == ROW_FILES
