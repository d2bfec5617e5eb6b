"""A prefix and LoRA trained together, beside PEFT's LoRA with a cache filled by hand.

That a killed run resumes bit for bit, that the base stays as it was, and `train.retain`, are asked
of it with all other methods (`TRAINED` in test_train).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_base, random_model
from encoders import random_classifier
from peft import PeftModel
from test_adapter_files import IDS, logits_of
from test_cli import QUICK, ptkit, refused
from test_composition import save_lora
from test_encoder_decoder import random_pair
from test_encoders import adapter_on, examples
from test_encoders import logits_of as head_logits_of
from test_engine import Asked
from test_peft_parity import LEARNT, make_adapter, rows_of
from test_train import fit, rows
from transformers import DynamicCache

from ptkit import AdapterBank, load_adapter, verify
from ptkit.errors import AdapterError, RecipeError, UserError
from ptkit.evaluation.retention import off_probe
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.hub.convert import as_prefix, as_prompt
from ptkit.hub.parts import export_parts
from ptkit.methods import ADAPTERS, Adapter, Demonstrations, adapter_from_files, parts_of
from ptkit.methods.catalogue import method_section
from ptkit.methods.prefix_lora.adapter import PREFIX_LORA
from ptkit.prefix_batch import PrefixBatch
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import all_logits, collate, supervised_losses
from ptkit.runtime.generation import generate
from ptkit.serve.answer import InUseError
from ptkit.serve.engine import Engine
from ptkit.serve.library import Library
from ptkit.training.adapter_trainer import Job, _groups
from ptkit.training.loop import fit as fit_jobs

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def both(base: Base, *, seed: int = 0, std: float = 0.15, **settings: object) -> Adapter:
    """A prefix and a LoRA, both away from their start."""
    cls = ADAPTERS["prefix_lora"]
    section = cls.section_class(
        **{"kind": "prefix_lora", "num_virtual_tokens": 4, "rank": 2, **settings}
    )
    torch.manual_seed(seed)
    adapter = cls.create(section, base, Demonstrations(["w1 w2 w3", "w4 w5"], 0))
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(torch.randn_like(parameter) * std)
    return adapter


def saved(folder: Path, base: Base, **settings: object) -> Path:
    """Such an adapter's folder; the base is given back as it was."""
    adapter = both(base, **settings)
    write_adapter(folder, adapter.files())
    adapter.close()
    return folder


