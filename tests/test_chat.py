"""`ptkit chat` and `ptkit bank` as a person uses them, on the shipped adapters."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import forked
import pytest
from test_cli import ptkit, refused

SHIPPED = Path(__file__).resolve().parents[1] / "adapters"
FACTS = "kind[boat], name[Orwick], colour[red]"
SHORT = ("--max-new-tokens", "12")


def chat(monkeypatch: pytest.MonkeyPatch, lines: list[str], *arguments: str | Path, cwd: Path,
         code: int = 0):  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    return ptkit("chat", *arguments, *SHORT, cwd=cwd, code=code)


def test_answers_are_those_of_generate(tmp_path: Path, monkeypatch) -> None:
    lines = [FACTS, "/reset", "/base", "The sea"]
    said = chat(monkeypatch, lines, "--adapter", SHIPPED / "facts-prefix", cwd=tmp_path).stdout
    adapted = ptkit("generate", FACTS, "-a", SHIPPED / "facts-prefix", *SHORT, cwd=tmp_path)
    plain = ptkit("generate", "The sea", *SHORT, cwd=tmp_path)
    assert said.split() == (adapted.stdout + plain.stdout).split()


def test_adapters_are_listed_known_by_name_and_compared(tmp_path: Path, monkeypatch) -> None:
    lines = [
        "/adapters", "/adapter facts-prefix", FACTS, "/diff facts-prefix facts-prompt",
        "/diff base facts-prefix kind[robot]", "/adapters", "/help", "/quit", "never read",
    ]  # fmt: skip
    shown = chat(monkeypatch, lines, "--adapters", SHIPPED, cwd=tmp_path).stdout
    assert "not read yet" in shown
    before, after = (line for line in shown.splitlines() if " facts-prefix " in line
                     and ("resident" in line or "disk" in line))  # fmt: skip
    assert "disk" in before
    assert after.split()[:4] == [">", "facts-prefix", "prefix_tuning", "10"]
    assert "/diff A B [TEXT]" in shown
    # Both name the same facts, and the first says what it said before.
    alone = ptkit("generate", FACTS, "-a", SHIPPED / "facts-prefix", *SHORT, cwd=tmp_path).stdout
    assert shown.count(alone.split()[0]) >= 2


def test_wrong_lines_end_a_script_with_the_fix(tmp_path: Path, monkeypatch) -> None:
    def message(*lines: str, options: tuple[str | Path, ...] = ()) -> str:
        return chat(monkeypatch, [*lines], *options, cwd=tmp_path, code=2).stderr

    assert "did you mean `/adapter`?" in message("/adaptr x")
    known = ("--adapters", SHIPPED)
    assert "known: base, facts-prefix" in message("/adapter nothing", options=known)
    assert "needs two names" in message("/diff facts-prefix", options=known)
    assert "nothing was said yet" in message("/diff base facts-prefix", options=known)
    assert "no such folder of adapters: nowhere" in message(options=("--adapters", "nowhere"))
    assert "no such adapter or run: /no/where" in message(options=("--adapter", "/no/where"))
    assert "the conversation is too long: tiny-en has 512" in message("word " * 3000)


@pytest.mark.skipif(not hasattr(pty, "openpty"), reason="needs a terminal")
def test_on_a_terminal_mistakes_and_ctrl_c_do_not_end_it(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = forked.Popen(
        [sys.executable, "-m", "ptkit", "chat", "--adapters", str(SHIPPED),
         "--max-new-tokens", "1500"],
        stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path, start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    os.close(slave)
    seen = ""

    def read_more() -> None:
        nonlocal seen
        assert select.select([master], [], [], 60)[0], f"nothing more after {seen!r}"
        seen += os.read(master, 4096).decode()

    def until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            read_more()
        seen = seen.split(text, 1)[1]

    def type_in(text: str) -> None:
        os.write(master, f"{text}\n".encode())

    until("base> ")
    type_in("/adapter nobody")
    until("no adapter `nobody` is known")
    until("base> ")
    type_in("The history of the town begins")
    until("begins\r\n")
    while not seen.strip():  # it has begun to answer
        read_more()
    os.killpg(process.pid, signal.SIGINT)
    until("this turn is forgotten")
    until("base> ")
    time.sleep(1)  # the prompt is printed just before readline begins to listen
    os.killpg(process.pid, signal.SIGINT)  # a new prompt
    until("base> ")
    type_in("/adapter facts-prefix")
    until("facts-prefix> ")
    type_in("/quit")
    assert process.wait(timeout=30) == 0
    os.close(master)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good adapters and two bad ones."""
    for name in ("facts-prefix", "facts-prompt"):
        shutil.copytree(SHIPPED / name, tmp_path / "all" / name)
    for name in ("cut", "headless"):
        shutil.copytree(SHIPPED / "facts-prefix", tmp_path / "all" / name)
    weights = tmp_path / "all" / "cut" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "all" / "headless" / "adapter_config.json").write_text("{")
    return tmp_path


