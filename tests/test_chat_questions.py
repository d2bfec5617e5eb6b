"""Files of conversations as questions: each form, with or without the answer that is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptkit.data.chat_questions import read_questions
from ptkit.errors import DataError

USER = {"role": "user", "content": "Who?"}
SAID = {"role": "assistant", "content": "Me."}
AGAIN = {"role": "user", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {}}}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def human(text: str, who: str = "human") -> dict[str, str]:
    return {"from": who, "value": text}


@pytest.mark.parametrize(
    ("row", "messages", "replaced"),
    [
        ({"messages": [USER]}, [USER], False),
        ({"messages": [SYSTEM, USER, SAID, AGAIN]}, [SYSTEM, USER, SAID, AGAIN], False),
        ({"messages": [USER, SAID, AGAIN, SAID]}, [USER, SAID, AGAIN], True),
        ({"messages": [USER, {**SAID, "weight": 0}]}, [USER], True),
        ({"conversations": [human("Who?")]}, [USER], False),
        ({"conversations": [human("Who?"), human("Me.", "gpt")]}, [USER], True),
        ({"prompt": "Who?"}, [USER], False),
        ({"prompt": "Who?", "completion": "Me."}, [USER], True),
        ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER], False),
        ({"prompt": [USER], "completion": [SAID]}, [USER], True),
        ({"instruction": "Who?"}, [USER], False),
        ({"instruction": "Why?", "history": [["Who?", "Me."]], "output": "x"},
         [USER, SAID, AGAIN], True),
    ],
)  # fmt: skip
def test_every_form_is_asked_up_to_its_last_answer(
    tmp_path: Path, row: dict[str, Any], messages: list[Any], replaced: bool
) -> None:
    (found,) = read_questions(write(tmp_path, row))
    assert [*found.messages] == messages
    assert found.replaced is replaced
    assert found.text.endswith(messages[-1]["content"])


def test_tools_come_along_and_rows_may_differ(tmp_path: Path) -> None:
    file = write(tmp_path, {"messages": [USER], "tools": [TOOL]}, {"messages": [USER, SAID]})
    first, second = read_questions(file)
    assert (first.tools, second.tools) == ((TOOL,), ())


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": [SAID]}, "rows.jsonl:1, turn 1: found `assistant`, expected system or user"),
        ({"messages": []}, "should be a list of messages with"),
        ({"messages": [USER, AGAIN]}, "turn 2: found `user`, expected assistant"),
        ({"messages": [SYSTEM]}, "turn 2: found `assistant`, expected user"),
        ({"text": "Who?"}, "no column holds conversations"),
        ({"prompt": 3}, "should both be texts"),
    ],
)
def test_a_broken_row_is_told_with_its_place(
    tmp_path: Path, row: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        read_questions(write(tmp_path, row))
