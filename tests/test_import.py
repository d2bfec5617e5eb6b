"""Adapters of other libraries are what they were, or are refused with the reason."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import random_base
from foreign_files import (
    EXACT,
    FOLDER,
    NAMES,
    ORACLES,
    REFUSED,
    base_for,
    largest_difference,
)
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from ptkit.cli.main import app
from ptkit.errors import AdapterError
from ptkit.evaluation.alone import answers_alone, changes_every_row
from ptkit.formats.adapter_files import read_adapter
from ptkit.formats.adapter_folder import CONFIG, PICKLED_WEIGHTS
from ptkit.hub.engines import writer
from ptkit.hub.foreign.pickled import unpickled
from ptkit.hub.foreign.rotation import turned
from ptkit.hub.imports import describe_source, import_adapter
from ptkit.hub.verify import verify
from ptkit.methods import compile_files
from ptkit.methods.base_names import same_name
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import all_logits

#: Adapters of it that are exported again.
GIVEN_BACK = [
    "adapterhub-llama-mlp",
    "adapterhub-mistral-flat",
    "adapterhub-gpt2-flat",
    "adapterhub-bert-seq2",
    "adapterhub-bert-seq1pool",
    "adapterhub-bert-tag",
    "adapterhub-roberta-seq2",
]


def test_at_least_thirty_adapters_of_eight_packages_or_versions_are_kept_here() -> None:
    assert len(NAMES) >= 30
    assert len({name.split("-llama")[0].split("-gpt2")[0] for name in NAMES}) >= 8
    assert REFUSED.keys() <= {*NAMES}


@pytest.mark.usefixtures("opened_here")
@pytest.mark.parametrize("name", EXACT)
def test_logits_are_those_of_the_library_that_wrote_it(name: str, tmp_path: Path) -> None:
    done = import_adapter(FOLDER / name, tmp_path / "out", base=base_for(name))
    assert largest_difference(name, done.path) < 1e-4


@pytest.mark.usefixtures("opened_here")
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_adapter_here_is_like_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=REFUSED[name]):
        import_adapter(FOLDER / name, tmp_path / "out", base=base_for(name))
    assert not (tmp_path / "out").exists()


@given(tokens=st.integers(1, 9), length=st.integers(1, 12), seed=st.integers(0, 999))
def test_keys_turned_are_read_as_from_as_far_away(tokens: int, length: int, seed: int) -> None:
    """A text read at position 0 behind keys as they are, and at `tokens` behind the turned ones."""
    base = base_for("llama")
    generator = torch.Generator().manual_seed(seed)
    shape = base.layout.widest
    keys = torch.randn(shape.kv_heads, tokens, shape.key_dim, generator=generator)
    there = turned(keys, base, length)
    torch.testing.assert_close(turned(there, base, -length), keys, atol=1e-5, rtol=1e-5)
    rotary = base.model.base_model.rotary_emb
    query = torch.randn(1, 1, 1, shape.key_dim, generator=generator)

    def asked(position: int) -> torch.Tensor:
        cos, sin = rotary(query, torch.tensor([[position]]))
        first, second = query.chunk(2, dim=-1)
        return query * cos + torch.cat([-second, first], dim=-1) * sin

    torch.testing.assert_close(asked(length) @ there.mT, asked(0) @ keys.mT, atol=1e-4, rtol=1e-4)


def test_a_key_that_cannot_be_moved_is_refused() -> None:
    with pytest.raises(AdapterError, match="cannot be moved to other positions on `gpt2`"):
        turned(torch.zeros(2, 8), random_base("gpt2"), 3)


def test_pickles_that_hold_more_than_tensors_are_not_run(tmp_path: Path) -> None:
    class Told:
        def __reduce__(self) -> tuple:
            return (print, ("told",))

    path = tmp_path / "a.bin"
    path.write_bytes(pickle.dumps({"a": Told()}))
    with pytest.raises(AdapterError, match="not a file of tensors"):
        unpickled(path)
    path.write_bytes(b"nothing")
    with pytest.raises(AdapterError, match="not a file of tensors"):
        unpickled(path)


def test_tensors_of_a_pickle_keep_their_types_and_nested_names(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    held = {"model": {"a": shared[:3], "b": shared[2:]}, "half": torch.ones(2).half(), "n": 3}
    torch.save(held, tmp_path / "a.pt")
    found = unpickled(tmp_path / "a.pt")
    assert found.keys() == {"model.a", "model.b", "half"}
    assert torch.equal(found["model.b"], shared[2:])
    assert found["half"].dtype == torch.float16


def test_a_numpy_prompt_is_what_is_read_before_the_text(tmp_path: Path) -> None:
    base = random_base("llama")
    soft = np.random.default_rng(0).normal(size=(4, base.embedding.embedding_dim)) * 0.1
    np.save(tmp_path / "prompt.npy", soft.astype(np.float32))
    done = import_adapter(tmp_path / "prompt.npy", tmp_path / "out", base=base)
    compiled = compile_files(read_adapter(done.path), base)
    assert compiled is not None
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        rows = compiled.for_rows(ids, torch.ones_like(ids))
        found = all_logits(base.model, ids, torch.ones_like(ids), rows)
        words = torch.cat([torch.tensor(soft).float()[None], base.embedding(ids)], dim=1)
        expected = base.model(inputs_embeds=words).logits[:, 4:]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    np.save(tmp_path / "words.npy", np.array([1, 2]))
    with pytest.raises(AdapterError, match="a soft prompt has floats"):
        import_adapter(tmp_path / "words.npy", tmp_path / "other", base=base)


def test_of_two_commands_the_second_answers(tmp_path: Path) -> None:
    """Pickled weights of an old PEFT, on the command line."""
    base = tmp_path / "tiny-gpt2"
    made_on = base_for("gpt2")
    made_on.model.generation_config.eos_token_id = made_on.model.config.eos_token_id = 0
    made_on.model.save_pretrained(base)
    made_on.tokenizer.save_pretrained(base)
    source = tmp_path / "old"
    source.mkdir()
    for name in (CONFIG, PICKLED_WEIGHTS):
        kept = FOLDER / "peft-0.3.0-gpt2-prefix" / name
        (source / name).write_bytes(kept.read_bytes())

    def ptkit(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ptkit", *words]
        return forked.run(command, cwd=tmp_path, capture_output=True, text=True)

    refused = ptkit("generate", "w1 w2", "--adapter", "old", "--model", str(base))
    assert refused.returncode == 2
    (line,) = (x for x in refused.stderr.splitlines() if x.startswith("ptkit import"))
    done = ptkit(*line.split()[1:])
    assert done.returncode == 0, done.stderr
    assert "PREFIX_TUNING adapter of PEFT with pickled weights" in done.stderr
    told = ["--adapter", done.stdout.strip(), "--model", str(base), "--max-new-tokens", "5"]
    answer = ptkit("generate", "w1 w2", *told)
    assert answer.returncode == 0, answer.stderr


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the base that a kept adapter was made on, with a tokenizer."""
    root = tmp_path_factory.mktemp("bases")

    def folder(name: str) -> Path:
        base = base_for(name)
        path = root / base.id.split("/")[1]
        if not path.exists():
            if base.head is None:
                base.model.generation_config.eos_token_id = 0
            model = base.model if base.head is None else base.model.base_model
            model.save_pretrained(path)
            base.tokenizer.save_pretrained(path)
        return path

    return folder


