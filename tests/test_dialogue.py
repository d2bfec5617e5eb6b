"""Files of conversations: what is recognised, and what is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from ptkit.data.chat_formats import recognised
from ptkit.data.chat_questions import read_questions
from ptkit.data.chat_rows import ChatEncoder
from ptkit.data.dialogue import Dialogue
from ptkit.data.in_memory import table_of
from ptkit.data.pair_formats import pair_format
from ptkit.data.read_files import read_files
from ptkit.data.table import Table
from ptkit.data.task import TaskData, load_task
from ptkit.data.values import json_of, json_value, typed
from ptkit.errors import DataError
from ptkit.recipe.tasks import ChatTask, PreferenceTask

USER, ANSWER = {"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2.5}}}


def chat_task(**settings: Any) -> ChatTask:
    files = {"train": "train.jsonl", "validation": "train.jsonl"}
    return ChatTask.model_validate({"kind": "chat", "data": {"files": files}, **settings})


def loaded(tmp_path: Path, *rows: Any, **settings: Any) -> TaskData:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    return load_task(chat_task(**settings), tmp_path)


def messages_of(data: TaskData) -> list[dict[str, Any]]:
    dialogue = data.train[0].dialogue
    assert dialogue is not None
    return [dict(message) for message in dialogue.messages]


SAID = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
FORMS = {
    "messages": {"messages": SAID},
    "messages in parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "w"},
                                                  {"type": "text", "text": "1"}]}, SAID[1]]
    },
    "messages in conversations": {"conversations": SAID},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]
    },
    "alpaca": {"instruction": "w1", "input": "", "output": "w2"},
    "prompt and completion": {"prompt": "w1", "completion": "w2"},
    "prompt and completion messages": {"prompt": SAID[:1], "completion": SAID[1:]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_the_same_conversation(tmp_path: Path, form: str) -> None:
    data = loaded(tmp_path, FORMS[form])
    assert messages_of(data) == SAID
    assert data.train[0].references == ("w2",)
    assert data.form


def test_weights_and_prompts_decide_which_answers_are_learnt(tmp_path: Path) -> None:
    turns = [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]
    (example, *_) = loaded(tmp_path, {"messages": turns}).train
    assert example.dialogue is not None
    assert example.dialogue.learnt == (False, False, False, True)
    (example, *_) = loaded(tmp_path, {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}).train
    assert example.dialogue is not None
    assert example.dialogue.learnt == (False, False, False, True)


def test_alpaca_history_and_system_stand_before_the_instruction(tmp_path: Path) -> None:
    row = {"instruction": "w3", "input": "w4", "output": "w5", "system": "w0",
           "history": [["w1", "w2"]]}  # fmt: skip
    found = [(m["role"], m["content"]) for m in messages_of(loaded(tmp_path, row))]
    assert found == [
        ("system", "w0"), ("user", "w1"), ("assistant", "w2"), ("user", "w3\nw4"),
        ("assistant", "w5"),
    ]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_column_of_system_prompts_goes_before_the_turns(tmp_path: Path, form: str) -> None:
    own = {"role": "system", "content": "w0"}
    data = loaded(tmp_path, {**FORMS[form], "system": "w0"}, system="w9")
    assert messages_of(data) == [own, *SAID]
    (example, *_) = data.train
    assert example.dialogue is not None
    assert example.dialogue.learnt == (False, False, True)
    # An empty one is none: the task's goes there.
    data = loaded(tmp_path, {**FORMS[form], "system": ""}, system="w9")
    assert messages_of(data) == [{**own, "content": "w9"}, *SAID]
    with pytest.raises(DataError, match=r"train\.jsonl:1: `system` should be a text"):
        loaded(tmp_path, {**FORMS[form], "system": ["w0"]})


@pytest.mark.parametrize("form", ["messages", "sharegpt", "prompt"])
def test_row_with_two_system_prompts_has_to_have_one(tmp_path: Path, form: str) -> None:
    own = {"role": "system", "content": "w0"}
    rows: dict[str, dict[str, Any]] = {
        "messages": {"messages": [own, *SAID]},
        "sharegpt": {"conversations": [{"from": "system", "value": "w0"},
                                       *FORMS["sharegpt"]["conversations"]]},
        "prompt": {"prompt": [own, *SAID[:1]], "completion": SAID[1:]},
    }  # fmt: skip
    data = loaded(tmp_path, {**rows[form], "system": "w0"})
    assert messages_of(data) == [own, *SAID]
    with pytest.raises(DataError, match=r"train\.jsonl:1: the column `system` .* turn another"):
        loaded(tmp_path, {**rows[form], "system": "w7"})


def test_pairs_have_the_system_prompt_of_their_column() -> None:
    task = PreferenceTask.model_validate(
        {"kind": "preference", "data": {"memory": True}, "system": "w9"}
    )
    other = [USER, {**ANSWER, "content": "w3"}]
    rows = [{"chosen": SAID, "rejected": other, "system": "w0"},
            {"chosen": SAID, "rejected": other, "system": None}]  # fmt: skip
    table = table_of("train", rows)
    read = pair_format(task, table).reader(task, table, "rows")[1]
    for number, (row, system) in enumerate(zip(rows, ["w0", "w9"], strict=True)):
        pair = read(number, row)
        assert pair.dialogues is not None
        for dialogue in pair.dialogues:
            assert dialogue.messages[0] == {"role": "system", "content": system}
        assert pair.input == f"system: {system}\nuser: w1"


def test_system_prompt_of_the_task_goes_before_conversations_without_one(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "w8"}, *SAID]
    data = loaded(tmp_path, {"messages": SAID}, {"messages": own}, system="w9")
    first = [e.dialogue.messages[0]["content"] for e in data.train if e.dialogue]
    assert first == ["w9", "w8"]


@pytest.mark.parametrize("arguments", [{"a": 1, "b": 2.5}, '{"a": 1, "b": 2.5}'])
def test_arguments_of_tool_calls_keep_the_types_of_json(tmp_path: Path, arguments: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": arguments}}
    turns = [
        USER, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "3.5"}, ANSWER,
    ]  # fmt: skip
    found = messages_of(loaded(tmp_path, {"messages": turns, "tools": [CALL]}))
    assert found[1]["tool_calls"][0]["function"] == CALL["function"]
    assert found[2] == {"role": "tool", "tool_call_id": "c1", "content": "3.5"}


def test_call_in_sharegpt_is_a_tool_call(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "w1"},
        {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"a": 1}})},
        {"from": "observation", "value": "7"}, {"from": "gpt", "value": "w2"},
    ]  # fmt: skip
    found = messages_of(loaded(tmp_path, {"conversations": turns}))
    assert [m["role"] for m in found] == ["user", "assistant", "tool", "assistant"]
    assert found[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "w1"} for role in roles]}


#: Rows that are refused -> what the message has, beside the file and the line.
BROKEN = {
    "two questions": (turns("user", "user", "assistant"), "turn 2: found `user`, expected assist"),
    "an answer first": (turns("assistant"), "turn 1: found `assistant`, expected system or user"),
    "a late system": (turns("user", "system", "assistant"), "turn 2: found `system`"),
    "no answer": (turns("user"), "no assistant turn"),
    "a question last": (turns("user", "assistant", "user"), "turn 3: the conversation ends"),
    "a result of no call": (turns("user", "assistant", "tool", "assistant"), "found `tool`"),
    "an unknown role": (turns("user", "asistant"), 'turn 2: unknown role "asistant"; did you mean'),
    "no role": ({"messages": [{"content": "w1"}]}, "turn 1: `role` is missing"),
    "no messages": ({"messages": []}, "non-empty list of messages, found an empty list"),
    "a message that is none": ({"messages": ["w1", "w2"]}, "turn 1: expected a message"),
    "no content": ({"messages": [{"role": "user"}, ANSWER]}, "turn 1 (user): `content` should be"),
    "a number": ({"messages": [{"role": "user", "content": 7}, ANSWER]}, "found the number 7"),
    "a picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]},
        "a part of type `image_url`",
    ),
    "another field": ({"messages": [{**USER, "weigth": 0}, ANSWER]}, "did you mean `weight`"),
    "a weight of two": ({"messages": [USER, {**ANSWER, "weight": 2}]}, "should be 0 or 1"),
    "nothing learnt": ({"messages": [USER, {**ANSWER, "weight": 0}]}, "nothing to learn"),
    "broken arguments": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [
            {"function": {"name": "add", "arguments": "{"}}]}]},
        "tool call 1: `arguments` are not valid JSON",
    ),
    "another form": (
        {"conversations": [{"from": "human", "value": "w1"}]},
        "`messages` is missing; the rows were recognised as messages",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_broken_row_is_refused_with_its_place(tmp_path: Path, what: str) -> None:
    row, told = BROKEN[what]
    with pytest.raises(DataError) as error:  # behind a blank line: lines are those of the file
        loaded(tmp_path, {"messages": SAID}, "", row)
    assert told in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'train.jsonl'}:3")
    assert len(str(error.value).splitlines()) == 1


def test_json_that_breaks_is_refused_with_its_line(tmp_path: Path) -> None:
    rows = [{"messages": SAID}] * 99
    with pytest.raises(DataError, match=r"train\.jsonl:100: not valid JSON"):
        loaded(tmp_path, *rows, '{"messages": [')


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"text": "w1"}, "no column holds conversations; expected `messages`"),
        ({"messages": SAID, "prompt": "w1", "completion": "w2"}, "tell of several forms"),
        ({"messages": "w1"}, "`messages` should be a list of messages"),
        ({"messages": None, "x": "w1"}, "is empty in every row"),
    ],
)
def test_columns_that_tell_nothing_or_too_much_are_refused(
    tmp_path: Path, row: Any, told: str
) -> None:
    with pytest.raises(DataError) as error:
        loaded(tmp_path, row, row)
    assert told in str(error.value)


def test_form_and_column_can_be_named(tmp_path: Path) -> None:
    row = {"messages": SAID, "prompt": "w5", "completion": "w6"}
    assert messages_of(loaded(tmp_path, row, format="prompt_completion"))[0]["content"] == "w5"
    assert messages_of(loaded(tmp_path, {"talk": SAID}, column="talk")) == SAID
    with pytest.raises(DataError, match=r"no column `conversations`"):
        loaded(tmp_path, row, format="sharegpt")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(json_values)
def test_json_is_read_and_written_without_loss(value: Any) -> None:
    read = json_value(json.dumps(value))
    assert typed(read) == value
    assert typed(json_value(json_of(read))) == value


def test_model_without_a_template_is_told_how_to_give_one() -> None:
    with pytest.raises(DataError, match=r"no chat template; give one with `task.chat_template`"):
        ChatEncoder(word_tokenizer(), chat_task())


def called(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A row that calls one tool, with its schema."""
    fields = {"type": "object", "properties": {key: {"type": "number"} for key in arguments}}
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": name, "parameters": fields}}
    return {"messages": messages, "tools": [tool]}


