"""Token ids kept on disk are those the tokenizer gives, and are read only for the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import word_tokenizer

from ptkit.data import token_cache
from ptkit.data.encode import encode_examples
from ptkit.data.examples import Example
from ptkit.data.token_cache import cache_folder, encode_cached
from ptkit.recipe.tasks import GenerationTask, SequenceClassificationTask, TokenClassificationTask

DATA = {"builtin": "facts-to-text"}
TASK = GenerationTask(kind="generation", data=DATA, input="{a}", target="{b}")
ROWS = [
    Example(f"w{i % 90 + 1} w3" * (i % 7), f"w{i % 80 + 1}", ()) for i in range(1_200)
]  # some inputs are empty


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PTKIT_CACHE", str(tmp_path))
    return tmp_path / "tokens"


class Counted:
    """How often rows were really tokenised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        monkeypatch.setattr(token_cache, "encode_examples", self)

    def __call__(self, *args: Any, **kw: Any) -> Any:
        self.calls += 1
        return encode_examples(*args, **kw)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


HEADED = SequenceClassificationTask(
    kind="sequence_classification", data=DATA, input="{a}", labels=["w1", "w2"]
)
TAGGED = TokenClassificationTask(kind="token_classification", data=DATA, labels=["w1", "w2"])


@pytest.mark.parametrize(
    ("task", "rows"),
    [
        (TASK, ROWS),
        (HEADED, [Example(f"w{i % 50 + 1} w4", f"w{i % 2 + 1}", ()) for i in range(1_000)]),
        (
            TAGGED,
            [Example("", "w1 w2", (), words=(f"w{i % 50 + 1}", "w3")) for i in range(1_000)],
        ),
    ],
)
def test_read_back_as_encoded(counted: Counted, task: Any, rows: list[Example]) -> None:
    tokenizer = word_tokenizer()
    first = encode_cached(rows, tokenizer, task)
    assert first == encode_examples(rows, tokenizer, task)
    # The tokenizer remembers how it was last asked to cut; that is no other tokenizer.
    tokenizer(["w1 w2"], truncation=True, max_length=1, padding=True)
    assert encode_cached(rows, tokenizer, task) == first
    assert encode_cached(rows, word_tokenizer(), task) == first
    assert counted.calls == 1


def test_anything_else_is_encoded_anew(counted: Counted) -> None:
    encode_cached(ROWS, word_tokenizer(), TASK)
    shorter = TASK.model_copy(update={"max_input_tokens": 3})
    other = word_tokenizer()
    other.add_tokens(["w1000"])
    ended = word_tokenizer()
    ended.eos_token = "w5"
    changed = [*ROWS[:-1], Example("w9", "w9", ())]
    for rows, tokenizer, task in (
        (ROWS, word_tokenizer(), shorter), (ROWS, other, TASK), (ROWS, ended, TASK),
        (changed, word_tokenizer(), TASK), (ROWS[:-1], word_tokenizer(), TASK),
        (ROWS[::-1], word_tokenizer(), TASK),
    ):  # fmt: skip
        before = counted.calls
        assert encode_cached(rows, tokenizer, task) == encode_examples(rows, tokenizer, task)
        assert counted.calls == before + 1
    # Columns and metrics say nothing about the ids.
    encode_cached(ROWS, word_tokenizer(), TASK.model_copy(update={"metrics": ["chrf"]}))
    assert counted.calls == 7


def test_ids_made_by_other_rules_are_not_read(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_cached(ROWS, word_tokenizer(), TASK)
    monkeypatch.setattr(token_cache, "_VERSION", token_cache._VERSION - 1)
    encode_cached(ROWS, word_tokenizer(), TASK)
    assert counted.calls == 2


@pytest.mark.parametrize("damage", [b"", b"\xff" * 64, None])
def test_a_damaged_file_is_written_anew(
    counted: Counted, folder: Path, damage: bytes | None
) -> None:
    wanted = [*encode_cached(ROWS, word_tokenizer(), TASK)]
    (file,) = folder.iterdir()
    file.write_bytes(file.read_bytes()[:-40] if damage is None else damage)
    assert encode_cached(ROWS, word_tokenizer(), TASK) == wanted
    assert encode_cached(ROWS, word_tokenizer(), TASK) == wanted
    assert counted.calls == 2


def test_few_rows_and_a_place_that_cannot_be_written_to(
    counted: Counted, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_cached(ROWS[:10], word_tokenizer(), TASK)
    assert not folder.exists()
    blocked = folder.parent / "a file"
    blocked.write_text("")
    monkeypatch.setenv("PTKIT_CACHE", str(blocked))
    assert encode_cached(ROWS, word_tokenizer(), TASK)
    assert counted.calls == 2


def test_old_files_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_cached(ROWS, word_tokenizer(), TASK)
    (first,) = folder.iterdir()
    monkeypatch.setattr(token_cache, "MOST_BYTES", first.stat().st_size)
    encode_cached(ROWS[::-1], word_tokenizer(), TASK)
    assert len([*folder.iterdir()]) == 1
    assert not first.exists()


def test_folder_is_where_caches_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PTKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/ptkit/tokens")
