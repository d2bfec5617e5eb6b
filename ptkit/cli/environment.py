"""`ptkit env`: what is installed and found here, for a report of a fault."""

from __future__ import annotations

import json
import platform
from importlib.util import find_spec

import typer

from ptkit.cli.options import JsonOutput, Quiet
from ptkit.extras import EXTRAS, install_line, installed

#: Packages that every result depends on.
_PACKAGES = ("ptkit", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


def env(json_output: JsonOutput = False, quiet: Quiet = False) -> None:
    """Say which versions, devices, extras and fetched models there are. Nothing leaves the machine.

    Paste it into a report of a fault: it names no user and no folder.
    """
    found = {
        "python": platform.python_version(),
        "system": platform.system(),
        **{name: installed(name) or "not installed" for name in _PACKAGES},
        "devices": ", ".join(_devices()),
        "extras": ", ".join(name for name in EXTRAS if not _missing(name)) or "none",
    }
    if json_output:
        missing = {name: sorted(lacking) for name in EXTRAS if (lacking := _missing(name))}
        typer.echo(json.dumps({**found, "missing": missing}, indent=2))
        return
    if quiet:
        typer.echo(found["ptkit"])
        return
    width = max(map(len, found))
    for name, value in found.items():
        typer.echo(f"{name:<{width}}  {value}")
    for name in EXTRAS:
        if lacking := _missing(name):
            packages = ", ".join(sorted(lacking))
            typer.echo(f"not here: {packages}: {install_line(name)}")


def _missing(extra: str) -> set[str]:
    return {package for module, package in EXTRAS[extra].items() if find_spec(module) is None}


def _devices() -> list[str]:
    """Each device, the CPU last, and whether it multiplies in bfloat16 by itself."""
    import torch

    from ptkit.formats.sizes import in_bytes
    from ptkit.runtime.precision import has_bf16

    found = []
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        told = f"{about.name}, {in_bytes(about.total_memory)}"
        found.append((torch.device("cuda", number), told))
    if torch.backends.mps.is_available():
        found.append((torch.device("mps"), platform.machine()))
    cpu = f"{platform.machine()}, {torch.get_num_threads()} threads"
    found.append((torch.device("cpu"), cpu))
    return [f"{at} ({told}, {'bf16' if has_bf16(at) else 'no bf16'})" for at, told in found]
