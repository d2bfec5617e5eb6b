"""Full fine-tuning, to compare with: every weight of a copy of the base is trained."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

from ptkit.errors import AdapterError, ModelError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, Demonstrations, register
from ptkit.methods.full.settings import FullSection
from ptkit.runtime.base_model import Base


@register
class Full(Adapter):
    """A trainable copy of the base; the base itself stays frozen for the other methods."""

    section_class = FullSection
    encoder_decoder = True
    changes_weights = True
    has_off = False

    def __init__(self, section: FullSection, base: Base) -> None:
        super().__init__(section, base)
        if base.quantized:
            raise ModelError(
                "full fine-tuning needs floating-point weights; leave `model.quantize` out, or use "
                "another method"
            )
        self.copy = copy.deepcopy(super().model).float()
        self.copy.requires_grad_(True)
        self.head = None  # the copy has it

    @classmethod
    def create(cls, section: FullSection, base: Base, demonstrations: Demonstrations) -> Full:
        return cls(section, base)

    @property
    def model(self) -> PreTrainedModel:
        return self.copy

    def own_files(self) -> AdapterFiles:
        raise AdapterError(
            "full fine-tuning has no adapter; its whole model is saved in transformers' format"
        )
