"""A draft for pairs of answers teaches which one is preferred, and never the rejected one."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from test_cli import ptkit as command
from test_drafting import jsonl_file

import ptkit
from ptkit.drafting.draft import Draft, draft_recipe
from ptkit.errors import DataError, UserError
from ptkit.recipe.load import load_recipe
from ptkit.recipe.tasks import PreferenceTask

Rows = list[dict[str, Any]]


def asked(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


TEXTS: Rows = [
    {"prompt": f"What is number {i}?", "chosen": f"It is {i}, as you know", "rejected": f"No {i}"}
    for i in range(24)
]
MESSAGES: Rows = [
    {"prompt": asked("user", row["prompt"]), "chosen": asked("assistant", row["chosen"]),
     "rejected": asked("assistant", row["rejected"])}
    for row in TEXTS
]  # fmt: skip
#: As UltraFeedback: the prompt as text, the best conversation alone, and both conversations.
BESIDE_A_CHAT: Rows = [
    {"prompt": text["prompt"], "messages": row["prompt"] + row["chosen"], "score_chosen": 8.0,
     "chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"],
     "score_rejected": 7.0}
    for text, row in zip(TEXTS, MESSAGES, strict=True)
]  # fmt: skip


def drafted(tmp_path: Path, rows: Rows, **options: Any) -> Draft:
    with contextlib.chdir(tmp_path):
        return draft_recipe(jsonl_file(tmp_path / "pairs.jsonl", rows), **options)


@pytest.mark.parametrize(
    ("rows", "templates"),
    [
        (TEXTS, ("{prompt}\n", "{chosen}", "{rejected}")),
        # A space or a line's end that is there already is not written again.
        ([{**row, "prompt": row["prompt"] + " "} for row in TEXTS],
         ("{prompt}", "{chosen}", "{rejected}")),
        # The prompt under another name, with a system prompt that is the same in many rows.
        ([{"system": ["Be kind.", ""][i % 2], "question": row.pop("prompt"), **row}
          for i, row in enumerate(map(dict, TEXTS))],
         ("System: {system}\nQuestion: {question}\nAnswer:", " {chosen}", " {rejected}")),
        ([{"prompt": row["prompt"], "answer_preferred": row["chosen"],
           "answer_rejected": row["rejected"], "chosen_score": 8, "rejected_score": 7}
          for row in TEXTS],
         ("{prompt}\n", "{answer_preferred}", "{answer_rejected}")),
        # All rejected answers are the same.
        ([{**row, "rejected": "I do not know"} for row in TEXTS],
         ("{prompt}\n", "{chosen}", "{rejected}")),
    ],
    ids=["texts", "parted", "system", "other-names", "constant"],
)  # fmt: skip
def test_pairs_of_texts_become_a_preference(
    rows: Rows, templates: tuple[str, ...], tmp_path: Path
) -> None:
    draft = drafted(tmp_path, rows)
    task = draft.loaded.recipe.task
    assert isinstance(task, PreferenceTask)
    assert (task.input, task.chosen, task.rejected) == templates
    assert "train: 22 rows" in draft.told
    assert not any("prompts leave" in line for line in draft.told)  # nothing is cut
    assert [m.kind for m in draft.loaded.recipe.methods] == ["base", "prefix_tuning"]


@pytest.mark.parametrize("rows", [MESSAGES, BESIDE_A_CHAT], ids=["messages", "beside-a-chat"])
def test_pairs_of_messages_become_a_preference(rows: Rows, tmp_path: Path) -> None:
    draft = drafted(tmp_path, rows)
    task = draft.loaded.recipe.task
    assert isinstance(task, PreferenceTask)
    assert task.chat_template == "plain"
    assert task.max_tokens <= 64
    assert "pairs: recognised as `chosen` and `rejected` as lists of messages" in draft.told
    with pytest.raises(UserError, match="bring their prompt"):
        drafted(tmp_path, rows, text="prompt")


def test_a_draft_of_pairs_trains(tmp_path: Path) -> None:
    run = ptkit.train(
        data=TEXTS, model="tiny-en", steps=2, save_every=2, batch_size=4, out=tmp_path / "run",
        overrides=["retention=null"],
    )  # fmt: skip
    assert {"preference_accuracy", "reward_margin"} <= run.record.metrics.keys()


def test_one_answer_of_a_pair_is_learnt_without_reading_the_other(tmp_path: Path) -> None:
    for options, learnt in (
        ({"goal": "generation"}, "{chosen}"),
        ({"target": "chosen"}, "{chosen}"),
        ({"target": "rejected"}, "{rejected}"),
    ):
        task: Any = drafted(tmp_path, TEXTS, **options).loaded.recipe.task
        assert (task.kind, task.input, task.target) == ("generation", "{prompt}\n", learnt)
    task = drafted(tmp_path, TEXTS, text="prompt").loaded.recipe.task
    assert (task.kind, task.input) == ("preference", "{prompt}\n")


def test_pairs_without_a_prompt_of_their_own_are_refused(tmp_path: Path) -> None:
    """As HH-RLHF writes them: both texts begin with the prompt."""
    rows = [
        {key: f"Human: {row['prompt']} Assistant: {row[key]}" for key in ("chosen", "rejected")}
        for row in TEXTS
    ]
    with pytest.raises(DataError, match="no column with their prompt; write what both"):
        drafted(tmp_path, rows)
    with pytest.raises(DataError, match="no two columns hold a preferred and a rejected answer"):
        drafted(tmp_path, [{"a": row["prompt"], "b": row["chosen"]} for row in TEXTS],
                goal="preference")  # fmt: skip


@pytest.mark.parametrize("columns", [("prompt", "completion"), ("instruction", "output")])
def test_answers_with_a_verdict_are_not_all_learnt(
    columns: tuple[str, str], tmp_path: Path
) -> None:
    asks, says = columns
    rows = [
        {asks: row["prompt"], says: row["chosen"], "label": i % 2 == 0}
        for i, row in enumerate(TEXTS)
    ]
    with pytest.raises(DataError, match="keep the rows that are true"):
        drafted(tmp_path, rows)
    task = drafted(tmp_path, rows, label="label").loaded.recipe.task
    assert task.kind == "classification"
    wanted = [row for row in rows if row["label"]]
    assert drafted(tmp_path, wanted).loaded.recipe.task.kind == "chat"


@pytest.mark.parametrize("goal", [[], ["--goal", "preference"]])
def test_the_command_drafts_them(goal: list[str], tmp_path: Path) -> None:
    jsonl_file(tmp_path / "pairs.jsonl", TEXTS)
    command("init", "--out", "drafted.yaml", "--data", "pairs.jsonl", *goal, "--yes", cwd=tmp_path)
    with contextlib.chdir(tmp_path):
        assert isinstance(load_recipe("drafted.yaml").recipe.task, PreferenceTask)
