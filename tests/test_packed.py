"""Packed copies of weights: the same products, and nobody else's layers change."""

from __future__ import annotations

import importlib
import platform
from argparse import Namespace
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import Serving
from test_cli import refused
from test_engine import Asked
from torch import Tensor, nn

from ptkit.bank import AdapterBank
from ptkit.errors import UserError
from ptkit.runtime import packed
from ptkit.runtime.base_model import load_base
from ptkit.runtime.model_names import TINY_EN
from ptkit.runtime.packed import PackedWeights, can_pack
from ptkit.serve import run
from ptkit.serve.engine import Engine

command = importlib.import_module("ptkit.cli.serve")
#: More than any model of these tests has.
_ALL = 2**32


class _Model(nn.Module):
    """What is asked of a model: its layers and its device."""

    device = torch.device("cpu")

    def __init__(self, *sizes: tuple[int, int], bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(*size, bias=bias) for size in sizes)
        self.requires_grad_(False)


def _pack(model: nn.Module, most: int = _ALL) -> PackedWeights:
    made = PackedWeights(model, most)
    if not can_pack(model):
        pytest.skip("products are packed on x86 CPUs alone")
    return made


@pytest.mark.parametrize("shape", [(1,), (2,), (32, 1), (3, 5), (128,), (129,), (400,), (0,), ()])
@pytest.mark.parametrize("size", [(512, 640), (64, 8192)])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_the_same(shape: tuple[int, ...], size: tuple[int, int], bias: bool) -> None:
    model = _Model(size, bias=bias)
    layer = model.layers[0]
    given = torch.randn(*shape, size[0])
    right = layer(given)
    made = _pack(model)
    assert made.nbytes == layer.weight.nbytes
    with torch.no_grad():
        found = layer(given)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5)
    assert found.shape == right.shape
    made.close()
    assert "forward" not in layer.__dict__
    assert made.nbytes == 0
    assert torch.equal(layer(given), right)


def test_strides_and_other_types_are_read() -> None:
    model = _Model((512, 640))
    layer = model.layers[0]
    given = torch.randn(512, 9).T
    doubled = given.double()
    right = layer(given)
    made = _pack(model)
    with torch.no_grad():
        torch.testing.assert_close(layer(given), right, rtol=1e-5, atol=1e-5)
        with pytest.raises(RuntimeError):  # as an unpacked layer does
            layer(doubled)
    made.close()


def test_a_weight_that_changes_counts_at_once() -> None:
    model = _Model((512, 640))
    layer = model.layers[0]
    given = torch.randn(4, 512)
    made = _pack(model)
    with torch.no_grad():
        layer.weight.mul_(2)
        torch.testing.assert_close(
            layer(given), nn.functional.linear(given, layer.weight, layer.bias)
        )
        layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
        assert torch.equal(layer(given), layer.bias.expand(4, -1))
    made.close()


def test_a_copied_model_multiplies_with_its_own_weights() -> None:
    model = _Model((512, 640))
    given = torch.randn(4, 512)
    made = _pack(model)
    copied = deepcopy(model)
    with torch.no_grad():
        right = model.layers[0](given)
        torch.testing.assert_close(copied.layers[0](given), right, rtol=1e-5, atol=1e-5)
        copied.layers[0].weight.zero_()
        assert torch.equal(copied.layers[0](given), copied.layers[0].bias.expand(4, -1))
        assert torch.equal(model.layers[0](given), right)
    made.close()


def test_gradients_flow_as_before() -> None:
    model = _Model((512, 640))
    layer = model.layers[0]
    given = torch.randn(4, 512, requires_grad=True)
    made = _pack(model)
    layer(given).sum().backward()
    assert given.grad is not None
    torch.testing.assert_close(given.grad, layer.weight.sum(0).expand(4, -1), rtol=1e-4, atol=1e-4)
    made.close()


def test_the_widest_layers_come_first_and_bytes_are_kept_to() -> None:
    model = _Model((512, 640), (512, 1024), (16, 16), (512, 512))
    nbytes = [layer.weight.nbytes for layer in model.layers]
    made = _pack(model, nbytes[1] + nbytes[3])
    taken = ["forward" in layer.__dict__ for layer in model.layers]
    assert taken == [False, True, False, True]  # the second widest does not fit, another does
    assert made.nbytes == nbytes[1] + nbytes[3]
    made.close()


