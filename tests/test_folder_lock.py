"""Two commands in one run folder: the second is told who is there, and overwrites nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_cli import ptkit

from ptkit import api
from ptkit.errors import UserError
from ptkit.formats.folder_lock import held, require_free
from ptkit.training.run_folder import delete_run_folder

HOLDS = (
    "import sys, time, pathlib; from ptkit.formats.folder_lock import held\n"
    "with held(pathlib.Path(sys.argv[1])):\n"
    "    print('here', flush=True); time.sleep(60)"
)


class Holder:
    """Another process that works in `folder` until it is killed."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, str(folder)], stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Holder:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "here\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_the_second_is_told_who_is_there_and_a_killed_ones_folder_is_free(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    with Holder(folder) as other:
        told = rf"mine is in use by process {other.process.pid} on"
        with pytest.raises(UserError, match=told), held(folder):
            pass
        (folder / "recipe.yaml").write_text("")
        (folder / "cell.json").write_text("{}")
        for delete in (api.require_own, lambda f: delete_run_folder(f / "cell.json", "run")):
            with pytest.raises(UserError, match="in use by process"):
                delete(folder)
        assert (folder / "cell.json").exists()
        os.kill(other.process.pid, signal.SIGKILL)
        other.process.wait()
    assert (folder / ".lock").exists(), "it was killed"
    with held(folder):
        pass
    require_free(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["cell.json", "recipe.yaml"]
    delete_run_folder(folder / "cell.json", "run")
    assert not folder.exists()


def test_what_was_made_for_the_lock_is_gone_unless_something_is_in_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refused"), held(tmp_path / "a" / "b"):
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "x").touch()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["x"]


def test_what_a_killed_one_wrote_of_its_name_is_gone(tmp_path: Path) -> None:
    (tmp_path / "..lock.json.abcd.tmp").write_text("{")
    (tmp_path / "kept").write_text("")
    with held(tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


def test_of_many_threads_one_works_in_a_folder(tmp_path: Path) -> None:
    inside, most, refused = [], [], []

    def work() -> None:
        for _ in range(10):
            try:
                with held(tmp_path / "x"):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()
            except UserError:
                refused.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert len(most) + len(refused) == 40


def test_only_the_first_process_of_a_distributed_run_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(tmp_path / "x"):
        monkeypatch.setenv("RANK", "1")
        with held(tmp_path / "x"):
            pass


def test_a_second_training_in_a_run_folder_is_refused(tmp_path: Path) -> None:
    recipe = """name: r
task: {kind: classification, data: {files: {train: d.jsonl}}, input: "{q}", label: a,
       verbalizer: {x: " yes", y: " no"}}
methods: [{kind: prefix_tuning, num_virtual_tokens: 2}]
train: {steps: 2, batch_size: 2}
retention: null
"""
    (tmp_path / "r.yaml").write_text(recipe)
    rows = [{"q": f"word {i}", "a": "xy"[i % 2]} for i in range(20)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    with Holder(out) as other:
        done = ptkit("train", "r.yaml", "--out", out, cwd=tmp_path, code=2)
        assert f"process {other.process.pid}" in done.stderr
        assert "--out" in done.stderr
        again = ptkit("train", "r.yaml", "--out", out, "--fresh", cwd=tmp_path, code=2)
        assert again.stderr
        compared = ptkit("compare", "r.yaml", "--out", out, cwd=tmp_path, code=2)
        assert "in use by process" in compared.stderr
    shutil.rmtree(out)
