"""`ptkit search-prompt`: a text found word by word, scored as the text prompt it becomes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_base
from test_cli import ptkit, refused
from test_encoder_decoder import random_pair
from test_train import rows

from ptkit.data.encoded import EncodedExample
from ptkit.errors import ModelError, UserError
from ptkit.methods import Demonstrations, create_adapter
from ptkit.methods.catalogue import method_section
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import collate, supervised_losses
from ptkit.training.search_prompt import search_prompt

TRAIN, VALIDATION = rows(40, 1), rows(9, 2)


def loss_behind(base: Base, text: str, judged: list[EncodedExample]) -> float:
    """With the text as a `text_prompt` of a recipe, row by row."""
    section = method_section(
        {"kind": "text_prompt", "instruction": text, "separator": "", "examples": 0}
    )
    prefix = create_adapter(section, base, Demonstrations((), 0)).prefix()
    with torch.no_grad():
        losses = [
            supervised_losses(
                base.model, **collate([row], base), batch=PrefixBatch.shared(prefix, 1)
            )
            for row in judged
        ]
    return float(torch.cat(losses).mean())


def test_what_is_found_scores_as_said_and_better_than_what_it_began_with(family: str) -> None:
    base = random_base(family)
    told: list[tuple[str, float]] = []
    found = search_prompt(
        base, TRAIN, VALIDATION, "w1 w2 w3", rounds=2, candidates=8, rows=40,
        report=lambda text, loss: told.append((text, loss)),
    )  # fmt: skip
    assert found.loss < found.losses[0] - 0.01
    assert list(found.losses) == sorted(found.losses, reverse=True)
    assert told[-1] == (found.text, found.loss)
    assert len(found.token_ids) == 3
    assert found.losses[0] == pytest.approx(loss_behind(base, "w1 w2 w3", TRAIN), abs=1e-4)
    assert found.loss == pytest.approx(loss_behind(base, found.text, TRAIN), abs=1e-4)
    assert found.validation_loss == pytest.approx(
        loss_behind(base, found.text, VALIDATION), abs=1e-4
    )


def test_one_position_with_all_tokens_finds_the_best_token() -> None:
    """With every token tried, greedy search of one token is exhaustive search."""
    base = random_base("gpt2")
    rows = TRAIN[:10]
    found = search_prompt(base, rows, VALIDATION, "w1", rounds=1, candidates=200, rows=10)
    words = [f"w{i}" for i in range(1, 96)]
    losses = [loss_behind(base, word, rows) for word in words]
    assert found.text == words[losses.index(min(losses))]
    assert found.scored == 95  # the one it began with, and all others but the special ones


def test_the_same_seed_finds_the_same_and_the_base_is_left_alone() -> None:
    base = random_base("llama")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = base.model(ids).logits
    first, again = (
        search_prompt(base, TRAIN, VALIDATION, "w1 w2", candidates=4, rows=8, seed=3)
        for _ in range(2)
    )
    assert first == again
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, before)
    assert all(p.grad is None for p in base.model.parameters())


def test_what_cannot_be_searched_is_refused() -> None:
    with pytest.raises(UserError, match="needs a text to begin with"):
        search_prompt(random_base("gpt2"), TRAIN, VALIDATION, "")
    with pytest.raises(ModelError, match="encoder-decoder"):
        search_prompt(random_pair("bart"), TRAIN, VALIDATION, "w1")


def test_the_command_prints_a_method_for_a_recipe(tmp_path: Path) -> None:
    options = (
        "search-prompt", "message-routing", "--rounds", "1", "--candidates", "2", "--text", "about",
        "--set", "task.data.limits={train: 20, validation: 4, test: 2}",
    )  # fmt: skip
    four = (*options, "--rows", "4")
    found = json.loads(ptkit(*four, "--json", cwd=tmp_path).stdout)
    assert found["loss"] <= found["losses"][0]
    shown = ptkit(*four, cwd=tmp_path)
    assert f"instruction: {json.dumps(found['text'])}" in shown.stdout
    assert "on 4 training rows" in shown.stdout
    few = ptkit(*options, "--rows", "100", "--json", cwd=tmp_path)
    assert json.loads(few.stdout)["rows"] == 20
    assert "prompts scored; loss per target token" in shown.stdout
    headed = refused("search-prompt", "message-routing-minilm", cwd=tmp_path)
    assert "models that answer in words" in headed
    assert "no recipe called" in refused("search-prompt", "nothing", cwd=tmp_path)
