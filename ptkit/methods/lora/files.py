"""LoRA adapters of unknown origin: what their files say, checked before PEFT sees it.

PEFT puts its layers into the base while it reads settings and matrices. By the time it finds a
fault, the base has been changed.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Any, Literal

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.peft_layers import OF_FILE, task_type
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
    """The settings that say how the matrices act."""

    model_config = ConfigDict(extra="ignore")

    r: _Rank = 8
    lora_alpha: float = Field(default=8, allow_inf_nan=False)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    alpha_pattern: dict[_Pattern, float] | None = None
    rank_pattern: dict[_Pattern, _Rank] | None = None
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


#: Settings that say where matrices are, which the file's own names tell, and how training began.
_NOT_READ = OF_FILE | {
    "target_modules", "exclude_modules", "target_parameters", "layers_to_transform",
    "layers_pattern", "init_lora_weights", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
#: Beginnings of `init_lora_weights` that take something away from the base's weights, which PEFT
#: does again when it loads the adapter.
_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def lora_config(files: AdapterFiles, base: Base) -> LoraConfig:
    """PEFT's settings of the LoRA adapter `files`, with ranks and modules read from its matrices.

    Raises AdapterError for settings that mean nothing, and for matrices the base has no place for.
    """
    _require_plain(files.config)
    if embedding := next((name for name in files.tensors if ".lora_embedding_" in name), None):
        raise AdapterError(
            f"this LoRA changes embeddings (`{embedding}`), which ptkit does not compute; run it "
            "with PEFT"
        )
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
    patterns = settings.rank_pattern or {}
    for name, rank in ranks.items():
        said = patterns.get(get_pattern_key([*patterns], name), settings.r)
        if rank != said:  # the scale is alpha / r: one of the two is another adapter's
            raise AdapterError(
                f"the matrices of `{name}` have rank {rank}, and the settings say {said} (`r`, "
                "`rank_pattern`); settings and weights are of different adapters"
            )
    return LoraConfig(
        **settings.model_dump(exclude_none=True), target_modules=sorted(ranks), task_type=task
    )


def _require_plain(config: dict[str, Any]) -> None:
    """Raise AdapterError for a setting by which PEFT computes something else than `_Settings` say:
    a variant of LoRA, or another base."""
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    for key in sorted(known - _Settings.model_fields.keys() - _NOT_READ):
        if config.get(key):
            raise AdapterError(
                f"this LoRA is of a variant that ptkit does not compute (`{key}`); run it with PEFT"
            )
    began = config.get("init_lora_weights")
    if isinstance(began, str) and began.startswith(_OTHER_BASES):
        raise AdapterError(
            f"this LoRA belongs to a base whose weights its start changed (`init_lora_weights: "
            f"{began}`); save it as plain LoRA (`save_pretrained` with "
            "`path_initial_model_for_weight_conversion`), or run it with PEFT"
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