def ptkit_here(*words: str) -> Result:
    """The command in this process: another one would load torch."""
    return CliRunner().invoke(app, [*words])


@pytest.mark.usefixtures("opened_here")
@pytest.mark.parametrize("name", NAMES)
def test_of_two_commands_the_second_answers_or_the_first_says_why_not(
    name: str, tmp_path: Path, folders: Callable[[str], Path]
) -> None:
    base = str(folders(name))
    done = ptkit_here("import", str(FOLDER / name), "--base", base, "--out", str(tmp_path / "a"))
    if name in REFUSED:
        assert isinstance(done.exception, AdapterError)
        assert re.search(REFUSED[name], str(done.exception))
        return
    assert done.exit_code == 0, done.exception
    if base_for(name).head is not None:
        answer = ptkit_here("classify", "w5 w6", "--adapter", str(tmp_path / "a"), "--model", base)
        assert any(label in answer.stdout for label in base_for(name).head.labels)
    else:
        told = ["--model", base, "--max-new-tokens", "5"]
        answer = ptkit_here("generate", "w5 w6", "--adapter", str(tmp_path / "a"), *told)
    assert answer.exit_code == 0, answer.exception
    assert answer.stdout.strip()


@pytest.mark.parametrize("name", NAMES)
def test_inspect_names_what_it_is_and_what_reads_it(name: str) -> None:
    found = describe_source(FOLDER / name)
    assert found is not None
    assert name.split("-")[0] in found.what.lower()
    if name in REFUSED and found.refused is not None:
        assert re.search(REFUSED[name], found.refused)
        assert found.command is None
    else:
        assert found.command is not None
        assert found.command.startswith(f"ptkit import {FOLDER / name} --out ")


