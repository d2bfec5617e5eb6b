"""A base in eight or four bits: methods are exact on it, adapters fit the base it came from."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ptkit import load_base
from ptkit.errors import ModelError, UserError
from ptkit.families.kinds import used_as
from ptkit.families.matrix import Status, model_under_test, run_matrix
from ptkit.families.model_under_test import ModelUnderTest, real_model
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.methods import (
    ADAPTERS,
    Demonstrations,
    adapter_from_files,
    create_adapter,
    require_same_base,
)
from ptkit.runtime.base_model import Base

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(find_spec(package) is None, reason="needs ptkit[quantize]"),
    )
    for kind, package in PACKAGES.items()
]


#: Where `make setup-dev` puts the packages, which the other tests do without.
APART = Path(sys.prefix) / "quantize"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="these tests run here")
@pytest.mark.skipif(not APART.is_dir(), reason="`make setup-dev` puts ptkit[quantize] apart")
def test_quantised_bases_where_the_packages_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", "-rs", __file__],
        env={**os.environ, "PYTHONPATH": f"{APART}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "needs ptkit[quantize]" not in done.stdout


def as_subject(base: Base) -> ModelUnderTest:
    return real_model(base, used_as(base))


def rounded(family: str, kind: str, folder: Path) -> Base:
    plain = model_under_test(family).base()
    plain.model.save_pretrained(folder / family)
    plain.tokenizer.save_pretrained(folder / family)
    return load_base(str(folder / family), quantize=kind, device="cpu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mistral", "bloom", "t5"])
def test_every_property_holds_on_a_quantised_base(family: str, kind: str, tmp_path: Path) -> None:
    tested = as_subject(rounded(family, kind, tmp_path))
    # Rounded weights have neither a float64 nor a bfloat16 form, and LoRA's oracle adds to them.
    asked = ["exact", "padding", "checkpointing", "generation", "padded generation", "beams",
             "no cache", "saved", "off"]  # fmt: skip
    methods = [m for m in tested.kind.methods if m in ("prefix", "prompt")]
    cells = list(run_matrix(tested, methods, properties=asked))
    allowed = {Status.works, Status.refused} if family == "t5" else {Status.works}
    assert {c.status for c in cells} <= allowed, [c for c in cells if c.status not in allowed]
    assert sum(c.status is Status.works for c in cells) >= len(asked)


@pytest.mark.parametrize("kind", KINDS)
def test_lora_trains_on_it_and_comes_off(kind: str, tmp_path: Path) -> None:
    tested = as_subject(rounded("llama", kind, tmp_path))
    asked = ["checkpointing", "off"]  # what merges LoRA into rounded weights rounds it, too
    assert {c.status for c in run_matrix(tested, ["lora"], properties=asked)} == {Status.works}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_fit_the_base_it_was_made_of_and_the_reverse(kind: str, tmp_path: Path) -> None:
    plain = model_under_test("llama").base()
    base = rounded("llama", kind, tmp_path)
    assert (base.fingerprint, base.parameters) == (plain.fingerprint, plain.parameters)
    assert base.legacy_fingerprint == plain.legacy_fingerprint
    assert base.precision == kind
    ids = torch.tensor([[5, 6, 7]])
    near, exact = (b.model(input_ids=ids).logits for b in (base, plain))
    assert 0 < float((near - exact).norm() / exact.norm()) < (0.1 if kind == "int8" else 0.5)
    adapter = _prefix(base)
    write_adapter(tmp_path / "a", adapter.files())
    files = read_adapter(tmp_path / "a")
    again = adapter_from_files(files, plain)
    assert torch.equal(again.flat(), adapter.flat())
    require_same_base(files, base, "a")


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_done_says_so(kind: str, tmp_path: Path) -> None:
    base = rounded("llama", kind, tmp_path)
    full = ADAPTERS["full"].section_class(kind="full")
    with pytest.raises(ModelError, match=r"leave `model.quantize` out"):
        create_adapter(full, base, Demonstrations([], 0))
    if kind == "int8":  # bitsandbytes reads GPT-2's layers, too
        with pytest.raises(ModelError, match="no plain linear layers"):
            rounded("gpt2", kind, tmp_path)


@pytest.mark.parametrize(("kind", "package"), PACKAGES.items())
def test_without_the_package_the_way_to_it_is_named(
    kind: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptkit.extras.find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf'{package}, .*: pip install .*\[quantize\]"'):
        load_base("tiny-en", quantize=kind)


def _prefix(base: Base):
    section = ADAPTERS["prefix_tuning"].section_class(
        kind="prefix_tuning", num_virtual_tokens=4, start="random"
    )
    return create_adapter(section, base, Demonstrations([], 0))
