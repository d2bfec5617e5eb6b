"""What lies on disk because it is large is read, learnt and resumed as if it were in memory."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from conftest import random_base
from datasets import Dataset, DatasetDict
from hypothesis import given
from hypothesis import strategies as st
from test_chat_task import RECIPE_TEXT, WORDS, turns
from test_preference import implicit, messages, texts
from transformers.utils import chat_template_utils

from ptkit.api import train
from ptkit.data import chat_report, examples, pair_report, read_files, stored_rows, token_cache
from ptkit.data.chat_template import with_template_read
from ptkit.data.encoded import EncodedExample
from ptkit.data.encoded_rows import EncodedPairs, EncodedRows, Lengths
from ptkit.data.examples import StoredExamples
from ptkit.data.in_memory import with_rows
from ptkit.data.lazy import Lazy, Mapped, Picked
from ptkit.data.pair_rows import PairEncoder
from ptkit.data.stored_rows import StoredRows
from ptkit.errors import DataError, UserError
from ptkit.formats.adapter_files import weights_path
from ptkit.recipe.load import LoadedRecipe, load_recipe
from ptkit.recipe.tasks import PreferenceTask
from ptkit.runtime.base_model import Base
from ptkit.training import adapter_trainer, run
from ptkit.training.experiment import Experiment, prepare
from ptkit.training.task_rows import TaskRows


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any file be large, and any rows many."""
    monkeypatch.setattr(read_files, "IN_MEMORY_BYTES", 0)
    for module in (examples, token_cache):
        monkeypatch.setattr(module, "FEWEST_ROWS", 2)
    monkeypatch.setattr(token_cache, "_BATCH", 3)
    for report in (chat_report, pair_report):
        monkeypatch.setattr(report, "AT_A_TIME", 3)


@pytest.fixture(scope="module")
def base() -> Base:
    return random_base("llama")


def file(folder: Path, ending: str, name: str = "rows") -> Path:
    path = folder / f"{name}{ending}"
    rows: list[dict[str, Any]] = [
        {"id": str(i), "text": f"é “{i}”\n" if i % 3 else "", "more": "3.10"} for i in range(11)
    ]
    if ending == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in [*rows, {"last": 1e-5}]) + "\r\n")
    elif ending == ".json":
        path.write_text(json.dumps([*rows, {"last": [1, None]}]))
    elif ending == ".parquet":
        pd.DataFrame({"number": range(11), "words": [["a", str(i)] for i in range(11)]}).to_parquet(
            path
        )
    else:
        pd.DataFrame(rows).to_csv(path, index=False, sep="\t" if ending == ".tsv" else ",")
    return path