def test_inspect_opens_no_pickle_and_says_what_else_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: Callable[[str], Path]
) -> None:
    monkeypatch.setattr("ptkit.hub.foreign.source.unpickled", pytest.fail)
    monkeypatch.setattr(torch, "load", pytest.fail)
    shown = ptkit_here("inspect", str(FOLDER / "adapterhub-llama-gated"))
    assert "a prefix_tuning adapter of AdapterHub" in shown.stdout
    assert "it is not imported: this prefix has a gate" in shown.stdout
    shown = ptkit_here("inspect", str(FOLDER / "opendelta-gpt2-soft"), "--json")
    assert json.loads(shown.stdout)["what"] == "a `soft_prompt` delta of OpenDelta"
    shown = ptkit_here("inspect", str(folders("peft-0.3.0-gpt2-prefix")))
    assert "a model of transformers (`gpt2`), and no adapter" in shown.stdout
    (tmp_path / "nothing").mkdir()
    assert "neither an adapter" in str(ptkit_here("inspect", str(tmp_path / "nothing")).exception)


@pytest.mark.usefixtures("opened_here")
def test_several_adapters_in_one_folder_are_listed_and_a_subfolder_is_one_of_them(
    tmp_path: Path,
) -> None:
    for name in ("adapterhub-llama-flat", "peft-0.3.0-gpt2-prefix"):
        shutil.copytree(FOLDER / name, tmp_path / "all" / name)
    import_adapter(tmp_path / "all" / "peft-0.3.0-gpt2-prefix", tmp_path / "all" / "read")
    with pytest.raises(AdapterError, match=r"several adapters, name one: .*flat`.*prefix`.*read`"):
        import_adapter(tmp_path / "all", tmp_path / "out")
    with pytest.raises(AdapterError, match="PEFT's layout already"):
        import_adapter(tmp_path / "all" / "read", tmp_path / "out")
    named = {"base": base_for("llama"), "subfolder": "adapterhub-llama-flat"}
    import_adapter(tmp_path / "all", tmp_path / "out", **named)
    assert largest_difference("adapterhub-llama-flat", tmp_path / "out") < 1e-4


@pytest.mark.usefixtures("opened_here")
@pytest.mark.parametrize(
    ("told", "asked"),
    [
        ("/home/me/.cache/huggingface/hub/models--org--tiny/snapshots/60ab/", "org/tiny"),
        ("https://hf-mirror.com/org/tiny", "org/tiny"),
        ("org/tiny", "org/tiny"),
    ],
)
def test_a_base_is_found_by_the_name_that_is_told(
    told: str, asked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FOLDER / "adapterhub-llama-flat", tmp_path / "in")
    settings = json.loads((tmp_path / "in" / CONFIG).read_text())
    (tmp_path / "in" / CONFIG).write_text(
        json.dumps({**settings, "model_name": told, "revision": "v2"})
    )
    seen = []

    def load(id: str, *, revision: str | None, labels: object) -> Base:
        seen.append((id, revision, labels))
        return base_for("llama")

    monkeypatch.setattr("ptkit.hub.imports.load_base", load)
    import_adapter(tmp_path / "in", tmp_path / "out")
    assert seen == [(asked, "v2", None)]


def test_a_base_that_is_a_path_elsewhere_is_asked_for(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "adapterhub-llama-flat", tmp_path / "in")
    settings = json.loads((tmp_path / "in" / CONFIG).read_text())
    told = {**settings, "model_name": "/runs/llama/checkpoint-500"}
    (tmp_path / "in" / CONFIG).write_text(json.dumps(told))
    with pytest.raises(AdapterError, match="a path that is not here; name the same model with"):
        import_adapter(tmp_path / "in", tmp_path / "out")


def test_checkpoints_of_different_trainings_have_different_names() -> None:
    base = dataclasses.replace(base_for("llama"), id="runs/one/checkpoint-500")
    assert same_name("/elsewhere/one/checkpoint-500", base)
    assert not same_name("/elsewhere/other/checkpoint-500", base)


@pytest.mark.usefixtures("opened_here")
def test_a_decoders_adapter_with_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    base = base_for("llama")
    shutil.copytree(FOLDER / "adapterhub-llama-flat", tmp_path / "in")
    head = {"lm_head.weight": base.model.lm_head.weight.detach().clone()}
    torch.save(head, tmp_path / "in" / "pytorch_model_head.bin")
    import_adapter(tmp_path / "in", tmp_path / "same", base=base)
    torch.save({"lm_head.weight": head["lm_head.weight"] + 1},
               tmp_path / "in" / "pytorch_model_head.bin")  # fmt: skip
    with pytest.raises(AdapterError, match=r"brings a head .* that is not the one of"):
        import_adapter(tmp_path / "in", tmp_path / "other", base=base)


@pytest.mark.usefixtures("opened_here")
def test_a_numpy_prompt_of_t5_is_read_by_its_encoder(tmp_path: Path) -> None:
    """The same embeddings as OpenDelta's soft prompt, whose logits are kept."""
    soft = torch.load(FOLDER / "opendelta-t5-soft" / "pytorch_model.bin", weights_only=True)
    (embeddings,) = soft.values()
    np.save(tmp_path / "prompt.npy", embeddings.numpy())
    import_adapter(tmp_path / "prompt.npy", tmp_path / "out", base=base_for("t5"))
    assert largest_difference("opendelta-t5-soft", tmp_path / "out") < 1e-4


