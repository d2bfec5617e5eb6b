"""Commands that only read or copy text load no tensor library; help and completion are whole."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ptkit.cli.commands import EXAMPLES, command_names
from ptkit.cli.completion import complete_adapters, complete_models, complete_recipes
from ptkit.cli.main import app
from ptkit.recipe.load import load_recipe, shipped_recipes

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "pandas", "numpy", "sklearn")

#: Runs several lines of arguments, one after the other, in one process.
_PROGRAM = """
import contextlib, functools, io, json, os, sys
import typer.main
typer.main.get_command = functools.cache(typer.main.get_command)
from ptkit.cli.main import app
from typer.main import get_command
for arguments in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            app(arguments)
        except SystemExit:
            pass
    if not out.getvalue():
        print("nothing printed:", arguments)
    found = [name for name in {heavy!r} if name in sys.modules]
    if found:
        print(arguments, "loads", found)
        break
"""


def loads_nothing_heavy(lines: list[list[str]], cwd: Path) -> None:
    program = _PROGRAM.replace("{heavy!r}", repr(HEAVY))
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(lines)], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout


def test_no_help_page_loads_a_tensor_library(tmp_path: Path) -> None:
    names = [*command_names(app)]
    assert len(names) > 40
    lines = [["--help"], *([*name.split(), "--help"] for name in names)]
    loads_nothing_heavy(lines, tmp_path)


def test_reading_and_copying_recipes_and_listing_adapters_load_no_tensor_library(
    tmp_path: Path,
) -> None:
    adapters = str(ROOT / "adapters")
    loads_nothing_heavy(
        [
            ["recipes", "list"], ["recipes", "list", "--json"], ["recipes", "list", "-q"],
            ["recipes", "show", "quickstart"], ["recipes", "copy", "quickstart", "mine.yaml"],
            ["recipes", "schema"], ["adapters", "ls", adapters],
            ["adapters", "ls", adapters, "--json"], ["bank", "ls", adapters],
        ],
        tmp_path,
    )  # fmt: skip


def test_no_command_drops_a_value_that_was_given() -> None:
    """An option takes several values, or is refused when it is given twice."""
    seen = 0
    for name in command_names(app):
        command: Any = typer.main.get_command(app)
        for word in name.split():
            command = command.commands[word]
        for param in command.params:
            if param.param_type_name != "option" or param.is_flag or param.multiple:
                continue
            seen += 1
            line = [*name.split(), param.opts[0], "1", param.opts[-1], "2"]
            done = CliRunner().invoke(app, line, env={"COLUMNS": "200"})
            assert done.exit_code == 2, line
            said = f"{param.opts[0]} is given 2 times, and takes one value: leave out all but one"
            assert said in " ".join(done.output.split()), line
    assert seen > 100


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ptkit train quick", "quickstart"),
        ("ptkit recipes show message-routing-m", "message-routing-minilm"),
        ("ptkit inspect adapters/fa", "adapters/facts-prefix"),
        ("ptkit generate -a adapters/routing-pt", "adapters/routing-ptuning"),
        ("ptkit init --model ti", "tiny-en"),
    ],
)
def test_a_shell_completes_names_and_loads_no_tensor_library(line: str, expected: str) -> None:
    words = line.split()
    program = (
        "import sys\n"
        "from ptkit.cli.main import app\n"
        "try:\n    app(prog_name='ptkit')\nexcept SystemExit:\n    pass\n"
        f"print([n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "_PTKIT_COMPLETE": "complete_bash",
             "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1),
             "_TYPER_COMPLETE_ARGS": line},
    )  # fmt: skip
    assert "[]" in done.stderr, done.stderr
    assert expected in done.stdout


#: Lines that name what is not there; ADAPTER is one that is.
_NOT_THERE = """
generate hi -a nope
generate hi -a runs/nope
generate -a ADAPTER -i nope.txt
generate -a ADAPTER -i nope.csv
generate hi --model ./nope
evaluate nope
evaluate nope.yaml -a ADAPTER
evaluate -a nope
evaluate quickstart -a nope
evaluate -a ADAPTER --data nope.csv
export nope --out x
export nope --out x --as vllm
export nope --out x --as kv
export ADAPTER --out x --as llama-cpp --gguf nope.gguf
export ADAPTER --out there
verify nope
verify nope --engine vllm
verify ADAPTER --score --recipe nope.yaml
verify ADAPTER --engine nope
verify ADAPTER --engine llama-cpp --gguf nope.gguf
push nope me/x
push ADAPTER nope
inspect nope
inspect runs/nope
inspect nope.bin
classify hi -a nope
classify -a ADAPTER -i nope.csv
chat -a nope
chat --adapters nope
convert nope --to prefix --out x
import nope --out x
train nope
train --data nope.csv
train quickstart --method prefix_tuning --from nope
compare nope.yaml
report nope
transfer nope --out x
distill nope --tokens 4 --out x
distill text.txt --tokens 4 --out x --recipe nope
multitask nope --out x
search-prompt nope
bank load nope
bank verify nope
adapters diff nope nope
adapters info nope
data inspect nope
recipes validate nope
init --data nope.csv
serve --adapters nope
serve --model ./nope
serve --engine llama-cpp --gguf nope.gguf
serve --api-key-file nope
""".strip().splitlines()

#: Runs each line; one that imports a tensor library fails there.
_WITHOUT_TENSORS = """
import contextlib, io, json, sys
for name in {heavy!r}:
    sys.modules[name] = None