@pytest.mark.parametrize("ending", read_files.READERS)
@pytest.mark.parametrize("again", [False, True])
def test_a_large_file_has_the_rows_of_a_small_one(
    tmp_path: Path, ending: str, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [file(tmp_path, ending), file(tmp_path, ending, "others")]
    small = read_files.read_files(paths)
    monkeypatch.setattr(read_files, "IN_MEMORY_BYTES", 0)
    if again:  # from the cache
        read_files.read_files(paths)
    large = read_files.read_files(paths)
    assert isinstance(large.rows, StoredRows) or ending == ".parquet"
    assert large.columns == small.columns
    assert [*large.placed()] == [*small.placed()]
    assert [*large.raw("data")] == [*small.raw("data")]
    picked = [3, 14, 0]
    assert [*large.select(picked).raw("data")] == [*small.select(picked).raw("data")]
    assert [*large.select(picked).only([small.columns[0]])] == [
        *small.select(picked).only([small.columns[0]])
    ]


def test_a_broken_line_of_a_large_file_is_told_and_nothing_is_kept(
    tmp_path: Path, cache: Path, large: None
) -> None:
    path = file(tmp_path, ".jsonl")
    path.write_text(path.read_text() + '{"a": \n')
    with pytest.raises(DataError, match=r"rows\.jsonl:24: not valid JSON"):
        read_files.read_files([path])
    assert not [*(cache / "rows").iterdir()]
    path.write_text(path.read_text().replace('{"a": \n', '{"a": "b"}\n'))
    assert len(read_files.read_files([path])) == 13


def test_a_place_that_cannot_be_written_to_costs_memory_only(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("PTKIT_CACHE", str(tmp_path / "a file"))
    assert isinstance(read_files.read_files([file(tmp_path, ".jsonl")]).rows, list)


@given(st.lists(st.integers()), st.data())
def test_a_lazy_sequence_is_a_sequence(values: list[int], data: st.DataObject) -> None:
    numbers = data.draw(st.lists(st.integers(0, len(values) - 1))) if values else []
    for lazy, wanted in (
        (Mapped(lambda x: x + 1, values), [x + 1 for x in values]),
        (Picked(values, numbers), [values[i] for i in numbers]),
    ):
        assert isinstance(lazy, Lazy)
        assert lazy == wanted
        assert wanted == lazy
        cut = data.draw(st.slices(max(1, len(wanted))))
        assert lazy[cut] == wanted[cut]
        assert [*reversed(lazy)] == wanted[::-1]
        for i in range(-len(wanted), len(wanted)):
            assert lazy[i] == wanted[i]
        with pytest.raises(IndexError):
            lazy[len(wanted)]


TALK = [
    turns("w1 w2", "w3 w4", "w5", "w6 w7 w8"), turns("w9", "w10"),
    turns("w11 w12 w13", "w14", "w15", "w16", "w17", "w18 w19"), turns("w20", "w21 w22"),
    turns("w1", "w2", "w3", "w4"), turns("w30 w31", ""), turns("w33", "w34 w35", "w36", "w37"),
]  # fmt: skip
#: A template that leaves earlier answers out: a conversation is read once for each answer.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ 'w91 ' + m.content + ' <end> ' }}"
    "{% elif loop.last %}{{ 'w92 ' + m.content + ' <end> ' }}"
    "{% else %}{{ m.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'w92 ' }}{% endif %}"
)


def talk(folder: Path, template: str = WORDS, **task: Any) -> LoadedRecipe:
    rows = [turns(f"w{i % 80 + 1}", f"w{i % 70 + 1}") for i in range(9)]
    folder.mkdir(exist_ok=True)
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, [*TALK, *rows])) + "\n")
    (folder / "words.jinja").write_text(template)
    recipe = folder / "talk.yaml"
    recipe.write_text(RECIPE_TEXT.format(method="prefix_tuning", more=", num_virtual_tokens: 2"))
    changes = [f"task.{key}={value}" for key, value in {"system": "null", **task}.items()]
    return load_recipe(recipe, [*changes, "train.steps=12", "train.save_every=5"])


def assert_same_rows(many: Experiment, few: Experiment) -> None:
    """`many`, read from disk, are the rows of `few`, in memory."""
    assert isinstance(many.data.train, StoredExamples)
    assert many.rows.encoded == few.rows.encoded
    assert many.rows.examples == few.rows.examples
    assert many.validation == few.validation
    assert many.data == few.data
    assert many.data_lines() == few.data_lines()
    assert many.data_fingerprint(0) == few.data_fingerprint(0)
    assert many.test_fingerprint() == few.test_fingerprint()


@pytest.mark.parametrize(
    ("template", "task"),
    [
        (WORDS, {}),
        (WORDS, {"max_tokens": 14, "max_target_tokens": 3}),  # early turns are left out
        (WORDS, {"loss": "last"}),
        (WORDS, {"loss": "all", "system": "w60"}),
        (FORGETFUL, {}),
        (FORGETFUL, {"max_tokens": 14, "max_target_tokens": 3}),
    ],
)
def test_many_conversations_become_the_rows_of_few(
    tmp_path: Path, base: Base, template: str, task: dict[str, Any], request: Any
) -> None:
    loaded = talk(tmp_path / "talk", template, **task)
    few = prepare(loaded, base)
    assert isinstance(few.rows.encoded, list)
    request.getfixturevalue("large")
    for _ in range(2):  # written, then read
        many = prepare(loaded, base)
        assert isinstance(many.rows.encoded, EncodedRows)
        assert_same_rows(many, few)


