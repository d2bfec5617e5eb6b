"""Requests and responses about the adapters of a running server, in ptkit's form and vLLM's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, StrictBool

from ptkit.serve.library import NAME
from ptkit.serve.request_part import RequestPart

AdapterName = Annotated[str, Field(pattern=f"^{NAME}$")]


class AdapterCard(BaseModel):
    """See `ptkit.serve.library.Card`."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    method: str | None
    tier: str
    version: int
    virtual_tokens: int | None
    parameters: int | None
    bytes: int | None
    recipe: str | None
    metric: str | None
    score: float | None
    low: float | None
    high: float | None
    n: int | None
    rows: str | None
    forgetting: float | None
    template: str | None
    fault: str | None


class AdapterCards(BaseModel):
    """`GET /v1/adapters`. total: how many match; files: what uploads send; data: one page."""

    base: str
    total: int
    files: list[str]
    data: list[AdapterCard]


class LoadRequest(RequestPart):
    """`POST /v1/load_adapter` and `/v1/swap_adapter`; vLLM's field names are understood too.

    path: a folder below the server's folder of adapters, relative to it
    hub: `user/repo[@revision]`, where the server allows it
    load_inplace: replace an adapter that is served under the name already
    """

    model_config = ConfigDict(populate_by_name=True)

    name: AdapterName = Field(validation_alias=AliasChoices("name", "lora_name"))
    path: str | None = Field(
        default=None, max_length=1000, pattern=r"^[^\x00-\x1f\x7f]*$",
        validation_alias=AliasChoices("path", "lora_path"),
    )  # fmt: skip
    hub: str | None = Field(default=None, max_length=300)
    load_inplace: StrictBool = False


class UnloadRequest(RequestPart):
    """`POST /v1/unload_adapter`."""

    model_config = ConfigDict(populate_by_name=True)

    name: AdapterName = Field(validation_alias=AliasChoices("name", "lora_name"))
    lora_int_id: int | None = Field(default=None, description="vLLM's; taken and not used.")


class Changed(BaseModel):
    """An adapter was changed. change: loaded, swapped, unloaded or uploaded."""

    name: str
    change: Literal["loaded", "swapped", "unloaded", "uploaded"]
