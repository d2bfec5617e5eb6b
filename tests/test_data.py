"""Data: what is missing, empty or ill-formed is named; what is good arrives complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import word_tokenizer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from ptkit.data.encode import encode_examples
from ptkit.data.general_text import general_texts
from ptkit.data.sources import builtin_sets
from ptkit.data.task import load_task
from ptkit.data.templates import Template
from ptkit.errors import DataError
from ptkit.recipe.tasks import ClassificationTask, DataSection, GenerationTask


def generation(folder: Path, files: dict, **changes) -> GenerationTask:
    settings = {"kind": "generation", "data": {"files": files}, "input": "{a}", "target": "{b}"}
    return GenerationTask(**{**settings, **changes})


def rows(path: Path, *values: dict) -> str:
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path.name


def test_formats_give_the_same_examples(tmp_path: Path) -> None:
    values = [{"a": f"in {i}", "b": f"out {i}"} for i in range(12)]
    dataset = Dataset.from_list(values)
    rows(tmp_path / "t.jsonl", *values)
    dataset.to_csv(tmp_path / "t.csv")
    dataset.to_csv(tmp_path / "t.tsv", sep="\t")
    dataset.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.json").write_text(json.dumps(values))
    expected = load_task(generation(tmp_path, {"train": "t.jsonl"}), tmp_path)
    assert len(expected.train) == 11
    for suffix in ("csv", "tsv", "parquet", "json"):
        assert load_task(generation(tmp_path, {"train": f"t.{suffix}"}), tmp_path) == expected


def test_missing_splits_fall_back_as_documented(tmp_path: Path) -> None:
    name = rows(tmp_path / "t.jsonl", *({"a": str(i), "b": "x"} for i in range(30)))
    data = load_task(generation(tmp_path, {"train": name}), tmp_path)
    assert (len(data.train), len(data.validation)) == (27, 3)
    assert not {e.input for e in data.train} & {e.input for e in data.validation}
    assert data.test == data.validation
    in_order = generation(tmp_path, {}, data={"files": {"train": name}, "draw": "first"})
    assert [e.input for e in load_task(in_order, tmp_path).validation] == ["27", "28", "29"]


def test_limits_take_the_first_rows_where_asked(tmp_path: Path) -> None:
    name = rows(tmp_path / "t.jsonl", *({"a": str(i), "b": "x"} for i in range(30)))
    task = generation(
        tmp_path,
        {},
        data={"files": {"train": name}, "limits": {"train": 4, "test": 2}, "draw": "first"},
    )
    data = load_task(task, tmp_path)
    assert [e.input for e in data.train] == ["0", "1", "2", "3"]
    assert (len(data.validation), len(data.test)) == (3, 2)


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        ({"train": "nope.jsonl"}, {}, "no such data file: .*nope.jsonl"),
        ({"train": "empty.jsonl"}, {}, "empty.jsonl is empty"),
        ({"train": "bad.jsonl"}, {}, r"bad.jsonl:2: not valid JSON"),
        ({"train": "notes.txt"}, {}, "expected one of .jsonl"),
        ({"validation": "good.jsonl"}, {}, "no train split"),
        ({"tain": "good.jsonl"}, {}, "did you mean `train`"),
        ({"train": "one.jsonl"}, {}, "at least two"),
        ({"train": "good.jsonl"}, {"input": "{aa}"}, "`task.input` names the column `aa`"),
        ({"train": "good.jsonl"}, {"target": "{a.x}"}, r"no row has `{a.x}`.*there is a text"),
        ({"train": "good.jsonl"}, {"references": "c"}, "`task.references` names the column `c`"),
        ({"train": "good.jsonl"}, {"references": "b"}, "good.jsonl:1: `b` should be a non-empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, files, changes, message: str) -> None:
    rows(tmp_path / "good.jsonl", {"a": "1", "b": "2"}, {"a": "3", "b": "4"})
    rows(tmp_path / "one.jsonl", {"a": "1", "b": "2"})
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"a": "1", "b": "2"}\n{"a": \n')
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=message):
        load_task(generation(tmp_path, files, **changes), tmp_path)


def test_label_without_words_is_named_with_its_row(tmp_path: Path) -> None:
    name = rows(tmp_path / "t.jsonl", {"a": "x", "label": "good"}, {"a": "y", "label": "godo"})
    task = ClassificationTask(
        kind="classification", data={"files": {"train": name, "validation": name}},
        input="{a}", verbalizer={"good": " yes", "bad": " no"},
    )  # fmt: skip
    with pytest.raises(DataError, match=r"\.jsonl:2.*: the label `godo` .*did you mean `good`"):
        load_task(task, tmp_path)


def test_built_in_sets_are_complete_and_portions_are_held_out() -> None:
    assert builtin_sets() == [
        "captions-en-de", "facts-to-text", "message-routing", "passage-question",
        "persona-chat", "persona-preference", "persona-reply", "report-summary",
    ]  # fmt: skip
    task = GenerationTask(
        kind="generation", data={"builtin": "facts-to-text"}, input="{facts}", target="{text}",
        references="references",
    )  # fmt: skip
    data = load_task(task, Path())
    assert (len(data.train), len(data.validation), len(data.test)) == (1500, 100, 180)

    def attributes(text: str) -> tuple[str, ...]:
        return (
            *tuple(part.split("[")[0] for part in text.split("], ") if "name" not in part),
            text.split("[")[1].split("]")[0],
        )

    seen = {attributes(e.input) for e in data.train}
    portions = [attributes(e.input) in seen for e in data.test]
    assert all(portions[:60])
    assert not any(portions[60:])
    assert all(len(e.references) >= 2 for e in data.test)


def test_general_text_is_shipped_and_errors_name_the_file(tmp_path: Path) -> None:
    assert len(general_texts("general-en", tmp_path)["general-en"]) > 8000
    with pytest.raises(DataError, match=r"retention\.text.*missing\.txt"):
        general_texts("missing.txt", tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(DataError, match="not UTF-8"):
        general_texts("latin.txt", tmp_path)


@given(st.dictionaries(st.text("abcde", min_size=1, max_size=4), st.text(max_size=12), min_size=1))
def test_templates_fill_every_column_and_keep_the_rest(row: dict[str, str]) -> None:
    text = " | ".join(f"{{{{x}}}} {{{column}}}" for column in row)
    template = Template(text)
    assert template.columns == list(row)
    assert template.render(row) == " | ".join(f"{{x}} {value}" for value in row.values())


@pytest.mark.parametrize("text", ["{}", "{a!r}", "{a:>9}", "{", "}"])
def test_templates_cannot_reach_into_values(text: str) -> None:
    with pytest.raises(DataError, match="not a template"):
        Template(text)


def test_encoding_cuts_inputs_left_targets_right_and_ends_targets(tmp_path: Path) -> None:
    name = rows(tmp_path / "t.jsonl", *({"a": "w1 w2 w3 w4", "b": "w5 w6 w7"} for _ in range(2)))
    tokenizer = word_tokenizer()
    plain = generation(tmp_path, {"train": name, "validation": name})
    cut = plain.model_copy(update={"max_input_tokens": 2, "max_target_tokens": 3})
    examples = load_task(plain, tmp_path).train
    assert encode_examples(examples, tokenizer, plain)[0].target_ids == [5, 6, 7, 0]
    encoded = encode_examples(examples, tokenizer, cut)[0]
    assert (encoded.input_ids, encoded.target_ids) == ([3, 4], [5, 6, 7])


def test_lists_are_written_one_entry_per_line() -> None:
    row: dict = {
        "triples": [["Ada", "born in", "London"], ["Ada", "wrote", "Note G"]],
        "facts": ["a", "2"],
    }
    assert Template("{facts}\n").render(row) == "a\n2\n"
    assert Template("{triples}").render(row) == "Ada | born in | London\nAda | wrote | Note G"


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"hub": "a/b"}, "set `limits.train`"),
        ({"hub": "a/b", "limits": {"test": 3}}, "set `limits.train`"),
        ({"hub": "a/b", "limits": {"train": 3}, "draw": "seed"}, "`draw: seed` draws from all"),
        ({"builtin": "facts-to-text", "limits": {"train": 3}}, "is for hub datasets"),
    ],
)
def test_a_stream_is_refused_what_needs_the_number_of_rows(
    section: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        DataSection(streaming=True, **section)
