"""The commands as a person runs them, on the embedded base model.

Bad input ends with one clear message and exit code 2, and leaves nothing half-written.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import forked
import pytest
from safetensors.torch import load_file, save_file

from ptkit.cli.main import run

ROOT = Path(__file__).resolve().parents[1]

QUICK = ("--set", "train.steps=4", "--set", "train.eval_every=2", "--set", "train.save_every=2",
         "--set", "task.data.limits.test=4", "--set", "task.data.limits.train=40",
         "--set", "task.data.limits.validation=8", "--set", "task.max_target_tokens=24",
         "--set", "retention.max_tokens=600")  # fmt: skip


@dataclass
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def ptkit(*arguments: str | Path, cwd: Path, code: int = 0) -> Done:
    """Run a command in this process (starting one takes seconds) and check its exit code."""
    out, err = io.StringIO(), io.StringIO()
    interrupt = signal.getsignal(signal.SIGINT)
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["ptkit", *map(str, arguments)]),
    ):
        try:
            run()
        except SystemExit as ended:
            returncode = int(ended.code or 0)
        finally:
            signal.signal(signal.SIGINT, interrupt)
    done = Done(returncode, out.getvalue(), err.getvalue())
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def refused(*arguments: str | Path, cwd: Path) -> str:
    """The message of a command that must fail with exit code 2 and leave nothing behind."""
    before = sorted(p for p in cwd.rglob("*"))
    done = ptkit(*arguments, cwd=cwd, code=2)
    assert sorted(p for p in cwd.rglob("*")) == before
    assert not done.stdout
    return done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one short run of the quickstart and its export."""
    folder = tmp_path_factory.mktemp("work")
    done = ptkit("train", "quickstart", *QUICK, cwd=folder)
    assert "bleu" in done.stdout
    ptkit("export", "runs/quickstart/prefix_tuning-seed0", "--out", "adapters/mine", cwd=folder)
    return folder


def test_train_export_inspect_evaluate_generate(trained: Path) -> None:
    shown = json.loads(ptkit("inspect", "adapters/mine", "--json", cwd=trained).stdout)
    assert shown["peft_type"] == "PREFIX_TUNING"
    assert shown["virtual_tokens"] == 10
    assert len(shown["layers"]) == 6
    assert "norm" not in ptkit("inspect", "adapters/mine", cwd=trained).stderr
    record = json.loads((trained / "runs/quickstart/prefix_tuning-seed0/record.json").read_text())
    evaluated = json.loads(
        ptkit("evaluate", "quickstart", "-a", "adapters/mine", *QUICK, "--no-base", "--json",
              cwd=trained).stdout
    )  # fmt: skip
    assert evaluated["metrics"]["bleu"]["value"] == pytest.approx(record["metrics"]["bleu"])
    answers = ptkit(
        "generate", "kind[boat], name[Orwick]", "--base", "-a", "adapters/mine",
        "-a", "runs/quickstart/prefix_tuning-seed0", "--max-new-tokens", "8", "--json", cwd=trained,
    ).stdout.splitlines()  # fmt: skip
    rows = [json.loads(line) for line in answers]
    assert [r["adapter"] for r in rows] == [None, "mine", "prefix_tuning-seed0"]
    assert rows[1]["output"] == rows[2]["output"]


def test_ensemble_of_one_adapter_twice_is_that_adapter(trained: Path) -> None:
    options = ("kind[boat], name[Bo]", "-a", "adapters/mine", "--max-new-tokens", "6", "--json")
    (alone,) = ptkit("generate", *options, cwd=trained).stdout.splitlines()
    for by in ("vote", "average"):
        (line,) = ptkit(
            "generate", *options, "-a", "adapters/mine", "--ensemble", by, cwd=trained
        ).stdout.splitlines()
        assert json.loads(line)["output"] == json.loads(alone)["output"]
    for searched in (("--beams", "2"), ("--sample",)):
        message = refused(
            "generate", *options, "-a", "adapters/mine", "--ensemble", "average", *searched,
            cwd=trained,
        )  # fmt: skip
        assert "writes one greedy answer" in message
    message = refused("generate", *options, "--ensemble", "vote", cwd=trained)
    assert "at least two --adapter" in message


def test_an_option_with_one_value_is_refused_when_it_is_given_twice(tmp_path: Path) -> None:
    for arguments in (
        ("classify", "hi", "-a", "one", "--adapter", "two"),
        ("chat", "-a", "one", "-a", "two"),
    ):
        message = " ".join(refused(*arguments, cwd=tmp_path).split())
        assert "--adapter is given 2 times, and takes one value" in message


