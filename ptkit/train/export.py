"""Exporting a run's adapter: parameters only, in PEFT's layout, verified by reloading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ptkit.errors import PtkitError
from ptkit.evaluate.saved import find_adapter
from ptkit.formats.adapter_files import WEIGHTS, read_adapter, write_adapter
from ptkit.methods import adapter_from_files, require_same_base
from ptkit.recipe.schema import ModelSection
from ptkit.runtime.base_model import Base, load_base


@dataclass(frozen=True)
class Exported:
    """What was written. bytes: size of the weights file; parameters: values in it."""

    path: Path
    parameters: int
    bytes: int
    largest_rounding: float


def export_run(
    run: Path, out: Path, *, dtype: str = "float32", replace: bool = False, base: Base | None = None
) -> Exported:
    """Write the adapter of `run` (a finished run or an adapter folder) to `out` in `dtype`.

    The result is read back, compared with what was trained and loaded on its base. Raises
    UserError when `out` exists, AdapterError when the run is not finished or for another base.
    """
    trained = read_adapter(find_adapter(run))
    if base is None:
        revision = trained.info.get("base", {}).get("revision")
        base = load_base(ModelSection(id=str(trained.base_id), revision=revision))
    require_same_base(trained, base, str(run))
    files = trained.to(getattr(torch, dtype))
    write_adapter(out, files, replace=replace)
    reloaded = read_adapter(out)
    if any(not torch.equal(reloaded.tensors[n], t.cpu()) for n, t in files.tensors.items()):
        raise PtkitError(f"{out}: what was read back differs from what was written")
    adapter_from_files(reloaded, base).close()
    rounding = max(
        float((t.float() - reloaded.tensors[n].float()).abs().max())
        for n, t in trained.tensors.items()
    )
    return Exported(
        out,
        sum(t.numel() for t in files.tensors.values()),
        (out / WEIGHTS).stat().st_size,
        rounding,
    )
