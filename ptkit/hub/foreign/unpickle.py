"""`python unpickle.py FILE OUT`: the tensors of a pickle as safetensors; nothing else is run.

A program, not a part of the package: `ptkit.hub.foreign.pickled` starts it as a process.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

#: Bytes for any file, and times its size, beyond what the libraries take.
_MEMORY, _TIMES = 1 << 30, 6


def _limit_memory(size: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    held = 0
    status = Path("/proc/self/status")
    if not status.exists():  # macOS does not enforce it
        return
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("VmData:"):
            held = int(line.split()[1]) * 1024
    limit = held + _MEMORY + _TIMES * size
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def tensors_of(value: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in `value`, each with its name: of nested dictionaries joined by dots."""
    if isinstance(value, torch.Tensor):
        yield name or "tensor", value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from tensors_of(part, f"{name}.{key}" if name else str(key))


def main(source: Path, out: Path) -> None:
    _limit_memory(source.stat().st_size)
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except MemoryError:
        sys.exit("it asks for more memory than its size explains")
    except Exception as error:  # whatever a damaged file makes of it
        text = str(error)
        if "Weights only load failed" in text:
            text = "it holds other things than tensors, which could run code when read"
        sys.exit((text.splitlines() or [type(error).__name__])[0])
    found = {name: t.detach().clone().contiguous() for name, t in tensors_of(loaded)}
    if not found:
        sys.exit("it holds no tensors")
    save_file(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
