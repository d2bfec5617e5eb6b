"""Adapters that other libraries make here and now are imported as what they are, or refused with
the reason. Each library runs in a process of its own; where it is not installed, its test skips."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
from foreign_files import FOLDER, ORACLES, base_for, largest_difference

from ptkit.errors import AdapterError
from ptkit.hub.imports import import_adapter

SCRIPTS = Path(__file__).parent / "originals"
#: The transformers that the older libraries run with.
OLDER = "transformers-4.34.1"
PEFTS = ("0.2.0", "0.3.0", "0.4.0", "0.6.0")
#: Library -> the folders of `ORACLES` that it needs, the script that runs it, and how many adapters
#: that makes.
LIBRARIES = {
    "adapterhub": (["adapterhub"], "write_adapterhub.py", 37),
    **{f"peft-{v}": ([f"peft-{v}", OLDER], "write_peft.py", 21) for v in PEFTS},
    "opendelta": (["opendelta", OLDER], "write_opendelta.py", 12),
    "openprompt": (["openprompt", OLDER], "write_openprompt.py", 10),
    "litgpt": (["litgpt"], "write_litgpt.py", 1),
    "paddlenlp": (["paddlenlp"], "write_paddlenlp.py", 3),
}
SECOND_HALF = "let the decoder read the second half"
NOTHING_JOINS = "none for what joins them"
#: Names of adapters that are refused -> the reason. All others are imported.
REFUSED = {
    "adapterhub-*-gated": "has a gate",
    "adapterhub-*-leftout": "leaves out the layers 0",
    "adapterhub-*-lora": "is a lora adapter",
    "adapterhub-*-bottleneck": "is a bottleneck adapter",
    "adapterhub-bert-cls1": "which no classifier of transformers has",
    "adapterhub-bert-seq2relu": "the activation `relu`",
    "adapterhub-bert-mlp": "no head that classifies",
    "adapterhub-bert-qa": "its head is a `question_answering`",
    "litgpt-*": "second softmax",
    "opendelta-*-lora": "is a `lora` delta",
    "opendelta-t5-prefix*": NOTHING_JOINS,
    "openprompt-*-ptuning": "stand where its text puts them",
    "openprompt-t5-prefix*": NOTHING_JOINS,
    "peft-0.2.0-gpt2-lora": "`enable_lora`",
    "peft-0.[23].0-t5-prompt*": SECOND_HALF,
    "peft-0.[23].0-t5-ptuning": SECOND_HALF,
    "peft-0.[23].0-t5-lstm": SECOND_HALF,
    "peft-*-t5-prefix*": "have the decoder's part only",
}


def written(library: str, out: Path) -> list[Path]:
    """What `library` makes, a folder for each adapter."""
    folders, script, count = LIBRARIES[library]
    missing = [name for name in folders if not (ORACLES / name).is_dir()]
    if missing:
        target = "setup-paddlenlp" if library == "paddlenlp" else "setup-oracles"
        pytest.skip(f"{' and '.join(missing)} not here: make {target}")
    path = os.pathsep.join(str(ORACLES / name) for name in folders)
    done = subprocess.run(
        [sys.executable, SCRIPTS / script, FOLDER / "bases", out, "1"],
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    made = sorted(out.iterdir())
    assert len(made) >= count
    return made


def fault(made: Path, out: Path) -> str | None:
    """What is wrong with the import of `made`, if anything is."""
    reason = next((why for name, why in REFUSED.items() if fnmatch(made.name, name)), None)
    try:
        import_adapter(made, out, base=base_for(made.name))
    except AdapterError as error:
        told = str(error)
        return None if reason and re.search(reason, told) and not out.exists() else told
    if reason:
        return "imported"
    difference = largest_difference(made.name, out, made)
    return None if difference < 1e-4 else f"logits differ by {difference}"


@pytest.mark.slow
@pytest.mark.usefixtures("opened_here")
@pytest.mark.parametrize("library", LIBRARIES)
def test_what_a_library_makes_now_gives_its_logits_or_is_refused_with_the_reason(
    library: str, tmp_path: Path
) -> None:
    faults = {
        made.name: found
        for made in written(library, tmp_path / "made")
        if (found := fault(made, tmp_path / "in" / made.name)) is not None
    }
    assert not faults
