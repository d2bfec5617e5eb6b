"""A base in eight bits: every method is exact on it, and its adapters fit the base it came from."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import random_base

from ptkit import ModelSection, load_base
from ptkit.errors import ModelError
from ptkit.families.matrix import Status, run_matrix, subject_of
from ptkit.families.subject import Subject, real_subject
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.methods import (
    ADAPTERS,
    Demonstrations,
    adapter_from_files,
    create_adapter,
    require_same_base,
)
from ptkit.runtime.base_model import Base, quantized_base

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs ptkit[quantize]"
)


def eight_bits(family: str) -> Subject:
    return real_subject(quantized_base(subject_of(family).base()))


@needs_torchao
@pytest.mark.parametrize("family", ["llama", "mistral", "bloom", "t5"])
def test_every_property_holds_on_a_quantised_base(family: str) -> None:
    subject = eight_bits(family)
    # Rounded weights have neither a float64 nor a bfloat16 form, and LoRA's oracle adds to them.
    asked = ["exact", "padding", "checkpointing", "generation", "padded generation", "beams",
             "no cache", "saved", "off"]  # fmt: skip
    methods = [m for m in subject.kind.methods if m in ("prefix", "prompt")]
    cells = list(run_matrix(subject, methods, properties=asked))
    allowed = {Status.works, Status.refused} if family == "t5" else {Status.works}
    assert {c.status for c in cells} <= allowed
    assert sum(c.status is Status.works for c in cells) >= len(asked)


@needs_torchao
def test_lora_trains_on_it_and_comes_off() -> None:
    subject = eight_bits("llama")
    asked = ["checkpointing", "off"]  # what merges LoRA into rounded weights rounds it, too
    assert {c.status for c in run_matrix(subject, ["lora"], properties=asked)} == {Status.works}


@needs_torchao
def test_adapters_fit_the_base_it_was_made_of_and_the_reverse(tmp_path: Path) -> None:
    plain = subject_of("llama").base()
    plain.model.save_pretrained(tmp_path / "llama")
    plain.tokenizer.save_pretrained(tmp_path / "llama")
    section = ModelSection(id=str(tmp_path / "llama"), quantize="int8", device="cpu")
    rounded = load_base(section)
    assert rounded.fingerprint == plain.fingerprint
    ids = torch.tensor([[5, 6, 7]])
    near, exact = (b.model(input_ids=ids).logits for b in (rounded, plain))
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.1
    adapter = _prefix(rounded)
    write_adapter(tmp_path / "a", adapter.files())
    files = read_adapter(tmp_path / "a")
    again = adapter_from_files(files, plain)
    assert torch.equal(again.flat(), adapter.flat())
    require_same_base(files, rounded, "a")


@needs_torchao
def test_what_cannot_be_done_says_so() -> None:
    base = quantized_base(subject_of("llama").base())
    full = ADAPTERS["full"].section_class(kind="full")
    with pytest.raises(ModelError, match=r"leave `model.quantize` out"):
        create_adapter(full, base, Demonstrations([], 0))
    with pytest.raises(ModelError, match="no linear layers"):
        quantized_base(random_base("gpt2"))


@pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="torchao is here")
def test_without_torchao_the_way_to_it_is_named() -> None:
    with pytest.raises(ModelError, match=r"pip install 'ptkit\[quantize\]'"):
        quantized_base(subject_of("llama").base())


def _prefix(base: Base):
    section = ADAPTERS["prefix_tuning"].section_class(
        kind="prefix_tuning", num_virtual_tokens=4, start="random"
    )
    return create_adapter(section, base, Demonstrations([], 0))
