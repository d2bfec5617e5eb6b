"""PEFT's other prompt types, and soft prompts and prefixes turned into each other."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from conftest import random_base, random_model
from peft import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from test_adapter_files import IDS, logits_of
from test_peft_parity import LEARNT, make_adapter

from ptkit import AdapterBank
from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.formats.adapter_folder import CARD, CONFIG, INFO
from ptkit.formats.adapter_info import AdapterInfo
from ptkit.hub.convert import as_prefix, as_prompt, convert_adapter, one_task
from ptkit.methods import adapter_from_files, compile_files

PEFT_CONFIGS = {
    "cpt": CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 9, 33, 2], cpt_mask=[1] * 4,
                     cpt_tokens_type_mask=[1, 2, 3, 4]),
    "cartridge": CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_frozen_tokens=1),
    "multitask": MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4,
                                             num_tasks=3, num_ranks=2),
}  # fmt: skip


def saved_by_peft(
    name: str, model: torch.nn.Module, path: Path, std: float = 0.6
) -> torch.nn.Module:
    """An adapter of random values, made and saved by PEFT around `model`."""
    torch.manual_seed(5)
    model = get_peft_model(model, copy.deepcopy(PEFT_CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=std)
    if name == "cpt":
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS))  # projects what was learnt
    model.save_pretrained(str(path))
    return model


@pytest.mark.parametrize("name", ["cpt", "cartridge"])
def test_cpt_and_cartridge_adapters_of_peft_are_read(
    name: str, family: str, tmp_path: Path
) -> None:
    saved_by_peft(name, random_model(family), tmp_path)
    theirs = PeftModel.from_pretrained(random_model(family), str(tmp_path)).eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    adapter = adapter_from_files(read_adapter(tmp_path), random_base(family))
    torch.testing.assert_close(
        logits_of(adapter), expected[:, -IDS.shape[1] :], atol=1e-5, rtol=1e-5
    )


def test_one_task_of_a_multitask_prompt(family: str, tmp_path: Path) -> None:
    saved_by_peft("multitask", random_model(family), tmp_path / "all")
    base = random_base(family)
    with pytest.raises(AdapterError, match=r"3 tasks; .*ptkit convert"):
        AdapterBank(base).load(tmp_path / "all")
    files = read_adapter(tmp_path / "all")
    with pytest.raises(AdapterError, match="no task 3: this prompt has tasks 0 to 2"):
        one_task(files, 3)
    theirs = PeftModel.from_pretrained(random_model(family), str(tmp_path / "all")).eval()
    for task in range(3):
        with torch.no_grad():
            expected = theirs(
                input_ids=IDS, attention_mask=torch.ones_like(IDS),
                task_ids=torch.full((len(IDS),), task),
            ).logits  # fmt: skip
        adapter = adapter_from_files(one_task(files, task), base)
        torch.testing.assert_close(
            logits_of(adapter), expected[:, -IDS.shape[1] :], atol=1e-5, rtol=1e-5
        )
    done = convert_adapter(tmp_path / "all", tmp_path / "one", to="prompt", task=1, base=base)
    assert (done.virtual_tokens, done.error) == (4, 0.0)
    plain = PeftModel.from_pretrained(random_model(family), str(tmp_path / "one")).eval()
    with torch.no_grad():
        expected = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS),
                          task_ids=torch.ones(len(IDS), dtype=torch.long)).logits  # fmt: skip
        found = plain(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


REFUSED = [
    (
        "classifier",
        PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
        "for a sequence class",
    ),
    ("unknown", LoraConfig(task_type="CAUSAL_LM"), "ptkit reads"),
]


@pytest.mark.parametrize(("name", "config", "said"), REFUSED)
def test_adapters_ptkit_cannot_use_are_refused_with_the_reason(
    name: str, config: PromptTuningConfig, said: str, tmp_path: Path
) -> None:
    base = random_base("gpt2")
    files = make_adapter(base, LEARNT["prompt"]).files()
    values = json.loads(json.dumps(config.to_dict(), default=list))
    if name == "unknown":
        values["peft_type"] = "XLORA"
    write_adapter(tmp_path / name, type(files)(values, files.tensors))
    with pytest.raises(AdapterError, match=said):
        AdapterBank(base).load(tmp_path / name)


def test_head_trained_beside_the_prompt_is_not_dropped_in_silence(tmp_path: Path) -> None:
    base = random_base("gpt2")
    files = make_adapter(base, LEARNT["prompt"]).files()
    tensors = {**files.tensors, "base_model.lm_head.weight": torch.ones(2, 2)}
    with pytest.raises(AdapterError, match=r"base_model.lm_head.weight.*only virtual tokens"):
        compile_files(type(files)(files.config, tensors), base)


@pytest.mark.parametrize("method", ["prompt", "p-tuning-lstm", "prefix-mlp"])
def test_compiled_adapter_answers_the_same_in_plain_peft(
    family: str, method: str, tmp_path: Path
) -> None:
    torch.manual_seed(8)
    base = random_base(family)
    adapter = make_adapter(base, LEARNT[method])
    write_adapter(tmp_path / "kv", as_prefix(adapter.files(), base))
    theirs = PeftModel.from_pretrained(random_model(family), str(tmp_path / "kv")).eval()
    assert theirs.peft_config["default"].peft_type == "PREFIX_TUNING"
    with torch.no_grad():
        logits = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    assert logits.shape[1] == IDS.shape[1]  # no prompt token is read
    torch.testing.assert_close(logits, logits_of(adapter), atol=1e-5, rtol=1e-5)


def test_prefix_of_a_soft_prompt_is_fitted_back(family: str) -> None:
    base = random_base(family)
    words = base.embedding.weight[[5, 17, 40]].float()
    torch.manual_seed(1)
    adapter = make_adapter(base, LEARNT["prompt"]).files()
    noisy = words + 0.05 * words.std() * torch.randn_like(words)
    soft = type(adapter)({**adapter.config, "num_virtual_tokens": 3}, {"prompt_embeddings": noisy})
    fitted = as_prompt(as_prefix(soft, base), base, steps=150)
    assert 0 < fitted.error < 0.01
    expected, found = (adapter_from_files(f, base) for f in (soft, fitted.files))
    change = (logits_of(found) - logits_of(expected)).norm() / logits_of(expected).norm()
    assert change < 0.05


@pytest.fixture
def short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit of a soft prompt takes a tenth of its steps, where how well it ends is not judged."""
    monkeypatch.setitem(as_prompt.__kwdefaults__, "steps", 60)


