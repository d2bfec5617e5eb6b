"""The recipes that ship: a line on each, and a copy of one under a name of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from ptkit.recipe.load import LoadedRecipe, shipped_recipes


@dataclass(frozen=True)
class RecipeSummary:
    """What a list of recipes says of one. methods: their labels or kinds"""

    name: str
    description: str
    model: str
    task: str
    methods: list[str]


def recipe_summaries() -> list[RecipeSummary]:
    """Every recipe that ships, by name. They are known to be valid, so they are only read."""
    found = []
    for path in shipped_recipes().values():
        data = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        methods = [str(m.get("label") or m["kind"]) for m in data["methods"]]
        model = data.get("model", {}).get("id", "tiny-en")
        summary = RecipeSummary(
            data["name"], data.get("description", ""), model, data["task"]["kind"], methods
        )
        found.append(summary)
    return found


def renamed(loaded: LoadedRecipe, target: Path) -> str:
    """The text of a recipe for the file `target`: with a name of its own, and comments that name
    the file and its folders. So its runs lie apart from those of the shipped one."""
    old = loaded.recipe.name
    name = re.sub(r"[^a-z0-9._-]+", "-", target.stem.lower()).strip("-._") or "mine"
    if name in shipped_recipes():
        name = f"my-{name}"
    lines = []
    for line in loaded.text.splitlines(keepends=True):
        if re.match(r"#.*ptkit recipes copy ", line):
            continue
        if line.startswith("#"):
            line = re.sub(rf"(ptkit [a-z-]+ ){re.escape(old)}\b(?![-.\w])", rf"\g<1>{target}", line)
            line = re.sub(rf"((runs|comparisons)/){re.escape(old)}\b", rf"\g<1>{name}", line)
        lines.append(re.sub(rf"^name:\s*{re.escape(old)}\s*$", f"name: {name}\n", line))
    return "".join(lines)
