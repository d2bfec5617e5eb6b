"""What PEFT puts into the base's layers is PEFT's: same logits, same values, same files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_base, random_model, word_tokenizer
from peft import LilyConfig, LoraConfig, PeftModel, PromptLearningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import ValidationError
from test_compare import recipe_file  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ptkit.bank import AdapterBank
from ptkit.comparison.grid import run_grid
from ptkit.comparison.outputs import write_outputs
from ptkit.errors import AdapterError, ModelError
from ptkit.formats.adapter_files import AdapterFiles, read_adapter, write_adapter
from ptkit.formats.adapter_folder import CONFIG
from ptkit.formats.adapter_info import AdapterInfo, BaseInfo, MethodInfo
from ptkit.hub.export import export_run
from ptkit.methods import (
    Adapter,
    Demonstrations,
    adapter_from_files,
    compile_files,
    create_adapter,
    load_adapter,
)
from ptkit.methods.catalogue import method_section
from ptkit.methods.peft.settings import NAMES, REFUSED, PeftSection
from ptkit.recipe.load import load_recipe
from ptkit.runtime.base_model import Base, frozen_base, load_base
from ptkit.runtime.generation import generate
from ptkit.runtime.model_names import TINY_EN_FOLDER

IDS = torch.arange(1, 13).view(2, 6)
TYPES = PeftSection.file_types

#: A family that PEFT has the method for, and the method's settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ia3": ("qwen3", {"kind": "ia3"}),
    "ia3 on GPT-2's fused layers": ("gpt2", {"kind": "ia3"}),
    "ia3 of some modules": ("llama", {"kind": "ia3", "target_modules": ["q_proj", "up_proj"],
                                      "feedforward_modules": ["up_proj"]}),
    "LLaMA-Adapter": ("llama", {"kind": "adaption_prompt", "num_virtual_tokens": 4}),
    "LLaMA-Adapter in upper layers of GPT-2": ("gpt2", {"kind": "adaption_prompt", "layers": 2}),
}  # fmt: skip
#: Methods by PEFT's own keys.
BY_KEYS: dict[str, dict[str, Any]] = {
    "VeRA": {"type": "VERA", "config": {"r": 8}},
    "DoRA": {"type": "LORA", "label": "dora",
             "config": {"use_dora": True, "r": 4, "target_modules": "all-linear"}},
    "LoKr": {"type": "LOKR", "config": {"r": 4, "target_modules": ["q_proj", "down_proj"]}},
    "BOFT": {"type": "BOFT", "config": {"boft_block_size": 4, "target_modules": ["v_proj"]}},
}  # fmt: skip
CASES |= {name: ("llama", {"kind": "peft", **settings}) for name, settings in BY_KEYS.items()}

#: Settings for the base that ships with ptkit.
ON_TINY_EN: dict[str, dict[str, Any]] = {
    "ia3": {"kind": "ia3"},
    **{name: {"kind": "peft", **settings} for name, settings in BY_KEYS.items()},
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.detach().clone()


def started(base: Base, settings: dict[str, Any]) -> Adapter:
    """An adapter whose values are what they may be after some training."""
    torch.manual_seed(3)
    adapter = create_adapter(method_section(settings), base, Demonstrations([], 0))
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapter


def recorded(adapter: Adapter) -> AdapterFiles:
    """The adapter's files as a run leaves them, with the method that made them."""
    return replace(adapter.files(), info=AdapterInfo(method=MethodInfo(kind=adapter.section.kind)))