@pytest.mark.usefixtures("short_fits")
def test_prefix_no_soft_prompt_makes_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(2)
    base = random_base("gpt2")
    write_adapter(tmp_path / "prefix", make_adapter(base, LEARNT["prefix"]).files())
    with pytest.raises(AdapterError, match=r"no soft prompt comes close .* misses"):
        convert_adapter(tmp_path / "prefix", tmp_path / "out", to="prompt", base=base)
    assert not (tmp_path / "out").exists()
    done = convert_adapter(
        tmp_path / "prefix", tmp_path / "out", to="prompt", base=base, max_error=1
    )
    assert 0.05 < done.error <= 1


@pytest.mark.usefixtures("short_fits")
def test_conversion_keeps_the_record_and_drops_scores_it_cannot_vouch_for(tmp_path: Path) -> None:
    base = random_base("gpt2")
    files = make_adapter(base, LEARNT["prompt"]).files()
    info = {"base": {"id": base.id, "fingerprint": base.fingerprint}, "n_test": 3,
            "method": {"kind": "prompt_tuning"}, "seed": 0, "n_train": 9,
            "metrics": {"bleu": {"value": 1.0, "low": 0.5, "high": 2.0}}}  # fmt: skip
    recorded = AdapterInfo.model_validate(info)
    write_adapter(tmp_path / "prompt", type(files)(files.config, files.tensors, recorded))
    convert_adapter(tmp_path / "prompt", tmp_path / "kv", to="prefix", base=base)
    exact = json.loads((tmp_path / "kv" / INFO).read_text())
    assert exact["metrics"] == info["metrics"]
    assert exact["converted_from"] == {"kind": "prompt_tuning"}
    assert json.loads((tmp_path / "kv" / CONFIG).read_text())["peft_type"] == "PREFIX_TUNING"
    assert "prefix tuning" in (tmp_path / "kv" / CARD).read_text().lower()
    convert_adapter(tmp_path / "kv", tmp_path / "fit", to="prompt", base=base, max_error=1)
    assert "metrics" not in json.loads((tmp_path / "fit" / INFO).read_text())
