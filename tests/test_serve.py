"""The server as its clients see it: OpenAI's own Python client, and bad ones."""

from __future__ import annotations

import asyncio
import json
import random
import resource
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import httpx2
import openai
import pytest
from serving import Serving
from test_cli import refused

from ptkit.bank import AdapterBank
from ptkit.bench.bases import random_prefixes
from ptkit.evaluation.classify import classifier
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.model_names import TINY_EN

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "adapters"
ADAPTERS = 32
#: Prompts as they are, not in the adapter's template.
RAW = {"template": False}
PROMPTS = ["The boat", "A lake in winter is", "kind[robot], name[Al]\n", "Once upon a time, there"]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(TINY_EN, device="cpu")


@pytest.fixture(scope="module")
def folder(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped adapters, 32 random ones, and one whose weights are cut short."""
    folder = tmp_path_factory.mktemp("adapters")
    for path in SHIPPED.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
    random_prefixes(base, folder, ADAPTERS, 5)
    cut = folder / "cut"
    shutil.copytree(folder / "facts-prefix", cut)
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return folder


@pytest.fixture(scope="module")
def bank(base: Base, folder: Path) -> AdapterBank:
    bank = AdapterBank(base)
    bank.register_all(folder)
    return bank


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    log = tmp_path_factory.mktemp("log") / "serve.log"
    with Serving(folder, log, "--max-batch", "16", "--max-tokens", "400") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Serving) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def solo(bank: AdapterBank, name: str | None, prompt: str, tokens: int) -> str:
    return bank.generate([prompt], [name], max_new_tokens=tokens, do_sample=False)[0]


# OpenAI's client


@pytest.mark.parametrize("name", [None, "facts-prefix", "facts-prompt", "routing-ptuning"])
def test_completion_is_the_solo_greedy_run_streamed_or_not(
    client: openai.OpenAI, bank: AdapterBank, name: str | None
) -> None:
    for prompt in PROMPTS:
        expected = solo(bank, name, prompt, 16)
        settings: dict[str, Any] = {
            "model": name or TINY_EN, "prompt": prompt, "max_tokens": 16, "temperature": 0,
            "extra_body": RAW,
        }  # fmt: skip
        whole = client.completions.create(**settings)
        assert whole.choices[0].text == expected
        ids = bank.base.tokenizer(prompt)["input_ids"]
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == len(ids)
        pieces = list(
            client.completions.create(
                **settings, stream=True, stream_options={"include_usage": True}
            )
        )
        assert "".join(p.choices[0].text for p in pieces if p.choices) == expected
        assert pieces[-1].usage == whole.usage
        assert whole.choices[0].finish_reason == pieces[-2].choices[0].finish_reason


def test_several_prompts_n_stop_and_logprobs(client: openai.OpenAI, bank: AdapterBank) -> None:
    made = client.completions.create(
        model="facts-prefix", prompt=PROMPTS[:2], n=2, max_tokens=8, temperature=0, logprobs=2,
        extra_body=RAW,
    )  # fmt: skip
    assert [c.index for c in made.choices] == [0, 1, 2, 3]
    texts = [c.text for c in made.choices]
    assert texts == [solo(bank, "facts-prefix", p, 8) for p in PROMPTS[:2] for _ in range(2)]
    first = made.choices[0].logprobs
    assert first is not None
    assert "".join(first.tokens).startswith(texts[0])
    assert all(len(top) == 2 for top in first.top_logprobs)
    assert first.text_offset[:2] == [0, len(first.tokens[0])]
    ids = bank.base.tokenizer("The boat")["input_ids"]
    by_ids = client.completions.create(
        model="facts-prefix", prompt=ids, max_tokens=8, temperature=0, stop=[texts[0][5:8]]
    )
    assert by_ids.choices[0].text == texts[0][: texts[0].index(texts[0][5:8])]
    assert by_ids.choices[0].finish_reason == "stop"
    several = client.completions.create(
        model="facts-prefix", prompt="The", n=3, max_tokens=12, temperature=1.0, seed=3
    )
    assert len({c.text for c in several.choices}) > 1
    again = client.completions.create(
        model="facts-prefix", prompt="The", n=3, max_tokens=12, temperature=1.0, seed=3
    )
    assert [c.text for c in again.choices] == [c.text for c in several.choices]


def test_chat_streams_and_names_its_adapter(client: openai.OpenAI, bank: AdapterBank) -> None:
    messages: Any = [
        {"role": "system", "content": "Facts."},
        {"role": "user", "content": [{"type": "text", "text": "The boat"}]},
    ]
    whole = client.chat.completions.create(
        model="facts-prefix", messages=messages, max_tokens=12, temperature=0, logprobs=True,
        top_logprobs=1,
    )  # fmt: skip
    # tiny-en has no chat template: line by line, as `ptkit chat` does.
    expected = solo(bank, "facts-prefix", "Facts.\nThe boat", 12)
    assert whole.choices[0].message.content == expected
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content
    assert content is not None
    assert all(t.logprob == pytest.approx(t.top_logprobs[0].logprob) for t in content)
    stream = client.chat.completions.create(
        model="facts-prefix", messages=messages, max_tokens=12, temperature=0, stream=True
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == expected


def test_ensemble_and_template(server: Serving, bank: AdapterBank) -> None:
    names = ["facts-prefix", "facts-prompt"]
    facts = "kind[boat], name[Ashmere], colour[green]"
    together = server.completion(",".join(names), f"{facts}\n", 20)
    expected = bank.ensemble(
        [f"{facts}\n"], names, by="average", max_new_tokens=20, do_sample=False
    )
    assert [together] == expected
    filled = server.completion("facts-prefix", facts, 20, template=True)
    assert filled == solo(bank, "facts-prefix", f"{facts}\n", 20)


def test_the_first_request_is_answered_as_generate_answers(
    client: openai.OpenAI, server: Serving, bank: AdapterBank
) -> None:
    facts = "kind[boat], name[Ashmere], colour[green]"
    expected = solo(bank, "facts-prefix", f"{facts}\n", 64)
    bare = server.post("/v1/completions", {"model": "facts-prefix", "prompt": facts}).json()
    assert bare["choices"][0]["text"] == expected
    asked: Any = [{"role": "user", "content": facts}]
    # It was trained on single inputs, so its chats are as long as its completions.
    chat = client.chat.completions.create(model="facts-prefix", messages=asked)
    assert chat.choices[0].message.content == expected
    sampled = client.completions.create(model="facts-prefix", prompt=facts, n=4, max_tokens=24)
    assert len({choice.text for choice in sampled.choices}) > 1
    (ids,) = bank.base.encode([facts])
    by_ids = client.completions.create(model="facts-prefix", prompt=ids, max_tokens=8)
    assert by_ids.choices[0].text == solo(bank, "facts-prefix", facts, 8)


def test_labels_are_those_of_classify(server: Serving, base: Base) -> None:
    texts = ["I was charged twice for one order", "The parcel has not arrived yet"]
    for name in ("routing-prefix", "routing-ptuning"):
        with classifier(SHIPPED / name, base=base) as own:
            expected = own.probabilities(texts)
        body = {"model": name, "input": texts}
        for path in ("/v1/classify", "/classify"):
            answer = server.post(path, body).json()
            assert answer["labels"] == list(expected[0])
            for row, shares in zip(answer["data"], expected, strict=True):
                assert row["probs"] == pytest.approx([*shares.values()], abs=1e-5)
                assert row["label"] == max(shares, key=shares.__getitem__)
    one = server.post("/v1/classify", {"model": "routing-prefix", "input": texts[0]}).json()
    assert len(one["data"]) == 1
    for model, told in (
        ("facts-prefix", "was not trained to classify"),
        (TINY_EN, "has no labels"),
    ):
        refused_ = server.post("/v1/classify", {"model": model, "input": "x"})
        assert refused_.status_code == 400
        assert told in refused_.json()["error"]["message"]


def test_models_and_cards(client: openai.OpenAI, server: Serving) -> None:
    models = {model.id: model for model in client.models.list()}
    assert len(models) == ADAPTERS + 6
    assert models["facts-prefix"].model_dump()["parent"] == TINY_EN
    assert client.models.retrieve("facts-prompt").id == "facts-prompt"
    server.completion("facts-prefix", "The")
    cards = server.get("/v1/adapters", params={"search": "facts"}).json()
    assert cards["total"] == 2
    card = cards["data"][0]
    assert (card["method"], card["parameters"], card["metric"]) == ("prefix_tuning", 15360, "bleu")
    assert card["low"] < card["score"] < card["high"]
    assert card["tier"] == "resident"
    page = server.get("/v1/adapters", params={"offset": 3, "limit": 2}).json()["data"]
    assert [c["name"] for c in page] == ["adapter-00003", "adapter-00004"]


def test_errors_have_openais_form(client: openai.OpenAI) -> None:
    def ask(**changed: Any) -> None:
        settings = {"model": "facts-prefix", "prompt": "x", "max_tokens": 4, **changed}
        client.completions.create(**settings)

    with pytest.raises(openai.NotFoundError, match="did you mean `facts-prefix`") as unknown:
        ask(model="facts-prefx")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError, match="cut") as damaged:
        ask(model="cut")
    assert damaged.value.code == "adapter_refused"
    for changed, message in (
        ({"max_tokens": 401}, "at most 400"),
        ({"prompt": "x " * 300, "max_tokens": 300}, "needs .* positions"),
        ({"prompt": "", "extra_body": {"template": False}}, "no tokens"),
        ({"prompt": [9_999]}, "the model knows 0 to 8191"),
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "`n`"),
        ({"suffix": "x"}, "`suffix` is not supported"),
        ({"extra_body": {"topp": 1}}, "`topp` is not known"),
        ({"model": "facts-prefix,facts-prefix"}, "twice"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(**changed)


# Adapters under load


def test_adapters_come_and_go_under_load(server: Serving, bank: AdapterBank, folder: Path) -> None:
    """Loads, swaps, uploads, unloads and bad files throughout; nobody else notices."""
    asked = [(f"adapter-{i:05d}", random.Random(i).choice(PROMPTS)) for i in range(8)]
    expected = [solo(bank, name, prompt, 12) for name, prompt in asked]
    wrong: list[str] = []
    stop = threading.Event()

    def keep_asking(index: int) -> None:
        name, prompt = asked[index]
        while not stop.is_set():
            got = server.completion(name, prompt)
            if got != expected[index]:
                wrong.append(f"{name}: {got!r} for {expected[index]!r}")

    crowd = [threading.Thread(target=keep_asking, args=(i,)) for i in range(len(asked))]
    for thread in crowd:
        thread.start()
    facts = solo(bank, "facts-prefix", "The boat", 12)
    routing = solo(bank, "routing-prefix", "The boat", 12)
    names = ("adapter_config.json", "adapter_model.safetensors", "ptkit.json")
    files = {name: (folder / "routing-prefix" / name).read_bytes() for name in names}
    try:
        for _ in range(4):
            loaded = server.post("/v1/load_adapter", {"name": "new", "path": "facts-prefix"})
            assert loaded.json() == {"name": "new", "change": "loaded"}
            assert server.completion("new", "The boat") == facts
            again = server.post("/v1/load_adapter", {"name": "new", "path": "facts-prefix"})
            assert again.status_code == 400
            swapped = server.post("/v1/swap_adapter", {"name": "new", "path": "routing-prefix"})
            assert swapped.status_code == 200
            assert server.completion("new", "The boat") == routing
            for bad in ("cut", "nothing-there"):
                answer = server.post("/v1/swap_adapter", {"name": "new", "path": bad})
                assert answer.status_code == 422
                assert server.completion("new", "The boat") == routing
            put = httpx2.put(
                f"{server.url}/v1/adapters/sent",
                files=[("files", (name, content)) for name, content in files.items()],
            )
            assert put.status_code == 200, put.text
            assert server.completion("sent", "The boat") == routing
            broken = {**files, "adapter_model.safetensors": b"\x00" * 400}
            put = httpx2.put(
                f"{server.url}/v1/adapters/sent",
                files=[("files", (name, content)) for name, content in broken.items()],
            )
            assert put.status_code == 422
            assert server.completion("sent", "The boat") == routing
            for name in ("new", "sent"):
                assert server.post("/v1/unload_lora_adapter", {"lora_name": name}).is_success
                assert server.post("/v1/unload_adapter", {"name": name}).status_code == 404
    finally:
        stop.set()
        for thread in crowd:
            thread.join()
    assert not wrong
    assert not list(folder.glob(".*")), "uploads leave nothing half-written"


def test_many_clients_each_get_their_own_answer(server: Serving, bank: AdapterBank) -> None:
    """64 at once over 32 adapters, some streaming, all equal to the solo run."""
    draw = random.Random(1)
    asked = [
        (f"adapter-{draw.randrange(ADAPTERS):05d}", draw.choice(PROMPTS), draw.randint(1, 8))
        for _ in range(128)
    ]

    async def ask(client: Any, turn: int, gate: asyncio.Semaphore) -> str:
        name, prompt, tokens = asked[turn]
        settings: dict[str, Any] = {
            "model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0
        }  # fmt: skip
        async with gate:
            if turn % 2:
                return (await client.completions.create(**settings)).choices[0].text
            stream = await client.completions.create(**settings, stream=True)
            return "".join([piece.choices[0].text async for piece in stream])

    async def everybody() -> list[str]:
        gate = asyncio.Semaphore(64)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            return await asyncio.gather(*(ask(client, i, gate) for i in range(len(asked))))

    answers = asyncio.run(everybody())
    assert answers == [solo(bank, name, prompt, n) for name, prompt, n in asked]
    assert server.counter('ptkit_batch_rows_bucket{le="1.0"}') < server.counter(
        "ptkit_batch_rows_count"
    ), "requests shared batches"


# Bad clients


def raw(server: Serving, request: bytes, wait: float = 10) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=wait) as line:
        line.sendall(request)
        line.shutdown(socket.SHUT_WR)
        answer = b""
        while part := line.recv(65_536):
            answer += part
        return answer


def test_malformed_requests_get_the_right_status(server: Serving, folder: Path) -> None:
    url = f"{server.url}/v1/completions"
    json_type = {"content-type": "application/json"}
    ask = {"model": TINY_EN, "prompt": "x"}
    assert httpx2.post(url, content=b'{"model": ', headers=json_type).status_code == 400
    assert httpx2.post(url, content=b"\xff\xfe", headers=json_type).status_code == 400
    assert httpx2.post(url, content=b"[" * 100_000, headers=json_type).status_code == 400
    assert httpx2.post(url, content=json.dumps(ask).encode()).status_code == 400, "no content type"
    huge = server.post("/v1/completions", {**ask, "prompt": "x" * 10_000_000})
    assert huge.status_code == 413
    chunked = httpx2.post(url, content=(b"x" * 100_000 for _ in range(20)), headers=json_type)
    assert chunked.status_code == 413
    assert server.get("/v1/completions").status_code == 405
    assert server.get("/nothing").status_code == 404
    assert b" 400 " in raw(server, b"NOT HTTP\r\n\r\n").split(b"\r\n")[0]
    for name in ("../x", "a/b", "..", ".hidden", "a\x00b", "", "x" * 200, TINY_EN):
        for path, body in (
            ("/v1/load_adapter", {"name": name, "path": "facts-prefix"}),
            ("/v1/unload_adapter", {"name": name}),
        ):
            assert server.post(path, body).status_code in (400, 404), (path, name)
    outside = folder.parent / "outside"
    shutil.copytree(folder / "facts-prefix", outside)
    (folder / "link").symlink_to(outside)
    for path in (
        "../outside",
        str(outside),
        "link",
        ".",
        "",
        "facts-prefix/../../outside",
        "a\x00",
    ):
        answer = server.post("/v1/load_adapter", {"name": "stolen", "path": path})
        assert answer.status_code == 400, path
    (folder / "link").unlink()
    refused_hub = server.post("/v1/load_adapter", {"name": "x", "hub": "user/repo"})
    assert refused_hub.status_code == 403
    put = httpx2.put(f"{server.url}/v1/adapters/x", files=[("files", ("../evil", b"x"))])
    assert put.status_code == 400
    assert httpx2.put(f"{server.url}/v1/adapters/..%2Fx", files=[("files", ("a", b"x"))]).is_error
    assert server.get("/v1/models", headers={"host": "evil.example"}).status_code == 400
    assert server.completion(TINY_EN, "The")
    assert server.get("/health").status_code == 200


def test_who_leaves_frees_the_row(server: Serving) -> None:
    body = {"model": TINY_EN, "prompt": "x", "max_tokens": 400, "ignore_eos": True}
    cancelled = 'ptkit_answers_total{adapter="tiny-en",outcome="cancelled"}'
    before = server.counter(cancelled)
    with httpx2.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}) as s:
        next(s.iter_lines())
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as line:
        line.sendall(head.encode() + payload)
        time.sleep(0.3)
    end = time.monotonic() + 10
    while server.counter(cancelled) < before + 2 and time.monotonic() < end:
        time.sleep(0.1)
    assert server.counter(cancelled) == before + 2
    assert server.counter("ptkit_running_rows") == 0


def test_a_thousand_connections_and_slow_readers(server: Serving, bank: AdapterBank) -> None:
    expected = solo(bank, "facts-prefix", "The boat", 12)
    lines = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        for _ in range(1000):
            lines.append(socket.create_connection(("127.0.0.1", server.port), timeout=20))
        body = json.dumps(
            {"model": TINY_EN, "prompt": "x", "max_tokens": 300, "stream": True, "ignore_eos": True}
        ).encode()
        for line in lines[:8]:  # ask and never read
            line.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: "
                b"application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
            )
        for line in lines[8:100]:  # begin a request and stop
            line.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n")
        assert server.completion("facts-prefix", "The boat") == expected
    finally:
        for line in lines:
            line.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert server.get("/health").json() == {"status": "ok"}


def test_full_queue_keys_read_only_and_a_slow_body(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# for tests\nfirst-key-123\nsecond-key-456\n")
    options = ["--api-key-file", str(keys), "--max-batch", "1", "--max-queue", "2", "--read-only"]
    with Serving(folder, tmp_path / "log", *options) as server:
        ask = {"model": TINY_EN, "prompt": "x", "max_tokens": 200, "ignore_eos": True}
        right = {"authorization": "Bearer second-key-456"}
        for wrong in ("", "Bearer wrong", "Basic first-key-123", "Bearer first-key-12"):
            answer = server.post("/v1/completions", ask, headers={"authorization": wrong})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert "key-" not in answer.text
        for path in ("/v1/models", "/metrics", "/v1/adapters", "/openapi.json"):
            assert server.get(path).status_code == 401
        for path in ("/", "/health", "/ready"):
            assert server.get(path).status_code == 200
        denied = server.post(
            "/v1/load_adapter", {"name": "n", "path": "facts-prefix"}, headers=right
        )
        assert denied.status_code == 403
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong-key").models.list()

        async def crowd() -> list[httpx2.Response]:
            async with httpx2.AsyncClient(timeout=60) as client:
                url = f"{server.url}/v1/completions"
                posts = [client.post(url, json=ask, headers=right) for _ in range(8)]
                return list(await asyncio.gather(*posts))

        answers = asyncio.run(crowd())
        statuses = sorted(a.status_code for a in answers)
        assert statuses[0] == 200
        assert statuses[-1] == 429
        assert {200, 429} == set(statuses)
        full = next(a for a in answers if a.status_code == 429)
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "queue_full"


def test_termination_finishes_what_runs_and_refuses_what_comes(
    folder: Path, bank: AdapterBank, tmp_path: Path
) -> None:
    with Serving(folder, tmp_path / "log", "--max-batch", "4") as server:
        body = {
            "model": "facts-prefix", "prompt": "The boat", "max_tokens": 200, "temperature": 0,
            "ignore_eos": True, "template": False,
        }  # fmt: skip
        (expected,) = bank.generate(
            ["The boat"], ["facts-prefix"], max_new_tokens=200, do_sample=False, eos_token_id=None
        )
        got: list[str] = []
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x")
        ours = ("ignore_eos", "template")

        def ask(stream: bool) -> None:
            if not stream:
                got.append(server.post("/v1/completions", body).json()["choices"][0]["text"])
                return
            settings: dict[str, Any] = {k: v for k, v in body.items() if k not in ours}
            pieces = client.completions.create(
                **settings, stream=True, extra_body={k: body[k] for k in ours}
            )
            got.append("".join(piece.choices[0].text for piece in pieces))

        running = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(6)]
        keep = httpx2.Client()
        assert keep.get(f"{server.url}/ready").status_code == 200
        for thread in running:
            thread.start()
        arrived = ("ptkit_running_rows", "ptkit_waiting_answers")
        while len(got) + sum(map(server.counter, arrived)) < 6:
            time.sleep(0.02)
        server.terminate()
        time.sleep(0.1)
        refused_now = server.post("/v1/completions", body)
        assert refused_now.status_code == 503
        assert refused_now.json()["error"]["code"] == "draining"
        assert keep.get(f"{server.url}/ready").status_code == 503
        assert keep.get(f"{server.url}/health").status_code == 200
        for thread in running:
            thread.join(60)
        assert server.process.wait(30) == 0
    assert got == [expected] * 6


# The command


def test_wrong_options_are_refused_before_a_model_loads(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    assert "--insecure" in refused("serve", "--host", "0.0.0.0", cwd=tmp_path)
    assert "no such folder" in refused("serve", "--adapters", "none", cwd=tmp_path)
    keys.write_text("# nothing\n")
    assert "holds no key" in refused("serve", "--api-key-file", "keys", cwd=tmp_path)
    keys.write_text("short\n")
    assert "at least 8" in refused("serve", "--api-key-file", "keys", cwd=tmp_path)
    assert "no size" in refused("serve", "--budget", "many", cwd=tmp_path)
    assert "--dtype" in refused("serve", "--dtype", "float8", cwd=tmp_path)


def test_a_port_that_is_taken_is_named(server: Serving, tmp_path: Path) -> None:
    done = forked.run(
        [sys.executable, "-m", "ptkit", "serve", "--port", str(server.port)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "is another server there?" in done.stderr
    assert "Traceback" not in done.stderr
