"""What adapters' records say, and in what two adapters differ. No model is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptkit.formats.adapter_files import AdapterFiles, read_adapter
from ptkit.formats.adapter_folder import weights_path
from ptkit.formats.places import find_adapter


def describe(source: str | Path) -> dict[str, Any]:
    """The facts about the adapter `source` (a folder or a hub id), in the order to show them."""
    path = find_adapter(Path(source), whole=True)
    files = read_adapter(path)
    info = files.info
    facts: dict[str, Any] = {
        "path": str(path),
        "method": files.peft_type.lower(),
        "base": info.base.model_dump() or {"id": files.base_id},
        "virtual tokens": files.config.get("num_virtual_tokens"),
        "values": sum(t.numel() for t in files.tensors.values()),
        "bytes": weights_path(path).stat().st_size,
        "dtype": info.dtype or _dtypes(files),
    }
    if not info.empty:
        facts |= {
            "recipe": info.recipe,
            "seed": info.seed,
            "data": info.data.model_dump(),
            "scores": {name: score.shown for name, score in (info.metrics or {}).items()},
            ("validation rows" if info.test_chose else "test rows"): info.n_test,
            "forgetting": info.retention and info.retention.forgetting,
            "settings": info.method and info.method.model_dump(),
            "distilled from": info.distilled and info.distilled.document.model_dump(),
            "converted from": info.converted_from and info.converted_from.model_dump(),
            "versions": info.versions,
        }
    return {name: value for name, value in facts.items() if value not in (None, {})}


@dataclass(frozen=True)
class SettingDifference:
    """One thing two adapters differ in."""

    name: str
    first: Any
    second: Any


def differences(first: str | Path, second: str | Path) -> list[SettingDifference]:
    """Settings, scores and tensors in which two adapters differ.

    A tensor's entry holds its length in the first and the distance between the two; tensors of
    different shapes are shown by their shapes.
    """
    paths = [find_adapter(Path(source)) for source in (first, second)]
    one, other = (read_adapter(path) for path in paths)
    found = _unequal("", _settings(one), _settings(other))
    for name in sorted(one.tensors.keys() | other.tensors.keys()):
        a, b = one.tensors.get(name), other.tensors.get(name)
        if a is None or b is None or a.shape != b.shape:
            shapes = [None if t is None else str(list(t.shape)) for t in (a, b)]
            found.append(SettingDifference(f"tensor {name}", *shapes))
            continue
        distance = float((a.float() - b.float()).norm())
        if distance:
            length = float(a.float().norm())
            found.append(
                SettingDifference(
                    f"tensor {name}", f"length {length:.4g}", f"distance {distance:.4g}"
                )
            )
    return found


def _settings(files: AdapterFiles) -> dict[str, Any]:
    """Everything that is said about an adapter, without the digest of its weights."""
    return {**files.info.model_dump(mode="json", exclude={"weights"}), "peft": files.config}


def _unequal(prefix: str, one: dict[str, Any], other: dict[str, Any]) -> list[SettingDifference]:
    found = []
    for key in dict.fromkeys([*one, *other]):
        a, b = one.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _unequal(f"{prefix}{key}.", a, b)
        elif isinstance(a, float) and isinstance(b, float) and math.isclose(a, b, rel_tol=1e-4):
            continue  # shown with four digits they would look the same
        elif a != b:
            found.append(SettingDifference(f"{prefix}{key}", a, b))
    return found


def _dtypes(files: AdapterFiles) -> str:
    return ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in files.tensors.values()}))
