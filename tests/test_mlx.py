"""Adapters as MLX's prompt caches: `mlx_lm` itself generates what ptkit does.

`make setup-engines` puts `mlx_lm` and MLX for CPUs apart.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_peft_parity import LEARNT, make_adapter

from ptkit.bank import AdapterBank
from ptkit.errors import AdapterError
from ptkit.families.matrix import model_under_test
from ptkit.formats.adapter_files import write_adapter
from ptkit.hub.engines.mlx import write
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.model_names import TINY_EN, TINY_EN_FOLDER

ROOT = Path(__file__).resolve().parents[1]
APART = ROOT / ".venv" / "mlx"
NAMES = ["facts-prefix", "routing-prefix", "facts-prompt", "routing-ptuning"]
TEXTS = ["kind[boat], name[Ashmere], colour[green]\n", "My parcel is late", "The"]
PROGRAM = """
import json, sys
sys.path.append(sys.argv[1])
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import load_prompt_cache
from mlx_lm.utils import load
folder, model, files, rows = json.loads(sys.argv[2])
model = load(model)[0]
model.set_dtype(mx.float32)  # as ptkit computes; the file holds bfloat16
told = {}
for name in files:
    for number, ids in enumerate(rows):
        cache = load_prompt_cache(f"{folder}/{name}.safetensors")
        steps = generate_step(mx.array(ids), model, max_tokens=16, prompt_cache=cache)
        told[f"{name} {number}"] = [int(token) for token, _ in steps]
print("TOLD" + json.dumps(told))
"""


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(TINY_EN, device="cpu")


@pytest.mark.skipif(not APART.is_dir(), reason="needs mlx_lm: make setup-engines")
def test_mlx_generates_what_ptkit_does(base: Base, tmp_path: Path) -> None:
    """Prefixes, a prompt and a P-tuning, three texts each, greedily, in float32."""
    write([ROOT / "adapters" / name for name in NAMES], tmp_path / "served", base=base)
    rows = base.encode(TEXTS)
    given = json.dumps([str(tmp_path / "served"), str(TINY_EN_FOLDER), NAMES, rows])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(APART), given],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "TOLD" in done.stdout, done.stderr[-2000:]
    told = json.loads(done.stdout.partition("TOLD")[2])
    bank = AdapterBank(base)
    bank.register_all(ROOT / "adapters")
    end = base.tokenizer.eos_token_id
    for name in NAMES:
        expected = bank.generate_ids(rows, [name] * len(rows), max_new_tokens=16, do_sample=False)
        for number, ids in enumerate(expected):
            found = told[f"{name} {number}"]  # which goes on after an end of text
            assert found[: len(ids)] == ids
            assert len(ids) == 16 or found[len(ids)] == end


def test_a_prompt_cache_holds_the_prefix_and_says_what_it_is(base: Base, tmp_path: Path) -> None:
    write([ROOT / "adapters" / "facts-prefix"], tmp_path / "served", base=base)
    bank = AdapterBank(base)
    bank.load(ROOT / "adapters" / "facts-prefix")
    prefix = bank.prefix("facts-prefix")
    with safe_open(tmp_path / "served" / "facts-prefix.safetensors", "pt") as file:
        about = file.metadata()
        for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            torch.testing.assert_close(file.get_tensor(f"{layer}.0")[0], keys)
            torch.testing.assert_close(file.get_tensor(f"{layer}.1")[0], values)
            assert file.get_tensor(f"{layer}.2").item() == prefix.virtual_tokens
            assert about[f"1.{layer}"] == "KVCache"
            assert about[f"2.{layer + 1}.0"] == f"{layer}.2"
    assert about["0.model"] == base.id


def test_layers_with_a_window_are_refused(tmp_path: Path) -> None:
    base = model_under_test("mistral").base()
    write_adapter(tmp_path / "a", make_adapter(base, LEARNT["prefix"]).files())
    with pytest.raises(AdapterError, match="see a window"):
        write([tmp_path / "a"], tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
