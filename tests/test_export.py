"""What an exported adapter weighs, what plain PEFT makes of it, and whether its claims are true."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import forked
import pytest
import torch
from conftest import random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_adapter_files import IDS, lora_adapter
from test_cli import QUICK, ptkit
from test_peft_parity import LEARNT, make_adapter

from ptkit import AdapterBank, export_run, load_adapter, verify
from ptkit.errors import AdapterError, UserError
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.formats.adapter_folder import CARD, INFO, RECIPE, WEIGHTS, sha256
from ptkit.formats.int8 import dequantised, quantised

SHIPPED = Path(__file__).resolve().parents[1] / "adapters"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of the quickstart on the embedded base."""
    folder = tmp_path_factory.mktemp("export")
    ptkit("train", "quickstart", *QUICK, "--out", "run", cwd=folder)
    return folder / "run"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", LEARNT)
def test_file_is_the_parameters_and_at_most_two_kilobytes(
    method: str, dtype: str, tmp_path: Path
) -> None:
    base = random_base("llama")
    write_adapter(tmp_path / "a", make_adapter(base, LEARNT[method]).files())
    done = export_run(tmp_path / "a", tmp_path / "b", dtype=dtype, base=base)
    width = getattr(torch, dtype).itemsize
    assert done.parameters * width < done.bytes <= done.parameters * width + 2048


def test_lora_header_grows_with_its_matrices_only(tmp_path: Path) -> None:
    base = random_base("llama")
    write_adapter(tmp_path / "a", lora_adapter(base).files())
    matrices = len(read_adapter(tmp_path / "a").tensors)
    done = export_run(tmp_path / "a", tmp_path / "b", base=random_base("llama"))
    assert done.bytes <= done.parameters * 4 + 160 * matrices


