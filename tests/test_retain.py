"""`train.retain`: a second target keeps the adapted model near its base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_base
from test_cli import ptkit, refused
from test_train import TRAINED, Killed, fresh, rows

from ptkit.errors import UserError
from ptkit.methods.catalogue import method_section
from ptkit.recipe.schema import RetainSection, RetentionSection, TrainSection
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.forward import all_logits
from ptkit.runtime.model_names import TINY_EN
from ptkit.training.adapter_trainer import Job
from ptkit.training.loop import fit
from ptkit.training.retain import (
    WINDOW,
    Retainer,
    general_windows,
    require_retainable,
    written_by_base,
)

KEEPING = [name for name in TRAINED if name != "full"]


def text(base: Base, pieces: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randint(1, 95, (pieces, WINDOW), generator=generator)


def moved(name: str, base: Base):
    """An adapter away from its start, so that it differs from the base."""
    adapter = fresh(name, base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return adapter


@pytest.mark.parametrize("name", KEEPING)
def test_divergence_is_kl_to_the_base_with_its_gradient(name: str) -> None:
    base = random_base("llama")
    adapter = moved(name, base)
    windows = text(base)
    section = RetainSection(weight=1.0, tokens=128)
    retainer = Retainer(adapter, section, windows, seed=3)
    adapter.model.train()
    ours = retainer.divergence(step=4)
    ours.backward()
    gradients = [p.grad.clone() for p in adapter.trainable().values()]
    adapter.zero_grad()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    ids = windows[order][[8, 9]]  # two pieces a step, the fifth step
    adapter.model.eval()
    mask = torch.ones_like(ids)
    compiled = adapter.compiled()
    batch = None if compiled is None else compiled.for_rows(ids, mask)
    adapted = torch.distributions.Categorical(logits=all_logits(base.model, ids, mask, batch))
    with torch.no_grad(), adapter.off():
        plain = torch.distributions.Categorical(logits=all_logits(base.model, ids, mask, None))
    wanted = torch.distributions.kl_divergence(plain, adapted).mean()
    wanted.backward()
    assert float(ours.detach()) > 1e-4
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)
    for mine, parameter in zip(gradients, adapter.trainable().values(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, atol=1e-6, rtol=1e-3)
    assert all(p.grad is None for p in base.model.parameters() if not p.requires_grad)
    adapter.close()


def test_an_automatic_weight_goes_towards_its_target_and_no_further() -> None:
    base = random_base("gpt2")
    section = RetainSection(target=0.1)
    retainer = Retainer(fresh("prefix_tuning", base), section, text(base), 0)
    assert retainer.first_weight == 1.0
    assert retainer.next_weight(1.0, 0.5) == pytest.approx(1.1)
    assert retainer.next_weight(1.0, 0.0) == pytest.approx(0.9)
    assert retainer.next_weight(1.0, 0.1) == pytest.approx(1.0)
    assert retainer.next_weight(1e4, 9.0) == 1e4
    assert retainer.score(2.0, 0.15) == pytest.approx(2.0)
    assert retainer.score(2.0, 0.25) > 2.9
    fixed = Retainer(fresh("prefix_tuning", base), RetainSection(weight=2.0), text(base), 0)
    assert fixed.next_weight(2.0, 9.0) == fixed.first_weight == 2.0
    assert fixed.score(1.0, 0.5) == pytest.approx(2.0)


def trained(
    name: str, run: Path, kill_at: int | None = None, retain: object = None, steps: int = 24
):
    def report(step) -> None:
        if step.step == kill_at:
            raise Killed

    base = random_base("llama")
    adapter = fresh(name, base)
    settings = TrainSection(
        steps=24, batch_size=4, warmup_steps=2, eval_every=4, save_every=5, retain=retain
    )
    general = text(base) if retain else None
    torch.manual_seed(0)
    try:
        (progress,) = fit(
            [Job(adapter, rows(30, 1), rows(8, 2), settings, 2e-2, 0, run, report, general)]
        )
    except Killed:
        return None
    return adapter, progress


@pytest.mark.parametrize("name", ["prefix_tuning", "prompt_tuning", "lora"])
def test_training_with_it_stays_nearer_and_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    retain = {"target": 0.02, "tokens": 128}
    plain, _ = trained(name, tmp_path / "plain")
    near, progress = trained(name, tmp_path / "near", retain=retain)
    fixed = RetainSection(weight=1.0, tokens=512)
    far, close = (
        float(Retainer(adapter, fixed, text(adapter.base), 0).divergence(0))
        for adapter in (plain, near)
    )
    assert close < 0.85 * far
    assert progress.curve[-1]["retain_weight"] > 1, "it had to be raised"
    assert near.base.model.training is False
    assert trained(name, tmp_path / "cut", kill_at=13, retain=retain) is None
    resumed, again = trained(name, tmp_path / "cut", retain=retain)
    assert again.curve == progress.curve
    for key, value in near.trainable().items():
        assert torch.equal(value, resumed.trainable()[key])


def test_the_base_writes_its_own_text_and_leaves_the_generator_alone() -> None:
    base = load_base(TINY_EN, device="cpu")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    texts = written_by_base(base, count=6)
    assert torch.equal(torch.rand(3), expected)
    assert texts.shape == (6, WINDOW)
    assert torch.equal(texts, written_by_base(base, count=6))
    assert not torch.equal(texts, written_by_base(base, count=6, seed=1))
    logits = base.model(input_ids=texts).logits[:, :-1].log_softmax(-1)
    likely = logits.gather(-1, texts[:, 1:, None]).mean()
    noise = torch.randint(2, 8192, texts.shape)
    unlikely = base.model(input_ids=noise).logits[:, :-1].log_softmax(-1)
    assert likely > unlikely.gather(-1, noise[:, 1:, None]).mean() + 3


def test_text_that_forgetting_is_measured_on_is_refused(tmp_path: Path) -> None:
    base = random_base("gpt2")
    (tmp_path / "own.txt").write_text(" ".join(f"w{i % 90 + 1}" for i in range(500)))
    measured = RetentionSection(text=["general-en", "own.txt"])
    with pytest.raises(UserError, match="measured on text that was not trained on"):
        general_windows(RetainSection(text="own.txt"), measured, base, tmp_path)
    with pytest.raises(UserError, match="is what forgetting is measured on"):
        general_windows(RetainSection(text="general-en"), None, base, tmp_path)
    pieces = general_windows(RetainSection(text="own.txt"), RetentionSection(), base, tmp_path)
    assert pieces.shape[1] == WINDOW
    with pytest.raises(UserError, match="`full` changes the base's weights for good"):
        require_retainable(RetainSection(), method_section({"kind": "full"}))


def test_the_base_writes_no_text_for_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptkit.training.retain.written_by_base", None)
    said = refused("train", "quickstart", "--set", "train.retain={target: 0.02}",
                   "--set", "methods.0.num_virtual_tokens=500", cwd=tmp_path)  # fmt: skip
    assert "too few positions" in said


def test_from_the_command_line(tmp_path: Path) -> None:
    settings = [
        "--set", "train.steps=12", "--set", "train.eval_every=6", "--set", "train.batch_size=4",
        "--set", "task.data.limits.train=40", "--set", "task.data.limits.validation=8",
        "--set", "task.data.limits.test=4", "--set", "retention.max_tokens=600",
        "--set", "task.max_target_tokens=16", "--set", "train.retain={target: 0.02}",
    ]  # fmt: skip
    done = ptkit("train", "quickstart", *settings, "--json", cwd=tmp_path)
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["retention"]["drift"] >= 0
    wrong = refused(
        "train", "quickstart", *settings[:-2], "--set", "train.retain.text=general-en",
        cwd=tmp_path,
    )  # fmt: skip
    assert "is what forgetting is measured on" in wrong
