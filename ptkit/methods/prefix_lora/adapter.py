"""A prefix and LoRA trained together: what is read before the input, and how everything is read.

Two papers find that the two add up. They are He et al. 2022, "Towards a Unified View of
Parameter-Efficient Transfer Learning", section 4.6 (https://arxiv.org/abs/2110.04366), and Mao et
al. 2022, UniPELT (https://arxiv.org/abs/2110.07577). The prefix is prefix tuning's, and the rest is
LoRA's. Here is only what holds them together.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, Demonstrations, OwnRate, register
from ptkit.methods.lora.adapter import Lora
from ptkit.methods.lora.settings import lora_section
from ptkit.methods.prefix_lora.settings import PREFIX_LORA, PrefixLoraSection
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.methods.prefix_tuning.settings import prefix_section
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base

#: Begins the names of PEFT's LoRA matrices; a prefix has none such.
_MODULES = "base_model.model."


@register
class PrefixLora(Adapter):
    """Keys and values before the input of a base whose linear layers have low-rank changes."""

    section_class = PrefixLoraSection
    encoder_decoder = True
    changes_weights = True
    section: PrefixLoraSection

    def __init__(
        self, section: PrefixLoraSection, base: Base, prefix_tuning: PrefixTuning, lora: Lora
    ) -> None:
        super().__init__(section, base)
        self.prefix_tuning = prefix_tuning
        self.lora = lora
        prefix_tuning.head = lora.head = None  # this adapter has one for both

    @classmethod
    def create(
        cls, section: PrefixLoraSection, base: Base, demonstrations: Demonstrations
    ) -> PrefixLora:
        # The prefix first: its start is what the plain base makes of real tokens.
        prefix_tuning = PrefixTuning.create(prefix_section(section), base, demonstrations)
        lora = Lora.create(lora_section(section), base, demonstrations)
        return cls(section, base, prefix_tuning, lora)

    @classmethod
    def from_files(cls, files: AdapterFiles, section: PrefixLoraSection, base: Base) -> PrefixLora:
        lora_files, prefix_files = cls.parts(files)
        # The prefix first: should one of them not fit, the base has not been touched.
        prefix_tuning = PrefixTuning.from_files(prefix_files, prefix_section(section), base)
        lora = Lora.from_files(lora_files, lora_section(section), base)
        return cls(section, base, prefix_tuning, lora)

    @classmethod
    def prefix_from_files(cls, files: AdapterFiles, section: Any, base: Base) -> KVPrefix:
        raise AdapterError(
            "this adapter is a prefix and a LoRA, and the prefix by itself is not it; `load` it "
            "into an AdapterBank, which runs a row with both"
        )

    @classmethod
    def parts(cls, files: AdapterFiles) -> list[AdapterFiles]:
        """The LoRA, and the prefix for the base with that LoRA in it, each as PEFT stores it."""
        configs = []
        for name, types in (("lora", Lora.peft_types), ("prefix", PrefixTuning.peft_types)):
            config = files.config.get(name)
            if not isinstance(config, dict) or config.get("peft_type") not in types:
                raise AdapterError(
                    f"the settings of a {PREFIX_LORA} adapter should hold those of a "
                    f"{types[0]} adapter as `{name}`, found {config!r:.80}"
                )
            configs.append(config)
        matrices = {n: t for n, t in files.tensors.items() if n.startswith(_MODULES)}
        tokens = {n: t for n, t in files.tensors.items() if n not in matrices}
        return [
            AdapterFiles(config, tensors)
            for config, tensors in zip(configs, (matrices, tokens), strict=True)
        ]

    def prefix(self) -> KVPrefix | None:
        return self.prefix_tuning.prefix()

    @property
    def virtual_tokens(self) -> int:
        return self.prefix_tuning.virtual_tokens

    @property
    def infix(self) -> bool:
        return self.prefix_tuning.infix

    def own_rates(self) -> list[OwnRate]:
        matrices = [*self.lora.trainable().values()]
        rates = self.prefix_tuning.own_rates()
        return [OwnRate(matrices, self.section.lora_learning_rate), *rates]

    def own_files(self) -> AdapterFiles:
        prefix, lora = self.prefix_tuning.own_files(), self.lora.own_files()
        config = {
            "peft_type": PREFIX_LORA,
            "base_model_name_or_path": self.base.id,
            "revision": self.base.revision,
            "task_type": lora.config["task_type"],
            "num_virtual_tokens": self.virtual_tokens,
            "prefix": prefix.config,
            "lora": lora.config,
        }
        return AdapterFiles(config, {**prefix.tensors, **lora.tensors})

    def off(self) -> AbstractContextManager[None]:
        return self.lora.off()

    def close(self) -> None:
        self.lora.close()