IN_BFLOAT16 = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file, save_file
base, adapter, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).eval()
ids = load_file(ids)["ids"]
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1]:]
save_file({"logits": logits.float().contiguous()}, out)
assert not any(name.startswith("ptkit") for name in sys.modules)
"""


@pytest.mark.parametrize("method", ["prefix-mlp", "prompt", "p-tuning-lstm"])
def test_plain_peft_in_bfloat16_in_another_process(method: str, tmp_path: Path) -> None:
    from ptkit.methods import adapter_from_files
    from ptkit.prefix_batch import PrefixBatch
    from ptkit.runtime.base_model import frozen_base
    from ptkit.runtime.forward import all_logits

    torch.manual_seed(8)
    base = random_base("llama")
    with torch.no_grad():  # logits of the size a trained model's have
        base.model.lm_head.weight.mul_(0.2)
    base.model.save_pretrained(tmp_path / "base")
    write_adapter(tmp_path / "a", make_adapter(base, LEARNT[method]).files())
    export_run(tmp_path / "a", tmp_path / "b", dtype="bfloat16", base=base)
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    forked.run(
        [sys.executable, "-c", IN_BFLOAT16, *(str(tmp_path / name) for name in
         ("base", "b", "ids.safetensors", "out.safetensors"))],
        check=True, env={**os.environ, forked.WITHOUT_PTKIT: "1"},
    )  # fmt: skip
    half = frozen_base(base.model.to(torch.bfloat16), base.tokenizer, base.id)
    adapter = adapter_from_files(read_adapter(tmp_path / "b"), half)
    batch = PrefixBatch.shared(adapter.prefix().detach(), len(IDS))
    with torch.no_grad():
        ours = all_logits(half.model, IDS, torch.ones_like(IDS), batch).float()
    theirs = load_file(tmp_path / "out.safetensors")["logits"]
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    assert difference < 2e-2


@given(
    rows=st.integers(1, 20), columns=st.integers(1, 40), seed=st.integers(0, 99),
    size=st.floats(-12, 12), name=st.sampled_from(["prompt_embeddings", "x.lora_A.weight"]),
)  # fmt: skip
@settings(deadline=None)
def test_int8_is_off_by_half_a_step_per_channel_at_most(
    rows: int, columns: int, seed: int, size: float, name: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, columns, generator=generator) * 10**size
    tensor[:, 0] = 0  # a channel of zeros stays one
    stored = quantised({name: tensor})
    assert stored[name].dtype == torch.int8
    back = dequantised(stored)[name]
    channel = 0 if name == "prompt_embeddings" else 1
    step = tensor.abs().amax(channel, keepdim=True) / 127
    assert ((back - tensor).abs() <= step * 0.51 + tensor.abs() * 1e-3 + 1e-30).all()
    assert (back[:, 0] == 0).all()


def test_int8_is_scored_and_says_what_it_lost(run: Path, tmp_path: Path) -> None:
    done = export_run(run, tmp_path / "small", dtype="int8")
    assert not (tmp_path / "small" / WEIGHTS).exists()
    assert done.bytes < 0.4 * (run / "adapter" / WEIGHTS).stat().st_size
    info = json.loads((tmp_path / "small" / INFO).read_text())
    before = json.loads((run / "adapter" / INFO).read_text())["metrics"]
    for name, lost in info["int8_lost"].items():
        assert before[name]["value"] - info["metrics"][name]["value"] == pytest.approx(lost)
    card = (tmp_path / "small" / CARD).read_text()
    assert "PEFT cannot read this file" in card
    assert "8-bit integers. Against the 32-bit original" in card
    bank = AdapterBank(load_adapter(tmp_path / "small").base)
    assert bank.load(tmp_path / "small") == "small"
    shutil.copytree(run / "adapter", tmp_path / "bare")
    (tmp_path / "bare" / RECIPE).unlink()
    with pytest.raises(AdapterError, match="give the recipe with --recipe"):
        export_run(tmp_path / "bare", tmp_path / "no", dtype="int8")
    assert not (tmp_path / "no").exists()


def test_card_and_recipe_travel_with_the_adapter(run: Path, tmp_path: Path) -> None:
    ptkit("export", run, "--out", "mine", "--license", "mit", "--language", "en", cwd=tmp_path)
    assert {p.name for p in (tmp_path / "mine").iterdir()} == {
        "adapter_config.json", WEIGHTS, INFO, RECIPE, CARD,
    }  # fmt: skip
    card = (tmp_path / "mine" / CARD).read_text()
    assert card.startswith("---\nbase_model: tiny-en\n")
    assert "license: mit" in card
    assert "| bleu |" in card
    ptkit("recipes", "validate", "mine/recipe.yaml", cwd=tmp_path)


def test_shipped_adapters_are_what_they_say() -> None:
    folders = [p for p in sorted(SHIPPED.iterdir()) if p.is_dir()]
    assert len(folders) >= 4
    for folder in folders:
        found = verify(folder, score=True)
        assert found.passed, [c for c in found.checks if c.passed is False]
        assert sum(c.name.startswith("score: ") for c in found.checks) == 2


@pytest.fixture
def routing(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SHIPPED / "routing-prefix", tmp_path / "altered"))


def rewrite(folder: Path, **changes: object) -> None:
    info = json.loads((folder / INFO).read_text())
    info["weights"]["sha256"] = sha256(folder / WEIGHTS)
    (folder / INFO).write_text(json.dumps({**info, **changes}))


def test_altered_tensor_is_found_by_its_score(routing: Path) -> None:
    tensors = load_file(routing / WEIGHTS)
    save_file({name: t * 0.5 for name, t in tensors.items()}, routing / WEIGHTS)
    assert not verify(routing).passed  # the digest tells
    rewrite(routing)
    assert verify(routing).passed  # and cannot when it was altered too
    failed = {c.name for c in verify(routing, score=True).checks if c.passed is False}
    assert {"score: accuracy", "score: macro_f1"} <= failed


def test_altered_claim_is_found(routing: Path) -> None:
    claims = json.loads((routing / INFO).read_text())["metrics"]
    better = {name: {k: v + 4 for k, v in claim.items()} for name, claim in claims.items()}
    rewrite(routing, metrics=better)
    assert verify(routing).passed
    failed = {c.name for c in verify(routing, score=True).checks if c.passed is False}
    assert failed == {"score: accuracy", "score: macro_f1"}


def test_recipe_with_a_strangers_code_is_not_run(routing: Path) -> None:
    text = (routing / RECIPE).read_text()
    assert "- accuracy" in text
    (routing / RECIPE).write_text(text.replace("- accuracy", "- subprocess:getoutput"))
    with pytest.raises(UserError, match=r"code of its own \(subprocess:getoutput\)"):
        verify(routing, score=True)