def written_out(folder: Path, family: str, flat: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Logits of PEFT's LoRA model in `folder` after keys and values put into its cache by hand.

    flat: PEFT's PREFIX_TUNING layout, `[virtual tokens, layers * 2 * kv heads * head dim]`
    """
    model = PeftModel.from_pretrained(random_model(family), folder).eval()
    config, tokens = model.config, len(flat)
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    # [tokens, layers, keys and values, heads, dim]
    parts = flat.view(tokens, config.num_hidden_layers, 2, heads, -1)
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        key, value = (parts[:, layer, i].transpose(0, 1)[None] for i in (0, 1))
        cache.update(key.repeat(len(ids), 1, 1, 1), value.repeat(len(ids), 1, 1, 1), layer)
    mask = torch.ones(len(ids), tokens + ids.shape[1], dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits


def test_logits_are_peft_loras_after_a_cache_filled_by_hand(family: str, tmp_path: Path) -> None:
    base = random_base(family)
    adapter = both(base, std=0.1)
    files = adapter.files()
    lora, prefix = parts_of(files)
    write_adapter(tmp_path / "lora", lora)
    expected = written_out(tmp_path / "lora", family, prefix.tensors["prompt_embeddings"], IDS)
    torch.testing.assert_close(logits_of(adapter), expected, atol=1e-5, rtol=1e-4)
    # Neither part is idle.
    without = PrefixBatch.shared(adapter.prefix().detach(), len(IDS))
    with torch.no_grad(), adapter.off():
        prefix_only = all_logits(base.model, IDS, torch.ones_like(IDS), without)
    lora_only = all_logits(base.model, IDS, torch.ones_like(IDS), None)
    for other in (prefix_only, lora_only):
        assert (other - expected).abs().max() > 1e-2


def test_it_is_saved_and_loaded_and_trained_further(family: str, tmp_path: Path) -> None:
    adapter = both(random_base(family), dropout=0.1, alpha=5)
    write_adapter(tmp_path / "a", adapter.files())
    base = random_base(family)
    again = adapter_from_files(read_adapter(tmp_path / "a"), base)
    assert torch.equal(logits_of(again), logits_of(adapter))
    assert again.virtual_tokens == 4
    started = {n: p.detach().clone() for n, p in again.trainable().items()}
    assert set(started) == set(adapter.trainable())
    again.model.eval()
    with torch.no_grad():
        batch = collate(rows(4, 2), base)
        loss = supervised_losses(
            base.model, **batch, batch=PrefixBatch.shared(again.prefix(), 4)
        ).mean()
    further = fit(
        again, rows(8, 1), rows(4, 2), TrainSection(steps=1, warmup_steps=0, eval_every=1),
        1e-9, seed=0, run=tmp_path / "run",
    )  # fmt: skip
    # The LoRA moves at a rate of its own.
    assert further.curve[0]["validation_loss"] != pytest.approx(float(loss), abs=1e-9)
    moved = {n for n, p in again.trainable().items() if (p - started[n]).abs().max() > 1e-6}
    assert moved == {n for n in started if "lora_" in n}


def test_what_plain_peft_loads_part_by_part_is_the_adapter(family: str, tmp_path: Path) -> None:
    adapter = both(random_base(family), std=0.1)
    write_adapter(tmp_path / "a", adapter.files())
    with pytest.raises((KeyError, ValueError), match=PREFIX_LORA):
        PeftModel.from_pretrained(random_model(family), tmp_path / "a")
    done = export_parts(tmp_path / "a", tmp_path / "out", base=random_base(family))
    assert done.names == ("lora", "prefix")
    assert "merge_and_unload" in (tmp_path / "out" / "README.md").read_text()
    model = PeftModel.from_pretrained(random_model(family), tmp_path / "out" / "lora")
    model = PeftModel.from_pretrained(model.merge_and_unload(), tmp_path / "out" / "prefix")
    with torch.no_grad():
        theirs = model(input_ids=IDS).logits[:, -IDS.shape[1] :]
    torch.testing.assert_close(logits_of(adapter), theirs, atol=2e-5, rtol=1e-4)
    adapter.close()
    # And a bank's row of both.
    bank = AdapterBank(random_base(family))
    for name in done.names:
        bank.load(tmp_path / "out" / name)
    bank.load(tmp_path / "a", "whole")
    prompts = rows_of([5, 3])
    assert bank.generate_ids(prompts, [("prefix", "lora")] * 2, **GREEDY) == bank.generate_ids(
        prompts, ["whole"] * 2, **GREEDY
    )


def job_of(adapter: Adapter, run: Path) -> Job:
    settings = TrainSection(steps=1, head_learning_rate=1e-2)
    return Job(adapter, rows(4, 1), rows(2, 2), settings, 0.2, 0, run)


def test_each_part_learns_at_its_own_rate(tmp_path: Path) -> None:
    adapter = both(random_base("llama"), learning_rate=0.2, lora_learning_rate=3e-3, beta2=0.9)
    rest, matrices = _groups(job_of(adapter, tmp_path))
    assert [n for n, p in adapter.trainable().items() if p is rest["params"][0]] == [
        "prefix_tuning.encoder.embedding.weight"
    ]
    assert len(rest["params"]) == 1
    assert "lr" not in rest  # the method's `learning_rate`
    assert (matrices["lr"], matrices["betas"]) == (3e-3, (0.9, 0.999))
    assert len(matrices["params"]) == len(adapter.lora.trainable()) > 10
    headed = adapter_on(random_classifier("llama"), "prefix_lora")
    groups = _groups(job_of(headed, tmp_path))
    assert [g.get("lr") for g in groups] == [None, 2e-3, 1e-2]
    counted = [p for g in groups for p in g["params"]]
    assert len(counted) == len(set(counted)) == len(headed.trainable())


def test_without_a_rate_the_lora_leaves_prefix_tuning(tmp_path: Path) -> None:
    """The LoRA's B begins at zero: not trained, it changes nothing, step for step."""
    settings = TrainSection(steps=8, batch_size=4, warmup_steps=1, eval_every=2, max_grad_norm=1e9)
    curves, ended = [], []
    for kind in ("prefix_tuning", "prefix_lora"):
        base = random_base("qwen3")
        lora = kind == "prefix_lora"
        own = {"lora_learning_rate": 1e-30} if lora else {"learn_embeddings": False}
        section = method_section({"kind": kind, "num_virtual_tokens": 4, **own})
        torch.manual_seed(0)
        adapter = ADAPTERS[kind].create(section, base, Demonstrations(["w1 w2 w3 w4"], 0))
        progress = fit(adapter, rows(16, 1), rows(4, 2), settings, 0.1, seed=0, run=tmp_path / kind)
        curves.append([e["validation_loss"] for e in progress.curve])
        ended.append(adapter.prefix().detach().flat())
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    assert curves[0][0] > curves[0][-1]
    torch.testing.assert_close(*ended, atol=1e-5, rtol=1e-4)


def test_off_is_the_base_bit_for_bit_and_closed_it_leaves_nothing(family: str) -> None:
    base = random_base(family)
    before = off_probe(base.model, IDS[:1])
    names = [n for n, _ in base.model.named_modules()]
    adapter = both(base)
    on = logits_of(adapter)[0]
    with adapter.off():
        assert torch.equal(off_probe(base.model, IDS[:1]), before)
    assert (on - before).abs().max() > 1e-2
    adapter.close()
    assert torch.equal(off_probe(base.model, IDS[:1]), before)
    assert [n for n, _ in base.model.named_modules()] == names


def test_an_infixs_inputs_are_read_anew_while_the_lora_changes_them(tmp_path: Path) -> None:
    base = random_base("llama")
    adapter = both(base, position="infix")
    settings = TrainSection(steps=6, batch_size=4, warmup_steps=0, eval_every=3)
    validation = rows(6, 2)
    progress = fit(adapter, rows(16, 1), validation, settings, 0.05, seed=0, run=tmp_path)
    batch = PrefixBatch.shared(adapter.prefix().detach(), len(validation))
    with torch.no_grad():
        losses = supervised_losses(base.model, **collate(validation, base), batch=batch)
    assert float(losses.mean()) == pytest.approx(progress.best_loss, abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_classifier_has_one_head_for_both_parts(kind: str, tmp_path: Path) -> None:
    adapter = adapter_on(random_classifier(kind), "prefix_lora")
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    heads = [n for n, _ in adapter.named_modules() if n.endswith("head")]
    assert heads == ["head"]
    part = examples([5, 3, 7], "sequence")
    expected = head_logits_of(adapter, part)
    write_adapter(tmp_path / "a", adapter.files())
    other = random_classifier(kind)
    again = adapter_from_files(read_adapter(tmp_path / "a"), other)
    for ours, theirs in zip(head_logits_of(again, part), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert verify(tmp_path / "a", base=random_classifier(kind)).passed
    with pytest.raises(AdapterError, match="a head that was trained for both"):
        export_parts(tmp_path / "a", tmp_path / "out", base=random_classifier(kind))
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoders_is_saved_and_loaded(tmp_path: Path) -> None:
    base = random_pair("bart")
    adapter = both(base, start="random")
    batch = PrefixBatch.shared(adapter.prefix().detach(), 2)
    prompts = rows_of([6, 4])
    options, padding = {"max_new_tokens": 5, "do_sample": False}, base.pad_token_id
    answers = generate(adapter.model, prompts, batch, pad_token_id=padding, **options)
    write_adapter(tmp_path / "a", adapter.files())
    adapter.close()
    plain = generate(base.model, prompts, None, pad_token_id=padding, **options)
    bank = AdapterBank(random_pair("bart"))
    bank.load(tmp_path / "a")
    assert bank.generate_ids(prompts, ["a", "a"], **options) == answers != plain
    assert bank.generate_ids(prompts, [None, None], **options) == plain
    with pytest.raises(AdapterError, match="PTKIT_ENCODER_DECODER_PREFIX, which PEFT cannot"):
        export_parts(tmp_path / "a", tmp_path / "out", base=random_pair("bart"))


def bank_of_three(family: str, folder: Path) -> AdapterBank:
    """Two of ours, a prefix and a LoRA, all different."""
    base = random_base(family)
    paths = [saved(folder / f"h{i}", base, seed=i, num_virtual_tokens=3 + i) for i in range(2)]
    save_lora(family, folder / "lora", seed=1)
    bank = AdapterBank(base)
    for path in (*paths, folder / "lora"):
        bank.load(path)
    torch.manual_seed(7)
    bank.add("prefix", make_adapter(base, LEARNT["prefix"]))
    return bank


def test_row_in_mixed_batch_equals_its_solo_run_and_the_adapter(
    family: str, tmp_path: Path
) -> None:
    bank = bank_of_three(family, tmp_path)
    names = ["h0", None, "prefix", "h1", "lora", "h0", ("prefix", "h1")]
    prompts = rows_of([5, 3, 7, 4, 6, 2, 5])
    for beams in (1, 2):
        options = {**GREEDY, "num_beams": beams}
        mixed = bank.generate_ids(prompts, names, **options)
        for prompt, name, answer in zip(prompts, names, mixed, strict=True):
            assert bank.generate_ids([prompt], [name], **options) == [answer]
    base = random_base(family)
    adapter = adapter_from_files(read_adapter(tmp_path / "h0"), base)
    batch = PrefixBatch.shared(adapter.prefix().detach(), 1)
    (alone,) = generate(base.model, prompts[:1], batch, pad_token_id=0, **GREEDY)
    assert bank.generate_ids(prompts, names, **GREEDY)[0] == alone
    ids, rows_ = IDS[:1].expand(3, -1), ["h0", "h1", None]
    with torch.no_grad(), bank.weights(rows_):
        together = all_logits(bank.base.model, ids, torch.ones_like(ids), bank.rows(rows_))
    torch.testing.assert_close(together[0], logits_of(adapter)[0], atol=2e-5, rtol=1e-4)
    assert bank.classify(["w3 w4"], ["w5", "w6 w7"], ["h0", "lora"]) in (["w5"], ["w6 w7"])


def test_the_bank_keeps_both_parts_of_one_version(tmp_path: Path) -> None:
    bank = bank_of_three("llama", tmp_path)
    plain = off_probe(random_base("llama").model, IDS[:1])
    status = bank.status("h0")
    assert (status.method, status.virtual_tokens, status.path) == (
        "ptkit_prefix_lora", 3, tmp_path / "h0",
    )  # fmt: skip
    assert bank.list() == ["h0", "h1", "prefix", "lora"]
    before, answer = bank.versions("h0"), bank.generate_ids(rows_of([5]), ["h0"], **GREEDY)
    assert len(before) == 2
    bank.swap("h0", saved(tmp_path / "other", random_base("llama"), seed=5))
    assert not set(map(id, bank.versions("h0"))) & set(map(id, before))
    assert bank.status("h0").version == 2
    assert bank.generate_ids(rows_of([5]), ["h0"], **GREEDY) != answer
    for name in ("h0", "h1", "lora"):
        bank.unload(name)
    assert bank.list() == ["prefix"]
    assert torch.equal(off_probe(bank.base.model, IDS[:1]), plain)


def test_the_bank_refuses_what_would_lose_a_part(tmp_path: Path) -> None:
    bank = bank_of_three("llama", tmp_path)
    for use in (
        lambda: bank.prefix("h0"),
        lambda: bank.compose("mix", ["h0", "prefix"]),
        lambda: bank.slots(2, slots=2, virtual_tokens=8).assign(0, "h0"),
    ):
        with pytest.raises(AdapterError, match="the prefix by itself is not it"):
            use()
    with pytest.raises(AdapterError, match="takes one LoRA adapter, found h0, lora"):
        bank.generate(["w1"], [("h0", "lora")])
    with pytest.raises(AdapterError, match="`prefix` is a prefix in this bank"):
        bank.load(tmp_path / "h0", "prefix")
    with pytest.raises(AdapterError, match="`h0` is a prefix and a LoRA in this bank"):
        bank.load(tmp_path / "lora", "h0")
    with pytest.raises(AdapterError, match="changes the base's weights"):
        bank.add("mine", both(random_base("llama")))
    bank.register(tmp_path / "h0", "later")
    with pytest.raises(AdapterError, match="`load` it"):
        bank.rows(["later"])
    with pytest.raises(AdapterError, match="AdapterBank"):
        load_adapter(tmp_path / "h0", random_base("llama"))
    small = AdapterBank(random_base("llama"), budget=100)
    with pytest.raises(AdapterError, match="more than the bank's budget"):
        small.load(tmp_path / "h0")
    assert small.list() == []
    assert not [n for n, _ in small.base.model.named_parameters() if "lora" in n]


def test_the_engine_serves_it_and_nothing_changes_while_it_is_in_use(tmp_path: Path) -> None:
    bank = bank_of_three("llama", tmp_path)
    engine = Engine(bank, max_rows=4)
    names = ("h0", "prefix", None, "h1")
    try:
        asked = [Asked(bank, [name], [7, 8, 9], max_tokens=30) for name in names]
        engine.submit([a.answer for a in asked])
        with pytest.raises(InUseError, match="in use"), engine.changing("h0"):
            pass
        for a, name in zip(asked, names, strict=True):
            ids = a.ids
            (expected,) = bank.generate_ids([[7, 8, 9]], [name], **{**GREEDY, "max_new_tokens": 30})
            assert ids == expected
        late = Asked(bank, ["h0"], [1])
        bank.swap("h0", tmp_path / "h1")
        with pytest.raises(InUseError, match="ask again"):  # a prefix of before, a LoRA of now
            engine.submit([late.answer])
    finally:
        engine.close()


def test_a_server_reads_it_at_once_and_guards_its_changes(tmp_path: Path) -> None:
    for i in range(2):
        saved(tmp_path / f"h{i}", random_base("llama"), seed=i)
    bank = AdapterBank(random_base("llama"))
    engine = Engine(bank, max_rows=4)
    try:
        library = Library(engine, tmp_path, base_name="base")
        assert library.register_all() == []
        assert library.names() == ["h0", "h1"]
        (adapter,) = library.adapters("h0")
        assert (adapter.virtual_tokens, adapter.lora) == (4, "h0")
        assert library.card("h0").method == "ptkit_prefix_lora"
        with engine.changing("h0"), pytest.raises(InUseError):
            library.load("h0", path="h1", hub=None, replace=True)
        library.load("h0", path="h1", hub=None, replace=True)
        assert bank.generate(["w3 w4"], ["h0"]) == bank.generate(["w3 w4"], ["h1"])
        library.unload("h0")
        assert library.names() == ["h1"]
    finally:
        engine.close()


def test_what_it_cannot_be_is_refused(tmp_path: Path) -> None:
    for key in ("start", "learning_rate"):
        with pytest.raises(ValueError, match="`auto` tries several adapters in one batch"):
            method_section({"kind": "prefix_lora", key: "auto"})
    files = both(random_base("llama")).files()
    for convert in (as_prefix, as_prompt):
        with pytest.raises(AdapterError, match="changes the base's weights too"):
            convert(files, random_base("llama"))
    base = random_base("llama")
    for name in ("lora", "prefix"):
        broken = type(files)({**files.config, name: 3}, files.tensors)
        with pytest.raises(AdapterError, match=f"as `{name}`, found 3"):
            adapter_from_files(broken, base)
    kept = {n: t for n, t in files.tensors.items() if n != "prompt_embeddings"}
    with pytest.raises(AdapterError, match="`prompt_embeddings` should be"):
        adapter_from_files(type(files)(files.config, kept), base)
    assert not [n for n, _ in base.model.named_parameters() if "lora" in n]
    write_adapter(tmp_path / "p", make_adapter(base, LEARNT["prefix"]).files())
    with pytest.raises(AdapterError, match="has no parts that PEFT could load"):
        export_parts(tmp_path / "p", tmp_path / "out", base=base)


def test_from_recipe_to_answers_on_the_command_line(tmp_path: Path) -> None:
    method = "methods=[{kind: prefix_lora, num_virtual_tokens: 3, rank: 2}]"
    ptkit("train", "quickstart", *QUICK, "--set", method, "--out", "run", cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "record.json").read_text())["adapter_off_exact"]
    ptkit("export", "run", "--out", "mine", cwd=tmp_path)
    assert (
        "PEFT cannot read this file (it is a prefix and a LoRA"
        in (tmp_path / "mine" / "README.md").read_text()
    )
    ptkit("verify", "mine", "--score", cwd=tmp_path)
    shown = ptkit("inspect", "mine", cwd=tmp_path).stdout
    assert PREFIX_LORA in shown
    assert "3 virtual tokens" in shown
    ptkit("evaluate", "quickstart", *QUICK, "-a", "mine", cwd=tmp_path)
    ptkit("generate", "kind[robot]", "-a", "mine", "--base", cwd=tmp_path)
    ptkit("export", "run", "--as", "parts", "--out", "parts", "--dtype", "bfloat16", cwd=tmp_path)
    assert read_adapter(tmp_path / "parts" / "lora").peft_type == "LORA"
    message = refused("export", "run", "--as", "kv", "--out", "kv", cwd=tmp_path)
    assert "--as parts" in message
    message = refused("export", "run", "--as", "tokens", "--out", "t", cwd=tmp_path)
    assert "learns no input embeddings" in message
    with pytest.raises(RecipeError, match="`auto` tries several"):
        load_recipe("quickstart", ["methods=[{kind: prefix_lora, start: auto}]"])


def test_it_shares_no_training_batch(tmp_path: Path) -> None:
    base = random_base("llama")
    settings = TrainSection(steps=2, warmup_steps=0)
    jobs = [
        Job(adapter, rows(4, 1), rows(4, 2), settings, 1e-2, 0, tmp_path / str(i))
        for i, adapter in enumerate([make_adapter(base, LEARNT["prefix"]), both(base)])
    ]
    with pytest.raises(UserError, match=r"`prefix_lora` cannot share .*: it changes the base's"):
        fit_jobs(jobs)
