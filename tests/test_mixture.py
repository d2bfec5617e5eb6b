"""Prefixes weighed by each row's input, beside the weighting written out.

That a killed run resumes bit for bit, that the base stays as it was, and `train.retain`, are asked
of it with all other methods (`TRAINED` in test_train).
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_base, random_model
from encoders import random_classifier
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_cli import QUICK, ptkit, refused
from test_encoder_decoder import random_pair
from test_encoders import examples
from test_engine import Asked
from test_peft_parity import LEARNT, make_adapter, rows_of
from test_train import fit, rows

from ptkit import AdapterBank, load_adapter
from ptkit.bank.conversation import Conversation
from ptkit.data.encoded import EncodedExample
from ptkit.data.examples import Example
from ptkit.errors import AdapterError, RecipeError, UserError
from ptkit.evaluation.predict import predict
from ptkit.evaluation.retention import measure_retention, off_probe, probe_base
from ptkit.formats.adapter_files import AdapterFiles, read_adapter, write_adapter
from ptkit.hub.convert import as_prefix, as_prompt
from ptkit.hub.parts import export_parts
from ptkit.methods import (
    ADAPTERS,
    Adapter,
    Demonstrations,
    adapter_from_files,
    compile_files,
    create_adapter,
)
from ptkit.methods.catalogue import method_section
from ptkit.methods.prefix_mixture.adapter import PREFIX_MIXTURE
from ptkit.prefix import KVPrefix
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import TrainSection
from ptkit.recipe.tasks import ClassificationTask, GenerationTask
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import all_logits, collate, head_logits, rows_for, supervised_losses
from ptkit.runtime.generation import generate
from ptkit.runtime.scoring import continuation_scores
from ptkit.serve.engine import Engine
from ptkit.training.adapter_trainer import Job, _groups
from ptkit.training.loop import fit as fit_jobs
from ptkit.training.objective import Objective

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
TEXTS = Demonstrations(["w1 w2 w3", "w4 w5", "w7 w8 w9"], 0)


def mixture(base: Base, *, seed: int = 0, **changes: object) -> Adapter:
    """Prefixes away from their start, and a gate that tells inputs apart."""
    cls = ADAPTERS["prefix_mixture"]
    section = cls.section_class(
        **{"kind": "prefix_mixture", "num_virtual_tokens": 4, "prefixes": 3, **changes}
    )
    torch.manual_seed(seed)
    adapter = cls.create(section, base, TEXTS)
    with torch.no_grad():
        for name, parameter in adapter.trainable().items():
            parameter.add_(torch.randn_like(parameter) * (3.0 if name == "gate.weight" else 0.3))
    return adapter


def written_out(files: AdapterFiles, base: Base, ids: list[int]) -> tuple[list[float], KVPrefix]:
    """The weights and the prefix of a row whose input is `ids`, one number after the other."""
    table = base.embedding.weight.detach().double()
    mean = sum(table[i] for i in ids) / len(ids)
    centred = mean - mean.mean()
    seen = centred / centred.square().sum().sqrt()
    tensors = {name: t.double() for name, t in files.tensors.items()}
    gate = zip(tensors["gate.weight"], tensors["gate.bias"], strict=True)
    scores = [math.exp(float(row @ seen + bias)) for row, bias in gate]
    if files.config["top"] is not None:
        least = sorted(scores)[-files.config["top"]]
        scores = [score if score >= least else 0.0 for score in scores]
    weights = [score / sum(scores) for score in scores]
    flat = sum(
        weight * tensors[f"prefixes.{i}.prompt_embeddings"] for i, weight in enumerate(weights)
    )
    return weights, KVPrefix.from_flat(flat.float(), base.layout)


def answer(base: Base, prompt: list[int], prefix: KVPrefix | None, **options: object) -> list[int]:
    batch = None if prefix is None else prefix.alone
    (found,) = generate(
        base.model, [prompt], batch, pad_token_id=base.pad_token_id, **{**GREEDY, **options}
    )
    return found


@pytest.mark.parametrize("top", [None, 1, 2])
def test_every_row_gets_the_mean_written_out(family: str, top: int | None) -> None:
    base = random_base(family)
    adapter = mixture(base, top=top)
    inputs = rows_of([6, 3, 8, 1, 5, 7, 2, 9])
    compiled = adapter.compiled().detach()
    batch = rows_for(compiled, inputs)
    files = adapter.files()
    found = set()
    for i, ids in enumerate(inputs):
        weights, prefix = written_out(files, base, ids)
        ours = compiled.weights(torch.tensor([ids]), torch.ones(1, len(ids)))[0]
        torch.testing.assert_close(ours, torch.tensor(weights), atol=1e-5, rtol=1e-4)
        assert sum(weight > 0 for weight in weights) == (top or 3)
        for made in (
            KVPrefix(tuple(k[i] for k in batch.keys), tuple(v[i] for v in batch.values)),
            compiled.for_input(ids),
        ):
            torch.testing.assert_close(made.flat(), prefix.flat(), atol=1e-5, rtol=1e-4)
        found.add(tuple(round(weight, 3) for weight in weights))
        row = torch.tensor([ids])
        with torch.no_grad():
            expected = all_logits(base.model, row, torch.ones_like(row), prefix.alone)
            logits = all_logits(
                base.model, row, torch.ones_like(row), compiled.for_rows(row, torch.ones_like(row))
            )
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert len(found) > 1, "inputs must be told apart for this to prove anything"


def test_an_empty_input_leaves_the_weights_to_the_bias() -> None:
    adapter = mixture(random_base("llama"))
    compiled = adapter.compiled().detach()
    expected = adapter.gate.bias.detach().softmax(-1)
    none = compiled.weights(torch.tensor([[5, 6]]), torch.zeros(1, 2))
    torch.testing.assert_close(none[0], expected)
    flat = sum(w * p.flat() for w, p in zip(expected, compiled.prefixes, strict=True))
    torch.testing.assert_close(compiled.for_input([]).flat(), flat, atol=1e-6, rtol=1e-5)


def test_one_prefix_alone_is_prefix_tuning_step_for_step(family: str, tmp_path: Path) -> None:
    curves, ended = [], []
    settings = TrainSection(steps=10, batch_size=4, warmup_steps=1, eval_every=2, save_every=5)
    alone = ("prefix_tuning", {"learn_embeddings": False})
    for kind, own in (alone, ("prefix_mixture", {"prefixes": 1})):
        base = random_base(family)
        section = method_section({"kind": kind, "num_virtual_tokens": 4, **own})
        torch.manual_seed(0)
        adapter = create_adapter(section, base, TEXTS)
        progress = fit(
            adapter, rows(20, 1), rows(6, 2), settings, 0.1, seed=0, run=tmp_path / kind, beta2=0.95
        )
        curves.append([(e["train_loss"], e["validation_loss"]) for e in progress.curve])
        files = adapter.files()
        ended.append(files.tensors.get("prompt_embeddings"))
        if kind == "prefix_mixture":
            ended[-1] = files.tensors["prefixes.0.prompt_embeddings"]
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert curves[0][0] != pytest.approx(curves[0][-1], abs=1e-2)
    torch.testing.assert_close(*ended, atol=1e-4, rtol=1e-3)


def gradients(adapter: Adapter, part: list[EncodedExample]) -> dict[str, torch.Tensor | None]:
    base = adapter.base
    adapter.zero_grad()
    Objective([adapter])([0], [len(part)], **collate(part, base)).sum().backward()
    assert all(p.grad is None for p in base.model.parameters())
    return {n: p.grad for n, p in adapter.named_parameters()}


def test_gradients_reach_what_is_learnt_and_nothing_else(tmp_path: Path) -> None:
    base = random_base("llama")
    for i, method in enumerate(("prefix", "prompt")):
        made = make_adapter(base, {**LEARNT[method], "num_virtual_tokens": 4})
        write_adapter(tmp_path / f"a{i}", made.files())
    folders = [str(tmp_path / f"a{i}") for i in range(2)]
    part = rows(6, 3)

    every = gradients(mixture(base), part)
    assert all(grad is not None and grad.abs().max() > 0 for grad in every.values())

    frozen = mixture(base, adapters=folders, prefixes=1)
    assert set(frozen.trainable()) == {
        "prefixes.2.encoder.embedding.weight", "gate.weight", "gate.bias",
    }  # fmt: skip
    found = gradients(frozen, part)
    assert {n for n, grad in found.items() if grad is not None} == set(frozen.trainable())
    gate_alone = mixture(base, adapters=folders, prefixes=0)
    assert set(gate_alone.trainable()) == {"gate.weight", "gate.bias"}
    (group,) = _groups(Job(gate_alone, part, part, TrainSection(steps=1), 0.1, 0, tmp_path))
    assert group["lr"] == gate_alone.section.gate_learning_rate == 1e-2
    started = mixture(base, adapters=folders, prefixes=0, train_adapters=True)
    assert set(started.trainable()) == {n for n, _ in started.named_parameters()}

    chosen = mixture(base, top=1, prefixes=8)
    weights = rows_weights(chosen, part)
    used = {int(row.argmax()) for row in weights}
    assert set(weights.flatten().tolist()) == {0.0, 1.0}
    assert 1 < len(used) < 8
    for name, grad in gradients(chosen, part).items():
        idle = name.startswith("prefixes.") and int(name.split(".")[1]) not in used
        assert grad is not None
        assert bool(grad.abs().max() > 0) is not idle, name


def rows_weights(adapter: Adapter, part: list[EncodedExample]) -> torch.Tensor:
    compiled = adapter.compiled().detach()
    return torch.cat([
        compiled.weights(torch.tensor([r.input_ids]), torch.ones(1, len(r.input_ids)))
        for r in part
    ])  # fmt: skip


def test_a_frozen_adapter_is_mixed_in_as_it_is(tmp_path: Path) -> None:
    base = random_base("qwen3")
    made = make_adapter(base, {**LEARNT["prompt"], "num_virtual_tokens": 4})
    write_adapter(tmp_path / "run" / "adapter", made.files())
    cls = ADAPTERS["prefix_mixture"]
    section = cls.section_class(
        kind="prefix_mixture", num_virtual_tokens=4, prefixes=1, adapters=["run"]
    )
    adapter = cls.create(section, base, replace(TEXTS, folder=tmp_path))
    torch.testing.assert_close(
        adapter.compiled().prefixes[0].flat(), made.prefix().flat(), atol=1e-6, rtol=1e-5
    )
    with pytest.raises(UserError, match=r"has 4 virtual tokens, .* set `num_virtual_tokens: 4`"):
        cls.create(
            section.model_copy(update={"num_virtual_tokens": 5}), base,
            replace(TEXTS, folder=tmp_path),
        )  # fmt: skip
    with pytest.raises(AdapterError, match="no such"):
        cls.create(section, base, TEXTS)
    write_adapter(tmp_path / "mixed", mixture(base).files())
    other = method_section({
        "kind": "prefix_tuning", "num_virtual_tokens": 4, "start": "adapter",
        "start_adapter": [str(tmp_path / "mixed")],
    })  # fmt: skip
    with pytest.raises(AdapterError, match="weighs its prefixes by the input and is no start"):
        create_adapter(other, base, TEXTS)


def test_fresh_prefixes_start_from_rows_of_their_own() -> None:
    compiled = mixture(random_base("gpt2"), prefixes=4, start="examples").compiled()
    flats = [p.flat() for p in compiled.prefixes]
    assert any(not torch.allclose(flats[0], other, atol=1.0) for other in flats[1:])


def test_the_target_is_never_seen(family: str) -> None:
    """Other targets, of other lengths, leave the rows' prefixes as they were."""
    base = random_base(family)
    adapter = mixture(base)
    seen = []
    compiled = adapter.compiled

    def spied():
        made = compiled()
        prefixes = type(made).for_rows

        class Spy:
            def for_rows(self, ids, read):
                seen.append(prefixes(made, ids, read))
                return seen[-1]

        return Spy()

    adapter.compiled = spied
    inputs = rows_of([5, 3, 7])
    for lengths, seed in (([2, 6, 1], 5), ([4, 1, 3], 6)):
        part = [EncodedExample(i, t) for i, t in zip(inputs, rows_of(lengths, seed), strict=True)]
        Objective([adapter])([0], [3], **collate(part, base))
    expected = rows_for(compiled(), inputs)
    for batch in seen:
        for ours, theirs in zip(batch.keys, expected.keys, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert len(seen) == 2


@pytest.mark.parametrize("position", ["prefix", "infix"])
def test_padded_rows_are_those_alone(family: str, position: str) -> None:
    base = random_base(family)
    adapter = mixture(base, position=position)
    part = rows(6, 4)
    objective = Objective([adapter])
    with torch.no_grad():
        together = float(objective([0], [6], **collate(part, base)))
        alone = sum(float(objective([0], [1], **collate([row], base))) for row in part)
    assert together == pytest.approx(alone, abs=1e-3)
    prompts = [row.input_ids for row in part]
    batch = rows_for(adapter.compiled().detach(), prompts)
    for options in ({}, {"num_beams": 2}):
        found = generate(base.model, prompts, batch, pad_token_id=0, **{**GREEDY, **options})
        for prompt, tokens in zip(prompts, found, strict=True):
            own = adapter.compiled().detach().for_input(prompt)
            assert answer(base, prompt, own, **options) == tokens


def test_an_infixs_inputs_are_not_taken_away_from_the_gate(tmp_path: Path) -> None:
    adapter = mixture(random_base("llama"), position="infix")
    settings = TrainSection(steps=4, batch_size=4, warmup_steps=0, eval_every=2)
    validation = rows(6, 2)
    progress = fit(adapter, rows(12, 1), validation, settings, 0.05, seed=0, run=tmp_path)
    total = sum(
        float(supervised_losses(
            adapter.model, **collate([row], adapter.base),
            batch=adapter.compiled().for_input(row.input_ids).alone,
        ).sum())
        for row in validation
    )  # fmt: skip
    supervised = sum(row.supervised for row in validation)
    assert total / supervised == pytest.approx(progress.best_loss, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_is_loaded(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = mixture(random_base(family), top=2)
    write_adapter(tmp_path / "a", adapter.files().to(dtype))
    base = random_base(family)
    files = read_adapter(tmp_path / "a")
    again = adapter_from_files(files, base)
    inputs = rows_of([5, 3])
    one, other = (rows_for(c, inputs) for c in (again.compiled(), compile_files(files, base)))
    original = rows_for(adapter.compiled(), inputs)
    for i in range(len(one.keys)):
        assert torch.equal(one.keys[i], other.keys[i])
        assert torch.equal(one.values[i], other.values[i])
        if dtype == torch.float32:
            assert torch.equal(one.keys[i], original.keys[i])
    assert again.section.top == 2
    assert again.virtual_tokens == 4
    assert not other.keys[0].requires_grad
    assert again.files().tensors.keys() == files.tensors.keys()
    with pytest.raises((KeyError, ValueError), match=PREFIX_MIXTURE):
        PeftModel.from_pretrained(random_model(family), tmp_path / "a")


def test_off_is_the_base_bit_for_bit(family: str) -> None:
    base = random_base(family)
    ids = torch.tensor(rows_of([9]))
    before = off_probe(base.model, ids)
    adapter = mixture(base)
    on = all_logits(
        base.model, ids, torch.ones_like(ids),
        adapter.compiled().for_rows(ids, torch.ones_like(ids)),
    )  # fmt: skip
    with adapter.off():
        assert torch.equal(off_probe(base.model, ids), before)
    assert (on[0] - before).abs().max() > 1e-2


def test_predictions_are_those_of_each_row_alone() -> None:
    base = random_base("llama")
    adapter = mixture(base)
    compiled = adapter.compiled().detach()
    data = {"builtin": "facts-to-text"}
    inputs = ["w3 w4 w5", "w9", "w1 w2 w3 w4 w8", "w7 w8"]
    writing = GenerationTask(
        kind="generation", data=data, input="{x}", target="{y}", max_target_tokens=5,
        metrics=["bleu", "perplexity"],
    )  # fmt: skip
    rows_ = [Example(text, "w5 w6", ("w5 w6",)) for text in inputs]
    for row, found in zip(rows_, predict(adapter, rows_, writing, 3), strict=True):
        ids = base.tokenizer(row.input)["input_ids"]
        own = compiled.for_input(ids)
        tokens = answer(base, ids, own, max_new_tokens=5, eos_token_id=0)
        assert found.prediction == base.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        target = [*base.tokenizer("w5 w6")["input_ids"], 0]
        part = collate([EncodedExample(ids, target)], base)
        with torch.no_grad():
            nats = supervised_losses(base.model, **part, batch=own.alone).sum()
        assert found.details["nats"] == pytest.approx(float(nats), abs=1e-3)
    choosing = ClassificationTask(
        kind="classification", data=data, input="{x}", verbalizer={"a": " w5", "b": " w6 w7"},
        metrics=["accuracy", "roc_auc"],
    )  # fmt: skip
    labelled = [Example(text, " w5", (" w5",), "a") for text in inputs]
    for row, found in zip(labelled, predict(adapter, labelled, choosing, 3), strict=True):
        ids = base.tokenizer(row.input)["input_ids"]
        scores = continuation_scores(
            base.model, [ids], [[5], [6, 7]], compiled.for_input(ids).alone, pad_token_id=0
        )
        assert list(found.details["label_scores"].values()) == pytest.approx(
            scores[0].tolist(), abs=1e-4
        )


def test_general_text_shows_the_gate_what_is_not_predicted() -> None:
    base = random_base("llama")
    adapter = mixture(base)
    compiled = adapter.compiled().detach()
    probe = probe_base(base, {"text": " ".join(f"w{1 + i * 7 % 95}" for i in range(400))}, 100)
    windows = probe.windows["text"]
    measured = measure_retention(adapter, probe)
    total = 0.0
    for row in windows:
        batch = compiled.for_input([int(row[0])]).alone
        with torch.no_grad():
            logits = all_logits(base.model, row[None], torch.ones_like(row[None]), batch)[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
    predicted = windows[:, 1:].numel()
    assert measured.adapter["text"].nats == pytest.approx(total / predicted, abs=1e-4)
    assert measured.drift_tokens == predicted
    assert measured.drift > 0


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("labels", ["sequence", "token"])
def test_a_classifiers_rows_are_padded_or_alone_the_same(
    kind: str, labels: str, tmp_path: Path
) -> None:
    base = random_classifier(kind, labels)
    adapter = mixture(base)
    part = examples([5, 3, 7], labels)

    def logits(of: Adapter, rows_: list[EncodedExample]) -> list[torch.Tensor]:
        read = collate(rows_, of.base)
        ids, mask = read["input_ids"], read["attention_mask"]
        with torch.no_grad():
            found = head_logits(of.model, ids, mask, of.compiled().for_rows(ids, mask))
        if labels == "sequence":
            return list(found)
        return [row[: len(e.input_ids)] for row, e in zip(found, rows_, strict=True)]

    together = logits(adapter, part)
    for row, found in zip(part, together, strict=True):
        torch.testing.assert_close(logits(adapter, [row])[0], found, atol=1e-5, rtol=1e-4)
    write_adapter(tmp_path / "a", adapter.files())
    again = adapter_from_files(read_adapter(tmp_path / "a"), random_classifier(kind, labels))
    for ours, theirs in zip(logits(again, part), together, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    settings = TrainSection(steps=2, batch_size=3, warmup_steps=0, eval_every=1)
    progress = fit(adapter, part, part, settings, 0.1, seed=0, run=tmp_path / "run")
    assert math.isfinite(progress.best_loss)


def test_an_encoder_decoders_rows_have_their_own_prefixes(tmp_path: Path) -> None:
    base = random_pair("bart")
    adapter = mixture(base, start="random")
    write_adapter(tmp_path / "a", adapter.files())
    bank = AdapterBank(random_pair("bart"))
    bank.load(tmp_path / "a")
    prompts = rows_of([6, 3, 5])
    options = {"max_new_tokens": 5, "do_sample": False}
    together = bank.generate_ids(prompts, ["a", "a", None], **options)
    for prompt, name, tokens in zip(prompts, ["a", "a", None], together, strict=True):
        own = None if name is None else adapter.compiled().detach().for_input(prompt)
        assert answer(base, prompt, own, **{**options, "eos_token_id": 0}) == tokens


BANKS: dict[str, AdapterBank] = {}
NAMES = [None, "mixed", "chosen", "loaded", "prefix", ("mixed", "prefix"), ("prefix", "chosen")]


def bank_of_mixtures(family: str, folder: Path) -> AdapterBank:
    base = random_base(family)
    bank = AdapterBank(base, check_every=1e9)
    bank.add("mixed", mixture(base))
    bank.add("chosen", mixture(base, seed=1, top=1, num_virtual_tokens=6))
    write_adapter(folder / "loaded", mixture(base, seed=2, prefixes=2).files())
    bank.load(folder / "loaded")
    bank.add("prefix", make_adapter(base, {**LEARNT["prefix"], "num_virtual_tokens": 3}))
    return bank


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=7),
    lengths=st.lists(st.integers(1, 9), min_size=7, max_size=7),
    seed=st.integers(0, 1000),
    beams=st.sampled_from([1, 2]),
)
def test_row_in_mixed_batch_equals_solo_run(
    family, tmp_path_factory, names, lengths, seed, beams
) -> None:
    if family not in BANKS:
        BANKS[family] = bank_of_mixtures(family, tmp_path_factory.mktemp(family))
    bank = BANKS[family]
    prompts = rows_of(lengths[: len(names)], seed)
    options = {**GREEDY, "num_beams": beams}
    together = bank.generate_ids(prompts, names, **options)
    for prompt, name, tokens in zip(prompts, names, together, strict=True):
        assert bank.generate_ids([prompt], [name], **options) == [tokens]


def test_the_bank_classifies_and_answers_as_the_adapter(tmp_path: Path) -> None:
    bank = bank_of_mixtures("llama", tmp_path)
    base = bank.base
    adapter = adapter_from_files(read_adapter(tmp_path / "loaded"), base)
    prompt = rows_of([5])[0]
    own = adapter.compiled().detach().for_input(prompt)
    assert bank.generate_ids([prompt], ["loaded"], **GREEDY) == [answer(base, prompt, own)]
    texts, labels = ["w3 w4", "w9 w9 w1"], ["w5", "w6 w7"]
    for text, found in zip(texts, bank.classify(texts, labels, ["loaded"]), strict=True):
        ids = base.tokenizer(text)["input_ids"]
        words = base.tokenizer(labels)["input_ids"]
        batch = adapter.compiled().detach().for_input(ids).alone
        scores = continuation_scores(base.model, [ids], words, batch, pad_token_id=0)
        assert found == labels[int(scores.argmax())]
    status = bank.status("loaded")
    assert (status.method, status.virtual_tokens) == ("ptkit_prefix_mixture", 4)
    assert status.nbytes == adapter.compiled().nbytes


def test_what_the_bank_keeps_is_not_the_adapter_in_training() -> None:
    base = random_base("llama")
    adapter = mixture(base)
    bank = AdapterBank(base)
    bank.add("mixed", adapter)
    before = bank.generate(["w3 w4"], ["mixed"], **GREEDY)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 9)
    assert bank.generate(["w3 w4"], ["mixed"], **GREEDY) == before


def test_it_leaves_the_device_and_comes_back(tmp_path: Path) -> None:
    base = random_base("llama")
    for i in range(2):
        write_adapter(tmp_path / f"m{i}", mixture(base, seed=i).files())
    size = mixture(base).compiled().nbytes
    prompts = rows_of([5, 5])
    free = AdapterBank(base)
    for host in (0, None):
        bank = AdapterBank(base, budget=int(size * 1.5), host_budget=host, check_every=0)
        for i in range(2):
            bank.register(tmp_path / f"m{i}")
            free.load(tmp_path / f"m{i}")
        for name in ("m0", "m1", "m0", "m1"):
            assert bank.generate_ids(prompts[:1], [name], **GREEDY) == free.generate_ids(
                prompts[:1], [name], **GREEDY
            )
        assert bank.counts.evictions >= 3
        write_adapter(tmp_path / "m0", mixture(base, seed=9).files(), replace=True)
        again = bank.generate_ids(prompts[:1], ["m0"], **GREEDY)
        free.load(tmp_path / "m0")
        assert again == free.generate_ids(prompts[:1], ["m0"], **GREEDY)


def test_the_engine_serves_every_input_its_own(tmp_path: Path) -> None:
    bank = bank_of_mixtures("qwen3", tmp_path)
    engine = Engine(bank, max_rows=4, piece=4)
    names = ["mixed", "chosen", None, "loaded", "prefix", "mixed"]
    prompts = rows_of([9, 3, 5, 7, 4, 2])
    try:
        asked = [Asked(bank, [n], p, max_tokens=8) for n, p in zip(names, prompts, strict=True)]
        together = Asked(bank, ["mixed", "prefix"], prompts[0], max_tokens=8)
        engine.submit([*(a.answer for a in asked), together.answer])
        for a, name, prompt in zip(asked, names, prompts, strict=True):
            (expected,) = bank.generate_ids([prompt], [name], **{**GREEDY, "max_new_tokens": 8})
            assert a.ids == expected
        (text,) = bank.ensemble(
            [bank.base.tokenizer.decode(prompts[0])], ["mixed", "prefix"], by="average",
            **{**GREEDY, "max_new_tokens": 8},
        )  # fmt: skip
        assert bank.base.tokenizer.decode(together.ids, skip_special_tokens=True) == text
    finally:
        engine.close()


def test_load_adapter_and_transformers_own_generate(tmp_path: Path) -> None:
    base = random_base("llama")
    write_adapter(tmp_path / "a", mixture(base).files())
    bank = AdapterBank(base)
    bank.load(tmp_path / "a")
    loaded = load_adapter(tmp_path / "a", base)
    texts = ["w3 w4 w5", "w9"]
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = bank.generate(texts, ["a", "a"], **options)
    assert loaded.generate(texts, **options) == expected
    encoding = base.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    inputs = loaded.inputs(encoding)
    tokens = base.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert base.tokenizer.batch_decode(tokens, skip_special_tokens=True) == expected


def test_what_needs_one_prefix_is_refused(tmp_path: Path) -> None:
    bank = bank_of_mixtures("llama", tmp_path)
    for use in (
        lambda: bank.prefix("mixed"),
        lambda: bank.rows(["mixed"]),
        lambda: bank.compose("mix", ["mixed", "prefix"]),
        lambda: bank.slots(2, slots=2, virtual_tokens=8).assign(0, "mixed"),
    ):
        with pytest.raises(AdapterError, match="`mixed` makes its prefix of each row's input"):
            use()
    talk = Conversation(bank)
    with pytest.raises(AdapterError, match="grows with every turn"):
        talk.use("mixed")
    compared = talk.compare(["w3 w4", "w3 w4"], ["mixed", None], max_new_tokens=4)
    assert compared == bank.generate(["w3 w4"] * 2, ["mixed", None], max_new_tokens=4)
    base = random_base("llama")
    adapter = mixture(base)
    with pytest.raises(AdapterError, match="there is no one prefix"):
        adapter.prefix()
    for convert in (as_prefix, as_prompt):
        with pytest.raises(AdapterError, match="there is no one prefix"):
            convert(adapter.files(), base)
    with pytest.raises(AdapterError, match="has no parts that PEFT could load"):
        export_parts(tmp_path / "loaded", tmp_path / "out", base=base)
    run = TrainSection(steps=2, warmup_steps=0)
    jobs = [
        Job(a, rows(4, 1), rows(4, 2), run, 1e-2, 0, tmp_path / str(i))
        for i, a in enumerate([make_adapter(base, LEARNT["prefix"]), adapter])
    ]
    with pytest.raises(UserError, match=r"cannot share .*: its prefixes are weighed anew"):
        fit_jobs(jobs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "auto"}, "`auto` tries several adapters in one batch"),
        ({"learning_rate": "auto"}, "weighed anew for every row; give a value"),
        ({"prefixes": 0}, "leaves nothing to mix"),
        ({"prefixes": 0, "adapters": ["x"]}, "always counts 1, so nothing is learnt"),
        ({"prefixes": 2, "top": 3}, "`top` is 3, but there are 2 prefixes"),
        ({"train_adapters": True}, "`train_adapters` needs `adapters`"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_section({"kind": "prefix_mixture", **settings})


def test_damaged_files_are_refused() -> None:
    base = random_base("llama")
    files = mixture(base).files()

    def with_(config: dict | None = None, **tensors: torch.Tensor | None) -> AdapterFiles:
        named = {**files.tensors, **{n.replace("__", "."): t for n, t in tensors.items()}}
        kept = {n: t for n, t in named.items() if t is not None}
        return AdapterFiles({**files.config, **(config or {})}, kept)

    token = "prefixes__1__prompt_embeddings"
    for broken, message in (
        (with_({"prefix": 3}), "should hold those of a prefix"),
        (with_({"prefix": {"peft_type": "LORA"}}), "should hold those of a prefix"),
        (with_({"prefixes": "3"}), "should be numbers"),
        (with_({"prefixes": 10**12}), "has 1000000000002 tensors, found 5"),
        (with_({"top": 7}), "`top` is 7"),
        (with_(gate__bias=torch.zeros(2)), "`gate.bias` has shape"),
        (with_(gate__weight=torch.zeros(3, 9)), "`gate.weight` has shape"),
        (with_(**{token: None}), "tensors, found 4"),
        (with_(**{token: torch.zeros(4, 96, dtype=torch.int32)}), "holds no numbers"),
        (with_(**{token: torch.zeros(3, 96)}), "of one length"),
    ):
        for read in (adapter_from_files, compile_files):
            with pytest.raises(AdapterError, match=message):
                read(broken, base)


def test_from_recipe_to_answers_on_the_command_line(tmp_path: Path) -> None:
    method = "methods=[{kind: prefix_mixture, num_virtual_tokens: 3, prefixes: 2}]"
    ptkit("train", "quickstart", *QUICK, "--set", method, "--out", "run", cwd=tmp_path)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["adapter_off_exact"]
    assert record["retention"]["forgetting"] > 0
    ptkit("export", "run", "--out", "mine", cwd=tmp_path)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "PEFT cannot read this file (its prefix is made anew from every input)" in card
    ptkit("verify", "mine", "--score", cwd=tmp_path)
    ptkit("export", "run", "--out", "small", "--dtype", "int8", cwd=tmp_path)
    shown = ptkit("inspect", "mine", cwd=tmp_path).stdout
    assert PREFIX_MIXTURE in shown
    assert "gate.weight" in shown
    ptkit("evaluate", "quickstart", *QUICK, "-a", "mine", cwd=tmp_path)
    ptkit("generate", "kind[robot]", "kind[boat]", "-a", "mine", "--base", cwd=tmp_path)
    for form, reason in (
        ("kv", "no one prefix"), ("tokens", "learns no input embeddings"),
        ("prompt-embeds", "learns no input embeddings"), ("parts", "no parts that PEFT"),
    ):  # fmt: skip
        assert reason in refused("export", "run", "--as", form, "--out", "x", cwd=tmp_path)
    frozen = "methods=[{kind: prefix_mixture, num_virtual_tokens: 3, prefixes: 1, adapters: [%s]}]"
    prefix = "methods=[{kind: prefix_tuning, num_virtual_tokens: 3}]"
    ptkit("train", "quickstart", *QUICK, "--set", prefix, "--out", "one", cwd=tmp_path)
    ptkit("train", "quickstart", *QUICK, "--set", frozen % (tmp_path / "one"), "--out", "two",
          cwd=tmp_path)  # fmt: skip
    kept = read_adapter(tmp_path / "two" / "adapter").tensors["prefixes.0.prompt_embeddings"]
    torch.testing.assert_close(
        kept, read_adapter(tmp_path / "one" / "adapter").tensors["prompt_embeddings"]
    )
    with pytest.raises(RecipeError, match="leaves nothing to mix"):
        load_recipe("quickstart", ["methods=[{kind: prefix_mixture, prefixes: 0}]"])
