"""`ptkit serve --engine llama-cpp`: OpenAI's API over llama.cpp's server, adapters in its slots."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
import torch
from gguf import GGMLQuantizationType
from llama_cpp import (
    ARCHITECTURES,
    SERVER,
    needs_server,
    shifted,
    tiny_base,
    tiny_gguf,
    write_prefixes,
)
from serving import Serving, free_port
from test_cli import ptkit, refused
from test_gguf import write as write_gguf
from test_peft_parity import LEARNT, make_adapter

from ptkit.bank import AdapterBank
from ptkit.errors import UserError
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.formats.adapter_info import ChatInfo
from ptkit.methods import Demonstrations, create_adapter
from ptkit.recipe.schema import method_section
from ptkit.runtime import named_models
from ptkit.runtime.base_model import Base
from ptkit.runtime.slot_file import NEIGHBOURS, CacheLayout, cache_layout, placeholders
from ptkit.serve import run
from ptkit.serve.engines.llama_cpp import host, launch
from ptkit.serve.engines.llama_cpp.events import asked_of_server, read_event
from ptkit.serve.engines.llama_cpp.executor import Slot, SlotExecutor
from ptkit.serve.engines.llama_cpp.server import LlamaCppSettings, LlamaServer, found
from ptkit.serve.engines.llama_cpp.trial import require_same_answers
from ptkit.serve.library import Library
from ptkit.serve.sampling import Sampling

PROMPT = "abc 12"
CONTEXT = 96
#: Of an adapter that was trained on conversations.
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ', ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)
FLOAT32 = CacheLayout(True, GGMLQuantizationType.F32)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(gguf: Path) -> Base:
    return tiny_base(gguf)


@pytest.fixture(scope="module")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prefixes and one adapter of each trained method; a LoRA and a damaged one."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters")
    write_prefixes(base, folder, 3)
    for name in ("prefix-mlp", "prompt", "p-tuning-lstm"):
        write_adapter(folder / name, make_adapter(base, LEARNT[name]).files())
    files = read_adapter(folder / "a0")
    info = files.info.model_copy(update={"chat": ChatInfo(template=CHAT, system="zyx")})
    write_adapter(folder / "chatty", replace(files, info=info))
    lora = create_adapter(method_section({"kind": "lora"}), base, Demonstrations((), 0))
    write_adapter(folder / "changes-weights", lora.files())
    lora.close()
    shutil.copytree(folder / "a0", folder / "damaged")
    weights = folder / "damaged" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    return folder


ADAPTERS = ["a0", "a1", "a2", "prefix-mlp", "prompt", "p-tuning-lstm"]


@pytest.fixture(scope="module")
def expected(base: Base, folder: Path) -> dict[str, str]:
    """Greedy answers of transformers, by what requests call the adapter."""
    bank = AdapterBank(base)
    for name in ADAPTERS:
        bank.load(folder / name, name)
    names = [*ADAPTERS, None]
    answers = bank.generate([PROMPT] * len(names), names, max_new_tokens=12)
    return dict(zip([*ADAPTERS, "tiny"], answers, strict=True))


@pytest.fixture(scope="module")
def served(gguf: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Six adapters and the base on two slots."""
    if not SERVER.is_dir():
        pytest.skip("needs llama.cpp's server: make setup-engines")
    options = ["--engine", "llama-cpp", "--gguf", str(gguf), "--slots", "2", "--context",
               str(CONTEXT), "--llama-server", str(SERVER), "--model-name", "tiny"]  # fmt: skip
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with Serving(folder, log, *options) as serving:
        yield serving


def asked(served: Serving, model: str, **more: Any) -> httpx2.Response:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **more}
    return served.post("/v1/completions", body)


def streamed(served: Serving, model: str, **more: Any) -> list[dict[str, Any]]:
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **more}
    url, events = f"{served.url}/v1/completions", []
    with httpx2.stream("POST", url, json={**body, "stream": True}, timeout=60) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                events.append(json.loads(line.removeprefix("data: ")))
    return events


def test_more_adapters_than_slots_answer_as_transformers_does(
    served: Serving, expected: dict[str, str]
) -> None:
    for _ in range(2):
        for name, text in expected.items():
            assert served.completion(name, PROMPT) == text, name
            told = "".join(e["choices"][0]["text"] for e in streamed(served, name))
            assert told == text, name