def test_bank_ls_shows_headers_and_faults(folder: Path) -> None:
    rows = json.loads(ptkit("bank", "ls", "all", "--json", cwd=folder).stdout)
    listed = {row["name"]: row for row in rows}
    assert [*listed] == ["cut", "facts-prefix", "facts-prompt", "headless"]
    good = listed["facts-prefix"]
    assert (good["method"], good["base"], good["virtual_tokens"]) == (
        "prefix_tuning", "tiny-en", 10,
    )  # fmt: skip
    assert good["bytes"] == (SHIPPED / "facts-prefix/adapter_model.safetensors").stat().st_size
    assert good["dtypes"] == ["BF16"]
    assert "damaged" in listed["cut"]["fault"]
    assert "not valid JSON" in listed["headless"]["fault"]
    assert "4 adapters" in ptkit("bank", "ls", "all", cwd=folder).stdout


def test_bank_verify_names_each_refusal(folder: Path) -> None:
    done = ptkit("bank", "verify", "all", cwd=folder, code=2)
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "refused", "ok", "ok", "refused",
    ]  # fmt: skip
    assert "2 of the adapters in all cannot be used with tiny-en" in done.stderr
    rows = ptkit("bank", "verify", SHIPPED, "--json", cwd=folder).stdout.splitlines()
    assert all(json.loads(row)["ok"] for row in rows)


def test_bank_load_keeps_to_its_budget(tmp_path: Path) -> None:
    everything = json.loads(ptkit("bank", "load", SHIPPED, "--json", cwd=tmp_path).stdout)
    assert everything["adapters"] == 4
    assert everything["evictions"] == 0
    sizes = [row["nbytes"] for row in everything["loaded"]]
    assert everything["resident_bytes"] == sum(sizes)
    tight = ("--budget", f"{max(sizes) / 1000}KB")
    shown = json.loads(ptkit("bank", "load", SHIPPED, *tight, "--json", cwd=tmp_path).stdout)
    assert shown["resident_bytes"] <= max(sizes) == shown["budget"]
    assert {row["tier"] for row in shown["loaded"]} == {"resident", "disk"}
    assert "4 adapters in" in ptkit("bank", "load", SHIPPED, cwd=tmp_path).stdout


def test_bank_commands_refuse_what_is_not_a_bank(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for command in ("ls", "load", "verify"):
        assert "no such folder of adapters" in refused("bank", command, "none", cwd=tmp_path)
        assert "empty holds no adapters" in refused("bank", command, "empty", cwd=tmp_path)
    message = refused("bank", "load", SHIPPED, "--budget", "much", cwd=tmp_path)
    assert "write 500MB, 2GiB or a number of bytes" in message
    message = refused("bank", "load", SHIPPED, "--budget", "1KB", cwd=tmp_path)
    assert "more than the bank's budget of 1,000" in message
