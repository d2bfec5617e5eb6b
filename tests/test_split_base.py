"""A base larger than one device: layers over several processes, or over several devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import random_model, word_tokenizer
from safetensors.torch import load_file
from test_compare import recipe_file as recipe_file
from transformers import Phi3Config, Phi3ForCausalLM

from ptkit.comparison.grid import run_grid
from ptkit.formats.adapter_folder import WEIGHTS
from ptkit.formats.cell_record import CellRecord
from ptkit.recipe.load import load_recipe
from ptkit.runtime.base_model import load_base

METHODS = {
    "llama": (
        "methods=[{kind: base}, {kind: text_prompt, examples: 2, separator: ' '}, "
        "{kind: prefix_tuning, num_virtual_tokens: 4}, "
        "{kind: prefix_tuning, label: infix, position: infix, num_virtual_tokens: 4}, "
        "{kind: prompt_tuning, num_virtual_tokens: 4}, "
        "{kind: p_tuning, num_virtual_tokens: 4, encoder_hidden_size: 16}]"
    ),
    "qwen3": "methods=[{kind: prefix_tuning, num_virtual_tokens: 4}]",
}
#: Greedy answers of an adapter on a base, and its logits, wherever the base lies.
SHARED = """
import torch
import ptkit
from ptkit.methods import Demonstrations, create_adapter
from ptkit.recipe.schema import method_section
from ptkit.runtime.forward import all_logits, supervised_losses
from ptkit.runtime.generation import generate

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12]]


def seen(base, folder):
    loaded = ptkit.load_adapter(folder, base)
    ids = torch.arange(1, 25).view(2, 12)
    mask = torch.ones_like(ids)
    batch = loaded.prefix.for_rows(ids, mask)
    with torch.no_grad():
        logits = all_logits(base.model, ids, mask, batch)
    options = {"pad_token_id": 0, "max_new_tokens": 8, "do_sample": False}
    return {
        "logits": logits.tolist(),
        "greedy": generate(base.model, PROMPTS, batch, **options),
        "beams": generate(base.model, PROMPTS, batch, num_beams=2, **options),
        "again": generate(base.model, PROMPTS, batch, use_cache=False, **options),
    }


def gradients(base):
    section = method_section({"kind": "prefix_tuning", "num_virtual_tokens": 3})
    torch.manual_seed(0)
    adapter = create_adapter(section, base, Demonstrations(("w1 w2 w3",), 0))
    ids = torch.arange(1, 25).view(2, 12)
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, :6] = -100
    batch = adapter.compiled().for_rows(ids, mask)
    supervised_losses(base.model, ids, mask, labels, batch).mean().backward()
    return {name: p.grad.tolist() for name, p in adapter.trainable().items()}
"""
PROGRAM = (
    """
import json, os, sys
import torch
from ptkit.errors import ModelError
from ptkit.runtime.base_model import load_base
from ptkit.training.processes import processes
"""
    + SHARED
    + """
recipe, folders, methods = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
found = {}
for family, names in methods.items():
    settings = [f"model.id={folders[family]}", "model.device=cpu", "model.tp_plan=auto", names[0]]
    for name in names[1:]:
        out = f"{family}-{name}"
        ptkit.train(recipe, method=name, out=out, overrides=settings)
    base = load_base(folders[family], device="cpu", tp_plan="auto")
    found[family] = {
        "layout": [list(shape) for shape in base.layout],
        "own heads": base.model.model.layers[0].self_attn.k_proj.weight.to_local().shape[0],
        "parameters": base.parameters,
        "words": base.word_vectors.sum().item(),
        "fingerprint": base.fingerprint,
        "seen": seen(base, f"{family}-prefix_tuning"),
        "gradients": gradients(base),
    }
whole = load_base(folders["phi3"], device="cpu", tp_plan="auto")
found["phi3"] = {"gradients": gradients(whole)}
for kind in ("lora", "ia3", "full"):
    try:
        create_adapter(method_section({"kind": kind}), base, Demonstrations((), 0))
    except ModelError as error:
        found[kind] = str(error)
