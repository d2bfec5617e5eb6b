"""LoRA adapters of unknown origin: what their files say, checked before PEFT sees it.

PEFT puts its layers into the base while it reads settings and matrices. By the time it finds a
fault, the base has been changed.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.peft_layers import task_type
from ptkit.methods.saved_modules import require_no_others, require_saved_modules
from ptkit.runtime.base_model import Base

#: A LoRA matrix in PEFT's files: the module it belongs to, and which of the two it is.
_MATRIX = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

#: Part of a module's name; PEFT would take a regular expression, which may never end.
_Name = Annotated[str, Field(pattern=r"^\^?[\w.]+$")]
#: The same below any module, as PEFT writes the patterns of fused experts.
_Pattern = Annotated[str, Field(pattern=r"^(\^|\.\*\\\.)?[\w.]+$")]
_Rank = Annotated[int, Field(ge=1, strict=True)]


class _Settings(BaseModel):
    """The settings that say how the matrices act; all others are about training."""

    model_config = ConfigDict(extra="ignore")

    r: _Rank = 8
    lora_alpha: float = Field(default=8, allow_inf_nan=False)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    alpha_pattern: dict[_Pattern, float] | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] | None = None
    fan_in_fan_out: bool = False


class _FusedSettings(_Settings):
    """Those of a LoRA on parameters that are no modules: the stacked experts of a mixture."""

    target_parameters: list[_Name]
    target_modules: list[_Name] = []
    rank_pattern: dict[_Pattern, _Rank] = {}


def lora_config(files: AdapterFiles, base: Base) -> LoraConfig:
    """PEFT's settings of the LoRA adapter `files`, with ranks and modules read from its matrices.

    Raises AdapterError for settings that mean nothing, and for matrices the base has no place for.
    """
    fused = bool(files.config.get("target_parameters"))
    try:
        settings = (_FusedSettings if fused else _Settings).model_validate(files.config)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise AdapterError(f"this LoRA's setting `{where}`: {first['msg']}") from error
    require_saved_modules(files, base)
    require_no_others(files, base)
    task = task_type(base)
    if fused:  # PEFT stacks the experts' matrices, whose ranks the shapes do not tell
        return LoraConfig(**settings.model_dump(exclude_none=True), task_type=task)
    ranks = _ranks(files, base)
    if not ranks:
        raise AdapterError("the file holds no LoRA matrices")
    others = {name: rank for name, rank in ranks.items() if rank != settings.r}
    return LoraConfig(
        **settings.model_dump(exclude_none=True),
        target_modules=sorted(ranks),
        rank_pattern=others,
        task_type=task,
    )


def _ranks(files: AdapterFiles, base: Base) -> dict[str, int]:
    """Module -> rank of its matrices. Raises AdapterError when they fit no module of the base."""
    modules = dict(base.model.named_modules())
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in files.tensors.items():
        found = _MATRIX.fullmatch(name)
        if found:
            pairs.setdefault(found["module"], {})[found["side"]] = tensor
    for name, pair in pairs.items():
        module = modules.get(name)
        weight = getattr(getattr(module, "base_layer", module), "weight", None)
        shapes = {side: list(t.shape) for side, t in pair.items()}
        fits = (
            isinstance(weight, Tensor)
            and set(pair) == {"A", "B"}
            and all(t.ndim == 2 and t.is_floating_point() for t in pair.values())
            and pair["A"].shape[0] == pair["B"].shape[1] > 0
            and sorted((pair["A"].shape[1], pair["B"].shape[0])) == sorted(weight.shape)
        )
        if not fits:
            place = "no such module" if weight is None else f"a weight of {list(weight.shape)}"
            raise AdapterError(
                f"the matrices of `{name}` have shapes {shapes}, the base has {place} there"
            )
    return {name: pair["A"].shape[0] for name, pair in pairs.items()}
