"""Adapters trained in one batch: each ends as it does alone."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_base, random_model, word_tokenizer
from test_compare import recipe_file as recipe_file
from test_peft_parity import LEARNT, make_adapter
from test_train import Killed, fresh, rows
from transformers import GPT2LMHeadModel, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from ptkit.comparison.grid import run_grid
from ptkit.errors import UserError
from ptkit.methods import Adapter
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.dropout import dropout_of
from ptkit.training.adapter_trainer import AdapterTrainer, Job, StepReport
from ptkit.training.cell import Cell
from ptkit.training.experiment import prepare
from ptkit.training.loop import fit
from ptkit.training.run import run_cells

#: Different methods, lengths, learning rates, seeds, batch sizes, schedules and data.
VARIED = [
    ("prefix", 5, 1e-2, {"batch_size": 2}),
    ("prompt", 3, 5e-2, {"batch_size": 3, "schedule": "cosine"}),
    ("prefix-mlp", 4, 1e-3, {"batch_size": 1, "warmup_steps": 7}),
    ("p-tuning-lstm", 6, 1e-3, {"batch_size": 2, "steps": 20}),
    ("prefix", 2, 3e-2, {"batch_size": 4, "schedule": "constant"}),
]


def job(base: Base, which: int, run: Path, **changes) -> Job:
    method, length, rate, own = VARIED[which]
    torch.manual_seed(which)
    adapter = make_adapter(base, {**LEARNT[method], "num_virtual_tokens": length})
    common = {"steps": 50, "warmup_steps": 2, "eval_every": 10, "save_every": 15}
    settings = TrainSection(**{**common, **own, **changes})
    return Job(
        adapter, rows(20, which), rows(6, 50 + which), settings, rate, which, run / str(which)
    )


def parameters(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in adapter.trainable().items()}


@pytest.mark.parametrize("changes", [{}, {"gradient_accumulation": 2}, {"patience": 1}])
def test_each_ends_as_it_does_alone(family: str, changes: dict, tmp_path: Path) -> None:
    base = random_base(family)
    jobs = [job(base, i, tmp_path / "together", **changes) for i in range(len(VARIED))]
    together = fit(jobs)
    for i, progress in enumerate(together):
        alone = job(base, i, tmp_path / "alone", **changes)
        (expected,) = fit([alone])
        assert progress.step == expected.step
        assert progress.best_step == expected.best_step
        assert progress.tokens == expected.tokens
        for a, b in zip(progress.curve, expected.curve, strict=True):
            assert a == pytest.approx(b, abs=1e-5)
        ended = parameters(alone.adapter)
        for name, value in parameters(jobs[i].adapter).items():
            torch.testing.assert_close(value, ended[name], atol=1e-5, rtol=1e-5)
    stopped = {p.step for p in together}
    assert len(stopped) > 1, "some must finish before others for this to prove anything"
    assert all(p.grad is None for p in base.model.parameters())


def test_killed_together_resume_together_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: str, kill_at: int | None) -> list[dict[str, torch.Tensor]] | None:
        def report(step: StepReport) -> None:
            if step.step == kill_at:
                raise Killed

        base = random_base("llama")
        jobs = [job(base, i, tmp_path / folder) for i in range(3)]
        jobs[1] = Job(**{**vars(jobs[1]), "report": report})
        try:
            fit(jobs)
        except Killed:
            return None
        return [parameters(j.adapter) for j in jobs]

    whole = run("whole", None)
    for at in (5, 16, 44):
        assert run("cut", at) is None
    for ended, expected in zip(run("cut", None), whole, strict=True):
        for name, value in ended.items():
            assert torch.equal(value, expected[name]), name


def test_killed_between_their_saves_they_go_on_from_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that share a batch are rounded together, so all have to be at one step."""
    saves = 0
    saved = AdapterTrainer.save

    def run(folder: str, kill_at: int | None) -> list[dict[str, torch.Tensor]]:
        nonlocal saves
        saves = 0

        def save(self: AdapterTrainer, random: Any) -> None:
            nonlocal saves
            saves += 1
            if saves == kill_at:
                raise Killed
            saved(self, random)

        monkeypatch.setattr(AdapterTrainer, "save", save)
        base = random_base("llama")
        jobs = [job(base, i, tmp_path / folder, steps=20 + 10 * (i > 0)) for i in range(3)]
        fit(jobs)
        return [parameters(j.adapter) for j in jobs]

    def steps(folder: str) -> list[list[int]]:
        places = [tmp_path / folder / str(i) for i in range(3)]
        return [sorted(int(p.name[-7:]) for p in own.glob("checkpoint-*")) for own in places]

    whole = run("whole", None)
    assert steps("whole") == [[20], [30], [30]]  # one checkpoint is left of each
    for kill_at, there in ((3, [[15], [15], []]), (5, [[15, 20], [15], [15]])):
        with pytest.raises(Killed):
            run("cut", kill_at)
        assert steps("cut") == there
    for ended, expected in zip(run("cut", None), whole, strict=True):
        for name, value in ended.items():
            assert torch.equal(value, expected[name]), name
    assert steps("cut") == steps("whole")


