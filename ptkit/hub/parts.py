"""An adapter that PEFT cannot hold in one, written as the adapters of PEFT's it is made of."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ptkit.errors import AdapterError
from ptkit.formats import atomic
from ptkit.formats.adapter_files import AdapterFiles, read_adapter, write_adapter
from ptkit.formats.adapter_folder import CARD
from ptkit.formats.adapter_info import AdapterInfo
from ptkit.formats.places import find_adapter
from ptkit.methods import adapter_from_files, base_of, parts_of, require_same_base
from ptkit.runtime.base_model import Base

Dtype = Literal["float32", "bfloat16", "float16"]

_README = """# The parts of one adapter

A LoRA and a prefix that were trained together on `{base}`. Either by itself is not the adapter: the
prefix was learnt in front of the base with the LoRA in it. With PEFT alone, the LoRA first:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(model, "lora").merge_and_unload()
model = PeftModel.from_pretrained(model, "prefix")
```

In an `AdapterBank`, `load` both and let a row name both.
"""


@dataclass(frozen=True)
class Parts:
    """What was written: a folder per part, below `path`."""

    path: Path
    names: tuple[str, ...]


def export_parts(
    run: Path,
    out: Path,
    *,
    dtype: Dtype = "float32",
    replace_out: bool = False,
    base: Base | None = None,
) -> Parts:
    """Write the parts of the adapter of `run` (a finished run or an adapter folder) to `out`.

    Raises AdapterError for an adapter that is one as it is. It raises it for one with a prefix that
    PEFT does not know (an infix, a prefix of an encoder). It raises it too for a
    classifier, whose head is trained for both parts.
    """
    path = find_adapter(run)
    files = read_adapter(path)
    parts = parts_of(files)
    if len(parts) == 1:
        raise AdapterError(
            f"{run} is a {files.peft_type} adapter, which has no parts that PEFT could load; "
            "export it without `--as parts`"
        )
    if base is None:
        base = base_of(files, None, str(run))
    require_same_base(files, base, str(run))
    if base.head is not None:
        raise AdapterError(f"{run} has a head that was trained for both parts; keep it whole")
    foreign = [part.peft_type for part in parts if part.peft_type.startswith("PTKIT_")]
    if foreign:
        raise AdapterError(f"{run} holds a {foreign[0]}, which PEFT cannot load; keep it whole")
    info = AdapterInfo()
    if not files.info.empty:
        info = AdapterInfo(base=files.info.base, part_of=files.info.method)
    named = {part.peft_type.split("_")[0].lower(): part for part in parts}
    with atomic.folder(out, replace=replace_out) as scratch:
        for name, part in named.items():
            stored = part.to(getattr(torch, dtype))
            write_adapter(scratch / name, replace(stored, info=info))
            _require_loads(scratch / name, stored, base)
        atomic.write_text(scratch / CARD, _README.format(base=base.id))
    return Parts(out, tuple(named))


def _require_loads(path: Path, stored: AdapterFiles, base: Base) -> None:
    reloaded = read_adapter(path)
    if any(not torch.equal(reloaded.tensors[n], t.cpu()) for n, t in stored.tensors.items()):
        raise AdapterError(f"{path}: what was read back differs from what was written")
    adapter_from_files(reloaded, base).close()
