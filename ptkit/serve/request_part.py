"""What all requests have in common: nulls are left out, and what is not known is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema


class RequestPart(BaseModel):
    """A request, or a part of one. What is null in it is left out, and what is not known refused.

    Clients send null for what was not set, and a message as they were given it: `refusal: null`.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """The schema says of nulls what `_leave_out_nulls` does with them."""
        schema = handler(core_schema)
        own = handler.resolve_ref_schema(schema)
        for name, of in own.get("properties", {}).items():
            if name not in own.get("required", []) and not _may_be_null(of):
                told = {key: of.pop(key) for key in ("title", "description", "default") & of.keys()}
                own["properties"][name] = {"anyOf": [of, {"type": "null"}], **told}
        own["additionalProperties"] = {"type": "null"}
        return schema


def _may_be_null(schema: Mapping[str, Any]) -> bool:
    return {"type": "null"} in schema.get("anyOf", ())
