"""An adapter's files as the Hub gets them: the base by its id there, no place on this machine."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ptkit.errors import UserError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.formats.adapter_folder import CARD, CONFIG, INFO, RECIPE
from ptkit.formats.adapter_info import ADAPTER_INFO, AdapterInfo
from ptkit.formats.hub_repository import HubId
from ptkit.hub.card import with_base
from ptkit.methods.base_names import hub_name, is_here

logger = logging.getLogger(__name__)


def public_base(named: str | None, chosen: str | None, where: str) -> str | None:
    """The id on the Hub of the base that the adapter `where` calls `named`.

    chosen: the name that the user gave. Raises UserError where there is none and `named` is a place
        on this machine, which is of no use to others. It raises it too where `chosen` is no id.
    """
    if chosen is not None:
        if HubId.read(chosen).revision is not None:
            raise UserError(f"`{chosen}`: give the base without a revision")
        return chosen
    if named is None:
        return None
    found = hub_name(named)  # a path into the Hub's cache holds the id
    if is_here(found):
        raise UserError(
            f"{where} names `{named}` as its base, a place on this machine that would be published "
            "and that others do not have; name the base on the Hub with --base-model USER/NAME"
        )
    return found


def with_public_base(files: AdapterFiles, texts: Mapping[str, str], base: str) -> dict[str, str]:
    """The files of an adapter that change where its base is called `base`: name -> content.

    texts: its card and recipe; both are changed where they are there
    """
    before = files.base_id
    config = {**files.config, "base_model_name_or_path": base}
    if "revision" in config:  # it was the other name's
        config["revision"] = None
    changed = {CONFIG: _json(config)}
    if "base" in files.info.model_fields_set:
        made_for = files.info.base.updated(id=base, revision=None)
        changed[INFO] = _json(ADAPTER_INFO.as_file(files.info.updated(base=made_for)))
    if RECIPE in texts:
        changed[RECIPE] = _recipe(texts[RECIPE], base)
    if CARD in texts:
        changed[CARD] = with_base(texts[CARD], before, base)
    return changed


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _recipe(text: str, base: str) -> str:
    """The recipe with `base` as its model; as it is where it is no recipe."""
    yaml = YAML()
    recipe = yaml.load(text)
    if not isinstance(recipe, dict) or not isinstance(recipe.get("model"), dict):
        return text
    recipe["model"]["id"] = base
    if "revision" in recipe["model"]:
        recipe["model"]["revision"] = None
    stream = io.StringIO()
    yaml.dump(recipe, stream)
    return stream.getvalue()


def say_places(texts: Mapping[str, str], info: AdapterInfo, where: str) -> None:
    """Warn in one line of files of this machine that the recipe or the record of `where` names."""
    try:
        recipe = YAML(typ="safe", pure=True).load(texts.get(RECIPE, ""))
    except YAMLError:
        recipe = None
    own = {k: v for k, v in recipe.items() if k != "model"} if isinstance(recipe, dict) else {}
    told = info.model_dump(exclude={"base"})
    named = [text for text in _texts([own, told]) if Path(text).is_absolute()]
    places = sorted({text for text in named if len(text) < 1000 and Path(text).exists()})
    if places:
        logger.warning(
            "%s names places on this machine, which are published as they are: %s",
            where, ", ".join(places),
        )  # fmt: skip


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
