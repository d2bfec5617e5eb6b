"""What the scripts beside this one share. Each runs where one library is, in a process of its own:

    python write_LIBRARY.py BASES OUT SEED

BASES holds the tiny bases of tests/files/foreign. For each setting that the script knows, it makes
an adapter with random values and lets the library save it in OUT/LIBRARY-BASE-SETTING. Beside the
library's files is `expected.safetensors`: `ids` `[rows, tokens]` and the `logits` that it gives.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file

#: Tokens of the decoder, for a base that has an encoder.
WRITTEN = 4


class Cases:
    """Where adapters are written, and what they are made of."""

    def __init__(self, library: str) -> None:
        self.library = library
        self.bases, self.out, seed = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
        torch.manual_seed(seed)
        self.ids = torch.randint(5, 100, (2, 9))

    def base(self, kind: str, auto: Any, **options: Any) -> Any:
        """The base `kind`, named as on the Hub."""
        model = auto.from_pretrained(self.bases / kind, **options)
        model.name_or_path = model.config._name_or_path = f"org/tiny-{kind}"
        return model.eval()

    def folder(self, kind: str, setting: str) -> Path:
        """An empty folder for the adapter."""
        path = self.out / f"{self.library}-{kind}-{setting}"
        path.mkdir(parents=True)
        return path

    def keep(self, folder: Path, logits: torch.Tensor) -> None:
        """Write what the library gives, of the text's own positions."""
        if logits.ndim == 3 and logits.shape[1] > self.ids.shape[1]:
            logits = logits[:, -self.ids.shape[1] :]
        tensors = {"ids": self.ids, "logits": logits.detach().float().contiguous().clone()}
        save_file(tensors, folder / "expected.safetensors")


def randomise(parameters: Iterable[torch.Tensor], scale: float = 0.5) -> None:
    """Give parameters values that no training would: large enough to be seen in every logit."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(0, scale)


class StandIns(MetaPathFinder, Loader):
    """Empty modules in place of those `names` that a library imports, and that nothing here uses.
    Used as `sys.meta_path.insert(0, StandIns(...))`."""

    def __init__(self, *names: str) -> None:
        self.names = {*names}

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        known = name.split(".")[0] in self.names
        return ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__name__, module.__path__, module.__file__ = spec.name, [], spec.name
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass
