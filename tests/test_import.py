"""Adapters of other libraries are what they were, or are refused with the reason."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_base
from encoders import random_classifier
from foreign_files import EXACT, FOLDER, NAMES, REFUSED, base_for, largest_difference
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import read_adapter
from ptkit.formats.adapter_folder import CONFIG, PICKLED_WEIGHTS
from ptkit.hub.engines import writer
from ptkit.hub.foreign.pickled import unpickled
from ptkit.hub.foreign.rotation import turned
from ptkit.hub.foreign.unpickle import tensors_of
from ptkit.hub.imports import import_adapter
from ptkit.methods import compile_files
from ptkit.runtime.forward import all_logits


@pytest.fixture
def opened_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles of `FOLDER`, which are known, need no process of their own, that loads torch."""

    def tensors(path: Path) -> dict[str, torch.Tensor]:
        return dict(tensors_of(torch.load(path, weights_only=True)))

    monkeypatch.setattr("ptkit.hub.foreign.source.unpickled", tensors)


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
def test_a_prefix_of_an_encoder_is_refused_for_its_head(tmp_path: Path) -> None:
    base = random_classifier("bert")
    with pytest.raises(AdapterError, match="works with a head"):
        import_adapter(FOLDER / "adapterhub-bert-mlp", tmp_path / "out", base=base)


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
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    refused = ptkit("generate", "w1 w2", "--adapter", "old", "--model", str(base))
    assert refused.returncode == 2
    (line,) = (x for x in refused.stderr.splitlines() if x.startswith("ptkit import"))
    done = ptkit(*line.split()[1:])
    assert done.returncode == 0, done.stderr
    assert "PREFIX_TUNING adapter of PEFT with pickled weights" in done.stderr
    told = ["--adapter", done.stdout.strip(), "--model", str(base), "--max-new-tokens", "5"]
    answer = ptkit("generate", "w1 w2", *told)
    assert answer.returncode == 0, answer.stderr


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


def test_copies_of_a_prefix_that_differ_are_refused(tmp_path: Path) -> None:
    source = FOLDER / "adapterhub-llama-flat"
    tensors = unpickled(source / "pytorch_adapter.bin")
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
@pytest.mark.parametrize("name", ["adapterhub-llama-mlp", "adapterhub-mistral-flat"])
def test_a_prefix_that_is_exported_for_adapterhub_is_the_one_that_was_imported(
    name: str, tmp_path: Path
) -> None:
    base = base_for(name)
    import_adapter(FOLDER / name, tmp_path / "in", base=base)
    writer("adapterhub")([tmp_path / "in"], tmp_path / "out", base=base)
    theirs = unpickled(FOLDER / name / "pytorch_adapter.bin")
    written = load_file(tmp_path / "out" / "adapter.safetensors")
    if name.endswith("flat"):  # under their names, one copy for each place they have
        own = {n.replace(".in.", ".a."): t for n, t in written.items()}
        assert own.keys() == theirs.keys()
        for tensor in theirs:
            torch.testing.assert_close(own[tensor], theirs[tensor], atol=1e-5, rtol=1e-5)
    import_adapter(tmp_path / "out", tmp_path / "back", base=base)
    assert largest_difference(name, tmp_path / "back") < 1e-4


@pytest.mark.usefixtures("opened_here")
def test_an_export_for_adapterhub_that_cannot_be_exact_is_refused(tmp_path: Path) -> None:
    base = base_for("gpt2")
    import_adapter(FOLDER / "peft-0.3.0-gpt2-prefix", tmp_path / "in", base=base)
    with pytest.raises(AdapterError, match="cannot be moved"):
        writer("adapterhub")([tmp_path / "in"], tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
