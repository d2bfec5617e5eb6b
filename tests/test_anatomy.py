"""What `ptkit inspect` says of an adapter: the attention its virtual tokens get."""

from __future__ import annotations

import pytest
import torch
from conftest import random_base
from test_peft_parity import LEARNT, make_adapter

from ptkit.evaluation.anatomy import attention_shares
from ptkit.runtime.attention_choice import attention_of, set_attention
from ptkit.runtime.compile import compile_tokens

TEXT = "w1 w2 w3 w4 w5"


def test_shares_of_real_tokens_are_those_of_the_base_reading_them(family: str) -> None:
    """A prefix of real tokens gets the attention they get as text, from the tokens after them."""
    base = random_base(family)
    first = [7, 8, 9]
    shares = attention_shares(compile_tokens(base.model, torch.tensor(first)), base, TEXT)
    set_attention(base.model, "eager")
    with torch.no_grad():
        weights = base.model(
            torch.tensor([[*first, 1, 2, 3, 4, 5]]), output_attentions=True
        ).attentions
    expected = torch.stack([w[0, :, 3:, :3].mean((0, 1)) for w in weights]).mean(0)
    torch.testing.assert_close(torch.tensor(shares), expected, atol=1e-5, rtol=1e-4)
    assert 0.05 < sum(shares) < 0.95


@pytest.mark.parametrize("method", LEARNT)
def test_the_base_is_left_as_it_was(method: str) -> None:
    base = random_base("llama")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = base.model(ids).logits
        shares = attention_shares(make_adapter(base, LEARNT[method]).prefix().detach(), base, TEXT)
        assert torch.equal(base.model(ids).logits, before)
    assert attention_of(base.model) == "sdpa"
    assert len(shares) == 5
    assert all(0 <= share <= 1 for share in shares)


def test_an_infix_is_seen_by_the_last_token_only() -> None:
    base = random_base("llama")
    settings = {**LEARNT["prefix"], "position": "infix"}
    prefix = make_adapter(base, settings, start="vocabulary").prefix().detach()
    seen_by_one_of_five = attention_shares(prefix, base, TEXT)
    assert 0 < sum(seen_by_one_of_five) <= 0.2
