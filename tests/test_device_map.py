"""A base over the devices of one process, and ways of spreading one that are refused."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import random_base, random_model, word_tokenizer
from safetensors.torch import load_file
from test_compare import recipe_file as recipe_file
from transformers import DynamicCache

import ptkit
from ptkit.bank import AdapterBank
from ptkit.errors import ModelError, RecipeError, UserError
from ptkit.formats.adapter_folder import WEIGHTS
from ptkit.launched import require_supported_launch
from ptkit.methods import Demonstrations, create_adapter
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import method_section
from ptkit.runtime.base_model import Base, frozen_base, load_base
from ptkit.runtime.cache import prefilled_cache
from ptkit.runtime.forward import all_logits
from ptkit.runtime.generation import generate
from ptkit.runtime.placement import is_spread, layer_devices, own_part, placement, whole

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of three layers."""
    folder = tmp_path_factory.mktemp("llama")
    random_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


#: The embeddings and the first layer in memory, the rest on the disk.
ON_DISK = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.layers.2": "disk", "model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


@pytest.fixture(scope="module")
def offloaded(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    away = tmp_path_factory.mktemp("offloaded")
    return load_base(folder, device_map=ON_DISK, offload_folder=str(away))


def adapter_on(base: Base, kind: str = "prefix_tuning") -> Any:
    torch.manual_seed(0)
    section = method_section({"kind": kind, "num_virtual_tokens": 3})
    return create_adapter(section, base, Demonstrations(("w1 w2 w3",), 0))


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning"])
def test_an_offloaded_base_learns_and_answers_as_one_in_memory(
    kind: str, folder: Path, offloaded: Base, recipe_file: Path, tmp_path: Path
) -> None:
    """Half of its weights come from the disk, for each pass anew."""
    assert any(p.is_meta for p in offloaded.model.parameters())
    methods = (
        "methods=[{kind: prefix_tuning, num_virtual_tokens: 4}, "
        "{kind: prompt_tuning, num_virtual_tokens: 4}]"
    )
    runs = [
        ptkit.train(recipe_file, method=kind, out=tmp_path / name, base=base, overrides=[methods])
        for name, base in (("away", offloaded), ("here", load_base(folder, device="cpu")))
    ]
    away, here = (load_file(run.adapter / WEIGHTS) for run in runs)
    assert away.keys() == here.keys()
    for name, tensor in here.items():
        torch.testing.assert_close(away[name], tensor, atol=2e-5, rtol=1e-4)
    assert runs[0].record.metrics == runs[1].record.metrics
    assert runs[0].record.base_fingerprint == runs[1].record.base_fingerprint
    assert runs[0].record.adapter_off_exact


@pytest.mark.parametrize("kind", ["lora", "full", "ia3", "prefix_lora"])
def test_methods_in_layers_that_are_offloaded_are_refused_by_name(
    kind: str, offloaded: Base
) -> None:
    section = method_section({"kind": kind})
    with pytest.raises(ModelError, match=rf"`{kind}` \({kind}\) changes layers .* offloads"):
        create_adapter(section, offloaded, Demonstrations(("w1 w2 w3",), 0))


def test_lora_works_on_a_map_without_offloading(folder: Path) -> None:
    base = load_base(folder, device_map={"": "cpu"})
    adapter = create_adapter(method_section({"kind": "lora"}), base, Demonstrations((), 0))
    assert adapter.trainable_parameters
    adapter.close()


def test_every_way_of_running_an_offloaded_base_is_that_of_one_in_memory(
    folder: Path, offloaded: Base
) -> None:
    ids = torch.arange(1, 25).view(2, 12)
    mask = torch.ones_like(ids)
    found = []
    for base in (load_base(folder, device="cpu"), offloaded):
        compiled = adapter_on(base).compiled().detach()
        batch = compiled.for_rows(ids, mask)
        options: dict[str, Any] = {"pad_token_id": 0, "max_new_tokens": 6, "do_sample": False}
        with torch.no_grad():
            logits = all_logits(base.model, ids, mask, batch)
        answers = [
            generate(base.model, PROMPTS, batch, **options),
            generate(base.model, PROMPTS, batch, num_beams=2, **options),
            generate(base.model, PROMPTS, batch, use_cache=False, **options),
        ]
        bank = AdapterBank(base)
        bank.add("a", compiled)
        answers.append(bank.generate_ids(PROMPTS, ["a", None], max_new_tokens=6, do_sample=False))
        found.append((logits, answers))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert found[0][1] == found[1][1]


def test_a_recipe_names_the_device_map(folder: Path, recipe_file: Path, tmp_path: Path) -> None:
    settings = [
        f"model.id={folder}", 'model.device_map={"": cpu}', "retention=null",
        "methods=[{kind: prefix_tuning, num_virtual_tokens: 4}]",
    ]  # fmt: skip
    done = ptkit.train(recipe_file, out=tmp_path / "run", overrides=settings)
    # Where the base lies is no part of what the run is: it goes on elsewhere.
    again = ptkit.train(
        recipe_file, out=tmp_path / "run",
        overrides=[settings[0], "model.device=cpu", *settings[2:]],
    )  # fmt: skip
    assert again.record == done.record


def spread_over(places: dict[str, Any], model: Any) -> Any:
    """`model` as one that accelerate spread over `places`; only where things go is asked of it."""
    model.hf_device_map = places
    return model


def test_each_layers_part_of_a_prefix_goes_to_the_layers_own_device() -> None:
    """`meta` stands for a second device: only where a tensor is placed can be asked of it. (`cpu`
    beside another device would mean that the weights are offloaded.)"""
    model = spread_over(
        {"model.embed_tokens": "cpu:0", "model.layers.0": "cpu:0", "model.layers.1": "meta",
         "model.layers.2.self_attn": "meta", "model.layers.2.mlp": "cpu:0", "model.norm": "meta",
         "lm_head": "meta"},
        random_model("llama"),
    )  # fmt: skip
    assert is_spread(model)
    assert [device.type for device in layer_devices(model)] == ["cpu", "meta", "meta"]
    prefix = KVPrefix(
        tuple(torch.rand(2, 5, 8) for _ in range(3)), tuple(torch.rand(2, 5, 8) for _ in range(3))
    )
    batch = own_part(model, PrefixBatch.shared(prefix, 4))
    for side in (batch.keys, batch.values):
        assert [t.device.type for t in side] == ["cpu", "meta", "meta"]
        assert all(t.shape == (4, 2, 5, 8) for t in side)
    cache = prefilled_cache(model, PrefixBatch.shared(prefix, 1), DynamicCache())
    layers: list[Any] = cache.layers
    assert [layer.keys.device.type for layer in layers] == ["cpu", "meta", "meta"]


@pytest.mark.parametrize(
    ("places", "devices"),
    [
        ({"": "cuda:0"}, None),
        ({"model": "cuda:0", "lm_head": "cuda:1"}, ["cuda:0"] * 3),
        ({"model.layers.0": "cuda:0", "": "cuda:1"}, ["cuda:0", "cuda:1", "cuda:1"]),
        # Offloaded layers are computed on the first device of the map.
        ({"model.layers.0": "cuda:1", "model.layers.1": "cpu", "": "disk"}, ["cuda:1"] * 3),
        ({"model": "cpu", "model.layers.2": "disk", "lm_head": "disk"}, ["cpu"] * 3),
    ],
)
def test_a_layer_is_where_its_attention_computes(
    places: dict[str, Any], devices: list[Any] | None
) -> None:
    model = spread_over(places, random_model("qwen3"))
    assert is_spread(model) is (devices is not None)
    if devices is None:
        assert placement(model).devices is None
    else:
        assert list(layer_devices(model)) == [torch.device(device) for device in devices]


def test_what_a_spread_base_computes_comes_together_on_one_device() -> None:
    model = spread_over({"model.layers.0": "meta", "": "cpu:0"}, random_model("llama"))
    parts = tuple(torch.rand(2, 5, 8) for _ in range(3))
    prefix = whole(model, KVPrefix(parts, parts))
    assert {t.device for t in prefix.tensors} == {model.device}


def test_a_view_of_a_spread_base_keeps_the_hooks_that_move_its_inputs(offloaded: Base) -> None:
    """A replaced part of a layer must not cost the layer its hook."""
    from ptkit.runtime.views import viewed

    model = offloaded.model
    calls: list[str] = []
    layer: Any = model.model.layers[1]
    hook = layer._hf_hook
    before = hook.pre_forward

    def counted(module: Any, *args: Any, **kw: Any) -> Any:
        calls.append(type(module).__name__)
        return before(module, *args, **kw)

    hook.pre_forward = counted
    try:
        with torch.no_grad():
            ids = torch.tensor([[1, 2, 3]])
            expected = model(input_ids=ids).logits
            plain = len(calls)
            view = viewed(model, {"model.layers.1.mlp": layer.mlp})
            assert torch.equal(view(input_ids=ids).logits, expected)
    finally:
        del hook.pre_forward
    assert plain
    assert len(calls) == 2 * plain


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["model.device_map=auto", "model.tp_plan=auto"], "keep one of them"),
        (["model.device_map=auto", "model.device=cpu"], "both say where the base lies"),
        (["model.max_memory={0: 1GiB}"], "`max_memory` needs `device_map`"),
        (["model.offload_folder=x"], "`offload_folder` needs `device_map`"),
        (["model.tp_plan=auto", "model.quantize=int8"], "`quantize` does not work with `tp_plan`"),
        (["model.device_map=everywhere"], "device_map"),
        (["model.tp_plan=pipeline"], "tp_plan"),
    ],
)
def test_contradictions_in_a_recipe_are_refused(
    settings: list[str], told: str, recipe_file: Path
) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe(recipe_file, settings)


