"""Checks the prose of the project: short sentences, and the field's words in place of private ones.

python scripts/check_prose.py                # README.md, docs/*.md and the docstrings of ptkit/
python scripts/check_prose.py FILE [FILE ...]
python scripts/check_prose.py --messages     # the messages of errors in ptkit/ instead

A sentence has at most 25 words. Code, tables and headings are not sentences. A piece of `code`, a
link, an interval in brackets and a citation in parentheses each count as one word. The exit code is
1 where something is found.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST = 25

#: What is not written here -> what to write.
BANNED = {
    r"comes? and goe?s?\b": "join and leave the running batch (continuous batching)",
    r"without a word\b": "silently, or: without an error",
    r"without a trace\b": "exactly",
    r"\bin company\b": "together with",
    r"\bunder way\b": "in progress",
    r"\bspeaks? with\b": "uses",
    r"\bsay(s|ing)? so\b": "report it",
    r"\bgives? away\b": "publish",
    r"\bthrow(s|n)? about\b": "change",
    r"\bdrown(s|ed)?\b": "is larger than",
    r"\bnobody\b": "no one, or name who",
    r"\bso to speak\b": "(leave out)",
    r"\bhouse\b": "package",
    r"\bguests?\b": "caller",
    r"\bContender": "Candidate",
    r"\bTrainee": "the adapter that is trained",
    r"\bis no fault\b": "is not an error",
}

_ABBREVIATIONS = ("et al.", "e.g.", "i.e.", "vs.", "cf.", "approx.")
_ITEM = re.compile(r"\s*(?:[-*+]|\d+\.)\s+")
#: `name: ...` or `one, two: ...` in a docstring: what an argument or a field is.
_ENTRY = re.compile(r"\s*[\w`*]+(?:, [\w`*]+)*: ")


@dataclass(frozen=True)
class Fault:
    """A sentence to rewrite.

    line: of its paragraph's first line, from 1
    why: what is wrong with it
    """

    path: Path
    line: int
    sentence: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.why}: {self.sentence}"


def plain(text: str) -> str:
    """`text` with what counts as one word made one word, and abbreviations without their stops."""
    text = re.sub(r"<!--.*?-->", " ", text, flags=re.DOTALL)
    text = re.sub(r"``.+?``|`[^`]*`", "CODE", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\[[^\]a-zA-Z]*\]", "INTERVAL", text)
    text = re.sub(r"\([^()]*\b(?:19|20)\d\d[^()]*\)", "CITATION", text)
    for short in _ABBREVIATIONS:
        text = text.replace(short, short.replace(".", ""))
    return " ".join(text.split())


def sentences(text: str) -> Iterator[str]:
    """The sentences of a paragraph; a library's name or `null` may begin one."""
    begins = r"(?=[\"'(*]*(?:[A-Z0-9(]|ptkit\b|transformers\b|accelerate\b|null\b))"
    yield from re.split(r"(?<=[.!?])[\"')*]*\s+" + begins, plain(text))


def words(sentence: str) -> int:
    """How many there are; figures count, signs do not."""
    return sum(any(c.isalnum() for c in word) for word in sentence.split())


def faults_of(paragraph: str, path: Path, line: int) -> Iterator[Fault]:
    """What is wrong with the sentences of a paragraph that begins at `line`."""
    for sentence in sentences(paragraph):
        if (n := words(sentence)) > LONGEST:
            yield Fault(path, line, sentence, f"{n} words (at most {LONGEST})")
        for pattern, instead in BANNED.items():
            if found := re.search(pattern, sentence):
                yield Fault(path, line, sentence, f"`{found[0]}`; write: {instead}")


def markdown_paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Line and text of each paragraph and list item, without code, tables and headings."""
    begun, fence = 0, ""
    held: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        bare = line.strip()
        opened = re.match(r"(```+|~~~+)", bare)
        inside = bool(fence)
        if opened and (not fence or bare.startswith(fence)):
            fence = "" if fence else opened[1]
        item = _ITEM.match(line)
        apart = not bare or bare.startswith(("#", "|", "<")) or bool(opened) or inside
        if (apart or item) and held:
            yield begun, " ".join(held)
            held = []
        if not apart:
            begun = begun if held else number
            held.append(bare[item.end() - len(line) + len(line.lstrip()) :] if item else bare)


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of the docstrings of a module, of its public classes and functions, and of
    fields (a text after an annotated name, which becomes the reference of recipes)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        name = getattr(node, "name", "")
        if name.startswith("_") and not name.startswith("__"):
            continue
        if text := ast.get_docstring(node, clean=True):
            yield node.body[0].lineno, text
        if isinstance(node, ast.ClassDef):
            for before, after in pairwise(node.body):
                if isinstance(before, ast.AnnAssign) and isinstance(after, ast.Expr):
                    text = getattr(after.value, "value", None)
                    if isinstance(text, str):
                        yield after.lineno, inspect.cleandoc(text)


def docstring_paragraphs(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each paragraph of the docstrings of a module and of what is public in it."""
    for first, text in docstrings(tree):
        begun: int = first
        held: list[str] = []
        for number, line in enumerate([*text.splitlines(), ""], start=first):
            code = re.search(r"\S {2,}\S", line) or (line.startswith("    ") and not held)
            starts = _ENTRY.match(line) or _ITEM.match(line)
            if (not line.strip() or starts) and held:
                yield begun, " ".join(held)
                held = []
            if line.strip() and not code and not line.strip().startswith(("|", "$")):
                begun = begun if held else number
                held.append(line.strip())


def messages(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of the messages of errors that a module raises; a value in one is one word.

    A semicolon stands between what is wrong and what to do, so each part is a text of its own.
    """
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        said = node.exc.args[0]
        parts = said.values if isinstance(said, ast.JoinedStr) else [said]
        texts = [part.value if isinstance(part, ast.Constant) else "VALUE" for part in parts]
        if any(isinstance(part, ast.Constant) for part in parts):
            yield from ((node.lineno, part) for part in "".join(map(str, texts)).split("; "))


def faults(path: Path, *, of_messages: bool = False) -> list[Fault]:
    """What is wrong with the prose of a Markdown or a Python file, or with its messages."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        paragraphs = (messages if of_messages else docstring_paragraphs)(ast.parse(text))
    else:
        paragraphs = markdown_paragraphs(text)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return [fault for line, said in paragraphs for fault in faults_of(said, shown, line)]


def checked_files() -> list[Path]:
    """What is checked where no file is named."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [*pages, *sorted((ROOT / "ptkit").rglob("*.py"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--messages", action="store_true", help="check messages of errors instead")
    arguments = parser.parse_args()
    given = [path.resolve() for path in arguments.files]
    if arguments.messages:
        given = given or sorted((ROOT / "ptkit").rglob("*.py"))
    given = given or checked_files()
    found = [fault for path in given for fault in faults(path, of_messages=arguments.messages)]
    for fault in found:
        print(fault)
    print(f"{len(found)} in {len(given)} files", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
