"""Adapters on the Hub for one base model."""

from __future__ import annotations

from dataclasses import dataclass

from ptkit.formats.hub_repository import HubId, hub_errors
from ptkit.methods.catalogue import method_sections


@dataclass(frozen=True)
class HubAdapter:
    """One adapter repository. method: from its tags, None where they do not say."""

    id: str
    method: str | None
    downloads: int
    likes: int
    updated: str
    by_ptkit: bool


def tags_of_methods() -> dict[str, tuple[str, ...]]:
    """Method -> the tags that name it, as cards of ptkit and of others write them."""
    return {kind: section.tags for kind, section in method_sections().items() if section.tags}


def search(
    base: str, *, method: str | None = None, text: str | None = None, limit: int = 20
) -> list[HubAdapter]:
    """Adapters on the Hub whose card names the base model `base`, most downloaded first.

    method: one of `tags_of_methods`; text: words in the repository's name

    Raises UserError for an unknown method or an id that is none, HubError when the Hub fails.
    """
    from huggingface_hub import HfApi

    from ptkit.errors import UserError, did_you_mean

    methods = tags_of_methods()
    if method is not None and method not in methods:
        raise UserError(f"no method `{method}`; {did_you_mean(method, methods)}")
    found = []
    with hub_errors(HubId(base)):
        listed = HfApi().list_models(
            filter=[f"base_model:adapter:{base}"], search=text, sort="downloads",
            limit=limit if method is None else None,
        )  # fmt: skip
        for model in listed:
            tags = set(model.tags or ())
            kind = next((k for k, names in methods.items() if tags & set(names)), None)
            if method is not None and kind != method:
                continue
            updated = model.last_modified.date().isoformat() if model.last_modified else ""
            found.append(
                HubAdapter(model.id, kind, model.downloads or 0, model.likes or 0, updated,
                      "ptkit" in tags)
            )  # fmt: skip
            if len(found) == limit:
                break
    return found