@pytest.mark.usefixtures("opened_here")
def test_llama_adapter_answers_as_in_peft_and_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    name = "peft-0.4.0-llama4-adaption"
    base, ids = base_for(name), torch.tensor([[5, 6]])
    import_adapter(FOLDER / name, tmp_path / "out", base=base)
    assert changes_every_row(tmp_path / "out")
    with torch.no_grad():
        before = base.model(input_ids=ids).logits
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    (found,) = answers_alone(tmp_path / "out", base, ["w5 w6"], max_new_tokens=5)
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, before)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path / "out")
    written = theirs.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert found.split() == base.tokenizer.decode(written[0, 2:]).split()


def test_what_is_known_of_each_library_is_in_the_documentation() -> None:
    page = (Path(__file__).parent.parent / "docs" / "foreign.md").read_text(encoding="utf-8")
    made = subprocess.run(
        [sys.executable, "scripts/make_foreign_table.py"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert made.strip() in page


def test_nothing_known_is_refused_with_what_is(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match=r"nothing that ptkit knows: neither .* OpenDelta"):
        import_adapter(tmp_path, tmp_path / "out")
    with pytest.raises(AdapterError, match="no such"):
        import_adapter(tmp_path / "absent", tmp_path / "out")


@pytest.mark.usefixtures("opened_here")
def test_copies_of_a_prefix_that_differ_are_refused(tmp_path: Path) -> None:
    source = FOLDER / "adapterhub-llama-flat"
    tensors = torch.load(source / "pytorch_adapter.bin", weights_only=True)
    name = next(n for n in tensors if "layers.1" in n)
    tensors[name] = tensors[name] + 1
    torch.save(tensors, tmp_path / "pytorch_adapter.bin")
    (tmp_path / CONFIG).write_text((source / CONFIG).read_text())
    with pytest.raises(AdapterError, match="copies of `control_trans` differ"):
        import_adapter(tmp_path, tmp_path / "out", base=base_for("llama"))


@pytest.mark.usefixtures("opened_here")
def test_an_import_of_the_wrong_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="values per virtual token"):
        import_adapter(FOLDER / "adapterhub-llama-flat", tmp_path / "out", base=base_for("llama4"))


@pytest.mark.usefixtures("opened_here")
@pytest.mark.parametrize("name", GIVEN_BACK)
def test_a_prefix_that_is_exported_for_adapterhub_is_the_one_that_was_imported(
    name: str, tmp_path: Path
) -> None:
    base = base_for(name)
    import_adapter(FOLDER / name, tmp_path / "in", base=base)
    assert verify(tmp_path / "in", base=base).passed
    writer("adapterhub")([tmp_path / "in"], tmp_path / "out", base=base)
    theirs = torch.load(FOLDER / name / "pytorch_adapter.bin", weights_only=True)
    written = load_file(tmp_path / "out" / "adapter.safetensors")
    flat = json.loads((FOLDER / name / CONFIG).read_text())["config"]["flat"]
    if flat:  # under their names, one copy for each place they have
        own = {n.replace(".in.", ".a."): t for n, t in written.items()}
        assert own.keys() == theirs.keys()
        for tensor in theirs:
            torch.testing.assert_close(own[tensor], theirs[tensor], atol=1e-5, rtol=1e-5)
    import_adapter(tmp_path / "out", tmp_path / "back", base=base)
    assert largest_difference(name, tmp_path / "back") < 1e-4


@pytest.mark.slow
@pytest.mark.usefixtures("opened_here")
def test_adapterhubs_own_loader_reads_what_is_exported(tmp_path: Path) -> None:
    if not (ORACLES / "adapterhub").is_dir():
        pytest.skip("AdapterHub's library is not here: make setup-oracles")
    for name in GIVEN_BACK:
        base = base_for(name)
        import_adapter(FOLDER / name, tmp_path / "in" / name, base=base)
        writer("adapterhub")([tmp_path / "in" / name], tmp_path / "out" / name, base=base)
    script = Path(__file__).parent / "adapterhub_reads.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "out", FOLDER, FOLDER / "bases"],
        capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ORACLES / "adapterhub")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {*GIVEN_BACK}
    assert max(found.values()) < 1e-4, found


@pytest.mark.usefixtures("opened_here")
def test_an_export_for_adapterhub_that_cannot_be_exact_is_refused(tmp_path: Path) -> None:
    base = base_for("gpt2")
    import_adapter(FOLDER / "peft-0.3.0-gpt2-prefix", tmp_path / "in", base=base)
    with pytest.raises(AdapterError, match="cannot be moved"):  # PEFT's texts begin after it
        writer("adapterhub")([tmp_path / "in"], tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
