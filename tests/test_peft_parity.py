"""The idea proved against PEFT: a compiled KV prefix is the same function, with its gradients.

Same parameters in both; logits within 1e-5, gradients within 1e-4 relative, in float32.
"""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import VOCABULARY, random_base, random_model
from peft import get_peft_model

from ptkit.methods import ADAPTERS, Adapter, Demonstrations
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import IGNORED, all_logits, supervised_logits, token_losses
from ptkit.runtime.generation import generate

LEARNT = {
    "prefix": {"kind": "prefix_tuning", "num_virtual_tokens": 5},
    "prefix-mlp": {
        "kind": "prefix_tuning", "num_virtual_tokens": 5, "reparameterize": True,
        "encoder_hidden_size": 24,
    },
    "prompt": {"kind": "prompt_tuning", "num_virtual_tokens": 5},
    "p-tuning-mlp": {"kind": "p_tuning", "num_virtual_tokens": 5, "encoder_hidden_size": 24},
    "p-tuning-lstm": {
        "kind": "p_tuning", "num_virtual_tokens": 5, "encoder": "lstm", "encoder_hidden_size": 24,
    },
}  # fmt: skip


def make_adapter(base: Base, settings: dict, *, start: str = "random") -> Adapter:
    cls = ADAPTERS[settings["kind"]]
    section = cls.section_class(**{**settings, "start": start})
    return cls.create(section, base, Demonstrations(["w1 w2 w3", "w4 w5"], seed=0))


def peft_twin(family: str, adapter: Adapter):
    """PEFT's own model with the adapter's encoder parameters copied in."""
    model = get_peft_model(random_model(family), copy.deepcopy(adapter.config))
    encoder = model.prompt_encoder["default"]
    encoder.load_state_dict(adapter.encoder.state_dict())
    return model, encoder


def rows_of(lengths: list[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("method", LEARNT)
def test_logits_and_gradients_equal_peft(family: str, method: str) -> None:
    torch.manual_seed(3)
    base = random_base(family)
    adapter = make_adapter(base, LEARNT[method])
    peft_model, encoder = peft_twin(family, adapter)
    ids = torch.tensor(rows_of([9, 9, 9]))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :4] = IGNORED

    theirs = peft_model(input_ids=ids, attention_mask=mask, labels=labels)
    theirs.loss.backward()

    batch = PrefixBatch.shared(adapter.prefix(), len(ids))
    logits, targets = supervised_logits(base.model, ids, mask, labels, batch)
    loss = token_losses(logits, targets).mean()
    loss.backward()
    ours = all_logits(base.model, ids, mask, batch)

    their_logits = theirs.logits[:, -ids.shape[1] :]
    torch.testing.assert_close(ours, their_logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, theirs.loss, atol=1e-5, rtol=1e-5)
    their_gradients = {n: p.grad for n, p in encoder.named_parameters()}
    compared = 0
    for name, parameter in adapter.encoder.named_parameters():
        difference = (parameter.grad - their_gradients[name]).norm()
        assert difference <= 1e-4 * their_gradients[name].norm() + 1e-9, name
        compared += 1
    assert compared >= 1
    assert all(p.grad is None for p in base.model.parameters())


@pytest.mark.parametrize("method", LEARNT)
def test_greedy_tokens_equal_peft(family: str, method: str) -> None:
    torch.manual_seed(4)
    base = random_base(family)
    adapter = make_adapter(base, LEARNT[method])
    peft_model, _ = peft_twin(family, adapter)
    peft_model.eval()
    prefix = adapter.prefix().detach()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    seen = set()
    for prompt in rows_of([7, 7, 7]):
        theirs = peft_model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, 7, dtype=torch.long),
            **options,
        )[0, 7:].tolist()
        (ours,) = generate(base.model, [prompt], PrefixBatch.shared(prefix, 1), **options)
        assert ours == theirs
        seen.update(ours)
    assert len(seen) > 1, "a model that repeats one token would prove nothing"


@pytest.mark.parametrize("method", LEARNT)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_left_padded_rows_equal_their_solo_runs(family: str, method: str, options: dict) -> None:
    torch.manual_seed(5)
    base = random_base(family)
    prefix = make_adapter(base, LEARNT[method]).prefix().detach()
    prompts = rows_of([3, 8, 5])
    settings = dict(pad_token_id=0, max_new_tokens=8, do_sample=False, **options)
    together = generate(base.model, prompts, PrefixBatch.shared(prefix, 3), **settings)
    alone = [
        generate(base.model, [p], PrefixBatch.shared(prefix, 1), **settings)[0] for p in prompts
    ]
    assert together == alone


@pytest.mark.parametrize("method", LEARNT)
def test_padding_on_either_side_leaves_losses_unchanged(family: str, method: str) -> None:
    torch.manual_seed(6)
    base = random_base(family)
    prefix = make_adapter(base, LEARNT[method]).prefix().detach()
    (row,) = rows_of([6])
    pad = [0] * 4

    def loss(ids: list[int], mask: list[int]) -> torch.Tensor:
        ids_, mask_ = torch.tensor([ids]), torch.tensor([mask])
        labels = ids_.masked_fill(mask_ == 0, IGNORED)
        labels[:, ids.index(row[0])] = IGNORED  # nothing precedes the first token
        batch = PrefixBatch.shared(prefix, 1)
        return token_losses(*supervised_logits(base.model, ids_, mask_, labels, batch)).mean()

    plain = loss(row, [1] * 6)
    torch.testing.assert_close(loss(pad + row, [0] * 4 + [1] * 6), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss(row + pad, [1] * 6 + [0] * 4), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", LEARNT)
def test_gradient_checkpointing_changes_neither_loss_nor_gradient(family: str, method: str) -> None:
    torch.manual_seed(7)
    base = random_base(family)
    adapter = make_adapter(base, LEARNT[method])
    ids = torch.tensor(rows_of([8, 8]))
    mask = torch.ones_like(ids)

    def step() -> tuple[torch.Tensor, list[torch.Tensor]]:
        adapter.zero_grad()
        batch = PrefixBatch.shared(adapter.prefix(), 2)
        logits, targets = supervised_logits(base.model, ids, mask, ids, batch)
        loss = token_losses(logits, targets).mean()
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in adapter.trainable().values()]

    base.model.train()
    plain_loss, plain = step()
    base.model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients = step()
    torch.testing.assert_close(loss, plain_loss, atol=0, rtol=0)
    for ours, expected in zip(gradients, plain, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-7, rtol=1e-5)


def test_adapter_off_restores_base_logits_bit_for_bit(family: str) -> None:
    base = random_base(family)
    ids = torch.tensor(rows_of([9, 9]))
    before = base.model(input_ids=ids).logits
    prefix = make_adapter(base, LEARNT["prefix"]).prefix().detach()
    batch = PrefixBatch.shared(prefix, 2)
    on = all_logits(base.model, ids, torch.ones_like(ids), batch)
    after = base.model(input_ids=ids).logits
    assert not torch.allclose(on, before)
    assert torch.equal(after, before)
