"""What ships inside the project is what it says: the base model and the adapters to try."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from ptkit.bank import AdapterBank
from ptkit.formats.adapter_files import read_adapter
from ptkit.formats.adapter_folder import WEIGHTS
from ptkit.methods import adapter_from_files, require_same_base
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.forward import all_logits
from ptkit.runtime.model_names import TINY_EN_FOLDER

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = sorted(p.parent for p in (ROOT / "adapters").glob(f"*/{WEIGHTS}"))
sys.path.insert(0, str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def tiny() -> Base:
    return load_base("tiny-en")


def test_embedded_base_is_small_bfloat16_safetensors() -> None:
    files = [p for p in TINY_EN_FOLDER.iterdir() if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 20_000_000
    with safe_open(TINY_EN_FOLDER / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118
    card = (TINY_EN_FOLDER / "README.md").read_text()
    for word in ("bits per byte", "licence", "steps", "generated"):
        assert word in card.lower()


def test_embedded_base_has_five_to_nine_million_parameters(tiny: Base) -> None:
    assert 5_000_000 <= tiny.parameters <= 9_000_000
    assert len(tiny.tokenizer) == 8192


def test_embedded_base_copies_by_induction(tiny: Base) -> None:
    """On a repeated random sequence the second half's loss is at most half of the first's."""
    generator = torch.Generator().manual_seed(123)
    run = torch.randint(2, 8192, (16, 100), generator=generator)
    ids = torch.cat([torch.full((16, 1), tiny.tokenizer.eos_token_id), run, run], dim=1)
    with torch.no_grad():
        logits = tiny.model(input_ids=ids[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    assert losses[:, 100:].mean() <= 0.5 * losses[:, :100].mean()


def test_pretraining_never_saw_the_built_in_data() -> None:
    from text_to_text_mix import documents

    lines = ["A man in a blue shirt is standing on a ladder.", "The lake is cold in winter."] * 50
    built_in = ROOT / "ptkit" / "data" / "builtin"
    rows = [
        json.loads(line)
        for split in ("train", "test")
        for line in (built_in / "facts-to-text" / f"{split}.jsonl").read_text().splitlines()
    ]
    inputs = {row["facts"] for row in rows} | {row["text"] for row in rows}
    made = [d for d, _ in zip(documents(20, lines), range(3000), strict=False)]
    assert len(made) == 3000
    for text in made:
        assert "kind[" not in text
        assert not any(line in inputs for line in text.splitlines())


def test_there_are_several_adapters_of_several_methods_and_tasks() -> None:
    assert len(ADAPTERS) >= 3
    kinds = {read_adapter(p).info.method_kind for p in ADAPTERS}
    recipes = {read_adapter(p).info.recipe for p in ADAPTERS}
    assert len(kinds) >= 3
    assert len(recipes) >= 2


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda p: p.name)
def test_shipped_adapter_is_small_fits_the_base_and_loads_in_peft(path: Path, tiny: Base) -> None:
    assert sum(p.stat().st_size for p in path.iterdir()) <= 100_000
    files = read_adapter(path)
    require_same_base(files, tiny, path.name)
    assert files.info.n_test >= 150
    adapter = adapter_from_files(files, tiny)
    ids = torch.tensor([tiny.tokenizer("kind[boat], name[Orwick]\n")["input_ids"]])
    ours = all_logits(
        tiny.model, ids, torch.ones_like(ids), PrefixBatch.shared(adapter.prefix().detach(), 1)
    )
    base = AutoModelForCausalLM.from_pretrained(TINY_EN_FOLDER, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(path)).eval()
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(logits[:, -ids.shape[1] :], ours, atol=1e-4, rtol=1e-4)


def test_mixed_batch_of_shipped_adapters_equals_solo_runs(tiny: Base) -> None:
    bank = AdapterBank(tiny)
    names: list[str | None] = [None, *(bank.load(path) for path in ADAPTERS)]
    texts = [f"kind[boat], name[Orwick], seats[{n}]\n" for n in ("six", "two", "nine")]
    rows = [(text, name) for text in texts for name in names]
    options = {"max_new_tokens": 16, "do_sample": False}
    together = bank.generate([t for t, _ in rows], [n for _, n in rows], **options)
    for (text, name), answer in zip(rows, together, strict=True):
        assert bank.generate([text], [name], **options) == [answer]
