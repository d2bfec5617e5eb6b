"""The prose of the project: short sentences, in the field's words."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from check_prose import checked_files, faults, sentences, words  # noqa: E402


@pytest.mark.parametrize("path", checked_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_sentences_are_short_and_words_are_the_fields(path: Path) -> None:
    found = faults(path)
    assert not found, "\n".join(map(str, found))


def test_what_is_checked_is_there() -> None:
    names = {str(path.relative_to(ROOT)) for path in checked_files()}
    assert {"README.md", "docs/how-it-works.md", "ptkit/prefix.py"} <= names


LONG = " ".join(["word"] * 26) + "."


@pytest.mark.parametrize(
    "text",
    [LONG, f"# Title\n\n- {LONG}", f"Short. {LONG} Short.", LONG.replace(" ", "\n", 5),
     "Rows come and go.", "It is dropped without a word."],
)  # fmt: skip
def test_long_sentences_and_figures_of_speech_are_found(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert len(faults(page)) == 1


@pytest.mark.parametrize(
    "text",
    [f"```text\n{LONG}\n```", f"| {LONG} |", f"# {LONG}", f"`{LONG}`", "Short. " * 26,
     f"{LONG[:40]} [0.1, 0.2] (Li & Liang 2021, section 4)."],
)  # fmt: skip
def test_code_tables_and_headings_are_no_sentences(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert not faults(page)


def test_docstrings_of_what_is_public_are_checked(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    said = f'"""Short.\n\n    rows: {LONG}\n    """'
    module.write_text(f"def shown():\n    {said}\n\n\ndef _hidden():\n    {said}\n")
    (fault,) = faults(module)
    assert fault.line == 4


def test_messages_of_errors_are_checked_when_asked_for(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(f'raise ValueError(f"{{1 + 1}} {LONG}")\nraise ValueError("short")\n')
    assert not faults(module)
    (fault,) = faults(module, of_messages=True)
    assert fault.why.startswith("27 words")


def test_messages_of_errors_are_plain() -> None:
    modules = sorted((ROOT / "ptkit").rglob("*.py"))
    assert not [fault for path in modules for fault in faults(path, of_messages=True)]


def test_citations_intervals_and_code_are_one_word_each() -> None:
    text = (
        "Lester et al. report it (Lester et al. 2021, section 6), 3.1 [2.0, 4.2], by `a b c`. Yes."
    )
    first, second = sentences(text)
    assert (words(first), words(second)) == (10, 1)