from ptkit.cli.main import run
for line in json.loads(sys.argv[1]):
    said = io.StringIO()
    sys.argv = ["ptkit", *line.split()]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        try:
            run()
            code = 0
        except SystemExit as ended:
            code = ended.code
    if "halted" in said.getvalue() or not code:
        print(line, code, said.getvalue())
    elif "Usage:" in said.getvalue():
        print(line, "is no command", said.getvalue())
"""


def test_a_wrong_path_or_name_is_told_before_a_tensor_library_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "text.txt").write_text("A text.")
    assert len(_NOT_THERE) > 40
    adapter = str(ROOT / "adapters" / "facts-prefix")
    lines = [line.replace("ADAPTER", adapter) for line in _NOT_THERE]
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TENSORS.replace("{heavy!r}", repr(HEAVY)),
         json.dumps(lines)],
        cwd=tmp_path, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stdout, done.stdout


def test_completion_offers_what_is_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    for place in ("adapters/one", "runs/mine/prefix_tuning-seed0/adapter"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "adapter_config.json").write_text("{}")
    with contextlib.chdir(tmp_path):
        assert complete_recipes("mi") == ["mine.yaml"]
        assert complete_adapters("") == ["adapters/one", "runs/mine/prefix_tuning-seed0"]
        assert complete_models("smol") == ["smollm2-135m"]


def test_every_command_has_one_example_and_it_parses() -> None:
    assert {*EXAMPLES} == {*command_names(app)}
    for name, example in EXAMPLES.items():
        program, *arguments = shlex.split(example)
        assert program == "ptkit"
        assert " ".join(arguments).startswith(name)
        context: Any = typer.main.get_command(app).make_context("ptkit", arguments)
        while hasattr(context.command, "commands"):
            rest = [*context._protected_args, *context.args]
            _, command, arguments = context.command.resolve_command(context, rest)
            context = command.make_context(command.name, arguments, parent=context)
        assert context.command.name == name.split()[-1]


def test_every_option_says_what_it_means() -> None:
    seen, silent = 0, []

    def look(command: Any, path: str) -> None:
        nonlocal seen
        for param in command.params:
            if param.param_type_name == "option" and not getattr(param, "hidden", False):
                seen += 1
                if not param.help:
                    silent.append(f"{path} {param.opts[0]}")
        for name, inner in getattr(command, "commands", {}).items():
            look(inner, f"{path} {name}")

    look(typer.main.get_command(app), "ptkit")
    assert seen > 200
    assert not silent


def shown(arguments: list[str], columns: int = 100) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ptkit", *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(columns)}, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_groups_commands_and_keeps_square_brackets() -> None:
    first = shown(["--help"])
    places = [
        first.index(f"─ {panel} ─") for panel in ("Train and use", "Ship", "Look", "Research")
    ]
    assert places == sorted(places)
    assert first.index("│ init ") < first.index("│ train ") < first.index("│ transfer ")
    evaluated = shown(["evaluate", "--help"])
    assert 'pip install -e ".[harness]"' in evaluated
    assert f"Example: {EXAMPLES['evaluate']}" in evaluated


def test_names_are_never_cut_in_tables() -> None:
    for columns in (60, 80):
        listed = shown(["recipes", "list"], columns)
        assert all(name in listed for name in shipped_recipes())
        assert "…" not in listed


def test_json_and_quiet_are_said_in_one_way() -> None:
    group: Any = typer.main.get_command(app)
    seen = 0

    def commands(command: Any, path: str) -> None:
        nonlocal seen
        for name, inner in getattr(command, "commands", {}).items():
            commands(inner, f"{path} {name}")
        options = {o for param in command.params for o in param.opts if o.startswith("-")}
        assert "--format" not in options, path
        if "--json" in options and "bench" not in path:
            seen += 1
            assert {"--quiet", "-q"} <= options, path

    commands(group, "ptkit")
    assert seen > 15


def test_a_copied_recipe_has_a_name_of_its_own(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        for destination, name in (("mine.yaml", "mine"), (None, "my-quickstart")):
            arguments = ["recipes", "copy", "quickstart", *([destination] if destination else [])]
            with contextlib.suppress(SystemExit):
                app(arguments)
            path = tmp_path / (destination or "quickstart.yaml")
            loaded = load_recipe(path)
            assert loaded.recipe.name == name
            assert f"ptkit train {path.name}" in loaded.text
            assert "train quickstart\n" not in loaded.text
            assert "runs/quickstart/" not in loaded.text
            shipped = load_recipe("quickstart").recipe.model_copy(update={"name": name})
            assert loaded.recipe == shipped


def test_recipes_are_listed_as_they_are() -> None:
    from ptkit.recipe.shipped import recipe_summaries

    for summary in recipe_summaries():
        recipe = load_recipe(summary.name).recipe
        assert summary.description == recipe.description
        assert summary.model == recipe.model.id
        assert summary.task == recipe.task.kind
        assert summary.methods == [method.title for method in recipe.methods]