def test_what_learns_or_was_replaced_is_left_alone() -> None:
    model = _Model((512, 640), (512, 640))
    model.layers[0].requires_grad_(True)

    def forward(input: Tensor) -> Tensor:
        return input

    model.layers[1].forward = forward
    made = _pack(model)
    assert made.nbytes == 0
    assert model.layers[1].forward is forward
    made.close()
    assert model.layers[1].forward is forward


def test_no_other_machine_is_packed_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed.platform, "machine", lambda: "arm64")
    model = _Model((512, 640))
    assert PackedWeights(model, _ALL).nbytes == 0
    assert "forward" not in model.layers[0].__dict__


def test_an_engine_answers_the_same_and_unpacks_at_its_end() -> None:
    base = load_base(TINY_EN)
    bank, head = AdapterBank(base), base.model.get_output_embeddings()
    found = []
    for most in (0, _ALL):
        engine = Engine(bank, packed_bytes=most)
        assert ("forward" in head.__dict__) == (most > 0 and can_pack(base.model))
        asked = [Asked(bank, [None], [5 + n, 9, 200 + n, 41]) for n in range(6)]
        engine.submit([one.answer for one in asked])
        found.append([one.ids for one in asked])
        engine.close()
        assert "forward" not in head.__dict__
    assert found[0] == found[1]


@pytest.mark.parametrize("option", [[], ["--no-packed"]])
def test_a_server_packs_unless_it_is_told_not_to(
    option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def ended(app: Any, engine: Engine, *_: Any, **__: Any) -> None:
        head = engine.bank.base.model.get_output_embeddings()
        seen.append("forward" in head.__dict__)
        raise UserError("the server began")

    monkeypatch.setattr(run, "run_server", ended)
    said = refused("serve", *option, cwd=tmp_path)
    assert "the server began" in said
    assert seen == [not option and platform.machine() in ("x86_64", "AMD64")]
    assert "--engine vllm" not in said
    found = find_spec
    monkeypatch.setattr(
        command, "find_spec", lambda name: object() if name == "vllm" else found(name)
    )
    assert "vLLM is installed here" in refused("serve", *option, cwd=tmp_path)


def test_options_of_another_engine_are_refused(tmp_path: Path) -> None:
    assert "does not take --packed" in refused(
        "serve", "--engine", "vllm", "--no-packed", cwd=tmp_path
    )


def test_the_script_that_loads_a_server_counts_what_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`scripts/engine_beside_vllm.py`, on `ptkit serve` alone."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "scripts"))
    from engine_beside_vllm import WAYS, Server, load, report

    adapters = Path(__file__).resolve().parents[1] / "adapters"
    prompts = [[5, 6, 7], [8, 9, 10, 11]]
    speeds, firsts, faults = {}, {"ptkit": [], "other": []}, set()
    with Serving(adapters, tmp_path / "log") as server:
        asked = Server(server.url, ["facts-prefix", "tiny-en"])
        for way, options in WAYS.items():
            seen, took = load(asked, prompts, 2, 0.5, {"max_tokens": 3, **options})
            assert not seen.faults
            assert seen.tokens == 3 * len(seen.first)
            assert all((first > 0) == (way == "streamed") for first in seen.first)
            speeds["ptkit", way], speeds["other", way] = [seen.tokens / took], [seen.tokens]
            firsts["ptkit"], firsts["other"] = seen.first[:1], [2 * seen.first[0]]
        wrong, _ = load(Server(server.url, ["nobody"]), prompts, 1, 0.1, {"max_tokens": 3})
        faults = wrong.faults
    assert faults == {"status 404, 0 tokens"}
    given = Namespace(model="tiny-en", adapters=1, clients=2, rounds=1, seconds=0.5)
    told = report(given, speeds, firsts, faults)
    assert told["failures"] == ["status 404, 0 tokens"]
    assert told["ptkit / other"]["first token, p95"]["median"] == 0.5
    assert told["ptkit / other"]["greedy"]["median"] == pytest.approx(
        speeds["ptkit", "greedy"][0] / speeds["other", "greedy"][0], abs=1e-3
    )
