"""What a shell completes: recipes, adapters and models. No tensor library is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def complete_recipes(incomplete: str) -> list[str]:
    """Shipped recipes, and YAML files of the current folder."""
    from ptkit.recipe.load import recipes_folder

    shipped = sorted(path.stem for path in recipes_folder().glob("*.yaml"))
    return _begun([*shipped, *_paths(["*.yaml", "*.yml"])], incomplete)


def complete_adapters(incomplete: str) -> list[str]:
    """Adapter folders below `adapters`, and finished runs below `runs`."""
    from ptkit.formats.adapter_folder import CONFIG

    adapters = [str(Path(p).parent) for p in _paths([f"adapters/*/{CONFIG}"])]
    runs = [str(Path(p).parents[1]) for p in _paths([f"runs/*/*/adapter/{CONFIG}"])]
    return _begun([*adapters, *runs], incomplete)


def complete_models(incomplete: str) -> list[str]:
    """Names that ptkit knows, models in the Hub's cache, and GGUF files of this folder."""
    from ptkit.runtime.model_names import PACKAGED, TINY_EN, WHEELS

    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub")
    fetched = [
        path.name.removeprefix("models--").replace("--", "/", 1)
        for path in sorted(cache.glob("models--*")) if path.is_dir()
    ]  # fmt: skip
    return _begun([TINY_EN, *PACKAGED, *WHEELS, *fetched, *_paths(["*.gguf"])], incomplete)


def _paths(patterns: Iterable[str]) -> list[str]:
    return [path.as_posix() for pattern in patterns for path in sorted(Path().glob(pattern))]


def _begun(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]
