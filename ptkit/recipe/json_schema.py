"""The recipe as a JSON schema, for editors and for the reference documentation."""

from __future__ import annotations

from typing import Any

from ptkit.methods.catalogue import method_sections
from ptkit.recipe.schema import Recipe


def recipe_json_schema() -> dict[str, Any]:
    """JSON schema of a recipe, with every method's own settings."""
    schema = Recipe.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    definitions.pop("MethodSection", None)
    for section in method_sections().values():
        own = section.model_json_schema()
        definitions.update(own.pop("$defs", {}))
        definitions[section.__name__] = own
    names = [section.__name__ for section in method_sections().values()]
    schema["properties"]["methods"]["items"] = {
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in names]
    }
    schema["title"] = "ptkit recipe"
    return schema