@pytest.mark.parametrize(
    ("arguments", "processes", "told"),
    [
        ({"device_map": "everywhere"}, 1, "no `device_map` 'everywhere'"),
        ({"device_map": {}}, 1, "`device_map` is empty"),
        ({"device_map": {"": 99}}, 1, "device `99` is not available"),
        ({"device_map": {"modell": "cpu", "": "cpu"}}, 1, "did you mean `model`"),
        ({"device_map": "auto", "device": "cpu"}, 1, "both say where"),
        ({"device_map": "auto"}, 2, "start one, or use `tp_plan: auto`"),
        ({"max_memory": {0: "1GiB"}}, 1, "need `device_map`"),
        ({"device_map": "auto", "tp_plan": "auto"}, 2, "keep one"),
        ({"tp_plan": "auto"}, 1, "this run has one; start it with `torchrun"),
        ({"tp_plan": "pipeline"}, 2, "pipeline parallelism is not supported"),
        ({"tp_plan": "auto", "quantize": "int8"}, 2, "no `quantize`"),
        ({"tp_plan": "auto"}, 3, "4 attention heads, which 3 processes cannot share"),
        ({"tp_plan": "auto"}, 4, "2 key/value heads, which 4 processes cannot share"),
        ({"tp_plan": {"layers.*.self_attn.k_proj": "replicate"}}, 2, "different styles"),
        ({"device_map": {"": "disk"}}, 1, "offloads the input embeddings|offload"),
    ],
)
def test_a_base_that_cannot_be_spread_so_is_refused_by_name(
    arguments: dict[str, Any], processes: int, told: str, folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ModelError, match=told):
        load_base(folder, **arguments)


