"""A prefix whose lower layers stay at their start."""

from __future__ import annotations

import pytest
import torch
from conftest import random_base
from pydantic import ValidationError

from ptkit.errors import ModelError
from ptkit.methods import Demonstrations
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.methods.prefix_tuning.settings import PrefixTuningSection
from ptkit.runtime.compile import compile_tokens
from ptkit.runtime.forward import supervised_logits, token_losses

TEXT = "w5 w6 w7 w8"


def make(family: str, **settings: object) -> PrefixTuning:
    section = PrefixTuningSection(
        kind="prefix_tuning", num_virtual_tokens=4, start="text", start_text=TEXT, **settings
    )
    torch.manual_seed(0)
    return PrefixTuning.create(section, random_base(family), Demonstrations((), 0))


def step(adapter: PrefixTuning) -> None:
    """One gradient step."""
    from ptkit.prefix_batch import PrefixBatch

    ids = torch.tensor([[1, 2, 3, 4]])
    batch = PrefixBatch.shared(adapter.prefix(), 1)
    token_losses(
        *supervised_logits(adapter.model, ids, torch.ones_like(ids), ids, batch)
    ).sum().backward()
    torch.optim.SGD(adapter.trainable().values(), lr=0.1).step()


@pytest.mark.parametrize("reparameterize", [False, True])
@pytest.mark.parametrize("trained", [1, 2, 3])
def test_lower_layers_keep_the_real_keys_and_values_of_the_start(
    family: str, trained: int, reparameterize: bool
) -> None:
    adapter = make(family, trained_layers=trained, reparameterize=reparameterize)
    real = compile_tokens(adapter.model, torch.tensor([5, 6, 7, 8]))
    before = adapter.prefix()
    for side in ("keys", "values"):
        for mine, theirs in zip(getattr(before, side), getattr(real, side), strict=True):
            torch.testing.assert_close(mine, theirs)
    for _ in range(2):  # an MLP that starts at zero moves its last layer first
        step(adapter)
    after = adapter.prefix()
    for side in ("keys", "values"):
        changed = [
            not torch.equal(a, b)
            for a, b in zip(getattr(after, side), getattr(before, side), strict=True)
        ]
        assert changed == [False] * (3 - trained) + [True] * trained


def test_only_trained_layers_are_counted_and_the_file_holds_all(family: str) -> None:
    whole, upper = make(family, learn_embeddings=False), make(family, trained_layers=1)
    assert upper.trainable_parameters * 3 == whole.trainable_parameters
    files = upper.files()
    assert files.config["num_layers"] == 3
    assert files.tensors["prompt_embeddings"].shape == whole.flat().shape
    read = PrefixTuning.from_files(files, upper.section, upper.base)
    torch.testing.assert_close(read.flat(), upper.flat())
    assert read.trainable_parameters == upper.trainable_parameters


def test_impossible_depths_are_refused(family: str) -> None:
    with pytest.raises(ModelError, match=r"`trained_layers` is 4, but .* has 3 layers"):
        make(family, trained_layers=4)
    with pytest.raises(ValidationError, match="`start: random` has none"):
        PrefixTuningSection(kind="prefix_tuning", start="random", trained_layers=2)
