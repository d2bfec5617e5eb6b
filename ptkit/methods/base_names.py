"""Names of base models as adapters write them, and the shapes PEFT's settings say of the base.

An adapter of plain PEFT has no fingerprint of its base. Only the name it was loaded by, and the
shapes in `adapter_config.json`, separate one base from another.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptkit.errors import AdapterError
from ptkit.runtime.model_names import PACKAGED, TINY_EN, WHEELS

if TYPE_CHECKING:
    from ptkit.runtime.base_model import Base

#: A page of the Hub, or of a mirror of it: `https://HOST/org/name`.
_PAGE = re.compile(r"https?://[^/]+/(?P<id>[^/]+/[^/]+?)(?:/tree/[^/]+)?/?")
#: Folders that are called alike in every training: they are known by the folder above them, too.
_LIKE_OTHERS = re.compile(r"checkpoint-\d+")
#: A model in the Hub's cache: `.../models--org--name/snapshots/COMMIT`.
_CACHED = re.compile(r"(?:^|[\\/])models--(?P<id>[^\\/]+)[\\/]snapshots[\\/][^\\/]+[\\/]?$")


def hub_name(name: str) -> str:
    """`name`, or the id `org/name` where it is a path into the Hub's cache or a page of the Hub or
    of a mirror."""
    page = _PAGE.fullmatch(name)
    if page is not None:
        return page["id"]
    found = _CACHED.search(name)
    return found["id"].replace("--", "/", 1) if found else name


def peft_name(id: str) -> str:
    """What plain PEFT finds the base `id` by: the original on the Hub of a model that was fetched
    from a package, else `id` itself."""
    return WHEELS[id].hub if id in WHEELS else id


def is_local_path(name: str) -> bool:
    """Whether a base's name is a path, and not an id on the Hub or a name of ptkit's."""
    return name.startswith(("/", ".", "~", "\\")) or "\\" in name or name.count("/") > 1 or (
        re.match(r"[A-Za-z]:", name) is not None
    )  # fmt: skip


def needs_no_download(name: str) -> bool:
    """Whether a base's name is one of ptkit's own, or a file or folder of this machine."""
    return name == TINY_EN or name in PACKAGED or name in WHEELS or Path(name).exists()


def is_here(name: str) -> bool:
    """Whether a base's name is a place on this machine, and not one of ptkit's own names. It is a
    path, or a file or folder of that name (which is what would be loaded)."""
    if name == TINY_EN or name in PACKAGED or name in WHEELS:
        return False
    return is_local_path(name) or Path(name).exists()


def same_name(name: str, base: Base) -> bool:
    """Whether `name` is `base`'s, by its last part: `gpt2` is `openai-community/gpt2`."""
    own = {base.id, str(base.model.name_or_path)}
    return last_part(name) in {last_part(other) for other in own}


def last_part(name: str) -> str:
    """What bases are told apart by where paths and accounts differ: `gpt2` of `openai/gpt2`."""
    parts = re.split(r"[\\/]", hub_name(name).rstrip("\\/"))
    count = 2 if _LIKE_OTHERS.fullmatch(parts[-1]) else 1
    return "/".join(parts[-count:])


def require_shapes(
    config: Mapping[str, Any], expected: Mapping[str, Collection[int]], base: Base
) -> None:
    """Raise AdapterError where PEFT's settings name another shape of the base than its own.

    expected: key of `adapter_config.json` -> the numbers that are right on `base`; a key that the
        settings leave out says nothing. The tensors alone cannot tell: a prefix for 2 layers of 4
        heads is as wide as one for 4 layers of 2.
    """
    faults = [
        f"`{key}` is {config[key]}, here {' or '.join(map(str, sorted({*right})))}"
        for key, right in expected.items()
        if isinstance(config.get(key), int) and config[key] not in right
    ]
    if faults:
        raise AdapterError(
            f"the adapter was made for a base of another shape than `{base.id}`: "
            + "; ".join(faults)
        )
