"""The base model itself: the row every comparison starts from."""

from __future__ import annotations

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, Demonstrations, register
from ptkit.methods.base.settings import BaseSection
from ptkit.runtime.base_model import Base


@register
class Untouched(Adapter):
    """No adapter."""

    section_class = BaseSection
    encoder_decoder = True

    @classmethod
    def create(cls, section: BaseSection, base: Base, demonstrations: Demonstrations) -> Untouched:
        adapter = cls(section, base)
        adapter.head = None  # the base's own, trained or not
        return adapter

    def own_files(self) -> AdapterFiles:
        raise AdapterError("the base model has no adapter to export")