def test_input_file_and_standard_input_give_the_same_answers(trained: Path) -> None:
    (trained / "in.txt").write_text("kind[robot], name[Ada]\nkind[boat], name[Bo]\n")
    options = ("-a", "adapters/mine", "--max-new-tokens", "6")
    from_file = ptkit("generate", *options, "--input", "in.txt", cwd=trained).stdout
    piped = forked.run(
        [sys.executable, "-m", "ptkit", "generate", *options], cwd=trained, text=True,
        input=(trained / "in.txt").read_text(), capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert from_file == piped
    assert len(from_file.splitlines()) >= 2


def test_finished_run_is_not_trained_again(trained: Path) -> None:
    record = trained / "runs/quickstart/prefix_tuning-seed0/record.json"
    before = record.stat().st_mtime_ns
    ptkit("train", "quickstart", *QUICK, cwd=trained)
    assert record.stat().st_mtime_ns == before
    message = refused("train", "quickstart", cwd=trained)
    differs = (  # BLEU's signature tells how many references rows have
        "data_fingerprint", "metrics", "retention", "retention_text", "task", "test_rows", "train",
    )  # fmt: skip
    assert f"holds a run that differs in {', '.join(f'`{k}`' for k in differs)}" in message


def test_trains_further_from_a_saved_adapter(trained: Path) -> None:
    done = ptkit(
        "train", "quickstart", *QUICK, "--from", "adapters/mine", "--out", "runs/further",
        "--json", cwd=trained,
    )  # fmt: skip
    assert json.loads(done.stdout)["train_steps"] == 4
    message = ptkit(
        "train", "table-to-text", "-m", "lora", *QUICK, "--from", "adapters/mine",
        "--out", "runs/wrong", cwd=trained, code=2,
    ).stderr  # fmt: skip
    assert "is a PREFIX_TUNING adapter; `lora` cannot train it further" in message


def test_wrong_recipes_are_refused_with_file_line_and_key(tmp_path: Path) -> None:
    ptkit("recipes", "copy", "quickstart", cwd=tmp_path)
    text = (tmp_path / "quickstart.yaml").read_text()
    (tmp_path / "quickstart.yaml").write_text(text.replace("  steps: 300", "  stps: 300"))
    line = next(i for i, t in enumerate(text.splitlines(), 1) if "  steps: 300" in t)
    message = refused("train", "quickstart.yaml", cwd=tmp_path)
    assert f"quickstart.yaml:{line}: `train.stps` unknown; did you mean `steps`?" in message
    assert "exists" in refused("recipes", "copy", "quickstart", cwd=tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("task.data={files: {train: nope.jsonl}}", "no such data file"),
        ("task.data={files: {train: empty.jsonl}}", "is empty"),
        ("task.input='{fact}'", "did you mean `facts`"),
        ("task.data.builtin=facts-to-txt", "did you mean `facts-to-text`"),
        ("methods.0.num_virtual_tokens=500", "too few positions: tiny-en has 512"),
        ("model.id=./nowhere", "cannot load the base model `./nowhere`"),
        ("model.device=cuda:7", "device `cuda:7` is not available"),
        ("retention.text=nope.txt", "no such file"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(tmp_path, change: str, expected: str) -> None:
    ptkit("recipes", "copy", "quickstart", "r.yaml", cwd=tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    message = ptkit("train", "r.yaml", "--set", change, cwd=tmp_path, code=2).stderr
    assert expected in message
    assert not list(tmp_path.rglob("record.json"))
    assert not list(tmp_path.rglob("*.tmp"))


def test_label_without_verbaliser_is_refused(tmp_path: Path) -> None:
    message = refused(
        "train", "message-routing", "-m", "prefix_tuning",
        "--set", "task.verbalizer={billing: ' money', praise: ' praise'}", cwd=tmp_path,
    )  # fmt: skip
    assert "is not in `task.verbalizer`" in message


def test_damaged_and_foreign_adapters_are_refused(trained: Path, tmp_path: Path) -> None:
    for name in ("truncated", "foreign", "pickle"):
        shutil.copytree(trained / "adapters" / "mine", tmp_path / name)
    weights = tmp_path / "truncated" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    info = json.loads((tmp_path / "foreign" / "ptkit.json").read_text())
    info["base"] |= {"id": "other-model", "fingerprint": "0" * 16}
    (tmp_path / "foreign" / "ptkit.json").write_text(json.dumps(info))
    (tmp_path / "pickle" / "adapter_model.safetensors").rename(
        tmp_path / "pickle" / "adapter_model.bin"
    )
    for name, expected in (
        ("truncated", "is damaged or not a safetensors file"),
        ("foreign", "not on this machine: `foreign` for `other-model`; --model NAME loads it"),
        ("pickle", "holds only pickled weights (adapter_model.bin)"),
        ("missing", "no such adapter or run"),
    ):
        assert expected in refused("generate", "x", "-a", name, cwd=tmp_path)


def test_swapping_a_tensor_changes_the_answer_not_the_base(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "adapters" / "mine", tmp_path / "changed")
    weights = tmp_path / "changed" / "adapter_model.safetensors"
    save_file({n: t * 3 for n, t in load_file(weights).items()}, weights)
    arguments = (
        "generate",
        "kind[boat], name[Orwick]",
        "--base",
        "--max-new-tokens",
        "12",
        "--json",
    )
    mine = ptkit(*arguments, "-a", trained / "adapters/mine", cwd=tmp_path).stdout.splitlines()
    changed = ptkit(*arguments, "-a", "changed", cwd=tmp_path).stdout.splitlines()
    assert mine[0] == changed[0]
    assert json.loads(mine[1])["output"] != json.loads(changed[1])["output"]


def test_full_disk_ends_with_one_line_and_nothing_half_written(trained: Path, tmp_path) -> None:
    code = (
        "import errno, os, sys, ptkit.formats.adapter_files as files\n"
        "def full(*a, **k): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'adapter')\n"
        "files.save_file = full\n"
        "from ptkit.cli.main import run\n"
        "run()"
    )
    run = trained / "runs/quickstart/prefix_tuning-seed0"
    done = forked.run(
        [sys.executable, "-c", code, "export", str(run), "--out", "new"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("Error: the disk is full")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


#: LONG is no name for a file anywhere, NEARLY none with what a file being written has behind it.
LONG, NEARLY = "a" * 300, "a" * 250


@pytest.mark.parametrize(
    ("line", "named", "told"),
    [
        ("adapters rm LONG --yes", LONG, "the name is too long"),
        ("generate hi -a LONG", LONG, "the name is too long"),
        ("generate -i LONG", LONG, "the name is too long"),
        ("export ADAPTER --out LONG", LONG, "the name is too long"),
        ("export ADAPTER --out NEARLY", NEARLY, "the name is too long"),
        ("train quickstart --out file/x", "file/x", "is a file, not a folder"),
        ("recipes copy quickstart file/x", "file", "a file is in the way"),
    ],
)
def test_a_place_that_cannot_be_is_named_as_it_was_given(
    tmp_path: Path, line: str, named: str, told: str
) -> None:
    (tmp_path / "file").write_text("")
    words = {"ADAPTER": str(ROOT / "adapters" / "facts-prompt"), "LONG": LONG, "NEARLY": NEARLY}
    said = refused(*(words.get(word, word) for word in line.split()), cwd=tmp_path)
    assert "Errno" not in said
    assert f"Error: {named}: " in said
    assert told in said


@pytest.mark.parametrize("seed", ["99999999999999999999", str(-(2**64))])
def test_a_seed_that_no_generator_takes_is_refused(tmp_path: Path, seed: str) -> None:
    for line in ("generate hi --sample", "chat --sample", "distill x.txt --tokens 4 --out x",
                 "search-prompt quickstart"):  # fmt: skip
        said = refused(*line.split(), "--seed", seed, cwd=tmp_path)
        assert "'--seed'" in said
    said = refused("train", "quickstart", "--set", f"seeds=[{seed}]", cwd=tmp_path)
    assert "seeds" in said


@pytest.mark.parametrize("seed", [-(2**63), 2**63 - 1])
def test_the_largest_seeds_are_taken(tmp_path: Path, seed: int) -> None:
    ptkit("generate", "hi", "--sample", "--max-new-tokens", "2", f"--seed={seed}", cwd=tmp_path)


def test_ctrl_c_ends_cleanly_and_the_run_goes_on_afterwards(tmp_path: Path) -> None:
    arguments = [*QUICK, "--set", "train.steps=4000", "--set", "train.save_every=2"]
    process = forked.Popen(
        [sys.executable, "-m", "ptkit", "train", "quickstart", *arguments],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = tmp_path / "runs/quickstart/prefix_tuning-seed0"
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert errors.strip().splitlines()[-1].startswith("Error: interrupted")
    assert "Traceback" not in errors
    assert list(run.glob("checkpoint-*"))
    assert not list(run.glob("*.tmp"))


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = forked.run(
        [sys.executable, "-m", "ptkit", "train", "nowhere.yaml", "--debug"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert "Traceback" in done.stderr


def test_recipes_list_show_validate_schema(tmp_path: Path) -> None:
    names = {r["name"] for r in json.loads(ptkit("recipes", "list", "--json", cwd=tmp_path).stdout)}
    assert {"quickstart", "table-to-text", "message-routing"} <= names
    shown = ptkit("recipes", "show", "quickstart", cwd=tmp_path).stdout
    (tmp_path / "copy.yaml").write_text(shown)
    assert "valid" in ptkit("recipes", "validate", "copy.yaml", "quickstart", cwd=tmp_path).stdout
    (tmp_path / "bad.yaml").write_text(shown.replace("kind: generation", "kind: generate"))
    done = ptkit("recipes", "validate", "copy.yaml", "bad.yaml", cwd=tmp_path, code=2)
    assert "bad.yaml:" in done.stderr
    assert json.loads(ptkit("recipes", "schema", cwd=tmp_path).stdout)["title"] == "ptkit recipe"
    assert "did you mean `quickstart`" in refused("train", "quickstrt", cwd=tmp_path)