def test_shares_of_the_time_add_up_to_it(tmp_path: Path) -> None:
    base = random_base("gpt2")
    jobs = [job(base, i, tmp_path) for i in range(3)]
    clock = time.perf_counter()
    shares = sum(p.seconds for p in fit(jobs))
    assert 0.3 * (time.perf_counter() - clock) < shares <= time.perf_counter() - clock


def with_dropout(setting: str) -> Base:
    """A small GPT-2 or BART-like model with one kind of dropout."""
    if setting == "layerdrop":
        config = OPTConfig(
            vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.0,
            attention_dropout=0.0, layerdrop=0.5, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return frozen_base(OPTForCausalLM(config), word_tokenizer(), setting)
    if setting == "attention_dropout":
        llama = random_model("llama").config
        llama.attention_dropout = 0.1
        return frozen_base(LlamaForCausalLM(llama), word_tokenizer(), setting)
    gpt2 = random_model("gpt2").config
    setattr(gpt2, setting, 0.1)
    return frozen_base(GPT2LMHeadModel(gpt2), word_tokenizer(), setting)


SETTINGS = ["resid_pdrop", "embd_pdrop", "attn_pdrop", "attention_dropout", "layerdrop"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_seeds_do_not_share_batches_on_a_base_with_dropout(
    setting: str, recipe_file: Path, tmp_path: Path
) -> None:
    prompt = "{kind: prompt_tuning, num_virtual_tokens: 2, start: text, start_text: w1}"
    methods = f"methods=[{{kind: base}}, {prompt}]"
    recipe = [methods, "train.together=2", "retention=null"]
    base = with_dropout(setting)
    with pytest.raises(UserError, match="has dropout") as error:
        run_grid(load_recipe(recipe_file, recipe), tmp_path / "out", base=base)
    assert setting in str(error.value)
    assert not (tmp_path / "out").exists()
    loaded = load_recipe(recipe_file, recipe)
    experiment = prepare(loaded, base)
    cells = [Cell(loaded.recipe.methods[1], seed, tmp_path / str(seed)) for seed in (0, 1)]
    with pytest.raises(UserError, match="has dropout"):
        run_cells(experiment, cells)
    alone = [*recipe[:1], "train.together=1", *recipe[2:], "seeds=[0]"]
    run_grid(load_recipe(recipe_file, alone), tmp_path / "alone", base=base)


def test_bases_without_dropout_are_said_to_have_none(family: str) -> None:
    assert not dropout_of(random_base(family).model)


def test_what_cannot_share_a_batch_is_refused(tmp_path: Path) -> None:
    base = random_base("gpt2")
    one, other = job(base, 0, tmp_path), job(base, 1, tmp_path)
    with pytest.raises(UserError, match="same `autocast`"):
        fit([one, job(base, 1, tmp_path, autocast="bf16")])
    with pytest.raises(UserError, match="one base model"):
        fit([one, job(random_base("gpt2"), 1, tmp_path)])
    lora = fresh("lora", base)
    with pytest.raises(UserError, match="changes the base's weights"):
        fit([one, Job(**{**vars(other), "adapter": lora})])