def test_a_family_without_a_plan_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_model("gpt2").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match=r"no tensor-parallel plan; use `model\.device_map: auto`"):
        load_base(tmp_path, tp_plan="auto")


def test_a_base_loaded_elsewhere_with_another_parallelism_is_refused() -> None:
    from transformers.distributed import DistributedConfig

    model = random_model("llama")
    model.config.distributed_config = DistributedConfig(fsdp_size=2)
    with pytest.raises(ModelError, match="loaded with FSDP"):
        frozen_base(model, word_tokenizer(), "elsewhere")


REFUSED = [
    ("ACCELERATE_USE_FSDP", "FSDP"),
    ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
    ("ACCELERATE_USE_MEGATRON_LM", "pipeline parallelism"),
    ("ACCELERATE_USE_PARALLELISM_CONFIG", "ParallelismConfig"),
]


@pytest.mark.parametrize(("variable", "name"), REFUSED)
def test_processes_started_for_another_parallelism_are_refused_before_anything_is_loaded(
    variable: str, name: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("ptkit.training.experiment.load_task", nothing)
    monkeypatch.setattr("ptkit.runtime.base_model.AutoConfig.from_pretrained", nothing)
    monkeypatch.setenv(variable, "false")
    require_supported_launch()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=name) as told:
        load_base("anything")
    assert "tp_plan: auto" in str(told.value)
    assert "device_map: auto" in str(told.value)
    with pytest.raises(UserError, match=name):
        ptkit.train(recipe_file, method="prefix_tuning", out=tmp_path / "run")
    with pytest.raises(UserError, match=name):
        ptkit.compare(recipe_file, out=tmp_path / "comparison")
    assert not [*tmp_path.iterdir()]


def test_the_command_line_refuses_fsdp_with_exit_code_2(recipe_file: Path, tmp_path: Path) -> None:
    done = forked.run(
        [sys.executable, "-m", "ptkit", "train", str(recipe_file), "--method", "prefix_tuning"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "ACCELERATE_USE_FSDP": "true", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 2
    assert "ptkit does not work with FSDP" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["lora", "full", "ia3"])
def test_methods_that_cannot_are_refused_before_anything_is_loaded(
    kind: str, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptkit.training.experiment.load_task", lambda *_: pytest.fail("loaded"))
    settings = ["model.tp_plan=auto", f"methods=[{{kind: {kind}}}]"]
    with pytest.raises(UserError, match=rf"\({kind}\) does not work on a base that `model.tp_plan"):
        ptkit.train(recipe_file, out=tmp_path / "run", overrides=settings)
    with pytest.raises(UserError, match=rf"\({kind}\) does not work on a base that `model.tp_plan"):
        ptkit.compare(recipe_file, out=tmp_path / "comparison", overrides=settings)


def test_a_base_in_one_place_is_not_touched() -> None:
    base = random_base("llama")
    batch = PrefixBatch.shared(adapter_on(base).prefix(), 2)
    assert own_part(base.model, batch) is batch
