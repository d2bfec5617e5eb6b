"""`train.retain: {by: gate}`: rows unlike the task's inputs are the base's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_base, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_cli import ptkit, refused
from test_encoder_decoder import random_pair
from test_engine import Asked
from test_peft_parity import LEARNT, make_adapter

from ptkit import AdapterBank, load_adapter
from ptkit.bank.conversation import Conversation
from ptkit.data.encoded import EncodedExample
from ptkit.errors import AdapterError, UserError
from ptkit.evaluation.retention import measure_retention, probe_base
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.hub.convert import as_prefix, as_prompt
from ptkit.methods import Adapter, adapter_from_files, compile_files
from ptkit.methods.catalogue import method_section
from ptkit.methods.gate_files import without_gate
from ptkit.recipe.schema import RetainSection
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.forward import all_logits, rows_for
from ptkit.runtime.gate import Gate, Gated, gate_features
from ptkit.runtime.generation import generate
from ptkit.serve.engine import Engine
from ptkit.training.gate import fit_gate, require_gate_fits, share_open

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
LOW, HIGH = range(2, 14), range(60, 72)
SHORT = ("--set", "train.steps=4", "--set", "train.eval_every=2",
         "--set", "task.data.limits.test=4", "--set", "retention.max_tokens=600")  # fmt: skip
INPUTS = st.lists(st.integers(1, 95), min_size=1, max_size=12)


def gate_of_low_tokens(base: Base) -> Gate:
    """A gate that opens where the input is made of `LOW` tokens, fitted as a run fits one."""
    draw = torch.Generator().manual_seed(4)

    def drawn(tokens: range, length: int) -> list[int]:
        picked = torch.randint(tokens.start, tokens.stop, (length,), generator=draw)
        return picked.tolist()

    task = [EncodedExample(drawn(LOW, 4 + i % 9), [1]) for i in range(300)]
    general = torch.tensor([drawn(HIGH, 24) for _ in range(60)])
    return fit_gate(base, task, general, seed=0)


def gated(base: Base, name: str = "prefix", **changes: object) -> Adapter:
    adapter = made(base, name, **changes)
    adapter.input_gate = gate_of_low_tokens(base)
    return adapter


def made(base: Base, name: str = "prefix", *, start: str = "random", **changes: object) -> Adapter:
    torch.manual_seed(2)
    adapter = make_adapter(base, {**LEARNT[name], **changes}, start=start)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return adapter


def answer(base: Base, prompt: list[int], batch: object, **options: object) -> list[int]:
    (found,) = generate(
        base.model, [prompt], batch, pad_token_id=base.pad_token_id, **{**GREEDY, **options}
    )
    return found


ON, OFF = [5, 9, 12, 3, 7], [60, 71, 65, 70, 66, 62]


def test_it_tells_inputs_apart_at_every_length() -> None:
    base = random_base("llama")
    gate = gate_of_low_tokens(base)
    assert share_open(gate, [ON[:4], ON, ON * 5]) == 1.0
    assert share_open(gate, [OFF[:4], OFF, OFF * 5]) == 0.0
    assert share_open(gate, [ON, OFF]) == 0.5


@given(st.lists(INPUTS, min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_the_score_is_the_one_written_out_whatever_the_padding(inputs: list[list[int]]) -> None:
    base = random_base("gpt2")
    gate = gate_of_low_tokens(base)
    table = base.embedding.weight.detach().double()
    longest = max(map(len, inputs))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in inputs])
    read = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in inputs]).bool()
    for row, opened, features in zip(
        inputs, gate.opens(ids, read), gate_features(base.embedding, ids, read), strict=True
    ):
        parts = []
        for tokens in (row, row[-3:]):
            mean = sum(table[i] for i in tokens) / len(tokens)
            centred = mean - mean.mean()
            parts.append(centred / centred.square().sum().sqrt())
        seen = torch.cat(parts)
        torch.testing.assert_close(features.double(), seen, atol=1e-5, rtol=1e-4)
        score = float(gate.weight.double() @ seen + gate.bias.double())
        if abs(score) > 1e-3:
            assert bool(opened) == (score > 0)


@pytest.mark.parametrize("name", LEARNT)
def test_a_mixed_batch_gives_rows_the_adapter_or_the_base(name: str, family: str) -> None:
    base = random_base(family)
    adapter = gated(base, name)
    inputs = [ON, OFF, OFF[:4] * 2, ON[:4]]
    compiled = adapter.compiled().detach()
    batch = rows_for(compiled, inputs)
    assert batch.visible.any(1).tolist() == [True, False, False, True]
    found = generate(base.model, inputs, batch, pad_token_id=base.pad_token_id, **GREEDY)
    plain = adapter.own_compiled().detach()
    for prompt, tokens in zip(inputs, found, strict=True):
        own = rows_for(plain, [prompt]) if prompt[0] < 50 else None
        assert answer(base, prompt, own) == tokens
        assert answer(base, prompt, compiled.for_input(prompt).alone) == tokens
    assert answer(base, ON, None) != answer(base, ON, rows_for(plain, [ON]))  # so that it shows


def test_where_it_is_shut_the_logits_are_the_bases(family: str) -> None:
    base = random_base(family)
    ids = torch.tensor([OFF * 3])
    mask = torch.ones_like(ids)
    batch = gated(base).compiled().detach().for_rows(ids, mask.bool())
    with torch.no_grad():
        ours = all_logits(base.model, ids, mask, batch)
        torch.testing.assert_close(ours, all_logits(base.model, ids, mask, None))


def test_an_infix_and_an_encoders_prompt_are_shut_too() -> None:
    base = random_base("llama")
    adapter = gated(base, position="infix")
    batch = rows_for(adapter.compiled().detach(), [ON, OFF])
    assert batch.infix.tolist() == [True, False]
    found = generate(base.model, [ON, OFF], batch, pad_token_id=base.pad_token_id, **GREEDY)
    assert found[1] == answer(base, OFF, None)
    pair = random_pair("t5")
    prompt = gated(pair, "prompt")
    both = rows_for(prompt.compiled().detach(), [ON, OFF])
    assert both.embedded.any(1).tolist() == [True, False]
    options = {**GREEDY, "pad_token_id": pair.pad_token_id}
    on, off = generate(pair.model, [ON, OFF], both, **options)
    assert off == generate(pair.model, [OFF], None, **options)[0]
    alone = rows_for(prompt.own_compiled().detach(), [ON])
    assert on == generate(pair.model, [ON], alone, **options)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEARNT)
def test_saved_is_loaded_and_plain_peft_loads_the_adapter(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = random_base("llama")
    adapter = gated(base, name)
    write_adapter(tmp_path / "a", adapter.files().to(dtype))
    write_adapter(tmp_path / "plain", without_gate(adapter.files()).to(dtype))
    files = read_adapter(tmp_path / "a")
    for compiled in (adapter_from_files(files, base).compiled(), compile_files(files, base)):
        assert isinstance(compiled, Gated)
        assert compiled.gate.weight.dtype == torch.float32
        assert rows_for(compiled, [ON, OFF]).visible.any(1).tolist() == [True, False]
    ids = torch.tensor([OFF])
    logits = [
        PeftModel.from_pretrained(random_model("llama"), tmp_path / folder)(ids).logits
        for folder in ("a", "plain")
    ]
    assert torch.equal(*logits)


def test_int8_and_conversions_keep_it(tmp_path: Path) -> None:
    base = random_base("llama")
    adapter = gated(base, "prompt")
    write_adapter(tmp_path / "a", adapter.files(), int8=True)
    files = read_adapter(tmp_path / "a")
    for kept in (files, as_prefix(files, base), as_prompt(files, base).files):
        again = adapter_from_files(kept, base).input_gate
        torch.testing.assert_close(again.weight, adapter.input_gate.weight)
        torch.testing.assert_close(again.bias, adapter.input_gate.bias)


def test_another_adapter_starts_from_what_is_behind_it(tmp_path: Path) -> None:
    base = random_base("llama")
    adapter = gated(base)
    write_adapter(tmp_path / "a", adapter.files())
    started = made(base, start="adapter", start_adapter=[str(tmp_path / "a")])
    assert started.input_gate is None
    assert started.virtual_tokens == adapter.virtual_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("ptkit_gate.bias"), "ptkit_gate.bias"),
        (lambda t: t.update({"ptkit_gate.weight": torch.zeros(3)}), "another base"),
        (lambda t: t.update({"ptkit_gate.bias": torch.zeros(1, dtype=torch.int8)}), "damaged"),
    ],
)
def test_a_damaged_one_is_refused(change, message: str) -> None:
    base = random_base("llama")
    files = gated(base).files()
    change(files.tensors)
    for read in (compile_files, adapter_from_files):
        with pytest.raises(AdapterError, match=message):
            read(files, base)


def test_the_bank_and_the_server_keep_to_it(tmp_path: Path) -> None:
    base = random_base("llama")
    adapter = gated(base)
    write_adapter(tmp_path / "gated", adapter.files())
    bank = AdapterBank(base)
    bank.load(tmp_path / "gated")
    bank.add("plain", made(base))
    assert bank.depends_on_input("gated")
    batch = bank.rows(["gated", "gated", "plain", None], [ON, OFF, OFF, OFF])
    assert batch.visible.any(1).tolist() == [True, False, True, False]
    with pytest.raises(AdapterError, match="input"):
        Conversation(bank, adapter="gated")
    assert load_adapter(tmp_path / "gated", base).prefix.virtual_tokens == adapter.virtual_tokens


def test_one_batch_of_every_kind_of_row_answers_as_each_alone(tmp_path: Path) -> None:
    base = random_base("llama")
    bank = AdapterBank(base)
    write_adapter(tmp_path / "gated", gated(base).files())
    bank.load(tmp_path / "gated")
    bank.add("plain", made(base, "prompt"))
    names = ["gated", "plain", "gated", None, ("gated", "plain")]
    prompts = [ON, OFF, OFF, ON, OFF]
    together = bank.generate_ids(prompts, names, **GREEDY)
    for prompt, name, tokens in zip(prompts, names, together, strict=True):
        assert bank.generate_ids([prompt], [name], **GREEDY) == [tokens]
    assert together[2] == answer(base, OFF, None)
    assert together[4] == together[1]
    engine = Engine(bank, max_rows=8, max_waiting=64, piece=16)
    try:
        asked = [Asked(bank, ["gated"], prompt, max_tokens=6) for prompt in (ON, OFF)]
        engine.submit([each.answer for each in asked])
        assert [each.ids for each in asked] == [together[0], together[2]]
    finally:
        engine.close()


def test_transformers_own_generate_takes_it(tmp_path: Path) -> None:
    base = random_base("llama")
    write_adapter(tmp_path / "gated", gated(base).files())
    loaded = load_adapter(tmp_path / "gated", base)
    ids = torch.tensor([[0, *ON], OFF])
    mask = torch.tensor([[0, *[1] * len(ON)], [1] * len(OFF)])
    inputs = loaded.inputs({"input_ids": ids, "attention_mask": mask})
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = base.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    assert found[0] == answer(base, ON, loaded.prefix.for_input(ON).alone)
    assert found[1] == answer(base, OFF, None)


def test_forgetting_is_none_where_it_is_shut() -> None:
    base = load_base()
    adapter = made(base)
    probe = probe_base(base, {"text": "The old harbour was quiet in the morning. " * 80}, 600)
    on = measure_retention(adapter, probe).as_dict()
    assert on["forgetting"] > 0.01
    words = base.tokenizer("The old harbour was quiet in the morning. " * 8)["input_ids"]
    task = base.tokenizer("name: Alimentum | food: Chinese | area: city centre ->")["input_ids"]
    rows = [EncodedExample(task[i % 3 :], [1]) for i in range(30)]
    adapter.input_gate = fit_gate(base, rows, torch.tensor([words]), seed=0)
    off = measure_retention(adapter, probe).as_dict()
    assert off["forgetting"] == pytest.approx(0.0, abs=1e-5)
    assert off["drift"] == pytest.approx(0.0, abs=1e-5)


def test_methods_that_change_weights_and_settings_that_do_nothing_are_refused() -> None:
    for kind in ("lora", "full", "prefix_lora", "linear_probe"):
        with pytest.raises(UserError, match="by: gate"):
            require_gate_fits(method_section({"kind": kind}))
    with pytest.raises(ValueError, match="`target` is of `by: divergence`"):
        RetainSection(by="gate", target=0.1)
    with pytest.raises(ValueError, match="`weight` is of `by: divergence`"):
        RetainSection(by="gate", weight="auto")
    gate = RetainSection(by="gate", text="own.txt")
    assert RetainSection(**gate.model_dump()) == gate
    assert {"weight", "target", "tokens"} <= RetainSection().model_dump().keys()


def test_a_run_fits_one_and_goes_on_without_it(tmp_path: Path) -> None:
    chosen = ("train", "message-routing", "--method", "prefix_tuning", *SHORT)
    ptkit(*chosen, "--set", "train.retain={by: gate}", "--out", "run", cwd=tmp_path)
    (record,) = tmp_path.glob("run/**/record.json")
    found = json.loads(record.read_text())
    assert found["gate"]["task"] > 0.9
    assert found["gate"]["general-en"] == 0.0
    assert abs(found["retention"]["forgetting"]) < 1e-4
    folder = record.parent / "adapter"
    files = read_adapter(folder)
    assert files.info.gate == found["gate"]
    trained = without_gate(files)
    values = sum(t.numel() for t in files.tensors.values())
    assert values > sum(t.numel() for t in trained.tensors.values())
    read = 10 * 256  # embeddings that learn as well, folded at export
    assert found["trainable_parameters"] == values + read
    assert "a gate opens for" in ptkit("inspect", folder, cwd=tmp_path).stdout
    ptkit(*chosen, "--out", "plain", cwd=tmp_path)
    (other,) = tmp_path.glob("plain/**/adapter")
    same = read_adapter(other)
    assert torch.equal(same.tensors["prompt_embeddings"], trained.tensors["prompt_embeddings"])


def test_a_comparison_is_of_gated_cells_and_is_reported_again(tmp_path: Path) -> None:
    one = ("--set", "methods=[{kind: base}, {kind: prefix_tuning}]", "--set", "seeds=[0]")
    (tmp_path / "own.txt").write_text(Path("README.md").read_text())
    gate = ("--set", f"train.retain={{by: gate, text: {tmp_path / 'own.txt'}}}")
    ptkit("compare", "message-routing", *SHORT, *one, *gate, "--out", "all", cwd=tmp_path)
    ptkit("report", "all", cwd=tmp_path)
    lines = (tmp_path / "all" / "results.jsonl").read_text().splitlines()
    gates = {(record := json.loads(line))["kind"]: record["gate"] for line in lines}
    assert gates["base"] is None
    assert gates["prefix_tuning"]["general-en"] == 0.0


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        ("train", "train.retain={by: gate}"),
        ("compare", "train.retain={by: gate}"),
        ("compare", "sweep={train.retain: [null, {by: gate}]}"),
    ],
)
def test_a_method_without_prefix_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, setting: str
) -> None:
    monkeypatch.setattr("ptkit.training.experiment.load_base", None)
    own = ("--method", "lora") if command == "train" else ()
    chosen = (command, "message-routing", *own, *SHORT, "--out", "run", "--set", setting)
    assert "by: gate" in refused(*chosen, cwd=tmp_path)
    assert not (tmp_path / "run").exists()
