"""`ptkit verify --engine`: how many greedy answers of an engine are transformers'."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forked
import pytest
import torch
from gguf import GGMLQuantizationType
from llama_cpp import SERVER, needs_server, tiny_base, tiny_gguf, write_prefixes
from test_cli import ptkit, refused
from test_gguf import write as write_gguf

from ptkit.bank import AdapterBank
from ptkit.errors import UserError
from ptkit.hub import engine_agreement
from ptkit.hub.engine_agreement import agreement, prompts_of
from ptkit.hub.engine_runs import engines_that_run
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.forward import all_logits

TEXTS = ["abc 12", "a", "zyx ab 1"]
TOKENS = 6


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(gguf: Path) -> Base:
    return tiny_base(gguf)


@pytest.fixture(scope="module")
def adapter(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    (name,) = write_prefixes(base, folder, 1)
    return folder / name


def test_the_first_difference_and_its_gap_are_told(
    base: Base, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that ends one answer early and errs in another."""
    bank = AdapterBank(base)
    bank.load(adapter, "a")
    prompts = base.encode(TEXTS)
    ours = engine_agreement._generated(base, bank.parts("a")[0], prompts, TOKENS)
    wrong = (ours[2][3] + 1) % 90

    def engine(name: str):
        return lambda source, base, prompts, max_new_tokens, **settings: [
            ours[0], ours[1][:2], [*ours[2][:3], wrong, *ours[2][4:]]
        ]  # fmt: skip

    monkeypatch.setattr(engine_agreement, "greedy_of", engine)
    found = agreement(adapter, base, "other", TEXTS, max_new_tokens=TOKENS)
    assert (found.prompts, found.equal) == (3, 1)
    assert found.share == pytest.approx(1 / 3)
    early, other = found.differences
    assert (early.prompt, early.place, early.theirs) == (1, 2, None)
    assert (other.prompt, other.place) == (2, 3)
    assert (other.ours, other.theirs) == (ours[2][3], wrong)
    row = torch.tensor([[*prompts[2], *ours[2][:3]]])
    logits = all_logits(base.model, row, torch.ones_like(row), bank.rows(["a"]))[0, -1]
    best = logits.topk(2)
    assert best.indices[0] == ours[2][3]
    assert other.gap == pytest.approx(float(best.values[0] - best.values[1]), abs=1e-4)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = Path(__file__).resolve().parents[1] / "scripts"
    monkeypatch.syspath_prepend(str(folder))
    return folder


def test_a_dequantised_copy_has_the_files_weights(scripts: Path, tmp_path: Path) -> None:
    from llama_cpp_agreement import dequantised

    source = tmp_path / "tiny.Q4_1.gguf"
    write_gguf(source, GGMLQuantizationType.Q4_1)
    copy = dequantised(source, tmp_path / "tiny.float32.gguf")
    assert copy.stat().st_size > 2 * source.stat().st_size
    one, other = (load_base(str(path), device="cpu") for path in (source, copy))
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert one.encode(TEXTS) == other.encode(TEXTS)


@needs_server
def test_the_script_goes_on_where_it_stopped(
    scripts: Path, adapter: Path, gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(TEXTS))
    out = tmp_path / "engines.json"
    for caches in (["float32"], ["float32", "float16"]):
        done = forked.run(
            [
                sys.executable, scripts / "llama_cpp_agreement.py", gguf, adapter, "--rows", "3",
                "--tokens", str(TOKENS), "--prompts", tmp_path / "prompts.txt", "--caches", *caches,
                "--llama-server", SERVER, "--work", tmp_path / "work", "--out", out,
            ],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 2  # of both files; what was there is kept
    runs = json.loads(out.read_text())["llama-cpp"]["runs"]
    assert [(run["file"], run["cache"]) for run in runs] == [
        ("llama", "f32"), ("float32", "f32"), ("llama", "f16"), ("float32", "f16"),
    ]  # fmt: skip
    assert all(run["equal"] == run["prompts"] == 3 for run in runs)


def told(adapter: Path, *options: str, code: int = 0) -> str:
    words = ["verify", adapter, "--engine", "llama-cpp", *options]
    return ptkit(*words, cwd=adapter.parent, code=code).stdout


@needs_server
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_llama_cpp_agrees_in_every_answer(
    adapter: Path, gguf: Path, tmp_path: Path, dtype: str
) -> None:
    inputs = tmp_path / "inputs.txt"
    inputs.write_text("\n".join(TEXTS))
    options = ["--gguf", str(gguf), "--prompts", str(inputs), "--llama-server", str(SERVER),
               "--dtype", dtype, "--max-new-tokens", str(TOKENS)]  # fmt: skip
    assert told(adapter, *options).strip() == "3 of 3 answers are equal to transformers'"
    found = json.loads(told(adapter, *options, "--rows", "2", "--json"))
    assert found["prompts"] == found["equal"] == 2


def test_fewer_equal_answers_than_asked_for_end_with_one(
    adapter: Path, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = tmp_path / "inputs.txt"
    inputs.write_text("\n".join(TEXTS))
    monkeypatch.setattr(
        engine_agreement, "greedy_of",
        lambda _: lambda source, base, prompts, most, **settings: [[5] for _ in prompts],
    )  # fmt: skip
    options = ["--gguf", str(gguf), "--prompts", str(inputs), "--max-new-tokens", "2"]
    said = told(adapter, *options, code=1)
    assert said.startswith("0 of 3 answers are equal")
    assert "input 1, token 1:" in said
    told(adapter, *options, "--at-least", "0")


def test_what_cannot_be_compared_is_refused(adapter: Path, gguf: Path, tmp_path: Path) -> None:
    assert "llama-cpp" in engines_that_run()
    inputs = tmp_path / "inputs.txt"
    inputs.write_text("a\n")
    verify = ["verify", adapter]
    assert "expected" in refused(*verify, "--engine", "other", cwd=tmp_path)
    assert "--gguf needs --engine" in refused(*verify, "--gguf", gguf, cwd=tmp_path)
    with_engine = [*verify, "--engine", "llama-cpp"]
    assert "leave --score out" in refused(*with_engine, "--score", cwd=tmp_path)
    said = refused(*with_engine, "--gguf", gguf, "--prompts", tmp_path / "no.txt", cwd=tmp_path)
    assert "no such file" in said
    said = refused(*with_engine, "--gguf", gguf, cwd=tmp_path)
    assert "give the recipe with --recipe" in said


def test_inputs_are_those_of_the_file_or_the_recipes_test(adapter: Path, tmp_path: Path) -> None:
    file = tmp_path / "inputs.txt"
    file.write_text("one\n\ntwo\nthree\n")
    assert prompts_of(adapter, 2, file=file) == ["one", "two"]
    file.write_text("\n")
    with pytest.raises(UserError, match="no inputs"):
        prompts_of(adapter, 2, file=file)
    recipe = Path(__file__).parents[1] / "recipes" / "message-routing-smollm2.yaml"
    found = prompts_of(adapter, 3, recipe=recipe)
    assert len(found) == 3
    assert all(text.startswith("Message: ") for text in found)
