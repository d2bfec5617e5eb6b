"""Adapters that other tools made: what is read, and what is refused and how."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import VOCABULARY, random_base, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    LoraConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ptkit.bank import AdapterBank
from ptkit.bank.source import require_files
from ptkit.cli.inspect import _as_dict, _show
from ptkit.errors import AdapterError
from ptkit.evaluation.anatomy import dissect
from ptkit.formats.adapter_files import AdapterFiles, read_adapter
from ptkit.formats.adapter_folder import CONFIG, WEIGHTS, conversion
from ptkit.formats.adapter_info import ADAPTER_INFO
from ptkit.formats.hub import is_on_hub
from ptkit.formats.places import find_adapter
from ptkit.hub.verify import check_files, verify
from ptkit.loaded_adapter import load_adapter
from ptkit.methods import adapter_from_files, base_of, compile_files
from ptkit.methods.base_names import hub_name, is_local_path
from ptkit.methods.saved_modules import saved_modules
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.forward import supervised_logits


def llama(layers: int = 2, heads: int = 4, kv_heads: int = 4, hidden: int = 32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def base_named(name: str, model: PreTrainedModel | None = None) -> Base:
    return frozen_base(model or llama(), word_tokenizer(), name)


def peft_folder(path: Path, name: str = "org/base", config: object | None = None) -> Path:
    """An adapter as plain PEFT saves it, of a base that was loaded as `name`."""
    model = llama()
    model.name_or_path = name
    config = config or PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(model, config).save_pretrained(path)
    return path


OTHER_SHAPES = [{"layers": 4, "kv_heads": 2}, {"heads": 8, "kv_heads": 8},
                {"hidden": 64, "kv_heads": 2}]  # fmt: skip


@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_prefix_for_a_base_of_another_shape_and_the_same_width_is_refused(
    shape: dict[str, int], tmp_path: Path
) -> None:
    files = read_adapter(peft_folder(tmp_path / "a"))
    with pytest.raises(AdapterError, match=r"another shape.*`num_"):
        compile_files(files, base_named("org/base", llama(**shape)))
    found = verify(tmp_path / "a", base=base_named("org/base", llama(**shape)))
    assert [c.name for c in found.checks if c.passed is False] == ["shapes"]


def test_soft_prompt_of_a_base_with_other_layers_is_refused(tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    files = read_adapter(peft_folder(tmp_path / "a", config=config))
    compile_files(files, base_named("org/base"))
    with pytest.raises(AdapterError, match=r"`num_layers` is 2, here 3$"):
        compile_files(files, base_named("org/base", llama(layers=3)))


CACHED = "/home/me/.cache/huggingface/hub/models--org--base/snapshots/0123abcd/"


def test_path_into_the_hubs_cache_is_the_name_of_the_model_in_it(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a", CACHED)
    assert load_adapter(folder, base_named("org/base")).prefix.virtual_tokens == 3
    with pytest.raises(AdapterError, match="load it on `org/base`"):
        compile_checked(folder, base_named("org/other"))


def compile_checked(folder: Path, base: Base) -> None:
    from ptkit.bank.source import read_checked

    read_checked(folder, base)


name = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._]{0,12}", fullmatch=True)


@settings(max_examples=50, deadline=None)
@given(org=name, model=name, commit=st.from_regex(r"[0-9a-f]{7,40}", fullmatch=True))
def test_cache_paths_and_names_are_told_apart(org: str, model: str, commit: str) -> None:
    for slash in "/\\":
        path = slash.join(["", "cache", f"models--{org}--{model}", "snapshots", commit])
        assert hub_name(path) == f"{org}/{model}"
        assert is_local_path(path)
    assert hub_name(f"{org}/{model}") == f"{org}/{model}"
    assert not is_local_path(f"{org}/{model}")


@pytest.mark.parametrize("named", ["./my-checkpoint", "/data/checkpoints/7", "mirror/base-copy"])
def test_chosen_base_wins_over_a_name_when_there_is_no_fingerprint(
    named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = peft_folder(tmp_path / "a", named)
    base = base_named("org/base")
    with pytest.raises(AdapterError, match="--model"):
        compile_checked(folder, base)
    with caplog.at_level(logging.WARNING):
        load_adapter(folder, base)
    (line,) = [r.getMessage() for r in caplog.records if "as chosen" in r.getMessage()]
    assert named in line
    assert "org/base" in line
    assert "\n" not in line


def test_verify_says_that_the_base_was_chosen(tmp_path: Path) -> None:
    from ptkit.runtime.model_names import TINY_EN

    base = base_of_tiny()
    model = base.model
    model.name_or_path = "mirror/tiny"
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(model, config).save_pretrained(tmp_path / "a")
    found = {c.name: c for c in verify(tmp_path / "a", model=TINY_EN).checks}
    assert found["base"].passed is None
    assert "by your choice" in found["base"].detail
    assert "mirror/tiny" in found["base"].detail
    assert found["shapes"].passed


def base_of_tiny() -> Base:
    from ptkit.runtime.base_model import load_base

    return load_base("tiny-en")


def test_revision_in_pefts_settings_is_the_one_that_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = peft_folder(tmp_path / "a")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "revision": "v2"}))
    asked = []
    monkeypatch.setattr(
        "ptkit.methods.of_base.load_base", lambda id, **how: asked.append((id, how.get("revision")))
    )
    base_of(read_adapter(folder), None, "a")
    base_of(read_adapter(folder), "org/base", "a")
    assert asked == [("org/base", "v2"), ("org/base", None)]


def test_command_in_the_refusal_of_pickled_weights_converts_them(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "it's mine")
    expected = load_file(folder / WEIGHTS)
    torch.save(expected, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError) as refusal:
        read_adapter(folder)
    line = str(refusal.value).splitlines()[-1]
    assert line == conversion(folder)
    command, *words = shlex.split(line)
    assert command == "ptkit"
    forked.run([sys.executable, "-m", "ptkit", *words], check=True, cwd=tmp_path)
    found = read_adapter(tmp_path / "it's mine-safetensors").tensors
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())


@pytest.mark.parametrize(
    ("file", "passed"),
    [("training_args.bin", None), ("optimizer.pt", None), ("checkpoint-5/scheduler.pt", None),
     ("adapter_model.bin", False), ("checkpoint-5/pytorch_model.bin", False)],
)  # fmt: skip
def test_verify_fails_only_pickles_that_are_opened_as_weights(
    file: str, passed: bool | None, tmp_path: Path
) -> None:
    folder = peft_folder(tmp_path / "a")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"\x80")
    found = {check.name: check for check in check_files(folder, str(folder))}
    assert found["no pickle"].passed is passed
    assert file in found["no pickle"].detail


def seq2seq(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 0}
    if family == "t5":
        model: PreTrainedModel = T5ForConditionalGeneration(T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, **ends
        ))  # fmt: skip
    else:
        model = BartForConditionalGeneration(BartConfig(
            vocab_size=VOCABULARY, d_model=32, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_position_embeddings=64, bos_token_id=0, **ends
        ))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model.eval()


def test_pefts_soft_prompt_with_absolute_positions_is_refused_for_what_it_is(
    tmp_path: Path,
) -> None:
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    get_peft_model(seq2seq("bart"), config).save_pretrained(tmp_path / "a")
    with pytest.raises(AdapterError, match="first positions of the encoder"):
        compile_files(read_adapter(tmp_path / "a"), base_named("org/base", seq2seq("bart")))


@pytest.mark.parametrize("config", [PromptTuningConfig, PromptEncoderConfig])
def test_pefts_soft_prompt_of_t5_is_what_its_encoder_reads(config: type, tmp_path: Path) -> None:
    theirs = get_peft_model(seq2seq("t5"), config(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5))
    theirs.eval().save_pretrained(tmp_path / "a")
    read, written = torch.tensor([[3, 5, 7, 9]]), torch.tensor([[0, 11, 12]])
    mask = torch.ones_like(read)
    with torch.no_grad():
        expected = theirs(input_ids=read, attention_mask=mask, decoder_input_ids=written).logits[0]
    base = base_named("org/base", seq2seq("t5"))
    prefix = compile_files(read_adapter(tmp_path / "a"), base)
    assert prefix is not None
    assert prefix.virtual_tokens == 5
    with torch.no_grad():
        labels = torch.tensor([[11, 12, 13]])  # the decoder reads them one place further on
        found, _ = supervised_logits(
            base.model, read, mask, labels, batch=PrefixBatch.shared(prefix, 1)
        )
        plain = base.model(input_ids=read, decoder_input_ids=written).logits[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (plain - expected).abs().max() > 1e-2


def test_folder_of_several_adapters_names_them(tmp_path: Path) -> None:
    for part in ("style", "task"):
        peft_folder(tmp_path / "root" / part)
    for look in (find_adapter, require_files):
        with pytest.raises(AdapterError, match="name one") as refusal:
            look(tmp_path / "root")
        assert f"`{tmp_path / 'root' / 'style'}`, `{tmp_path / 'root' / 'task'}`" in str(
            refusal.value
        )


def test_adapterhubs_folder_is_named_as_such(tmp_path: Path) -> None:
    theirs = {"config": {"architecture": "prefix_tuning"}, "model_type": "gpt2",
              "version": "adapters.1.3.0"}  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(theirs))
    (tmp_path / "pytorch_adapter.bin").write_bytes(b"pickled")
    for look in (read_adapter, require_files, AdapterBank(base_named("b")).register):
        with pytest.raises(AdapterError, match="is an adapter of AdapterHub's `adapters`"):
            look(tmp_path)


def test_mistyped_path_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    peft_folder(tmp_path / "adapters" / "facts")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(AdapterError, match="did you mean `adapters/facts`"):
        find_adapter(Path("adapters/fatcs"))
    assert is_on_hub("adapters/fatcs@main")
    assert is_on_hub("org/facts")
    assert not is_on_hub("adapters/facts")


def test_every_method_says_why_peft_cannot_read_a_type_of_ptkits_own() -> None:
    from ptkit.methods.catalogue import all_sections

    own = {
        name: kind.unreadable
        for section in all_sections().values()
        for name, kind in section.file_types.items()
        if name.startswith("PTKIT_")
    }
    assert len(own) >= 7
    assert all(own.values())
    # What PEFT has a type for it reads.
    assert not any(
        kind.unreadable
        for section in all_sections().values()
        for name, kind in section.file_types.items()
        if name in PeftType.__members__
    )


def test_every_method_has_a_name_and_a_search_finds_what_its_cards_say() -> None:
    from ptkit.hub.card import card_text
    from ptkit.hub.search import tags_of_methods
    from ptkit.methods.catalogue import all_sections

    for kind, section in all_sections().items():
        assert section.display_name, kind
    tags = tags_of_methods()
    for kind in tags:
        for peft_type, said in all_sections()[kind].file_types.items():
            files = AdapterFiles(
                {"peft_type": peft_type, "base_model_name_or_path": "org/base"},
                {"prompt_embeddings": torch.zeros(1, 1)},
                ADAPTER_INFO.read({"method": {"kind": kind}}, "here"),
            )
            card = card_text("mine", files, 4)
            name = said.name or all_sections()[kind].display_name
            assert f"{name[:1].upper()}{name[1:]} for `org/base`" in card
            assert ("PEFT cannot read this file" in card) == (said.unreadable is not None)


def lora_folder(path: Path, **settings: object) -> Path:
    """A LoRA adapter as plain PEFT saves it."""
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
    return peft_folder(path, config=config)


def edited(
    folder: Path, config: dict[str, object] | None = None, drop: str = "-", **added: torch.Tensor
) -> Path:
    """`folder` with changed settings and tensors."""
    settings = json.loads((folder / CONFIG).read_text()) | (config or {})
    (folder / CONFIG).write_text(json.dumps(settings))
    tensors = {n: t for n, t in load_file(folder / WEIGHTS).items() if drop not in n} | added
    save_file(tensors, folder / WEIGHTS)
    return folder


def into(base: Base, folder: Path, way: str) -> Any:
    if way == "bank":
        return AdapterBank(base).load(folder, "a")
    return adapter_from_files(read_adapter(folder), base)


HEAD = torch.full((VOCABULARY, 32), 0.5)


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_module_that_is_named_as_trained_and_not_there_is_refused(
    method: str, tmp_path: Path
) -> None:
    if method == "lora":
        folder = edited(lora_folder(tmp_path, modules_to_save=["lm_head"]), drop="lm_head")
    else:
        folder = edited(peft_folder(tmp_path), {"modules_to_save": ["lm_head"]})
    with pytest.raises(AdapterError, match=r"`lm_head` was trained too.*holds no tensor of it"):
        into(base_named("org/base"), folder, "alone")
    found = verify(folder, base=base_named("org/base"))
    assert [c.name for c in found.checks if c.passed is False] == ["shapes"]


@pytest.mark.parametrize("way", ["alone", "bank"])
def test_tensor_of_the_base_that_no_setting_names_is_refused_and_not_written_into_it(
    way: str, tmp_path: Path
) -> None:
    folder = edited(lora_folder(tmp_path), **{"base_model.model.lm_head.weight": HEAD})
    base = base_named("org/base")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"base's own `lm_head\.weight`, which no setting names"):
        into(base, folder, way)
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_module_that_is_named_and_there_is_used_and_given_back(tmp_path: Path) -> None:
    folder = lora_folder(tmp_path, modules_to_save=["lm_head", "score"])
    edited(folder, **{"base_model.model.lm_head.weight": HEAD})
    base = base_named("org/base")
    own = base.model.lm_head
    ids = torch.tensor([[3, 4]])
    adapter = into(base, folder, "alone")
    logits = base.model(ids).logits[0, 0]
    assert torch.allclose(logits, logits[:1]), "every row of the head is alike"
    adapter.close()
    assert base.model.lm_head is own
    with pytest.raises(AdapterError, match="cannot differ from row to row"):
        into(base, folder, "bank")


def test_biases_that_an_adapter_trained_are_given_back(tmp_path: Path) -> None:
    base = random_base("gpt2")
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    config = LoraConfig(r=2, target_modules=["c_attn"], bias="all", task_type="CAUSAL_LM")
    model = get_peft_model(random_base("gpt2").model, config)
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            value.data.add_(1.0)
    model.save_pretrained(tmp_path)
    adapter = into(base, tmp_path, "alone")
    assert not torch.equal(base.model.transformer.ln_f.bias, before["transformer.ln_f.bias"])
    adapter.close()
    after = base.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("way", ["alone", "bank"])
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"alora_invocation_tokens": [3, 4]}, "does not compute .`alora_invocation_tokens`"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "does not compute .`layer_replication`"),
        ({"use_qalora": True}, "does not compute .`use_qalora`"),
        ({"r": 8}, "have rank 2, and the settings say 8"),
        ({"rank_pattern": {"q_proj": 4}}, "have rank 2, and the settings say 4"),
        ({"init_lora_weights": "olora"}, "`init_lora_weights: olora`"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights: pissa_niter_4`"),
    ],
)
def test_lora_of_a_variant_that_is_not_computed_is_refused(
    settings: dict[str, object], told: str, way: str, tmp_path: Path
) -> None:
    """Left out, each of them gives other logits than PEFT does, or fits no weights."""
    base = base_named("org/base")
    with pytest.raises(AdapterError, match=told):
        into(base, edited(lora_folder(tmp_path), settings), way)
    assert not any("lora" in name for name, _ in base.model.named_modules())


@pytest.mark.parametrize("way", ["alone", "bank"])
def test_lora_on_embeddings_is_refused_for_what_it_is(way: str, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    with pytest.raises(AdapterError, match="changes embeddings"):
        into(base_named("org/base"), peft_folder(tmp_path, config=config), way)


def test_settings_of_lora_that_change_no_logits_are_read_past(tmp_path: Path) -> None:
    settings = {"init_lora_weights": "gaussian", "layers_to_transform": [1], "exclude_modules": "x"}
    folder = lora_folder(tmp_path, rank_pattern={"layers.1.self_attn.q_proj": 3}, **settings)
    into(base_named("org/base"), folder, "bank")


@given(st.one_of(st.text(min_size=1), st.lists(st.integers(), min_size=1), st.just({"a": 1})))
def test_saved_modules_that_are_no_names_are_refused(value: object) -> None:
    with pytest.raises(AdapterError, match="should be a list of modules' names"):
        saved_modules({"modules_to_save": value})


@pytest.mark.parametrize("revision", [None, "v2"])
def test_inspect_says_which_revision_of_the_base(
    revision: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, revision=revision)
    anatomy = dissect(peft_folder(tmp_path / "a", config=config), base_named("org/base"))
    assert _as_dict(anatomy)["base"] == {"id": "org/base", "revision": revision}
    _show(anatomy, Path("a"))
    said = "base org/base at the revision v2\n" if revision else "base org/base\n"
    assert said in capsys.readouterr().out
