"""Other packages bring methods and metrics, and a broken one is told by its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
SETTINGS = '''
from collections.abc import Mapping
from typing import ClassVar, Literal

from ptkit.methods.prompt_tuning.settings import PromptTuningSection
from ptkit.section import FileType, register_method


@register_method
class NudgeSection(PromptTuningSection):
    """A soft prompt that begins with a nudge."""

    display_name: ClassVar[str] = "a nudge"
    tags: ClassVar[tuple[str, ...]] = ("nudge",)
    file_types: ClassVar[Mapping[str, FileType]] = {"PROMPT_TUNING": FileType()}
    not_asked: ClassVar[str | None] = "it is another package's"
    kind: Literal["nudge"]
    """`nudge`."""
    nudge: float = 0.5
    """How far."""
'''
ADAPTER = """
from ptkit.methods.adapter import register
from ptkit.methods.prompt_tuning.adapter import PromptTuning

from nudged.nudge.settings import NudgeSection


@register
class Nudge(PromptTuning):
    section_class = NudgeSection

    def embeddings(self):
        return super().embeddings() + self.section.nudge
"""
METRIC = """
def length(prediction, references):
    return len(prediction.split()) - len(references[0].split())
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder of the path with a distribution that brings a method and a metric."""
    package = tmp_path / "nudged" / "nudge"
    package.mkdir(parents=True)
    (tmp_path / "nudged" / "__init__.py").write_text(METRIC)
    (package / "__init__.py").write_text("")
    (package / "settings.py").write_text(SETTINGS)
    (package / "adapter.py").write_text(ADAPTER)
    distribution(
        tmp_path, "nudged", {"ptkit.methods": "nudge = nudged.nudge",
                             "ptkit.metrics": "length = nudged:length"}
    )  # fmt: skip
    return tmp_path


def distribution(folder: Path, name: str, groups: dict[str, str]) -> None:
    """What pip leaves of a distribution `name` 1.0 that has these entry points."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = (f"[{group}]\n{entry}\n" for group, entry in groups.items())
    (info / "entry_points.txt").write_text("".join(lines))


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with `folder` on its path."""
    places = (str(folder), str(TESTS), os.environ.get("PYTHONPATH", ""))
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))},
    )  # fmt: skip


def test_a_method_and_a_metric_of_another_package_are_used_as_ptkits_own(installed: Path) -> None:
    rows = "\n".join(json.dumps({"a": f"w{i} w{i + 1}", "b": f"w{i}"}) for i in range(1, 9))
    (installed / "rows.jsonl").write_text(rows + "\n")
    files = dict.fromkeys(("train", "validation", "test"), "rows.jsonl")
    task = {"kind": "generation", "data": {"files": files}, "input": "{a} ", "target": "{b}",
            "max_target_tokens": 3, "metrics": ["length", "exact_match"]}  # fmt: skip
    methods = [{"kind": "base"}, {"kind": "nudge", "num_virtual_tokens": 2, "nudge": 0.25}]
    recipe = {"name": "own", "task": task, "methods": methods, "retention": None,
              "train": {"steps": 2, "batch_size": 4, "warmup_steps": 0}}  # fmt: skip
    (installed / "own.yaml").write_text(json.dumps(recipe))
    code = """
import sys
from pathlib import Path
from ptkit.recipe.load import load_recipe
loaded = load_recipe("own.yaml")
assert "torch" not in sys.modules and "nudged.nudge.adapter" not in sys.modules
from conftest import random_base
from ptkit.comparison.grid import run_grid
from ptkit.formats.adapter_files import read_adapter
from ptkit.methods import ADAPTERS, adapter_from_files
base = random_base("llama")
_, record = run_grid(loaded, Path("out"), base=base)
print(record.metrics["length"], record.trainable_parameters)
files = read_adapter(Path("out/cells") / record.cell / "adapter")
assert type(adapter_from_files(files, base)) is ADAPTERS["nudge"]
"""
    told = run(installed, "-c", code)
    assert told.returncode == 0, told.stderr
    assert told.stdout.split()[-1] == str(2 * 32)
    schema = json.loads(run(installed, "-m", "ptkit", "recipes", "schema").stdout)
    assert "nudge" in schema["$defs"]["NudgeSection"]["properties"]
    wrong = run(installed, "-m", "ptkit", "train", "own.yaml", "--set", "task.metrics=[lenght]")
    assert wrong.returncode == 2
    assert "no metric `lenght`; did you mean `length`?" in wrong.stderr


@pytest.mark.parametrize(
    ("groups", "told"),
    [
        ({"ptkit.methods": "lost = nowhere.lost"},
         "`lost` (nowhere.lost), which broken 1.0 brings, cannot be imported: ModuleNotFoundError"),
        ({"ptkit.metrics": "length = elsewhere:length"}, "both bring `length` (ptkit.metrics)"),
        ({"ptkit.methods": "lora = mine.lora"}, "two methods are called `lora`"),
    ],
)  # fmt: skip
def test_a_package_that_cannot_be_used_is_named_with_what_to_do(
    installed: Path, groups: dict[str, str], told: str
) -> None:
    distribution(installed, "broken", groups)
    mine = installed / "mine" / "lora"
    mine.mkdir(parents=True)
    own = SETTINGS.replace('Literal["nudge"]', 'Literal["lora"]')
    (mine / "settings.py").write_text(own)
    refused = run(installed, "-m", "ptkit", "recipes", "validate", "quickstart")
    assert refused.returncode == 2
    assert told in refused.stderr
    assert "uninstall" in refused.stderr
    assert "Traceback" not in refused.stderr