def test_answers_that_wait_for_a_slot_are_those_of_one_alone(
    served: Serving, expected: dict[str, str]
) -> None:
    names = [*expected] * 3
    with ThreadPoolExecutor(len(names)) as pool:
        answers = [*pool.map(lambda name: served.completion(name, PROMPT), names)]
    assert dict(zip(names, answers, strict=True)) == expected


def test_placeholders_are_not_counted_or_told(served: Serving, base: Base) -> None:
    answer = asked(served, "a2", logprobs=1).json()
    (ids,) = base.encode([PROMPT])
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["usage"]["completion_tokens"] == 12
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 12
    counted = streamed(served, "a2", stream_options={"include_usage": True})[-1]
    assert counted["usage"] == answer["usage"]


def test_chat_uses_the_models_template_and_adapters(served: Serving, base: Base) -> None:
    body = {"model": "a1", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8,
            "temperature": 0}  # fmt: skip
    answer = served.post("/v1/chat/completions", body).json()
    as_text = base.tokenizer.apply_chat_template(body["messages"], tokenize=False)
    (ids,) = base.encode([as_text])
    same = asked(served, "a1", prompt=ids, max_tokens=8).json()
    assert answer["choices"][0]["message"]["content"] == same["choices"][0]["text"]
    assert answer["usage"] == same["usage"]


def test_a_chat_uses_the_adapters_own_template_and_system_prompt(
    served: Serving, base: Base
) -> None:
    body = {"model": "chatty", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8,
            "temperature": 0}  # fmt: skip
    answer = served.post("/v1/chat/completions", body).json()
    (ids,) = base.encode([f"system zyx, user {PROMPT}, assistant"])
    same = asked(served, "a0", prompt=ids, max_tokens=8).json()
    assert answer["choices"][0]["message"]["content"] == same["choices"][0]["text"]
    assert answer["usage"] == same["usage"]
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_several_answers_stops_and_seeds(served: Serving, expected: dict[str, str]) -> None:
    text = expected["a1"]
    answer = asked(served, "a1", n=3, stop=text[5:7]).json()
    for choice in answer["choices"]:
        assert (choice["text"], choice["finish_reason"]) == (text[:5], "stop")
    drawn = [asked(served, "a1", temperature=1.0, seed=seed).json() for seed in (5, 5, 6)]
    texts = [answer["choices"][0]["text"] for answer in drawn]
    assert texts[0] == texts[1] != texts[2]


def test_models_are_the_base_and_its_adapters(served: Serving) -> None:
    listed = {m["id"]: m for m in served.get("/v1/models").json()["data"]}
    assert {"tiny", *ADAPTERS} <= {*listed}
    assert listed["a0"]["parent"] == "tiny"
    assert listed["a0"]["max_model_len"] == CONTEXT


def test_a_slot_is_filled_to_its_last_position_and_not_beyond(
    served: Serving, expected: dict[str, str], base: Base
) -> None:
    (ids,) = base.encode([PROMPT])
    most = CONTEXT - len(ids) - 3  # a0 has three virtual tokens
    full = asked(served, "a0", max_tokens=most).json()
    assert full["usage"]["completion_tokens"] == most or (
        full["choices"][0]["finish_reason"] == "stop"
    )
    over = asked(served, "a0", max_tokens=most + 1)
    assert over.status_code == 400
    assert f"of which there are {CONTEXT} here" in over.json()["error"]["message"]
    assert served.completion("a1", PROMPT) == expected["a1"]


@pytest.mark.parametrize(
    ("model", "more", "status", "says"),
    [
        ("nothing", {}, 404, "does not exist"),
        ("damaged", {}, 422, "damaged"),
        ("changes-weights", {}, 422, "changes the base's weights"),
        ("a0,a1", {}, 400, "holds one adapter"),
        ("a0", {"presence_penalty": 1}, 400, "not supported with llama.cpp"),
        ("a0", {"ignore_eos": True}, 400, "not supported with llama.cpp"),
        ("a0", {"prompt": [100_000]}, 400, "the model knows"),
    ],
)
def test_what_a_slot_cannot_hold_is_refused_with_its_reason(
    served: Serving, expected: dict[str, str], model: str, more: dict, status: int, says: str
) -> None:
    response = asked(served, model, **more)
    assert response.status_code == status, response.text
    assert says in response.json()["error"]["message"]
    assert served.completion("a0", PROMPT) == expected["a0"]


