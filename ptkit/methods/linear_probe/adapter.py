"""Linear probing: the classification head alone, on what the frozen model makes of its input.

The row below which no adapter of a classifier should fall (Alain & Bengio 2016, "Understanding
intermediate layers using linear classifier probes", section 3).
"""

from __future__ import annotations

from typing import Any

from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, Demonstrations, register
from ptkit.methods.linear_probe.settings import LINEAR_PROBE, LinearProbeSection
from ptkit.runtime.base_model import Base


@register
class LinearProbe(Adapter):
    """No adapter but the head that every method trains."""

    section_class = LinearProbeSection
    needs_head = True

    @classmethod
    def create(
        cls, section: LinearProbeSection, base: Base, demonstrations: Demonstrations
    ) -> LinearProbe:
        return cls(section, base)

    @classmethod
    def from_files(cls, files: AdapterFiles, section: Any, base: Base) -> LinearProbe:
        return cls(section, base)

    def own_files(self) -> AdapterFiles:
        return AdapterFiles(
            {
                "peft_type": LINEAR_PROBE,
                "base_model_name_or_path": self.base.id,
                "revision": self.base.revision,
            },
            {},
        )
