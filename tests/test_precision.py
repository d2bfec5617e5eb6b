"""Frozen weights in autocast's precision: the same results bit for bit, and the weights back."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_base, word_tokenizer
from torch import nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from ptkit.data.encoded import EncodedExample
from ptkit.methods import ADAPTERS, Adapter, Demonstrations, create_adapter
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.attention_choice import attention_of
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.precision import fastest_attention, weights_cast_once
from ptkit.runtime.runner import ModelRunner, Tokens
from ptkit.training import loop
from ptkit.training.adapter_trainer import Job, StepReport
from ptkit.training.checkpoint import Progress
from ptkit.training.loop import fit

ROWS = [EncodedExample([4 + i, 8, 2], [7 + i, 5, 9 + i]) for i in range(12)]


def matrices(base: Base) -> dict[str, nn.Parameter]:
    return {
        name: module.weight
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    }


def trained(
    base: Base, kind: str, folder: Path, report=None, **settings: object
) -> tuple[Adapter, Progress]:
    torch.manual_seed(0)
    section = ADAPTERS[kind].section_class(kind=kind)  # type: ignore[call-arg]
    adapter = create_adapter(section, base, Demonstrations(["w1 w2 w3", "w4 w5"], 0))
    train = TrainSection(steps=4, batch_size=4, eval_every=2, autocast="bf16", **settings)  # type: ignore[arg-type]
    (progress,) = fit([Job(adapter, ROWS, ROWS[:4], train, 0.01, 0, folder, report)])
    return adapter, progress


@pytest.mark.filterwarnings("ignore:.*without bfloat16 instructions.*")
@pytest.mark.parametrize("kind", ["prefix_tuning", "p_tuning", "lora", "full"])
def test_training_ends_at_the_same_bits(
    family: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, progress = trained(random_base(family), kind, tmp_path / "cast")
    values = {n: p.detach().clone() for n, p in adapter.trainable().items()}
    adapter.close()
    monkeypatch.setattr(loop, "weights_cast_once", lambda *_: nullcontext())
    again, plain = trained(random_base(family), kind, tmp_path / "plain")
    assert progress.curve == plain.curve
    for name, parameter in again.trainable().items():
        assert torch.equal(values[name], parameter)
    again.close()


@pytest.mark.filterwarnings("ignore:.*without bfloat16 instructions.*")
def test_weights_are_cast_in_training_and_back_after_a_kill(family: str, tmp_path: Path) -> None:
    base = random_base(family)
    before = {name: (weight, weight.clone()) for name, weight in matrices(base).items()}
    embedding = base.embedding.weight
    seen = []

    class Killed(Exception):
        pass

    def report(step: StepReport) -> None:
        seen.append({weight.dtype for weight in matrices(base).values()})
        assert base.embedding.weight is embedding
        if step.step == 2:
            raise Killed

    with pytest.raises(Killed):
        trained(base, "prefix_tuning", tmp_path, report)
    assert seen == [{torch.bfloat16}] * 2
    for name, weight in matrices(base).items():
        assert weight is before[name][0]
        assert torch.equal(weight, before[name][1])


@pytest.mark.filterwarnings("ignore:.*without bfloat16 instructions.*")
def test_checkpointed_runs_save_the_memory(tmp_path: Path) -> None:
    base = random_base("gpt2")
    seen = []

    def report(step: StepReport) -> None:
        seen.extend(weight.dtype for weight in matrices(base).values())

    trained(base, "prefix_tuning", tmp_path, report, gradient_checkpointing=True)
    assert set(seen) == {torch.float32}


def test_what_learns_and_what_is_no_float32_is_left_alone() -> None:
    base = random_base("llama")
    layers = [m for m in base.model.modules() if isinstance(m, nn.Linear)]
    layers[0].weight.requires_grad_(True)
    layers[1].to(torch.float64)
    shared = layers[2].weight = layers[3].weight = nn.Parameter(
        layers[2].weight.detach(), requires_grad=False
    )
    with weights_cast_once(base.model, torch.bfloat16):
        assert layers[0].weight.dtype == torch.float32
        assert layers[1].weight.dtype == torch.float64
        assert layers[2].weight is layers[3].weight
        assert layers[2].weight.dtype == torch.bfloat16
    assert layers[2].weight is layers[3].weight is shared


def test_attention_left_to_ptkit_is_eager_for_short_rows_in_bf16_on_a_cpu() -> None:
    model = random_base("llama").model
    assert attention_of(model) == "sdpa"
    for kind, longest, wanted in [("bf16", 64, "eager"), ("bf16", 600, "sdpa"), ("no", 64, "sdpa")]:
        with fastest_attention(model, kind, longest):
            assert attention_of(model) == wanted
        assert attention_of(model) == "sdpa"


@pytest.mark.filterwarnings("ignore:.*without bfloat16 instructions.*")
def test_a_recipe_that_names_its_attention_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = []
    monkeypatch.setattr(
        loop, "fastest_attention", lambda *args: used.append(args[1:]) or nullcontext()
    )
    base = random_base("llama")
    trained(base, "prefix_tuning", tmp_path / "given")[0].close()
    assert used == []
    trained(replace(base, free_attention=True), "prefix_tuning", tmp_path / "free")[0].close()
    assert used == [("bf16", 6)]


@pytest.mark.parametrize("folder", ["recipes", "tests/recipes"])
def test_no_recipe_forces_a_precision_or_an_attention(folder: str) -> None:
    """What is fast depends on the machine: bf16 without instructions for it takes several times as
    long as float32."""
    recipes = sorted((Path(__file__).parents[1] / folder).glob("*.yaml"))
    assert recipes
    for path in recipes:
        recipe = load_recipe(path).recipe
        assert recipe.train.autocast == "auto", path.name
        assert recipe.model.attention == "auto", path.name


def test_an_attention_that_a_checkpoint_asks_to_be_in_float32_stays_so() -> None:
    """GPT-2's `reorder_and_upcast_attn`, which transformers has with eager attention only."""
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0,
        reorder_and_upcast_attn=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT2LMHeadModel._from_config(config, attn_implementation="eager").bfloat16().eval()
    ids, cache = torch.arange(1, 21)[None], DynamicCache(config=config)
    with torch.no_grad():
        own = model(ids).logits
        model(ids[:, :8], past_key_values=cache)
        prefix = KVPrefix(
            tuple(layer.keys[0] for layer in cache.layers),
            tuple(layer.values[0] for layer in cache.layers),
        )
        after = model(ids[:, 8:], past_key_values=cache).logits
        base = frozen_base(model, word_tokenizer(), "gpt2")
        runner = ModelRunner(base.model)
        whole = Tokens(ids, torch.ones_like(ids), last=torch.tensor([19]))
        assert torch.equal(runner.forward(whole), own)
        rest = Tokens(ids[:, 8:], torch.ones(1, 12, dtype=torch.long), last=torch.tensor([11]))
        assert torch.equal(runner.forward(rest, PrefixBatch.shared(prefix, 1)), after)