def test_a_swapped_adapter_is_not_the_one_in_the_slot(
    served: Serving, base: Base, expected: dict[str, str], folder: Path
) -> None:
    asked(served, "a0")
    name = "later"
    for source in ("a1", "a2"):
        kind = "load" if source == "a1" else "swap"
        changed = served.post(f"/v1/{kind}_adapter", {"name": name, "path": source})
        assert changed.status_code == 200, changed.text
        assert served.completion(name, PROMPT) == expected[source]
    served.post("/v1/unload_adapter", {"name": name})
    assert asked(served, name).status_code == 404


def test_a_client_that_leaves_gives_its_slot_back(
    served: Serving, expected: dict[str, str]
) -> None:
    body = {"model": "a0", "prompt": PROMPT, "max_tokens": CONTEXT - 20, "stream": True, "seed": 1}
    for _ in range(4):  # twice as many as slots
        with httpx2.stream("POST", f"{served.url}/v1/completions", json=body) as response:
            next(response.iter_lines())
    end = time.monotonic() + 20
    while served.counter("ptkit_running_rows") and time.monotonic() < end:
        time.sleep(0.05)
    assert served.counter("ptkit_running_rows") == 0
    for name in ("a0", "a1"):
        assert served.completion(name, PROMPT) == expected[name]


def hosts(served: Serving) -> list[psutil.Process]:
    """The processes that are llama.cpp's server."""
    return psutil.Process(served.process.pid).children(recursive=True)


def test_the_servers_death_is_told_and_it_is_started_again(
    served: Serving, expected: dict[str, str]
) -> None:
    asked(served, "a0")
    (old,) = hosts(served)
    old.kill()
    while old.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert served.completion("a0", PROMPT) == expected["a0"]  # idle: not noticed
    (new,) = hosts(served)
    assert new.pid != old.pid
    new.suspend()  # so that an answer is surely under way
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(asked, served, "a1")
        time.sleep(0.3)
        new.kill()
        response = waiting.result(30)
    assert response.status_code == 503
    assert "ended (exit code" in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "engine_died"
    assert served.completion("a1", PROMPT) == expected["a1"]


def test_llama_cpps_server_ends_with_ptkit(gguf: Path, tmp_path: Path) -> None:
    if not SERVER.is_dir():
        pytest.skip("needs llama.cpp's server: make setup-engines")
    options = ["--engine", "llama-cpp", "--gguf", str(gguf), "--slots", "1", "--context", "64",
               "--llama-server", str(SERVER)]  # fmt: skip
    with Serving(None, tmp_path / "log", *options) as serving:
        (process,) = hosts(serving)
        serving.process.kill()
        process.wait(20)


# Without `ptkit serve`