def test_peft_itself_reads_the_export_and_computes_the_same(
    case: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    family, settings = case
    base = random_base(family)
    plain = logits(base.model)
    adapter = started(base, settings)
    expected = logits(adapter.model)
    assert (expected - plain).abs().max() > 1e-4
    write_adapter(tmp_path / "a", adapter.files())
    theirs = PeftModel.from_pretrained(random_model(family), tmp_path / "a", is_trainable=True)
    torch.testing.assert_close(logits(theirs.eval()), expected, atol=1e-5, rtol=1e-4)
    assert theirs.get_nb_trainable_parameters()[0] == adapter.trainable_parameters > 0


def test_it_comes_off_bit_for_bit_and_back_from_its_files(
    case: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    family, settings = case
    base = random_base(family)
    weights = {n: w.clone() for n, w in base.model.state_dict().items()}
    plain = logits(base.model)
    adapter = started(base, settings)
    expected = logits(adapter.model)
    with adapter.off():
        assert torch.equal(logits(base.model), plain)
    assert torch.equal(logits(adapter.model), expected)
    write_adapter(tmp_path / "a", recorded(adapter))
    adapter.close()
    assert torch.equal(logits(base.model), plain)
    again = adapter_from_files(read_adapter(tmp_path / "a"), base)
    assert torch.equal(logits(again.model), expected)
    assert again.section.kind == settings["kind"]
    assert {*again.trainable()} == {*adapter.trainable()}
    again.close()
    now = base.model.state_dict()
    assert [n for n, weight in weights.items() if not torch.equal(now[n], weight)] == []
    assert not any(p.requires_grad for p in base.model.parameters())


def test_what_does_not_fit_is_refused_and_the_base_is_as_it_was(
    case: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    family, settings = case
    base = random_base(family)
    plain, modules = logits(base.model), [n for n, _ in base.model.named_modules()]
    adapter = started(base, settings)
    files = recorded(adapter)
    adapter.close()
    name, tensor = next(iter(files.tensors.items()))
    wrong = {
        "no place for `stray`": {**files.tensors, "stray": tensor},
        f"`{name}` is missing": {n: t for n, t in files.tensors.items() if n != name},
        f"`{name}` has shape": {**files.tensors, name: torch.cat([tensor, tensor])},
    }
    for told, tensors in wrong.items():
        damaged = type(files)(files.config, tensors, files.info)
        for read in (adapter_from_files, compile_files):
            with pytest.raises(AdapterError) as refusal:
                read(damaged, base)
            assert told in str(refusal.value)
    assert torch.equal(logits(base.model), plain)
    assert [n for n, _ in base.model.named_modules()] == modules
    assert compile_files(files, base) is None
    write_adapter(tmp_path / "a", files)
    with pytest.raises(AdapterError, match=r"changes the base for every row|uses DoRA"):
        AdapterBank(base).load(tmp_path / "a")


def test_modules_that_peft_saves_whole_leave_the_base_its_own(tmp_path: Path) -> None:
    base = random_base("llama")
    plain, head = logits(base.model), base.model.lm_head
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    theirs = get_peft_model(random_model("llama"), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=False)
    adapter = adapter_from_files(read_adapter(tmp_path / "a"), base)
    torch.testing.assert_close(logits(adapter.model), logits(theirs), atol=1e-5, rtol=1e-4)
    adapter.close()
    assert base.model.lm_head is head
    assert torch.equal(logits(base.model), plain)


def test_patterns_in_a_strangers_settings_are_refused(tmp_path: Path) -> None:
    base = random_base("llama")
    adapter = started(base, {"kind": "ia3"})
    write_adapter(tmp_path / "a", adapter.files())
    adapter.close()
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    for key, value in {"target_modules": "(k|v)_proj", "feedforward_modules": ["down.*"]}.items():
        (tmp_path / "a" / CONFIG).write_text(json.dumps({**config, key: value}))
        with pytest.raises(AdapterError, match=f"`{key}` holds .* only names are read"):
            adapter_from_files(read_adapter(tmp_path / "a"), base)


def test_a_family_that_peft_has_no_choice_for_is_told_before_anything_trains() -> None:
    base = random_base("llama")
    base.model.config.model_type = "strange"
    with pytest.raises(ModelError, match=r"no choice of modules for strange; name them"):
        create_adapter(method_section({"kind": "ia3"}), base, Demonstrations([], 0))
    named = {"kind": "ia3", "target_modules": ["k_proj"]}
    create_adapter(method_section(named), base, Demonstrations([], 0)).close()
    wrong = method_section({**named, "target_modules": ["nowhere"]})
    with pytest.raises(ModelError, match=r"`ia3`: PEFT cannot put it into random-llama-0"):
        create_adapter(wrong, base, Demonstrations([], 0))


@pytest.mark.parametrize("settings", ON_TINY_EN.values(), ids=ON_TINY_EN)
def test_plain_peft_answers_with_the_export_on_tiny_en(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    base = load_base("tiny-en", device="cpu")
    adapter = started(base, settings)
    write_adapter(tmp_path / "a", adapter.files())
    expected = logits(adapter.model)
    text = base.encode(["kind[robot], name[Ferro], weight[two kilos]\n"])
    (ours,) = generate(
        adapter.model, text, None, pad_token_id=base.pad_token_id, max_new_tokens=12,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(TINY_EN_FOLDER, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(plain, tmp_path / "a").eval()
    torch.testing.assert_close(logits(theirs), expected, atol=1e-4, rtol=1e-4)
    answer = theirs.generate(
        input_ids=torch.tensor(text), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    assert answer[0, len(text[0]) :].tolist() == ours


def test_llama_adapter_is_refused_where_peft_has_no_place_for_it() -> None:
    section = method_section({"kind": "adaption_prompt"})
    with pytest.raises(ModelError, match=r"PEFT has LLaMA-Adapter for llama, .* is a qwen3"):
        create_adapter(section, random_base("qwen3"), Demonstrations([], 0))
    deep = method_section({"kind": "adaption_prompt", "layers": 4})
    with pytest.raises(ModelError, match="`layers` is 4, but random-llama-0 has 3 layers"):
        create_adapter(deep, random_base("llama"), Demonstrations([], 0))


def test_every_type_that_peft_has_is_taken_or_said_not_to_be() -> None:
    layers = {k.value for k, v in PEFT_TYPE_TO_CONFIG_MAPPING.items()
              if not issubclass(v, PromptLearningConfig)}  # fmt: skip
    own = {"IA3", "ADAPTION_PROMPT"}
    assert {*NAMES} | {*REFUSED} | own == layers
    assert not {*NAMES} & {*REFUSED}


#: What PEFT's defaults are too large for, or say nothing of.
SETTINGS: dict[str, dict[str, Any]] = {
    "FOURIERFT": {"n_frequency": 50}, "WAVEFT": {"n_frequency": 50}, "OFT": {"oft_block_size": 4},
    "BOFT": {"boft_block_size": 4}, "C3A": {"block_size": 16}, "MISS": {"r": 8}, "SHIRA": {"r": 4},
    "VBLORA": {"vector_length": 16, "num_vectors": 8, "r": 2}, "ROAD": {"group_size": 16},
    "PSOFT": {"r": 4},
}  # fmt: skip


@pytest.mark.parametrize("peft_type", sorted(NAMES))
def test_every_type_works_comes_off_and_is_read_by_peft(peft_type: str, tmp_path: Path) -> None:
    base = random_base("llama")
    plain = logits(base.model)
    config = dict(SETTINGS.get(peft_type, {}))
    if peft_type != "LN_TUNING":  # whose own choice it is
        config["target_modules"] = ["v_proj", "down_proj"]
    adapter = started(base, {"kind": "peft", "type": peft_type.lower(), "config": config})
    expected = logits(adapter.model)
    assert (expected - plain).abs().max() > 1e-5
    adapter.model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in adapter.trainable().values())
    with adapter.off():
        assert torch.equal(logits(base.model), plain)
    write_adapter(tmp_path / "a", adapter.files())
    count = adapter.trainable_parameters
    adapter.close()
    assert torch.equal(logits(base.model), plain)
    again = adapter_from_files(read_adapter(tmp_path / "a"), base)
    assert torch.equal(logits(again.model), expected)
    again.close()
    theirs = PeftModel.from_pretrained(random_model("llama"), tmp_path / "a", is_trainable=True)
    torch.testing.assert_close(logits(theirs.eval()), expected, atol=1e-5, rtol=1e-4)
    assert theirs.get_nb_trainable_parameters()[0] == count


def in_precision(dtype: torch.dtype) -> Base:
    """A base of one checkpoint, whose matrices are wide enough to be told apart when rounded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, bos_token_id=0, eos_token_id=0, max_position_embeddings=64,
    )  # fmt: skip
    return frozen_base(LlamaForCausalLM(config).to(dtype), word_tokenizer(), "wide")


@pytest.mark.parametrize("peft_type", [name for name, kind in TYPES.items() if kind.one_precision])
def test_what_peft_computes_from_the_bases_weights_is_for_one_precision(
    peft_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, rounded = in_precision(torch.float32), in_precision(torch.bfloat16)
    plain = logits(base.model)

    def moved(peft_type: str) -> tuple[torch.Tensor, torch.Tensor | None, AdapterFiles]:
        """How an adapter moves the logits in both precisions; None where it does not fit."""
        config: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
        if peft_type == "PSOFT":
            config["r"] = 128  # of 256: the singular values there are close to each other
        section = method_section({"kind": "peft", "type": peft_type, "config": config})
        adapter = create_adapter(section, base, Demonstrations([], 0))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in adapter.trainable().items():
                if "vector" not in name:  # PSOFT's scales are the same in any precision
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        here, files = logits(adapter.model) - plain, recorded(adapter)
        adapter.close()
        try:
            other = adapter_from_files(files, rounded)
        except AdapterError:
            return here, None, files
        there = logits(other.model).float() - plain
        other.close()
        return here, there, files

    here, there, _ = moved("LORA")
    assert there is not None
    assert (there - here).norm() < 0.1 * here.norm()
    here, there, files = moved(peft_type)
    assert there is None or (there - here).norm() > 0.3 * here.norm()

    identity = {"fingerprint": base.fingerprint, "sketch": base.identity.sketch}
    made_for = BaseInfo(id="wide", precision="float32", **identity)
    write_adapter(tmp_path / "a", replace(files, info=files.info.updated(base=made_for)))
    load_adapter(tmp_path / "a", base).close()
    with pytest.raises(AdapterError, match=f"trained in float32, .* {NAMES[peft_type]} .*load the"):
        load_adapter(tmp_path / "a", rounded)
    assert not caplog.records
    write_adapter(tmp_path / "b", replace(files, info=AdapterInfo()))
    load_adapter(tmp_path / "b", base, chosen=True).close()
    assert "does not say in which precision it was trained" in caplog.text


def test_the_rows_beside_a_row_change_what_lily_adds_to_it() -> None:
    """Why `LILY` is not taken: once this fails, it can be."""
    model = get_peft_model(random_model("llama"), LilyConfig(target_modules=["v_proj"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lily" in name:
                parameter.normal_(0, 0.3)
    assert (logits(model)[:1] - model(IDS[:1]).logits).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"type": "VEAR"}, "PEFT has no `VEAR` for layers; did you mean `VERA`"),
        ({"type": "xlora"}, "`xlora` is not taken: it mixes adapters"),
        ({"type": "Lily"}, "`Lily` is not taken: .* depends on the rows beside it"),
        ({"type": "frod"}, "`frod` is not taken: .* another number of threads"),
        ({"type": "LORA", "config": {"init_lora_weights": "pissa"}}, "'pissa' changes the base"),
    ],
)
def test_what_a_recipe_may_not_say_of_peft_is_told_with_its_line(
    settings: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValidationError, match=told):
        method_section({"kind": "peft", **settings})


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"rr": 8}, "PEFT's VeraConfig has no `rr`; did you mean `r`|known"),
        ({"target_modules": ["nowhere"]}, "`vera`: PEFT cannot put it into random-llama-0"),
        ({"layers_pattern": "x"}, "`vera`: PEFT refuses its `config`"),
    ],
)
def test_keys_that_peft_does_not_know_are_told_before_anything_trains(
    config: dict[str, Any], told: str
) -> None:
    section = method_section({"kind": "peft", "type": "VERA", "config": config})
    base = random_base("llama")
    plain = logits(base.model)
    with pytest.raises(ModelError, match=told):
        create_adapter(section, base, Demonstrations([], 0))
    assert torch.equal(logits(base.model), plain)


def test_a_comparison_trains_counts_scores_and_exports_them(
    recipe_file: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    base = random_base("llama")
    methods = [s for family, s in CASES.values() if family == "llama"]
    listed = json.dumps([{"kind": "base"}, *methods])
    loaded = load_recipe(
        recipe_file, [f"methods={listed}", "seeds=[0]", "sweep={}", "budget=null",
                      "evaluate.baseline=base", "train.steps=6"]
    )  # fmt: skip
    plain = logits(base.model)
    records = run_grid(loaded, tmp_path / "out", base=base)
    assert torch.equal(logits(base.model), plain)
    summaries = write_outputs(tmp_path / "out", records, loaded.recipe)
    assert [s.title for s in summaries] == [m.title for m in loaded.recipe.methods]
    for record in records[1:]:
        assert record.trainable_parameters > 0
        run = tmp_path / "out" / "cells" / record.cell
        exported = export_run(run, tmp_path / record.cell, base=base)
        theirs = PeftModel.from_pretrained(random_model("llama"), tmp_path / record.cell).eval()
        assert (logits(theirs) - plain).abs().max() > 1e-6
        ours = adapter_from_files(read_adapter(tmp_path / record.cell), base)
        torch.testing.assert_close(logits(theirs), logits(ours.model), atol=1e-5, rtol=1e-4)
        ours.close()
        assert exported
