"""Whatever PEFT puts into the base's layers, by PEFT's own settings."""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ptkit.errors import AdapterError, ModelError, did_you_mean
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import register
from ptkit.methods.peft.settings import PeftSection
from ptkit.methods.peft_layers import OF_FILE, PeftLayers, head_modules, read_config, task_type
from ptkit.runtime.base_model import Base


def _config_class(peft_type: str) -> type[PeftConfig]:
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]


@register
class AnyPeft(PeftLayers):
    """Layers of PEFT's, of a type that the settings name."""

    section_class = PeftSection

    @classmethod
    def peft_config(cls, section: PeftSection, base: Base) -> PeftConfig:
        kind = _config_class(section.type)
        known = {f.name for f in dataclasses.fields(kind) if f.init} - OF_FILE
        for key in section.config:
            if key not in known:
                raise ModelError(
                    f"`{section.title}`: PEFT's {kind.__name__} has no `{key}`; "
                    + did_you_mean(key, known)
                )
        own: dict[str, Any] = {**section.config, "task_type": task_type(base)}
        if (head := head_modules(base)) is not None and "exclude_modules" in known:
            own["exclude_modules"] = [*own.get("exclude_modules", []), *head]
        try:
            return kind(**own)
        except (TypeError, ValueError) as error:
            raise ModelError(f"`{section.title}`: PEFT refuses its `config`: {error}") from error

    @classmethod
    def config_of_files(cls, files: AdapterFiles, base: Base) -> PeftConfig:
        starts = files.config.get("init_lora_weights", True)
        if starts not in (True, False, "gaussian"):
            raise AdapterError(
                f"the adapter starts from {starts!r:.80}, which changes the base's own weights; "
                "save it as a plain LoRA (PEFT: `path_initial_model_for_weight_conversion`)"
            )
        return read_config(_config_class(files.peft_type), files, base)
