"""Writes docs/recipes.md from the recipe schema, the one place where keys are described.

python scripts/make_recipe_reference.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from ptkit.methods.catalogue import method_sections
from ptkit.recipe import schema, tasks
from ptkit.recipe.values import Range

OUT = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
HEAD = """# Recipes

A recipe is one YAML file (YAML 1.2: `1e-5` is a number, `off` a word). Unknown keys are refused.
`ptkit recipes copy NAME` gives you a commented one to start from; `--set KEY=VALUE` overrides any
key for one run. This page is made from the schema by `scripts/make_recipe_reference.py`.
"""
SECTIONS: list[tuple[str, type[BaseModel]]] = [
    ("Top level", schema.Recipe),
    ("`model`", schema.ModelSection),
    ("`task` with `kind: generation`", tasks.GenerationTask),
    ("`task` with `kind: chat`", tasks.ChatTask),
    ("`task` with `kind: preference`", tasks.PreferenceTask),
    ("`task` with `kind: classification`", tasks.ClassificationTask),
    ("`task` with `kind: sequence_classification`", tasks.SequenceClassificationTask),
    ("`task` with `kind: token_classification`", tasks.TokenClassificationTask),
    ("`task.data`", tasks.DataSection),
    ("`task.data.splits`", tasks.Splits),
    ("`task.data.limits`", tasks.SplitLimits),
    ("`train`", schema.TrainSection),
    ("`evaluate`", schema.EvaluateSection),
    ("`retention`", schema.RetentionSection),
    ("`budget`", schema.BudgetSection),
    ("A range, in `sweep` and `budget.search`", Range),
]


def default(field: Any) -> str:
    """A field's default as written in YAML, empty when it must be given or is a section."""
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        return ""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list):
        return f"`[{', '.join(map(str, value))}]`"
    if isinstance(value, str):
        written = json.dumps(value)
        return f"`{written[1:-1] or written}`"
    return f"`{value!r}`"


def table(section: type[BaseModel]) -> str:
    """The keys of a section."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {default(field)} | {meaning} |")
    return "\n".join(rows)


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    methods = [
        (f"`methods` with `kind: {kind}`", section) for kind, section in method_sections().items()
    ]
    for title, section in [*SECTIONS[:9], *methods, *SECTIONS[9:]]:
        summary = (section.__doc__ or "").strip().splitlines()[0]
        parts.append(f"## {title}\n\n{summary}\n\n{table(section)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    OUT.write_text(reference(), encoding="utf-8")
    print(OUT)
