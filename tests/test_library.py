"""The adapters of a server: what is refused changes nothing, in memory or on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_base
from huggingface_hub.constants import HF_HUB_CACHE
from peft import LoraConfig, get_peft_model
from safetensors.torch import save
from starlette.testclient import TestClient
from test_composition import save_lora
from test_engine import Asked
from test_peft_parity import LEARNT, make_adapter

from ptkit.bank import AdapterBank
from ptkit.errors import AdapterError, UserError
from ptkit.formats import atomic
from ptkit.formats.adapter_files import write_adapter
from ptkit.formats.adapter_folder import CONFIG, INFO, WEIGHTS
from ptkit.serve.answer import InUseError
from ptkit.serve.app import create_app
from ptkit.serve.engine import Engine
from ptkit.serve.library import Library
from ptkit.serve.metrics import Metrics


@pytest.fixture
def library(tmp_path: Path) -> Iterator[Library]:
    (tmp_path / "served").mkdir()
    bank = AdapterBank(random_base("gpt2"), check_every=0)
    engine = Engine(bank, max_rows=2)
    yield Library(engine, tmp_path / "served", base_name="base")
    engine.close()


def files_of(folder: Path) -> dict[str, bytes]:
    kept = ("adapter_config.json", WEIGHTS, "ptkit.json")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name in kept}


def prefix_files(library: Library, folder: Path, seed: int, **changed: object) -> dict[str, bytes]:
    torch.manual_seed(seed)
    kind = str(changed.pop("kind", "prefix"))
    adapter = make_adapter(library.bank.base, {**LEARNT[kind], **changed})
    files = adapter.files()
    if kind == "prompt" and "huge" in folder.name:
        files.tensors["prompt_embeddings"][0, 0] = 3e38  # finite, until the base has read it
    write_adapter(folder, files)
    return files_of(folder)


def snapshot(library: Library) -> dict[str, bytes]:
    assert library.root is not None
    return {str(p): p.read_bytes() for p in library.root.rglob("*") if p.is_file()}


REFUSED = ["huge", "dora", "lora", "too large for the budget", "a disk that is full"]


@pytest.mark.parametrize("why", REFUSED)
def test_a_refused_upload_leaves_the_adapter_on_disk_and_in_use(
    why: str, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = library.bank
    assert library.upload("mine", prefix_files(library, tmp_path / "good", 1))
    before, held = snapshot(library), bank.prefix("mine")
    raised: type[Exception] = AdapterError
    if why == "dora":
        config = LoraConfig(r=2, target_modules=["c_attn"], use_dora=True, task_type="CAUSAL_LM")
        get_peft_model(random_base("gpt2").model, config).save_pretrained(tmp_path / "new")
        files = files_of(tmp_path / "new")
    elif why == "lora":  # `mine` is a prefix; another kind needs another name
        save_lora("gpt2", tmp_path / "new", seed=1)
        files = files_of(tmp_path / "new")
    elif why == "huge":
        files = prefix_files(library, tmp_path / "huge", 2, kind="prompt")
    else:
        files = prefix_files(library, tmp_path / "new", 2, num_virtual_tokens=9)
    if why == "too large for the budget":
        bank._store.resident.budget = held.nbytes
    if why == "a disk that is full":
        raised = OSError

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(atomic, "exchange", full)
    with pytest.raises(raised):
        library.upload("mine", files)
    assert snapshot(library) == before
    assert bank.prefix("mine") is held
    assert [p.name for p in (library.root or tmp_path).iterdir()] == ["mine"]


def test_an_upload_refused_for_a_lora_in_use_replaces_nothing(
    library: Library, tmp_path: Path
) -> None:
    for number in range(2):
        save_lora("gpt2", tmp_path / f"l{number}", seed=number, rank=2 + number)
    assert library.upload("mine", files_of(tmp_path / "l0"))
    before = snapshot(library)
    asked = Asked(library.bank, ["mine"], [5, 6], max_tokens=100)
    asked.answer.adapters = library.adapters("mine")
    library.engine.submit([asked.answer])
    with pytest.raises(InUseError):
        library.upload("mine", files_of(tmp_path / "l1"))
    assert snapshot(library) == before
    assert len(asked.ids) == 100
    while library.engine.scheduler.uses("mine"):  # told before the row is free
        pass
    alone = library.bank.generate(["w3 w4"], ["mine"], max_new_tokens=6, do_sample=False)
    assert not library.upload("mine", files_of(tmp_path / "l1"))
    assert snapshot(library) != before
    assert library.bank.status("mine").path == library.root / "mine"
    assert library.bank.generate(["w3 w4"], ["mine"], max_new_tokens=6, do_sample=False) != alone


def test_a_lora_that_cannot_be_published_leaves_the_base_as_it_was(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_lora("gpt2", tmp_path / "l0", seed=0)
    base = library.bank.base.model
    before = [name for name, _ in base.named_parameters()]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "chmod", full)
    with pytest.raises(OSError, match="No space"):
        library.upload("mine", files_of(tmp_path / "l0"))
    assert [name for name, _ in base.named_parameters()] == before
    assert library.names() == []
    assert list((library.root or tmp_path).iterdir()) == []


def test_an_upload_is_served_from_its_own_folder_and_read_again_when_that_changes(
    library: Library, tmp_path: Path
) -> None:
    assert library.upload("mine", prefix_files(library, tmp_path / "one", 1))
    first = library.bank.prefix("mine")
    assert library.bank.prefix("mine") is first, "its files are those that were read"
    assert library.bank.status("mine").path == library.root / "mine"
    assert not library.upload("mine", prefix_files(library, tmp_path / "two", 2))
    assert library.bank.status("mine").version == 2
    assert not torch.equal(library.bank.prefix("mine").flat(), first.flat())


@pytest.mark.parametrize("beside", ["checkpoint-5/x.json", "mine.txt"])
@pytest.mark.parametrize("served", [True, False])
def test_an_upload_replaces_no_folder_that_holds_other_things(
    served: bool, beside: str, library: Library, tmp_path: Path
) -> None:
    files = prefix_files(library, tmp_path / "one", 1)
    if served:
        library.upload("mine", files)
    kept = library.root / "mine" / beside
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text("precious")
    with pytest.raises(
        UserError, match=rf"holds `{kept.relative_to(library.root / 'mine').parts[0]}`"
    ):
        library.upload("mine", files)
    assert kept.read_text() == "precious"
    (library.root / "file").write_text("precious")
    with pytest.raises(UserError, match="is a file"):
        library.upload("file", files)


@pytest.mark.parametrize("change", ["gone", "damaged", "record gone"])
def test_an_adapter_in_use_is_asked_as_its_own_files_said_whatever_becomes_of_them(
    change: str, library: Library, tmp_path: Path
) -> None:
    library.upload("mine", prefix_files(library, tmp_path / "one", 1))
    folder = library.root / "mine"
    task = {"kind": "classification", "input": "Q: {text}", "verbalizer": {"a": "w1", "b": "w2"}}
    (folder / INFO).write_text(json.dumps({"task": task}))
    before = library.bank.prefix("mine")
    assert library.template("mine") == "Q: {text}"
    if change == "gone":
        folder.rename(tmp_path / "elsewhere")
    elif change == "damaged":
        (folder / INFO).write_text("{")
    else:  # half of a copy: what is there is a sound adapter of PEFT's
        (folder / INFO).unlink()
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    assert library.bank.prefix("mine") is before
    assert library.template("mine") == "Q: {text}"
    found = library.task("mine")
    assert found is not None
    assert found.verbalizer == task["verbalizer"]


def test_changed_files_of_a_lora_are_told_and_loaded_by_a_swap(
    library: Library, tmp_path: Path
) -> None:
    for number in range(2):
        save_lora("gpt2", tmp_path / f"l{number}", seed=number)
    library.upload("mine", files_of(tmp_path / "l0"))
    folder = library.root / "mine"
    assert library.card("mine").fault is None
    for name, content in files_of(tmp_path / "l1").items():
        (folder / name).write_bytes(content)
    assert "`swap` loads them" in str(library.card("mine").fault)
    library.load("mine", path="mine", hub=None, replace=True)
    assert library.card("mine").fault is None
    assert library.bank.status("mine").version == 2


def spoilt(files: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    """Uploads that are refused, each for a reason of its own."""
    config = json.loads(files[CONFIG])
    info = {"base": {"id": "gpt2", "fingerprint": "0" * 16}}
    nan = save({"prompt_embeddings": torch.full((4, 32), float("nan"))})
    return {
        "no settings": {WEIGHTS: files[WEIGHTS]},
        "no weights": {CONFIG: files[CONFIG]},
        "cut": {**files, WEIGHTS: files[WEIGHTS][:-9]},
        "zeros": {**files, WEIGHTS: bytes(400)},
        "no JSON": {**files, CONFIG: b"{"},
        "a list": {**files, CONFIG: b"[]"},
        "no method": {**files, CONFIG: b"{}"},
        "unknown method": {**files, CONFIG: json.dumps({**config, "peft_type": "X"}).encode()},
        "AdapterHub": {**files, CONFIG: b'{"config": {}, "model_type": "gpt2"}'},
        "record": {**files, INFO: b'{"base": 1}'},
        "other base": {**files, INFO: json.dumps(info).encode()},
        "not finite": {CONFIG: files[CONFIG], WEIGHTS: nan},
    }  # fmt: skip


def test_what_a_client_is_told_names_no_place_on_the_servers_disk(tmp_path: Path) -> None:
    """Uploads, loads, swaps, cards and answers: every way that a refusal is worded."""
    served = tmp_path / "served"
    served.mkdir()
    base = replace(random_base("gpt2"), id=str(tmp_path))  # as if loaded from a folder
    library = Library(Engine(AdapterBank(base, check_every=0), max_rows=2), served, base_name="b")
    good = prefix_files(library, tmp_path / "good", 1, kind="prompt")
    told: list[str] = []
    with TestClient(create_app(library, Metrics(library.bank))) as client:
        library.upload("mine", good)
        for name, content in spoilt(good).items():
            sent = [("files", pair) for pair in content.items()]
            refused = [client.put("/v1/adapters/mine", files=sent)]
            (served / name).mkdir()
            for file, data in content.items():
                (served / name / file).write_bytes(data)
            refused.append(client.post("/v1/load_adapter", json={"name": "new", "path": name}))
            refused.append(client.post("/v1/swap_adapter", json={"name": "mine", "path": name}))
            assert [answer.status_code for answer in refused] == [422] * 3, name
            told += [answer.json()["error"]["message"] for answer in refused]
        # Files that go bad while they are served.
        library.bank.register(served / "cut", "later")
        (served / "mine" / CONFIG).write_bytes(b"{")
        library.adapters("mine")
        told.append(str(client.get("/v1/adapters").json()))
        for stream in (False, True):
            asked = {"model": "later", "prompt": "w1", "stream": stream}
            answer = client.post("/v1/completions", json=asked)
            assert answer.status_code == 422
            told.append(answer.text)
    assert not [message for message in told if str(tmp_path) in message or ".tmp" in message]
    assert any("cut/adapter_model.safetensors is damaged" in message for message in told)
    assert any("made for the base model `gpt2`, not for `b`" in message for message in told)


@pytest.mark.parametrize("prompts", [["w1"] * 65, [[1, 2]] * 65])
def test_too_many_prompts_are_told_as_such(library: Library, prompts: list[object]) -> None:
    with TestClient(create_app(library, Metrics(library.bank))) as client:
        refused = client.post("/v1/completions", json={"model": "base", "prompt": prompts})
        assert refused.status_code == 400
        told = refused.json()["error"]["message"]
        assert told.startswith("`prompt` holds 65 prompts, a request takes at most 64")
        long = client.post("/v1/completions", json={"model": "base", "prompt": [1] * 100})
        assert long.status_code == 200, "token ids of one prompt"
        for nothing in ([], [[]]):
            refused = client.post("/v1/completions", json={"model": "base", "prompt": nothing})
            assert refused.json()["error"]["message"] == "`prompt` is an empty list"


def test_an_adapter_of_the_hubs_cache_is_told_by_its_id(library: Library) -> None:
    place = Path(HF_HUB_CACHE) / "models--team--facts" / "snapshots" / "0a1b" / WEIGHTS
    assert library.public(f"{place} is damaged") == f"team/facts/{WEIGHTS} is damaged"
