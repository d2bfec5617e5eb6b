"""Long rows behind a prefix train without a mask of tokens x tokens, with the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_paged_batch import _LLAMA
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from ptkit.data.encoded import IGNORED
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime import attention, parted_attention
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.forward import supervised_losses
from ptkit.runtime.parted_attention import prefixed_causal

TOKENS = 560


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3), tokens=st.integers(1, 70), virtual=st.integers(1, 40),
    kv_heads=st.integers(1, 2), times=st.integers(1, 3), scale=st.sampled_from([None, 0.2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]), seed=st.integers(0, 999),
)  # fmt: skip
def test_two_parts_have_the_outputs_and_gradients_of_one_mask(
    rows: int, tokens: int, virtual: int, kv_heads: int, times: int, scale: float | None,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 8).to(dtype).requires_grad_()

    query = drawn(rows, kv_heads * times, tokens)
    keys, values = drawn(rows, kv_heads, tokens), drawn(rows, kv_heads, tokens)
    front = drawn(kv_heads, virtual), drawn(kv_heads, virtual)
    learnt = (query, keys, values, *front)
    of_rows = tuple(tensor.expand(rows, *tensor.shape) for tensor in front)
    output = prefixed_causal(query, keys, values, of_rows, scale)
    whole = [
        torch.cat([x, y], dim=2).repeat_interleave(times, dim=1)
        for x, y in zip(of_rows, (keys, values), strict=True)
    ]
    mask = torch.ones(tokens, virtual + tokens, dtype=torch.bool).tril(virtual)
    expected = scaled_dot_product_attention(
        query.float(), whole[0].float(), whole[1].float(), attn_mask=mask, scale=scale
    ).transpose(1, 2)
    near: dict[str, float] = {"atol": 2e-5, "rtol": 1e-4}
    if dtype is torch.bfloat16:
        near = {"atol": 0.1, "rtol": 0.05}
    torch.testing.assert_close(output.float(), expected, **near)
    upstream = torch.randn_like(expected)
    found = torch.autograd.grad(output, learnt, upstream.to(dtype))
    for one, other in zip(found, torch.autograd.grad(expected, learnt, upstream), strict=True):
        torch.testing.assert_close(one.float(), other.float(), **near)


class Largest(TorchDispatchMode):
    """The most values of a tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                self.most = max(self.most, tensor.numel())
        return result


@pytest.fixture(params=["llama", "qwen3"])
def base(request: pytest.FixtureRequest) -> Base:
    torch.manual_seed(0)
    options = {**_LLAMA, "max_position_embeddings": 1024, "head_dim": 16}
    made = LlamaConfig if request.param == "llama" else Qwen3Config
    model = AutoModelForCausalLM.from_config(made(**options)).eval()
    return frozen_base(model, word_tokenizer(), request.param)


def step(base: Base, lengths: list[int], checkpointing: bool) -> tuple[torch.Tensor, Any, int]:
    """Losses of right-padded rows behind one prefix, its gradients, and the largest tensor."""
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(s.kv_heads, 7, width, generator=generator).requires_grad_()
        for s in base.layout for width in (s.key_dim, s.value_dim)
    ]  # fmt: skip
    prefix = KVPrefix(tuple(tensors[::2]), tuple(tensors[1::2]))
    ids = torch.randint(1, 90, (len(lengths), TOKENS), generator=generator)
    mask = torch.arange(TOKENS) < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~mask, IGNORED)
    labels[:, :-40] = IGNORED
    labels[0, :30] = ids[0, :30]
    model: Any = base.model
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    batch = PrefixBatch.shared(prefix, len(lengths))
    with Largest() as largest:
        losses = supervised_losses(model, ids, mask.long(), labels, batch)
        losses.sum().backward()
    return losses.detach(), [tensor.grad for tensor in tensors], largest.most


@pytest.mark.parametrize("lengths", [[TOKENS], [TOKENS, 555, 540]])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_long_step_builds_no_mask_of_tokens_by_tokens(
    base: Base, lengths: list[int], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, gradients, most = step(base, lengths, checkpointing)
    assert most < TOKENS * TOKENS
    for module in (attention, parted_attention):
        monkeypatch.setattr(module, "LEAST_TOKENS", 10**9)
    expected, their_gradients, with_mask = step(base, lengths, checkpointing)
    assert with_mask >= TOKENS * TOKENS
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, their_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