CALLED = [called("add", {"a": 1, "b": {"c": 2}}), called("weather", {"city": "w3"})] * 5


def of_table(table: Table) -> list[Dialogue]:
    return [own for _, own in recognised(chat_task(), table).dialogues(table, "rows")]


@pytest.mark.parametrize("kind", ["data set", "data frame", "parquet", "list"])
def test_typed_rows_have_the_calls_and_tools_that_json_has(kind: str, tmp_path: Path) -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    dataset = datasets.Dataset.from_list(CALLED)
    if kind == "parquet":
        dataset.to_parquet(tmp_path / "rows.parquet")
        table = read_files([tmp_path / "rows.parquet"])
    else:
        rows = {"data set": dataset, "data frame": pandas.DataFrame(CALLED), "list": CALLED}
        table = table_of("train", rows[kind])
    for found, row in zip(of_table(table), CALLED, strict=True):
        assert found.messages[1]["tool_calls"] == row["messages"][1]["tool_calls"]
        assert [*found.tools] == row["tools"]
    if kind == "parquet":  # what is asked of a model
        (first, *_) = read_questions(tmp_path / "rows.parquet")
        assert [*first.tools] == CALLED[0]["tools"]
    pairs = [
        {**row, "chosen": row["messages"], "rejected": [USER, ANSWER], "prompt": None}
        for row in CALLED
    ]
    held = table_of("train", datasets.Dataset.from_list(pairs) if kind != "list" else pairs)
    task = PreferenceTask.model_validate({"kind": "preference", "data": {"memory": True}})
    form = pair_format(task, held)
    assert form.messages
    read = form.reader(task, held, "rows")[1]
    dialogues = read(0, held.rows[0]).dialogues
    assert dialogues is not None
    assert dialogues[0].messages[1]["tool_calls"] == CALLED[0]["messages"][1]["tool_calls"]


def test_null_of_json_is_an_argument(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    row = called("add", {"a": None})
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    text = called("add", {"a": None})
    text["messages"][1]["tool_calls"][0]["function"]["arguments"] = '{"a": null}'
    json_column = datasets.Features(
        {"messages": datasets.Json(), "tools": datasets.List(datasets.Json())}
    )
    for table in (
        read_files([tmp_path / "rows.jsonl"]),
        table_of("train", datasets.Dataset.from_list([text])),
        table_of("train", datasets.Dataset.from_list([row], features=json_column)),
    ):
        (found,) = of_table(table)
        (call,) = found.messages[1]["tool_calls"]
        assert call["function"]["arguments"] == {"a": None}