@needs_server
def test_a_running_server_is_used_where_it_is(
    gguf: Path, base: Base, folder: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    """Another client takes the slot in between, which is noticed."""
    from starlette.testclient import TestClient

    from ptkit.serve.build import build_app
    from ptkit.serve.engines.llama_cpp.launch import started

    port = free_port()
    given = {"program": None, "library": str(SERVER), "gguf": str(gguf), "port": port, "slots": 1,
             "positions": 64, "flash_attention": True, "cache": "f32", "folder": str(tmp_path),
             "threads": 1, "api_key": ""}  # fmt: skip
    process = subprocess.Popen([sys.executable, host.__file__], stdin=subprocess.PIPE, text=True)
    assert process.stdin is not None
    process.stdin.write(json.dumps(given) + "\n")
    process.stdin.flush()
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                if httpx2.get(f"{url}/health").status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.05)
        with pytest.raises(UserError, match="needs --slot-folder"):
            build_app(base, executor=started(gguf, "float32", 1, 64, url))
        with pytest.raises(UserError, match="has 1 slots"):
            build_app(base, executor=started(gguf, "float32", 2, 32, url, tmp_path))
        with pytest.raises(UserError, match="has room for"):
            build_app(base, executor=started(gguf, "float32", 1, 1000, url, tmp_path))
        with pytest.raises(UserError, match="refuses slot files"):
            build_app(base, executor=started(gguf, "float16", 1, 64, url, tmp_path))
        app = build_app(
            base, folder, executor=started(gguf, "float32", 1, 64, url, tmp_path), max_batch=1,
            chosen=True,
        )  # fmt: skip
        with TestClient(app) as client:
            for _ in range(2):
                body = {"model": "a0", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
                answer = client.post("/v1/completions", json=body).json()
                assert answer["choices"][0]["text"] == expected["a0"]
                other = {"prompt": [5, 6, 7], "n_predict": 1, "id_slot": 0}
                assert httpx2.post(f"{url}/completion", json=other).status_code == 200
        assert not [*tmp_path.glob("*.bin")]
    finally:
        process.stdin.close()
        process.wait(20)


async def tried(gguf: Path, base: Base, layout: CacheLayout) -> None:
    settings = LlamaCppSettings(gguf, layout, 1, 64, threads=1, where=str(SERVER))
    server = LlamaServer(settings)
    try:
        await server.ready()
        await require_same_answers(server, base)
    finally:
        await server.close()


@needs_server
@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.parametrize("flash", [True, False])
def test_a_server_that_keeps_values_as_it_is_said_to_is_used(
    gguf: Path, base: Base, dtype: str, flash: bool
) -> None:
    asyncio.run(tried(gguf, base, CacheLayout(True, GGMLQuantizationType[dtype], flash)))


def test_every_architecture_that_is_written_is_compared() -> None:
    assert {*NEIGHBOURS} == {*ARCHITECTURES}


@needs_server
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_keys_lie_as_the_architecture_turns_them(architecture: str, tmp_path: Path) -> None:
    """And a server that reads them otherwise is refused before it serves."""
    gguf = tiny_gguf(tmp_path, architecture)
    base, right = tiny_base(gguf), cache_layout(gguf, "float32")
    asyncio.run(tried(gguf, base, right))
    wrong = CacheLayout(not right.neighbours, right.cache)
    with pytest.raises(UserError, match="does not continue a restored text"):
        asyncio.run(tried(gguf, base, wrong))


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", GGMLQuantizationType.F32, arch="phi3")
    with pytest.raises(UserError, match=r"'phi3'; slot files are written for llama, qwen2, qwen3"):
        cache_layout(tmp_path / "m.gguf", "float32")


@needs_server
def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF, but no model")

    async def begun() -> None:
        server = LlamaServer(LlamaCppSettings(bad, FLOAT32, 1, 64, where=str(SERVER)))
        try:
            for _ in range(4):
                with pytest.raises(Exception, match=r"last lines:") as told:
                    await server.ready()
            assert "3 times within 60 s" in str(told.value)
        finally:
            await server.close()

    asyncio.run(begun())


def test_the_program_is_given_what_the_slot_files_need(tmp_path: Path) -> None:
    given = {
        "program": "llama-server", "gguf": "m.gguf", "port": 5, "slots": 3, "threads": 2,
        "positions": 300, "flash_attention": False, "cache": "f16", "folder": "/slots",
    }  # fmt: skip
    words = " ".join(host.command(given))
    for option in ("--model m.gguf", "--parallel 3", "--ctx-size 300", "--flash-attn off",
                   "--cache-type-k f16", "--cache-type-v f16", "--slot-save-path /slots",
                   "--cache-ram 0", "--kv-unified", "--threads 2", "--port 5"):  # fmt: skip
        assert option in words


def test_what_is_no_server_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="neither a program"):
        found(str(tmp_path))
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert found(str(program)) == (str(program), None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert found(None) == (str(program), None)
    (tmp_path / "xllamacpp").mkdir()
    assert found(str(tmp_path)) == (None, str(tmp_path))


def test_options_of_another_engine_are_refused(gguf: Path, tmp_path: Path) -> None:
    llama_cpp = ["serve", "--engine", "llama-cpp"]
    assert "needs --gguf" in refused(*llama_cpp, cwd=tmp_path)
    for option in (["--model", "x"], ["--max-batch", "3"], ["--kv-budget", "1GB"]):
        said = refused(*llama_cpp, "--gguf", gguf, *option, cwd=tmp_path)
        assert f"does not take {option[0]}" in said
    for option in (["--gguf", gguf], ["--slots", "3"], ["--context", "64"]):
        assert f"does not take {option[0]}" in refused("serve", *option, cwd=tmp_path)
    said = refused(*llama_cpp, "--gguf", gguf, "--dtype", "bfloat16", cwd=tmp_path)
    assert "float32, float16 or int8" in said


def test_every_option_arrives(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def started(*settings: Any) -> None:
        given.append(settings)
        raise UserError("seen")

    monkeypatch.setattr(launch, "started", started)
    words = ["serve", "--engine", "llama-cpp", "--gguf", gguf, "--dtype", "int8", "--slots", "3",
             "--context", "77", "--llama-server", "there", "--slot-folder", tmp_path]  # fmt: skip
    assert "seen" in refused(*words, cwd=tmp_path)
    assert given == [(gguf, "int8", 3, 77, "there", tmp_path)]


def test_the_base_is_called_as_it_was_asked_for_and_by_its_file_too(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Library] = []

    def ended(app: Any, *_: Any, **__: Any) -> None:
        seen.append(app.state.library)

    monkeypatch.setattr(launch, "started", lambda *_: None)
    monkeypatch.setattr(named_models, "gguf_of", lambda name: gguf)
    monkeypatch.setattr(run, "run_server", ended)
    for given, name in (("smollm2-135m", "smollm2-135m"), (gguf, gguf.name)):
        ptkit("serve", "--engine", "llama-cpp", "--gguf", given, cwd=tmp_path)
        library = seen.pop()
        assert library.base_name == name
        assert library.is_base(gguf.name)
        assert not library.is_base("smollm2")
    ptkit("serve", "--engine", "llama-cpp", "--gguf", "smollm2-135m", "--model-name", "mine",
          cwd=tmp_path)  # fmt: skip
    assert seen.pop().base_name == "mine"


def test_a_slot_that_answers_is_never_taken_and_the_oldest_idle_one_is() -> None:
    executor = object.__new__(SlotExecutor)
    first, second, base = object(), object(), None
    slots = [
        Slot(0, holds=first, used=3.0), Slot(1, holds=second, used=1.0),
        Slot(2, holds=base, used=2.0),
    ]  # fmt: skip
    executor._slots = slots
    assert executor._free_slot(first) is slots[0]
    assert executor._free_slot(base) is slots[2]
    assert executor._free_slot(object()) is slots[1]
    slots[0].busy = True
    assert executor._free_slot(first) is slots[1]
    slots[1].busy = True
    assert executor._free_slot(second) is slots[2]


def test_placeholders_are_tokens_that_the_model_has(base: Base) -> None:
    """The tokenizer of this file has one more."""
    assert len(base.tokenizer) > base.embedding.num_embeddings
    used = set()
    for seed in range(20):
        used |= {*placeholders(shifted(base, seed, "abcdefghijklmnop" * 3, 0.1), base)}
    assert max(used) < base.embedding.num_embeddings
    assert not used & {*base.tokenizer.all_special_ids}


def test_tokens_that_are_parts_of_a_character_are_counted() -> None:
    """The server tells of the last one only, with the text of all."""
    event = {"content": "🔥", "tokens": [115], "stop": False, "tokens_predicted": 3}
    written = read_event(event, 0, 0)
    assert (written.missing, written.written, written.text) == (True, 3, "🔥")
    last = {"content": "", "tokens": [], "stop": True, "tokens_predicted": 5, "stop_type": "limit"}
    written = read_event(last, 3, 0)
    assert (written.missing, written.written, written.finish) == (True, 5, "length")
    assert not read_event(last, 5, 0).missing


def test_only_what_openai_calls_sampling_is_on() -> None:
    asked = asked_of_server(Sampling(max_tokens=5, temperature=0.7, top_p=0.9, seed=2**40))
    assert asked["samplers"] == ["temperature", "top_p"]
    assert (asked["temperature"], asked["top_p"], asked["n_predict"]) == (0.7, 0.9, 5)
    assert 0 <= asked["seed"] < 2**32 - 1
    assert asked_of_server(Sampling(max_tokens=5))["temperature"] == 0
