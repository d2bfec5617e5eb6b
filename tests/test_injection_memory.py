"""What is made for the layers of a pass does not outlive the pass."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from conftest import random_base
from test_peft_parity import LEARNT, make_adapter, rows_of

from ptkit.families.kinds import DECODER
from ptkit.families.model_under_test import small_model
from ptkit.families.shapes import FAMILIES, small
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.attention import Placed
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import all_logits
from ptkit.runtime.generation import generate


def windowed() -> Base:
    return small_model("gemma3", small(FAMILIES["gemma3"].config), DECODER).base()


def masks_made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[torch.Tensor]]:
    """The masks that are widened from now on, as long as they live."""
    made: list[weakref.ref[torch.Tensor]] = []
    own = Placed._joined

    def noted(self: Placed, *arguments) -> torch.Tensor:
        mask = own(self, *arguments)
        made.append(weakref.ref(mask))
        return mask

    monkeypatch.setattr(Placed, "_joined", noted)
    return made


@pytest.mark.parametrize(
    ("make", "options"),
    [(lambda: random_base("llama"), {"use_cache": False}), (windowed, {}),
     (windowed, {"num_beams": 2})],
    ids=["no cache", "windows", "beams"],
)  # fmt: skip
def test_masks_kept_do_not_grow_with_the_tokens_written(
    make: Callable[[], Base], options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    base = make()
    adapter = make_adapter(base, LEARNT["prefix"])
    made, alive = masks_made(monkeypatch), []
    hook = base.model.register_forward_hook(
        lambda *_: alive.append(sum(mask() is not None for mask in made)) or None
    )
    generate(
        base.model, [[i % 80 + 3 for i in row] for row in rows_of([5, 8])],
        PrefixBatch.shared(adapter.compiled(), 2), pad_token_id=0, eos_token_id=None,
        do_sample=False, max_new_tokens=20, **options,
    )  # fmt: skip
    hook.remove()
    assert len(alive) >= 20
    assert len(made) >= 20
    assert max(alive) <= 4  # one for every kind of layer, of this pass and the one before


def test_layers_of_a_pass_share_one_mask_and_a_checkpointed_one_finds_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(1)
    base = random_base("llama")
    adapter = make_adapter(base, LEARNT["prefix"])
    ids = torch.tensor(rows_of([6, 6]))
    batch = PrefixBatch.shared(adapter.prefix(), 2)
    made = masks_made(monkeypatch)
    base.model.train()
    base.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = all_logits(base.model, ids, torch.ones_like(ids), batch).sum()
    loss.backward()
    del loss
    gc.collect()
    assert len(made) == 1
    assert made[0]() is None