def test_another_template_or_another_day_is_tokenised_anew(
    tmp_path: Path, base: Base, cache: Path, large: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = "{% set day = strftime_now('%Y') %}" + WORDS

    def files(template: str) -> int:
        prepare(talk(tmp_path / "talk", template), base)
        return len([*(cache / "tokens").iterdir()])

    first = files(WORDS)
    assert files(WORDS) == first
    assert files(FORGETFUL) > first
    before = files(dated)
    tomorrow = SimpleNamespace(today=lambda: date(2031, 1, 2))
    monkeypatch.setattr(token_cache, "date", tomorrow)
    assert files(dated) > before


class _Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def bytes_of(run: Any) -> bytes:
    """The trained weights of a run."""
    return weights_path(run.adapter).read_bytes()


def killed_at(step: int, patch: pytest.MonkeyPatch) -> None:
    """Let runs be killed after so many steps."""
    next_batch = adapter_trainer.AdapterTrainer.next_batch

    def killed(trainer: Any) -> list[EncodedExample]:
        if trainer.progress.step == step:
            raise _Killed
        return next_batch(trainer)

    patch.setattr(adapter_trainer.AdapterTrainer, "next_batch", killed)


def test_training_from_disk_resumes_within_an_epoch_bit_for_bit(
    tmp_path: Path, base: Base, request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = talk(tmp_path / "talk")  # 16 rows, batches of 2: step 12 is in the second epoch
    wanted = train(loaded, base=base, out=tmp_path / "memory")
    request.getfixturevalue("large")
    whole = train(loaded, base=base, out=tmp_path / "disk")
    assert bytes_of(whole) == bytes_of(wanted)
    with monkeypatch.context() as patch:
        killed_at(11, patch)
        with pytest.raises(_Killed):
            train(loaded, base=base, out=tmp_path / "killed")
    resumed = train(loaded, base=base, out=tmp_path / "killed")
    assert bytes_of(resumed) == bytes_of(wanted)


def test_run_with_a_dated_template_goes_on_the_next_day(
    tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated = "{{ strftime_now('w%d ') }}" + WORDS
    loaded = talk(tmp_path / "talk", dated)

    def on_day(day: int) -> None:
        today = datetime(2031, 1, day)
        monkeypatch.setattr(chat_template_utils, "datetime", SimpleNamespace(now=lambda: today))

    on_day(10)
    first = prepare(loaded, base)
    with pytest.MonkeyPatch.context() as patch:
        killed_at(11, patch)
        with pytest.raises(_Killed):
            train(loaded, base=base, out=tmp_path / "run")
    on_day(11)
    second = prepare(loaded, base)
    assert first.rows.encoded[0].input_ids[0] != second.rows.encoded[0].input_ids[0]
    assert first.data_fingerprint(0) == second.data_fingerprint(0)
    assert train(loaded, base=base, out=tmp_path / "run").record.train_steps == 12
    # Other conversations are other rows, on whatever day.
    rows = (tmp_path / "talk" / "talk.jsonl").read_text().splitlines()
    (tmp_path / "talk" / "talk.jsonl").write_text("\n".join([*rows[1:], rows[0]]) + "\n")
    assert prepare(loaded, base).data_fingerprint(0) != first.data_fingerprint(0)
    # So are pairs with another rejected answer.
    pairs = choices(tmp_path / "pairs", "messages")
    (tmp_path / "pairs" / "words.jinja").write_text(dated)
    one = prepare(pairs, base).data_fingerprint(0)
    on_day(12)
    assert prepare(pairs, base).data_fingerprint(0) == one
    file = tmp_path / "pairs" / "rows.jsonl"
    held = [json.loads(line) for line in file.read_text().splitlines()]
    held[0]["rejected"][-1]["content"] += " w1"
    file.write_text("\n".join(map(json.dumps, held)) + "\n")
    assert prepare(pairs, base).data_fingerprint(0) != one


PAIRS = """
name: choices
model: {id: random-llama-0}
task:
  kind: preference
  data: {files: {train: rows.jsonl, validation: rows.jsonl, test: rows.jsonl}}
  metrics: [preference_accuracy]
methods: [{kind: lora, rank: 2}]
train: {steps: 8, batch_size: 2, warmup_steps: 1, eval_every: 4, save_every: 3}
retention: null
"""
FORMS = {"texts": lambda row: row, "messages": messages, "shared beginning": implicit}


def choices(folder: Path, form: str, *changes: str, count: int = 13) -> LoadedRecipe:
    folder.mkdir(exist_ok=True)
    rows = [FORMS[form](row) for row in texts(count)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "words.jinja").write_text(WORDS)
    (folder / "choices.yaml").write_text(PAIRS)
    template = [] if form == "texts" else ["task.chat_template=words.jinja"]
    return load_recipe(folder / "choices.yaml", [*template, *changes])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("short", [False, True])
def test_many_pairs_become_the_rows_of_few(
    tmp_path: Path, base: Base, form: str, short: bool, request: Any
) -> None:
    cut = ["task.max_tokens=6"] if short and form == "texts" else []
    loaded = choices(tmp_path / "pairs", form, *cut)
    few = prepare(loaded, base)
    assert isinstance(few.rows.encoded, list)
    request.getfixturevalue("large")
    for _ in range(2):  # written, then read
        many = prepare(loaded, base)
        assert isinstance(many.rows.encoded, EncodedPairs)
        assert_same_rows(many, few)
        for name, lengths in vars(Lengths.of(few.rows.encoded)).items():
            assert getattr(Lengths.of(many.rows.encoded), name).tolist() == lengths.tolist()


@pytest.mark.parametrize("form", FORMS)
def test_pairs_are_inspected_a_part_at_a_time(
    tmp_path: Path, base: Base, form: str, request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = choices(tmp_path / "pairs", form, "task.max_tokens=14")
    task = with_template_read(loaded.recipe.task, loaded.folder)
    assert isinstance(task, PreferenceTask)
    files = [loaded.folder / "rows.jsonl", loaded.folder / "more.jsonl"]
    files[1].write_text("\n".join(files[0].read_text().splitlines()[3:8]))

    def report() -> pair_report.PairReport:
        return pair_report.inspect_pairs(files, base.tokenizer, task, 5)

    whole = report()
    assert [split.rows for split in whole.splits] == [13, 5]
    assert whole.splits[1].duplicates == {"rows.jsonl": 5}
    request.getfixturevalue("large")
    sizes: list[int] = []
    rows = PairEncoder.rows

    def counted(encoder: PairEncoder, some: Any) -> Any:
        sizes.append(len(some))
        return rows(encoder, some)

    monkeypatch.setattr(PairEncoder, "rows", counted)
    assert report() == whole
    assert sizes == [3, 3, 3, 3, 1, 3, 2]


def test_pairs_that_differ_in_a_rejected_answer_are_tokenised_anew(
    tmp_path: Path, base: Base, cache: Path, large: None
) -> None:
    for form in FORMS:
        loaded = choices(tmp_path / "pairs", form)
        first = prepare(loaded, base)
        path = loaded.folder / "rows.jsonl"
        path.write_text(path.read_text().replace("w61", "w63"))
        second = prepare(loaded, base)
        assert first.rows.encoded != second.rows.encoded


def test_a_broken_pair_of_a_large_file_is_told_by_its_line(
    tmp_path: Path, base: Base, large: None
) -> None:
    loaded = choices(tmp_path / "pairs", "texts")
    with (loaded.folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "w1", "chosen": "w2", "rejected": "w2"}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl:14: `chosen` and `rejected` are the same"):
        prepare(loaded, base)


@pytest.mark.parametrize("form", ["texts", "messages"])
def test_pairs_from_disk_are_learnt_and_resumed_bit_for_bit(
    tmp_path: Path, base: Base, form: str, request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = choices(tmp_path / "pairs", form)  # 13 rows, batches of 2: step 8 is a new epoch
    wanted = train(loaded, base=base, out=tmp_path / "memory")
    request.getfixturevalue("large")
    whole = train(loaded, base=base, out=tmp_path / "disk")
    assert whole.record.curve == wanted.record.curve
    assert bytes_of(whole) == bytes_of(wanted)
    with monkeypatch.context() as patch:
        killed_at(5, patch)
        with pytest.raises(_Killed):
            train(loaded, base=base, out=tmp_path / "killed")
    assert bytes_of(train(loaded, base=base, out=tmp_path / "killed")) == bytes_of(wanted)


def test_pairs_handed_over_as_a_dataset_stay_where_they_lie(
    tmp_path: Path, base: Base, large: None
) -> None:
    loaded = choices(tmp_path / "pairs", "messages")
    lines = (loaded.folder / "rows.jsonl").read_text().splitlines()
    rows = Dataset.from_list([json.loads(line) for line in lines])
    handed = prepare(with_rows(loaded, DatasetDict(train=rows, validation=rows, test=rows)), base)
    assert isinstance(handed.rows.encoded, EncodedPairs)
    assert handed.rows.encoded == prepare(loaded, base).rows.encoded


def test_rows_of_several_tasks_stay_in_their_files(
    tmp_path: Path, base: Base, request: Any
) -> None:
    chats, last = talk(tmp_path / "talk"), talk(tmp_path / "last", loss="last")

    def joined() -> TaskRows:
        return TaskRows([prepare(loaded, base).rows.encoded for loaded in (chats, last, chats)])

    few = joined()
    request.getfixturevalue("large")
    many = joined()
    assert all(isinstance(own, EncodedRows) for own in many._rows)
    assert many == few
    assert [many[i] for i in range(len(many))] == [*many]
    whole, wanted = (vars(Lengths.of(rows)) for rows in (many, [*many]))
    for name in whole:
        assert whole[name].tolist() == wanted[name].tolist()


def test_checks_of_all_rows_hold_one_at_a_time() -> None:
    """A list of a million rows as objects would be what the file spares."""

    def rows() -> Iterator[EncodedExample]:
        yield EncodedExample([1], [2, 3], (True, False))
        pytest.fail("the first row tells enough")

    adapter = SimpleNamespace(infix=True, section=SimpleNamespace(title="an infix"))
    with pytest.raises(UserError, match="an infix"):
        run._require_one_input(adapter, rows())  # type: ignore[arg-type]


MANY = """
name: many
model: {{id: random-llama-0}}
task:
  data: {{files: {{train: rows.jsonl, validation: talk.jsonl}}}}
  metrics: [{metric}]
{task}
methods: [{{kind: prefix_tuning}}]
retention: null
"""
TASKS = {
    "chat": "  kind: chat\n  chat_template: words.jinja\n",
    "preference": "  kind: preference\n  input: '{messages[0].content}'\n"
    "  chosen: 'w1 {messages[1].content}'\n  rejected: 'w2 {messages[1].content}'\n",
    "generation": "  kind: generation\n  input: '{messages[0].content}'\n"
    "  target: '{messages[1].content}'\n",
}


def anonymous() -> int:
    """Bytes of this process that the system cannot take back."""
    gc.collect()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", TASKS)
def test_memory_hardly_grows_with_rows(
    tmp_path: Path, base: Base, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_files, "IN_MEMORY_BYTES", 100_000)
    talk(tmp_path)
    recipe = tmp_path / "many.yaml"
    recipe.write_text(
        MANY.format(
            task=TASKS[kind], metric="preference_accuracy" if kind == "preference" else "chrf"
        )
    )
    loaded = load_recipe(recipe)

    for module in (stored_rows, token_cache):
        monkeypatch.setattr(module, "_BATCH", 200)

    def prepared(rows: int) -> Any:
        words = " ".join(f"w{i}" for i in range(1, 12))
        with (loaded.folder / "rows.jsonl").open("w") as out:
            for i in range(rows):
                row = turns(f"w{i % 80 + 1} {words}", f"{words} w{i % 70}")
                out.write(json.dumps(row) + "\n")
        return prepare(loaded, base)

    few = prepared(1_500)
    before = anonymous()
    many = prepared(6_000)
    grown = anonymous() - before
    assert (len(few.rows.encoded), len(many.rows.encoded)) == (1_500, 6_000)
    # Bytes a row; its texts and ids take more than 2,000 as objects. Measured: below 50.
    assert grown / 4_500 < 400
    assert int(Lengths.of(many.rows.encoded).whole.min()) > 20
