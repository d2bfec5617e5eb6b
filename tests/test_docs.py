"""What the documentation says, the program does."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import ptkit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))


def documented_commands() -> list[list[str]]:
    """Every `$ ptkit ...` line of the README, docs and recipes' headers, split into words."""
    texts = [(ROOT / "README.md").read_text()]
    texts += [p.read_text() for p in (ROOT / "docs").glob("*.md")]
    texts += [p.read_text() for p in (ROOT / "recipes").glob("*.yaml")]
    lines = [
        m for t in texts for m in re.findall(r"(?:\$|run:|it:|own:|key:|fewer:) +(ptkit .*)", t)
    ]
    return [shlex.split(line.split(" #")[0])[1:] for line in lines]


#: Commands with commands of their own.
GROUPS = ("adapters", "recipes", "bank", "bench", "models")


def test_readme_commands_and_options_exist() -> None:
    commands = documented_commands()
    assert len(commands) > 15
    help_of: dict[tuple[str, ...], str] = {}
    for words in commands:
        if words[0].startswith("-"):
            continue
        name = tuple(words[:2]) if words[0] in GROUPS else (words[0],)
        if name not in help_of:
            help_of[name] = subprocess.run(
                [sys.executable, "-m", "ptkit", *name, "--help"],
                check=True, capture_output=True, text=True,
            ).stdout  # fmt: skip
        for option in (w for w in words if w.startswith("--")):
            assert option in help_of[name], f"{name} has no {option}"


def test_recipe_reference_is_up_to_date() -> None:
    from make_recipe_reference import reference

    assert (ROOT / "docs" / "recipes.md").read_text() == reference(), (
        "run scripts/make_recipe_reference.py"
    )


def test_reference_of_files_is_up_to_date() -> None:
    from make_files_reference import reference

    assert (ROOT / "docs" / "files.md").read_text() == reference(), (
        "run scripts/make_files_reference.py"
    )


def test_readme_python_examples_run() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 2
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()):
        exec(code[1], {})
    imports = [line for line in code[0].splitlines() if line.startswith(("from", "import"))]
    exec("\n".join(imports), {})


@pytest.mark.parametrize("page", ["bank.md", "python.md"])
def test_examples_of_the_guides_run(page: str, tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    assert len(code) >= 3
    for name in ("adapters", "ptkit"):  # what the examples write stays out of the project
        (tmp_path / name).symlink_to(ROOT / name)
    names: dict[str, object] = {}
    with contextlib.chdir(tmp_path), contextlib.redirect_stdout(io.StringIO()):
        for block in code:  # each goes on where the one before it ended
            exec(block, names)


def test_every_public_name_is_in_an_example() -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    imported = set(
        re.findall(r"\w+", " ".join(re.findall(r"from ptkit import (.*)", "\n".join(code))))
    )
    # What functions return is not imported to be made.
    assert imported | {"Run", "Comparison", "LoadedAdapter"} == set(ptkit.__all__)


def test_answers_through_transformers_own_generate_are_the_banks() -> None:
    text = (ROOT / "docs/python.md").read_text().partition("<!-- five lines -->")[2]
    block = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    names: dict[str, object] = {}
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()):
        exec(block, names)
    bank = ptkit.AdapterBank(ptkit.load_base("tiny-en"))
    bank.load(ROOT / "adapters/facts-prefix")
    prompts = ["kind[robot]\n", "kind[boat], name[Orwick]\n"]
    expected = bank.generate(prompts, ["facts-prefix"] * 2, max_new_tokens=24)
    tokenizer, answers = names["tokenizer"], names["answers"]
    assert tokenizer.batch_decode(answers, skip_special_tokens=True) == expected


PAGES = ["README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_links_to_files_of_the_project_resolve(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{name} links to {target}"
