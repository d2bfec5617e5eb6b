"""What the documentation says, the program does."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import shlex
import sys
from pathlib import Path

import peft
import pytest
from test_cli import ptkit as ptkit_here

import ptkit
from ptkit.prefix import KVPrefix, PrefixBatch
from ptkit.runtime.runner import ModelRunner

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
GROUPS = ("adapters", "recipes", "bank", "bench", "models", "data")


def test_readme_commands_and_options_exist() -> None:
    commands = documented_commands()
    assert len(commands) > 15
    help_of: dict[tuple[str, ...], str] = {}
    for words in commands:
        if words[0].startswith("-"):
            continue
        name = tuple(words[:2]) if words[0] in GROUPS else (words[0],)
        if name not in help_of:
            help_of[name] = ptkit_here(*name, "--help", cwd=ROOT).stdout
        for option in (w for w in words if w.startswith("--")):
            assert option in help_of[name], f"{name} has no {option}"


def test_no_page_installs_ptkit_by_a_name_that_no_index_may_have() -> None:
    folders = ("docs", "recipes", "ptkit/cli", "ptkit/recipe")
    pages = [page for folder in folders for page in (ROOT / folder).glob("*.*")]
    texts = [page.read_text() for page in pages if page.suffix in (".md", ".py", ".yaml")]
    lines = [m for t in texts for m in re.findall(r"pip install[^`\n]*\[\w+\][^`\n]*", t)]
    assert len(lines) > 10
    # As in the README: from a checkout. The example of a message names one by its path.
    assert not [line for line in lines if not re.search(r"-e ['\"](\.|/home/me/ptkit)\[", line)]


def test_recipe_reference_is_up_to_date() -> None:
    from make_recipe_reference import reference

    assert (ROOT / "docs" / "recipes.md").read_text() == reference(), (
        "run scripts/make_recipe_reference.py"
    )


def test_list_of_commands_is_up_to_date() -> None:
    from make_commands_reference import reference

    assert (ROOT / "docs" / "first-hour.md").read_text() == reference(), (
        "run: python scripts/make_commands_reference.py"
    )


def test_reference_of_files_is_up_to_date() -> None:
    from make_files_reference import reference

    assert (ROOT / "docs" / "files.md").read_text() == reference(), (
        "run scripts/make_files_reference.py"
    )


def test_readme_python_examples_run() -> None:
    own, peft = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len([line for line in own.splitlines() if line]) == 6
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()):
        exec(own, {})
    imports = [line for line in peft.splitlines() if line.startswith(("from", "import"))]
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


def links(page: Path) -> list[str]:
    """The targets of the links and pictures of a page that are in the project."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"\]\((?!\w+:)([^)\s]+)\)", prose)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by, as GitHub names them."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ +(.+?) *$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_to_files_and_headings_of_the_project_resolve(name: str) -> None:
    page = ROOT / name
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            assert anchor in anchors(file), f"{name} links to {target}: no such heading"


def test_links_with_a_fault_are_found() -> None:
    assert "pefts-other-methods" in anchors(ROOT / "docs/how-it-works.md")
    assert "pefts-other" not in anchors(ROOT / "docs/how-it-works.md")
    assert sum(len(links(ROOT / name)) for name in PAGES) > 80


@pytest.mark.parametrize("name", PAGES[2:])
def test_files_that_pages_name_are_there(name: str) -> None:
    """A path is below the project or below the package, as the sentences write it."""
    for path in re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml))`", (ROOT / name).read_text()):
        there = [ROOT / path, ROOT / "ptkit" / path, Path(peft.__file__).parents[1] / path]
        assert any(place.exists() for place in there), f"{name} names {path}"


def test_the_index_names_every_page_once() -> None:
    named = [target for target in links(ROOT / "docs/README.md") if target.endswith(".md")]
    pages = {p.name for p in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert sorted(named) == sorted([*pages, "../README.md"])


def test_the_pictures_text_names_what_the_code_has() -> None:
    """The picture is drawn by hand; a renamed part must be renamed there too."""
    picture = (ROOT / "docs/how-it-works.svg").read_text()
    package = {p.name for p in (ROOT / "ptkit").iterdir() if (p / "__init__.py").exists()}
    words = set(re.findall(r"\w+", re.sub(r"<[^>]*>", " ", picture.partition("</style>")[2])))
    assert package - words == set()
    forward = inspect.signature(ModelRunner.forward)
    shown = ", ".join(name for name in forward.parameters if name != "self")
    assert f"ModelRunner.forward({shown})" in picture
    assert {KVPrefix.__name__, PrefixBatch.__name__, KVPrefix.for_rows.__name__} <= words
