"""A draft's limits fit the rows it was made for: it refuses none of them, and cuts no turn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from ptkit.data.chat_rows import ChatEncoder
from ptkit.data.task import load_task
from ptkit.drafting import lengths, tasks
from ptkit.drafting.draft import Draft, draft_recipe
from ptkit.recipe.tasks import ChatTask
from ptkit.runtime.tokenization import load_tokenizer

WORDS = ("the", "harbour", "of", "town", "has", "three", "quays", "boats", "come", "at", "noon")
TOKENIZER = load_tokenizer("tiny-en")


def chats(words: int, turns: int = 1, rows: int = 12) -> list[dict[str, Any]]:
    """Conversations with long questions and short answers, as over passages of a document."""
    drawn = random.Random(words * 10 + turns)

    def turn(role: str, count: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(drawn.choice(WORDS) for _ in range(count))}

    return [
        {"messages": [
            turn(role, count) for _ in range(turns)
            for role, count in (("user", words - drawn.randint(0, 3)), ("assistant", 2))
        ]}
        for _ in range(rows)
    ]  # fmt: skip


def lost(draft: Draft) -> int:
    """Test conversations that lose turns before the last answer is generated."""
    task = draft.loaded.recipe.task
    assert isinstance(task, ChatTask)
    own = ChatEncoder(TOKENIZER, task)
    unlimited = ChatEncoder(TOKENIZER, task.model_copy(update={"max_tokens": 10**6}))
    asked = load_task(task, draft.loaded.folder, draft.loaded.given).test
    return sum(own.asked(e).input_ids != unlimited.asked(e).input_ids for e in asked)


@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("words", [*range(16, 32, 2)])
def test_no_length_of_questions_is_refused_or_loses_turns(words: int, turns: int) -> None:
    assert not lost(draft_recipe(chats(words, turns)))


def test_longer_test_rows_count_too() -> None:
    assert not lost(draft_recipe({"train": chats(10), "test": chats(120)}))


def test_a_long_row_beyond_the_sampled_ones_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "SAMPLED", 5)
    assert not lost(draft_recipe([*chats(10, rows=20), *chats(120, rows=1)]))


def test_a_question_beyond_what_is_usual_is_read_where_the_base_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Early turns may be lost then, but never the last question."""
    monkeypatch.setattr(lengths, "_MOST_INPUT", 64)
    rows: Sequence[Any] = chats(150, turns=2)
    task: Any = draft_recipe(rows).loaded.recipe.task
    assert 150 < task.max_tokens < 260


def test_the_positions_of_the_base_are_a_limit() -> None:
    """Two turns of 320 words do not fit into 512 positions, and one does."""
    task: Any = draft_recipe(chats(320, turns=2)).loaded.recipe.task
    assert task.max_tokens == 492