with open(f"found-{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
"""
)


def phi3() -> Any:
    """Its plan leaves keys and values of all heads in every process."""
    config = Phi3Config(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Phi3ForCausalLM(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Tiny random checkpoints: family -> folder."""
    made = {}
    models = {"llama": random_model("llama"), "qwen3": random_model("qwen3"), "phi3": phi3()}
    for family, model in models.items():
        folder = tmp_path_factory.mktemp(family)
        model.save_pretrained(folder)
        word_tokenizer().save_pretrained(folder)
        made[family] = str(folder)
    return made


def in_two_processes(program: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    (cwd / "program.py").write_text(program)
    return forked.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "program.py",
         *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=600,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def split(
    recipe_file: Path, folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """Everything that two processes do with bases they hold together, done once."""
    out = tmp_path_factory.mktemp("split")
    asked = {
        family: [methods, *(m.title for m in loaded(recipe_file, folders, family).recipe.methods)]
        for family, methods in METHODS.items()
    }
    done = in_two_processes(
        PROGRAM, str(recipe_file), json.dumps(folders), json.dumps(asked), cwd=out
    )
    assert done.returncode == 0, done.stderr
    return out, [json.loads((out / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def loaded(recipe_file: Path, folders: dict[str, str], family: str) -> Any:
    settings = [f"model.id={folders[family]}", "model.device=cpu", METHODS[family], "seeds=[0]"]
    return load_recipe(recipe_file, settings)


@pytest.fixture(scope="module")
def alone(
    recipe_file: Path, folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same trained by this process: family-method -> the run's folder."""
    found = {}
    for family in METHODS:
        out = tmp_path_factory.mktemp("alone")
        for record in run_grid(loaded(recipe_file, folders, family), out):
            found[f"{family}-{record.method}"] = out / "cells" / record.cell
    return found


@pytest.fixture(scope="module")
def shared() -> dict[str, Any]:
    """The functions of `SHARED`, for this process."""
    names: dict[str, Any] = {}
    exec(SHARED, names)
    return names


TRAINED = ["llama-prefix_tuning", "llama-infix", "llama-prompt_tuning", "llama-p_tuning",
           "qwen3-prefix_tuning"]  # fmt: skip


@pytest.mark.parametrize("run", TRAINED)
def test_an_adapter_of_a_split_base_is_the_one_a_process_alone_trains(
    run: str, split: tuple[Path, Any], alone: dict[str, Path]
) -> None:
    ours = load_file(split[0] / run / "adapter" / WEIGHTS)
    theirs = load_file(alone[run] / "adapter" / WEIGHTS)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        torch.testing.assert_close(ours[name], tensor, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("run", [*TRAINED, "llama-base", "llama-text_prompt"])
def test_a_split_base_is_measured_as_a_whole_one(
    run: str, split: tuple[Path, Any], alone: dict[str, Path]
) -> None:
    ours, theirs = (CellRecord.read(f / "record.json") for f in (split[0] / run, alone[run]))
    assert ours.metrics == theirs.metrics
    assert ours.base_fingerprint == theirs.base_fingerprint
    assert ours.base_parameters == theirs.base_parameters
    assert ours.trainable_parameters == theirs.trainable_parameters
    assert ours.adapter_off_exact
    for a, b in zip(ours.curve, theirs.curve, strict=True):
        assert a.validation_loss == pytest.approx(b.validation_loss, abs=1e-4)
    assert ours.retention is not None
    assert theirs.retention is not None
    assert ours.retention.forgetting == pytest.approx(theirs.retention.forgetting, abs=1e-4)
    predictions = [(f / "predictions.jsonl").read_text() for f in (split[0] / run, alone[run])]
    assert predictions[0] == predictions[1]


@pytest.mark.parametrize("family", METHODS)
def test_logits_and_answers_on_a_split_base_are_those_of_a_whole_one(
    family: str, split: tuple[Path, Any], folders: dict[str, str], shared: dict[str, Any]
) -> None:
    out, (first, second) = split
    base = load_base(folders[family], device="cpu")
    expected = shared["seen"](base, out / f"{family}-prefix_tuning")
    for found in (first[family], second[family]):
        assert found["layout"] == [list(shape) for shape in base.layout]
        width = base.layout[0].kv_heads * base.layout[0].key_dim
        assert found["own heads"] * 2 == width
        assert found["parameters"] == base.parameters
        assert found["fingerprint"] == base.fingerprint
        assert found["words"] == pytest.approx(float(base.word_vectors.sum()), abs=1e-2)
        torch.testing.assert_close(
            torch.tensor(found["seen"]["logits"]), torch.tensor(expected["logits"]),
            atol=2e-4, rtol=1e-4,
        )  # fmt: skip
        for way in ("greedy", "beams", "again"):
            assert found["seen"][way] == expected[way], way


@pytest.mark.parametrize("family", [*METHODS, "phi3"])
def test_gradients_on_a_split_base_are_whole_in_every_process(
    family: str, split: tuple[Path, Any], folders: dict[str, str], shared: dict[str, Any]
) -> None:
    """Also where the plan leaves all keys and values in every process (phi3)."""
    expected = shared["gradients"](load_base(folders[family], device="cpu"))
    for found in split[1]:
        for name, gradient in expected.items():
            torch.testing.assert_close(
                torch.tensor(found[family]["gradients"][name]), torch.tensor(gradient),
                atol=1e-5, rtol=1e-3,
            )  # fmt: skip


def test_methods_that_cannot_run_on_a_split_base_are_refused_by_name(
    split: tuple[Path, Any],
) -> None:
    for found in split[1]:
        for kind in ("lora", "ia3", "full"):
            assert f"({kind}) does not work on a base that `model.tp_plan` splits" in found[kind]
            assert "device_map" in found[kind]
