"""What is refused is refused before anything is deleted, trained or scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_cli import QUICK, ptkit, refused

from ptkit.data.read_files import read_files
from ptkit.data.task import _Unknown
from ptkit.errors import DataError

ADAPTERS = Path(__file__).parent.parent / "adapters"
LABELS = ("a/b", "bill ing", "delivery")


@pytest.fixture
def tickets(tmp_path: Path) -> Path:
    """A folder with a recipe of a classification task and its file, which is named relatively."""
    rows = [f"ticket {i},{LABELS[i % 3]}" for i in range(42)]
    (tmp_path / "t.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    words = ", ".join(f"'{label}': ' {label}'" for label in LABELS)
    (tmp_path / "cls.yaml").write_text(
        "name: cls\nmodel: {id: tiny-en}\nretention: null\n"
        "train: {steps: 4, batch_size: 4, eval_every: 2}\n"
        "methods: [{kind: prompt_tuning, num_virtual_tokens: 3}]\n"
        'task:\n  kind: classification\n  input: "{text}\\nLabel:"\n'
        f"  verbalizer: {{{words}}}\n  data: {{files: {{train: t.csv}}}}\n"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("kept", "command"),
    [
        ("cell.json", ["train", "quickstart", "--set", "task.references=nonsense"]),
        ("cell.json", ["train", "quickstart", "--set", "methods.0.num_virtual_tokens=500"]),
        ("recipe.yaml", ["compare", "quickstart", "--set", "task.references=nonsense"]),
        ("recipe.yaml", ["compare", "quickstart", "--set", "methods.0.num_virtual_tokens=500"]),
        ("distill.json", ["distill", "long.txt", "--tokens", "4000"]),
        ("multitask.json", ["multitask", "message-routing", "quickstart"]),
        ("transfer.json", ["transfer", "message-routing", "quickstart", "-m", "prompt_tuning",
                           "--set", "task.metrics=[nonsense]"]),
    ],
)  # fmt: skip
def test_fresh_deletes_nothing_where_the_command_is_refused(
    tmp_path: Path, kept: str, command: list[str]
) -> None:
    (tmp_path / "long.txt").write_text("The ferry leaves at noon. " * 30)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / kept).write_text("{}")
    (tmp_path / "out" / "hours.txt").write_text("of work")
    refused(*command, "--out", "out", "--fresh", cwd=tmp_path)
    assert (tmp_path / "out" / "hours.txt").read_text() == "of work"


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("{kind: prompt_tuning, num_virtual_tokens: 3, start: labels}", "`start: labels`"),
        ("{kind: lora, target_modules: [nowhere]}", "nowhere"),
        ("{kind: prefix_tuning, num_virtual_tokens: 3, trained_layers: 99}", "trained_layers"),
        ("{kind: prompt_tuning, num_virtual_tokens: 3, start: adapter, start_adapter: [%s]}",
         "num_virtual_tokens: 20"),
    ],
)  # fmt: skip
def test_a_method_that_is_refused_leaves_its_folder_to_the_next(
    tmp_path: Path, method: str, told: str
) -> None:
    method = method.replace("%s", str(Path("adapters/facts-prompt").resolve()))
    asked = ("train", "quickstart", *QUICK, "--out", "out")
    assert told in refused(*asked, "--set", f"methods=[{method}]", cwd=tmp_path)
    right = "methods=[{kind: prompt_tuning, num_virtual_tokens: 3, start: task}]"
    ptkit(*asked, "--set", right, cwd=tmp_path)


def test_a_recipe_beside_results_finds_its_rows_where_the_command_runs(tickets: Path) -> None:
    ptkit("compare", "cls.yaml", "--out", "results", cwd=tickets)
    shutil.rmtree(tickets / "results" / "cells")
    (tickets / "results" / "cells").mkdir()
    ptkit("compare", "results/recipe.yaml", "--out", "results", cwd=tickets)
    (tickets / "elsewhere").mkdir()
    told = refused("compare", "../results/recipe.yaml", "--out", "x", cwd=tickets / "elsewhere")
    assert "`t.csv`, not found from here; run this where" in told


def test_a_merged_comparison_knows_what_its_cells_are(tickets: Path) -> None:
    for seed in (0, 1):
        ptkit("compare", "cls.yaml", "--set", f"seeds=[{seed}]", "--out", f"s{seed}", cwd=tickets)
    ptkit("report", "s0", "s1", "--out", "both", cwd=tickets)
    asked = ("compare", "cls.yaml", "--set", "seeds=[0, 1]", "--out", "both")
    ptkit(*asked, cwd=tickets)
    (tickets / "t.csv").write_text((tickets / "t.csv").read_text().replace("ticket", "letter"))
    assert "differs in `data_fingerprint`" in refused(*asked, cwd=tickets)


def test_a_run_that_started_from_an_adapter_knows_its_weights(tickets: Path) -> None:
    for seed in (0, 1):
        ptkit("train", "cls.yaml", "--seed", str(seed), "--out", f"from{seed}", cwd=tickets)
    asked = ("train", "cls.yaml", "--from", "start", "--out", "further")
    shutil.copytree(tickets / "from0" / "adapter", tickets / "start")
    ptkit(*asked, cwd=tickets)
    ptkit(*asked, cwd=tickets)
    shutil.rmtree(tickets / "start")
    shutil.copytree(tickets / "from1" / "adapter", tickets / "start")
    assert "differs in `start_weights`" in refused(*asked, cwd=tickets)


def test_fresh_starts_over_and_a_dry_run_knows(tickets: Path) -> None:
    first = json.loads(ptkit("train", "cls.yaml", "--out", "run", "--json", cwd=tickets).stdout)
    (tickets / "run" / "of-before.txt").write_text("")
    asked = ("train", "cls.yaml", "--out", "run", "--json")
    told = json.loads(ptkit(*asked, "--dry-run", cwd=tickets).stdout)
    assert (told["cells"], told["finished"]) == (0, 1)
    told = json.loads(ptkit(*asked, "--dry-run", "--fresh", cwd=tickets).stdout)
    assert (told["cells"], told["finished"]) == (1, 0)
    assert (tickets / "run" / "of-before.txt").exists()
    again = json.loads(ptkit(*asked, "--fresh", cwd=tickets).stdout)
    assert not (tickets / "run" / "of-before.txt").exists()
    assert again["metrics"] == first["metrics"]


@pytest.mark.parametrize("kind", ["chat", "generation"])
def test_test_rows_that_do_not_fit_are_told_before_training(tmp_path: Path, kind: str) -> None:
    def row(words: int) -> str:
        text = " ".join(f"word{i % 7}" for i in range(words))
        if kind == "generation":
            return json.dumps({"text": text, "answer": "Yes."})
        said = [("user", text), ("assistant", "Yes, it is.")]
        return json.dumps({"messages": [{"role": r, "content": c} for r, c in said]})

    (tmp_path / "train.jsonl").write_text("\n".join(row(60 + i) for i in range(24)))
    (tmp_path / "test.jsonl").write_text("\n".join(row(200 + i) for i in range(4)))
    task = "chat_template: plain" if kind == "chat" else (
        'input: "{text}", target: " {answer}", max_target_tokens: 120, max_input_tokens: 480'
    )  # fmt: skip
    (tmp_path / "long.yaml").write_text(
        "name: long\nmodel: {id: tiny-en}\nretention: null\ntrain: {steps: 4, batch_size: 4}\n"
        "methods: [{kind: prefix_tuning, num_virtual_tokens: 4}]\n"
        f"task: {{kind: {kind}, {task}, data: {{files: {{train: train.jsonl, test: test.jsonl}}}}}}"
    )
    for command in ("train", "compare"):
        assert "too few positions" in refused(command, "long.yaml", "--out", "out", cwd=tmp_path)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_an_input_without_tokens_is_told_before_training(tmp_path: Path, kind: str) -> None:
    rows = [{"text": f"word{i}", "label": LABELS[i % 3]} for i in range(24)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows[2]["text"] = ""
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
    words = ", ".join(f"'{label}': ' {label}'" for label in LABELS)
    task = f"verbalizer: {{{words}}}" if kind == "classification" else 'target: " {label}"'
    (tmp_path / "r.yaml").write_text(
        "name: r\nmodel: {id: tiny-en}\nretention: null\ntrain: {steps: 2, batch_size: 4}\n"
        "methods: [{kind: prefix_tuning, num_virtual_tokens: 4}]\n"
        f'task: {{kind: {kind}, input: "{{text}}", {task}, '
        "data: {files: {train: train.jsonl, test: test.jsonl}}}"
    )
    told = refused("train", "r.yaml", "--out", "out", cwd=tmp_path)
    assert "the input of row 3 of 4 is empty: it has no tokens" in told
    assert not (tmp_path / "out").exists()


def test_an_export_is_scored_on_the_data_of_where_the_command_runs(tickets: Path) -> None:
    ptkit("train", "cls.yaml", "--out", "run", cwd=tickets)
    ptkit("export", "run", "--dtype", "int8", "--out", "small", cwd=tickets)
    ptkit("verify", "small", "--score", cwd=tickets)
    (tickets / "t.csv").rename(tickets / "elsewhere.csv")
    said = refused("export", "run", "--dtype", "int8", "--out", "other", cwd=tickets)
    assert "`t.csv`, not found from here" in said
    assert "--recipe FILE" in said
    assert not (tickets / "other").exists()


def test_an_adapters_recipe_runs_no_code_of_its_own_unasked(tickets: Path) -> None:
    ptkit("train", "cls.yaml", "--out", "run", cwd=tickets)
    kept = tickets / "run" / "adapter" / "recipe.yaml"
    kept.write_text(kept.read_text().replace("accuracy", "mine:scored", 1))
    (tickets / "mine.py").write_text("raise SystemExit('run')\n")
    for command in (
        ["export", "run", "--dtype", "int8", "--out", "small"],
        ["verify", "run/adapter", "--score"],
        ["evaluate", "-a", "run"],
    ):
        assert "code of its own (mine:scored" in refused(*command, cwd=tickets)


def test_files_of_one_name_are_reported_apart(tmp_path: Path) -> None:
    said = [("user", "Is it {}?"), ("assistant", "Yes.")]
    rows = [
        json.dumps({"messages": [{"role": r, "content": c.format(i)} for r, c in said]})
        for i in range(20)
    ]
    for name, count in (("train", 20), ("test", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "chats.jsonl").write_text("\n".join(rows[:count]))
    files = ("train/chats.jsonl", "test/chats.jsonl")
    found = json.loads(
        ptkit("data", "inspect", *files, "--chat-template", "plain", "--json", cwd=tmp_path).stdout
    )
    assert [(s["name"], s["rows"]) for s in found["files"]] == [(files[0], 20), (files[1], 5)]
    assert found["files"][1]["duplicates"] == {files[0]: 5}


def test_maps_of_a_parquet_file_are_lists_of_pairs(tmp_path: Path) -> None:
    kind = pa.map_(pa.string(), pa.string())
    columns = {"text": ["one", "two"], "m": pa.array([[("k", "v"), ("l", "w")], []], kind)}
    pq.write_table(pa.table(columns), tmp_path / "map.parquet")
    rows = [*read_files([tmp_path / "map.parquet"])]
    assert [row["text"] for row in rows] == ["one", "two"]
    assert rows[0]["m"] == [{"key": "k", "value": "v"}, {"key": "l", "value": "w"}]


@pytest.mark.parametrize("place", ["folder", "file.txt/rows.jsonl"])
def test_a_place_for_predictions_is_looked_at_before_scoring(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("")
    said = refused("evaluate", "quickstart", *QUICK, "--model", "nowhere", "--predictions", place,
                   cwd=tmp_path)  # fmt: skip
    assert f"--predictions {place}" in said


def test_a_label_of_one_row_is_counted_once_where_a_file_is_several_splits() -> None:
    unknown = _Unknown(["ham"], "task.labels")
    for _ in range(3):
        unknown.add("spam", "t.csv, row 2")
    with pytest.raises(DataError, match=r"^t.csv, row 2: the label `spam`"):
        unknown.require_none()


@pytest.mark.parametrize(
    ("out", "told"),
    [("all", "is in all, and would be deleted"), (".", "the current folder"), ("..", "one above")],
)
@pytest.mark.parametrize(
    "command",
    [["export", "all/mine"], ["export", "all/mine", "--as", "mlx"], ["convert", "all/mine"],
     ["import", "all/mine"]],
)  # fmt: skip
def test_force_replaces_no_folder_that_holds_what_is_read_or_works(
    command: list[str], out: str, told: str, tmp_path: Path
) -> None:
    for name in ("mine", "other"):
        shutil.copytree(ADAPTERS / "facts-prompt", tmp_path / "all" / name)
    more = ["--to", "prefix"] if command[0] == "convert" else []
    assert told in refused(*command, *more, "--out", out, "--force", cwd=tmp_path)
    assert {p.name for p in (tmp_path / "all").iterdir()} == {"mine", "other"}


def test_what_a_killed_writer_left_is_no_adapter_and_no_run(tmp_path: Path) -> None:
    for place in ("all/mine", "all/.other.0a1b2c3d.tmp", "runs/.gone.0a1b2c3d.gone/adapter"):
        shutil.copytree(ADAPTERS / "facts-prompt", tmp_path / place)
    listed = ptkit("adapters", "ls", "all", "--json", cwd=tmp_path).stdout
    assert "mine" in listed
    assert "other" not in listed
    assert "0 adapters" in ptkit("adapters", "ls", "runs", cwd=tmp_path).stdout


@pytest.mark.parametrize(
    ("name", "content"), [("t.csv", "text,label\n"), ("t.json", "[]"), ("t.jsonl", "")]
)
def test_a_file_without_rows_is_told_as_such(name: str, content: str, tickets: Path) -> None:
    (tickets / name).write_text(content)
    change = f"task.data.files.train={name}"
    told = refused("train", "cls.yaml", "--set", change, cwd=tickets)
    assert "no rows" in told or "is empty" in told
    assert "known: " not in told
