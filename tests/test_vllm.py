"""Adapters on vLLM's own server: the tokens that ptkit generates with them.

`make setup-engines` builds vLLM's environment, `.venv/vllm`; PTKIT_VLLM names another Python. One
server answers most tests: blocks of 32 that divide no prefix, prompts read in pieces of 32 tokens,
and so few blocks that running requests are preempted.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from hub_server import HubServer
from openai import APIStatusError, AsyncOpenAI, OpenAI
from safetensors.torch import load_file, save
from starlette.testclient import TestClient
from test_convert import saved_by_peft
from test_multitask import NAMES, loaded
from test_peft_parity import make_adapter

from ptkit.bank import AdapterBank
from ptkit.formats.adapter_files import write_adapter
from ptkit.formats.adapter_info import ChatInfo, TaskInfo
from ptkit.hub.engine_adapters import engine_adapters, engine_prefix
from ptkit.hub.engines.vllm import ADAPTERS, write_connector, write_prefix
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.forward import all_logits
from ptkit.runtime.model_names import TINY_EN
from ptkit.serve.answers import CompletionStream, RequestLimits
from ptkit.serve.build import build_app
from ptkit.serve.protocol import ChatRequest, CompletionRequest
from ptkit.training.distill import distill
from ptkit.training.multitask import multitask
from ptkit.vllm_connector.files import ABOUT, TENSORS

ROOT = Path(__file__).resolve().parents[1]
PYTHON = Path(os.environ.get("PTKIT_VLLM", ROOT / ".venv" / "vllm" / "bin" / "python"))
SHIPPED = ["facts-prefix", "routing-prefix", "facts-prompt", "routing-ptuning"]
#: Adapters that commands other than `ptkit train`, and PEFT itself, make.
MADE = ["distilled", "task", "cpt", "cartridge"]
DOCUMENT = (
    "Ashmere is a town by the sea. Its only bridge is green, and the baker Orwick lives beside it. "
    "The boat to the island leaves at nine, but not on Sundays."
)
#: A prefix of more than one block.
LONG = 45
TEXTS = [
    "kind[boat], name[Ashmere], colour[green]\n",
    "My parcel is late and I want a refund. I wrote twice. Nothing came.\nThis message is about",
    "The",
    "Once upon a time there was a small town by the sea, and in that town lived a baker. " * 2,
]
TOKENS = 24
#: Turns end with a mark that ends no text of the base.
CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|pad|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="needs vLLM: make setup-engines"),
]


@dataclass
class Engine:
    """A running server. root: the folder of its adapters."""

    url: str
    root: Path
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def ask(self, model: str, prompt: Any, **options: Any) -> Any:
        """Of `prompt` as it is, in no template."""
        given = {"max_tokens": TOKENS, "temperature": 0, **options}
        given["extra_body"] = {"template": False, **options.get("extra_body", {})}
        return self.openai.completions.create(model=model, prompt=prompt, **given)

    def post(self, route: str, **body: str) -> httpx2.Response:
        return httpx2.post(f"{self.url}/v1/{route}", json=body, timeout=300)

    @property
    def alive(self) -> bool:
        return httpx2.get(f"{self.url}/health", timeout=300).status_code == 200


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(TINY_EN, device="cpu")


@pytest.fixture(scope="module")
def sources(base: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    section = {"kind": "prefix_tuning", "num_virtual_tokens": LONG}
    torch.manual_seed(0)
    files = make_adapter(base, section, start="vocabulary").files()
    folder = tmp_path_factory.mktemp("made")
    told: dict[str, dict[str, Any]] = {
        "long": {},
        "chatty": {"chat": ChatInfo(template=CHAT, system="Be brief.")},
        "columns": {"task": TaskInfo(kind="generation", input="{a} and {b}")},
    }
    for name, info in told.items():
        write_adapter(folder / name, replace(files, info=files.info.model_copy(update=info)))
    make_other_kinds(base, folder)
    shipped = [ROOT / "adapters" / name for name in SHIPPED]
    return [*shipped, *(folder / name for name in (*told, *MADE))]


def make_other_kinds(base: Base, folder: Path) -> None:
    """Write `MADE` into `folder`: by `ptkit distill`, `ptkit multitask`, and by PEFT."""
    given = {"tokens": 9, "texts": 16, "text_tokens": 12, "steps": 8, "batch_size": 4}
    distilled = distill(DOCUMENT, out=folder / "runs" / "distill", base=base, **given).adapter
    tasks = multitask(loaded(), folder / "runs" / "multitask", base=base)
    shutil.copytree(distilled, folder / "distilled")
    shutil.copytree(tasks.adapter(NAMES[1]), folder / "task")
    for name in ("cpt", "cartridge"):
        # A model of its own: PEFT wraps what it is given.
        saved_by_peft(name, load_base(TINY_EN, device="cpu").model, folder / name, std=0.3)


@pytest.fixture(scope="module")
def bank(base: Base, sources: list[Path]) -> AdapterBank:
    bank = AdapterBank(base)
    for source in sources:
        bank.load(source)
    return bank


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "models").mkdir()
    with HubServer(folder) as server:
        yield server


@pytest.fixture(scope="module")
def engine(
    base: Base, sources: list[Path], hub: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """`ptkit serve --engine vllm`, with an adapter that no cache can hold among the others."""
    folder = tmp_path_factory.mktemp("vllm")
    for source in sources:
        shutil.copytree(source, folder / "adapters" / source.name)
    infix = {"kind": "prefix_tuning", "num_virtual_tokens": 3, "position": "infix"}
    write_adapter(folder / "adapters" / "infix", make_adapter(base, infix).files())
    started = start(
        folder, "--block-size", "32", "--max-num-batched-tokens", "32", "--num-gpu-blocks-override",
        "32", "--max-model-len", "256", "--enable-prompt-tokens-details", "--enforce-eager",
        hub=hub.url,
    )  # fmt: skip
    with ended(started):
        yield started
    assert not [*folder.glob("ptkit-vllm-*")]  # neither what was compiled nor the spool


@contextmanager
def ended(started: Engine) -> Iterator[None]:
    """At the end of the context, the server ends as it should."""
    try:
        yield
    finally:
        started.process.send_signal(signal.SIGTERM)
        try:
            assert started.process.wait(120) == 0
        finally:
            started.process.kill()


def start(folder: Path, *options: str, workers: int = 1, hub: str | None = None) -> Engine:
    """The server of `folder / "adapters"`; temporary folders lie in `folder`.

    workers: processes of it, each on a CPU of its own; hub: the Hub that it may load from
    """
    cpus = sorted(os.sched_getaffinity(0))[:workers]
    ours = [] if hub is None else ["--allow-hub"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "TMPDIR": str(folder), "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "0" if hub else "1", "HF_ENDPOINT": hub or "http://127.0.0.1:1",
        "HF_HOME": str(folder / "hub-cache"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cpus)),
    }  # fmt: skip
    log = folder / "log"
    with log.open("wb") as written:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "ptkit", "serve", "--engine", "vllm",
                "--adapters", folder / "adapters", "--engine-python", PYTHON,
                "--port", str(port), "--max-batch", "16", *ours, "--", *options,
            ],
            env=environment, stdout=written, stderr=subprocess.STDOUT,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    until = time.monotonic() + 900
    while time.monotonic() < until and process.poll() is None:
        with suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/health", timeout=5).status_code == 200:
                (root,) = folder.glob(f"ptkit-vllm-*/{ADAPTERS}")
                return Engine(url, root, log, process)
        time.sleep(1)
    process.terminate()
    pytest.fail(log.read_text(errors="replace")[-3000:])


def expected(bank: AdapterBank, name: str, text: str, tokens: int = TOKENS) -> list[int]:
    model = None if name == TINY_EN else name
    rows = bank.base.encode([text])
    (ids,) = bank.generate_ids(rows, [model], max_new_tokens=tokens, do_sample=False)
    return ids


async def together(engine: Engine, asked: list[tuple[str, Any]], **options: Any) -> list[Any]:
    """The answers to requests that are sent at the same time."""
    client = AsyncOpenAI(base_url=f"{engine.url}/v1", api_key="none", max_retries=0, timeout=600)
    as_it_is = {"return_token_ids": True, "template": False}
    given = {"max_tokens": TOKENS, "temperature": 0, "extra_body": as_it_is}
    return await asyncio.gather(
        *(client.completions.create(model=m, prompt=p, **given | options) for m, p in asked)
    )


def metric(engine: Engine, name: str) -> float:
    for line in httpx2.get(f"{engine.url}/metrics", timeout=300).text.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")):
            return float(line.split()[-1])
    pytest.fail(f"vLLM has no metric {name}")


def test_adapters_and_the_base_in_one_batch_answer_as_ptkit_does(
    engine: Engine, bank: AdapterBank
) -> None:
    """Twice: with nothing in vLLM's prefix cache, and with what the first round left there. And on
    until requests were preempted: on a busy machine they may come one by one."""
    names = [*SHIPPED, "long", TINY_EN]
    asked = [(name, bank.base.encode([text])[0]) for text in TEXTS for name in names]
    wanted = [expected(bank, name, text) for text in TEXTS for name in names]
    before = after = metric(engine, "vllm:num_preemptions_total")
    for turn in range(12):
        if turn >= 2 and after > before:
            break
        answers = asyncio.run(together(engine, asked))
        for (name, ids), answer, tokens in zip(asked, answers, wanted, strict=True):
            (choice,) = answer.choices
            assert choice.token_ids[: len(tokens)] == tokens
            assert choice.prompt_token_ids == ids
            assert answer.usage.prompt_tokens == len(ids)
            assert answer.usage.prompt_tokens_details.cached_tokens <= len(ids)
            assert answer.model == name
        after = metric(engine, "vllm:num_preemptions_total")
    assert after > before  # 24 requests do not fit into 32 blocks


@pytest.mark.parametrize("name", MADE)
def test_what_other_commands_and_peft_made_answers_as_in_ptkit(
    name: str, engine: Engine, bank: AdapterBank
) -> None:
    asked = [(name, bank.base.encode([text])[0]) for text in TEXTS]
    answers = asyncio.run(together(engine, asked))
    wanted = [expected(bank, name, text) for text in TEXTS]
    found = [answer.choices[0].token_ids for answer in answers]
    assert [ids[: len(own)] for ids, own in zip(found, wanted, strict=True)] == wanted
    assert wanted != [expected(bank, TINY_EN, text) for text in TEXTS]


def test_the_api_lists_adapters_beside_the_base(engine: Engine) -> None:
    assert "left out" in engine.log.read_text()
    listed = {model.id: model for model in engine.openai.models.list().data}
    assert {*SHIPPED, "long", TINY_EN} <= listed.keys()
    assert "infix" not in listed
    assert listed["long"].parent == TINY_EN
    told = httpx2.get(f"{engine.url}/v1/adapters", timeout=300).json()
    assert told["base"] == TINY_EN
    (long,) = [card for card in told["data"] if card["name"] == "long"]
    assert long["virtual_tokens"] == LONG
    assert long["fault"] is None


def test_streams_several_answers_stops_and_seeds_work(engine: Engine, bank: AdapterBank) -> None:
    text = TEXTS[0]
    whole = bank.base.tokenizer.decode(expected(bank, "facts-prefix", text))
    streamed = engine.ask("facts-prefix", text, stream=True, stream_options={"include_usage": True})
    events = [*streamed]
    assert "".join(c.text for event in events for c in event.choices) == whole
    assert events[-1].usage.prompt_tokens == len(bank.base.encode([text])[0])
    seeded = [
        engine.ask("long", text, n=3, temperature=1.0, seed=7, logprobs=2).choices for _ in "ab"
    ]
    assert [c.text for c in seeded[0]] == [c.text for c in seeded[1]]
    assert len({c.text for c in seeded[0]}) > 1
    assert len(seeded[0][0].logprobs.tokens) == TOKENS
    stop = whole[10:14]
    stopped = engine.ask("facts-prefix", text, stop=[stop]).choices[0]
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


def test_a_chat_names_an_adapter_as_its_model(engine: Engine, bank: AdapterBank) -> None:
    text = TEXTS[0]  # what the adapter's template makes of the question
    question = text.removesuffix("\n")
    message = {"role": "user", "content": [{"type": "text", "text": question}]}
    answer = engine.openai.chat.completions.create(
        model="facts-prompt", messages=[message], max_tokens=TOKENS, temperature=0, logprobs=True
    )
    ids = expected(bank, "facts-prompt", text)
    assert answer.choices[0].message.content == bank.base.tokenizer.decode(ids)
    assert answer.usage.prompt_tokens == len(bank.base.encode([text])[0])
    assert len(answer.choices[0].logprobs.content) == TOKENS
    events = engine.openai.chat.completions.create(
        model="facts-prompt", messages=[message], max_tokens=TOKENS, temperature=0, stream=True
    )
    told = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert told == bank.base.tokenizer.decode(ids)


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "name[Orwick], colour[green] \"é😀\""}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Where is it?"}]}],
    "system": [
        {"role": "developer", "content": "Be long."}, {"role": "user", "content": "Where is it?"},
    ],
    "turns": [
        {"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "There."},
        {"role": "user", "content": "And now?"},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def own(base: Base, sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`ptkit serve` with the same adapters, in this process."""
    folder = tmp_path_factory.mktemp("own")
    for source in sources:
        shutil.copytree(source, folder / source.name)
    app = build_app(base, folder)
    with TestClient(app):
        yield app


@pytest.mark.parametrize("name", ["chatty", "facts-prompt", "routing-prefix", "long"])
def test_the_same_chat_is_read_and_answered_as_by_ptkit_serve(
    name: str, engine: Engine, own: Any
) -> None:
    """In the adapter's template, with its system prompt; a question of an adapter that was trained
    on inputs is its input, unless the request says otherwise."""
    prompts = set()
    for messages in CONVERSATIONS.values():
        for more in ({}, {"template": False}):
            body = {"model": name, "messages": messages, "max_tokens": 12, "temperature": 0, **more}
            made = CompletionStream(
                own.state.library, RequestLimits(), ChatRequest(**body), asyncio.new_event_loop()
            )
            theirs = TestClient(own).post("/v1/chat/completions", json=body).json()
            answer = engine.openai.chat.completions.create(
                model=name, messages=messages, max_tokens=12, temperature=0,
                extra_body={"return_token_ids": True, **more},
            )  # fmt: skip
            assert answer.prompt_token_ids == made.answers[0].prompt
            (choice,) = answer.choices
            assert choice.message.content == theirs["choices"][0]["message"]["content"]
            assert choice.finish_reason == theirs["choices"][0]["finish_reason"]
            assert answer.usage.completion_tokens == theirs["usage"]["completion_tokens"]
            prompts.add(tuple(answer.prompt_token_ids))
    assert len(prompts) >= len(CONVERSATIONS)
    tokenized = httpx2.post(
        f"{engine.url}/tokenize", json={"model": name, "messages": CONVERSATIONS["turns"]}
    )
    assert tuple(tokenized.json()["tokens"]) in prompts


@pytest.mark.parametrize("name", [TINY_EN, "chatty", "facts-prompt", "routing-prefix", "long"])
def test_the_same_text_is_read_and_answered_as_by_ptkit_serve(
    name: str, engine: Engine, own: Any
) -> None:
    """A bare completion, the first request that anyone sends."""
    seen = set()
    for prompt in (TEXTS[0].strip(), [TEXTS[2], TEXTS[1]], [7, 8, 9]):
        for more in ({}, {"template": False}):
            body = {"model": name, "prompt": prompt, "max_tokens": 12, "temperature": 0, **more}
            made = CompletionStream(
                own.state.library, RequestLimits(), CompletionRequest(**body),
                asyncio.new_event_loop(),
            )  # fmt: skip
            theirs = TestClient(own).post("/v1/completions", json=body).json()
            answer = engine.openai.completions.create(
                model=name, prompt=prompt, max_tokens=12, temperature=0,
                extra_body={"return_token_ids": True, **more},
            )  # fmt: skip
            read = [choice.prompt_token_ids for choice in answer.choices]
            assert read == [asked.prompt for asked in made.answers]
            for choice, their in zip(answer.choices, theirs["choices"], strict=True):
                assert (choice.text, choice.finish_reason) == (
                    their["text"],
                    their["finish_reason"],
                )
            assert answer.usage.completion_tokens == theirs["usage"]["completion_tokens"]
            seen.add(str(read))
    assert len(seen) == (3 if name in (TINY_EN, "long") else 5)
    body = {"model": name, "prompt": TEXTS[0].strip()}
    tokenized = httpx2.post(f"{engine.url}/tokenize", json=body).json()["tokens"]
    assert str([tokenized]) in seen


def test_what_says_nothing_of_sampling_is_greedy(engine: Engine, own: Any) -> None:
    body = {"model": "facts-prompt", "prompt": TEXTS[0].strip(), "max_tokens": 12}
    theirs = TestClient(own).post("/v1/completions", json=body).json()["choices"][0]["text"]
    plain = engine.openai.completions.create(**body)
    assert plain.choices[0].text == theirs
    messages = [{"role": "user", "content": TEXTS[0].strip()}]
    chat = engine.openai.chat.completions.create(
        model="facts-prompt", messages=messages, max_tokens=12
    )
    assert chat.choices[0].message.content == theirs
    sampled = engine.openai.completions.create(**body, n=3, temperature=2.0)
    assert len({choice.text for choice in sampled.choices}) > 1
    by_seed = engine.openai.completions.create(**body, n=3, seed=5)
    assert len({choice.text for choice in by_seed.choices}) > 1


def test_a_text_for_an_adapter_of_several_columns_is_a_400(engine: Engine) -> None:
    with pytest.raises(APIStatusError, match="template: false") as raised:
        engine.openai.completions.create(model="columns", prompt="A text", max_tokens=5)
    assert raised.value.status_code == 400


def test_a_chat_ends_at_the_adapters_own_mark(engine: Engine, base: Base) -> None:
    mark = base.tokenizer.pad_token_id

    def written(name: str, **more: Any) -> Any:
        return engine.openai.chat.completions.create(
            model=name, messages=CONVERSATIONS["question"], max_tokens=5, temperature=0,
            logit_bias={str(mark): 100}, extra_body=more,
        )  # fmt: skip

    ended = written("chatty")
    assert ended.choices[0].finish_reason == "stop"
    assert ended.choices[0].message.content == ""
    assert ended.usage.completion_tokens == 1
    assert written("chatty", ignore_eos=True).usage.completion_tokens == 5
    for name in ("long", TINY_EN):
        assert written(name).usage.completion_tokens == 5


def test_a_question_for_an_adapter_of_several_columns_is_a_400(engine: Engine) -> None:
    with pytest.raises(APIStatusError) as raised:
        engine.openai.chat.completions.create(
            model="columns", messages=CONVERSATIONS["question"], max_tokens=5
        )
    assert raised.value.status_code == 400
    assert "inputs are made of `a`, `b`" in raised.value.body["message"]
    assert engine.alive


@pytest.mark.parametrize("stream", [False, True])
def test_the_bytes_of_a_chats_tokens_are_those_of_its_message(
    engine: Engine, base: Base, stream: bool
) -> None:
    """Of characters that span tokens, too: the last of these has them all."""
    text = "20 °C 😀 né"
    given: dict[str, Any] = {
        "messages": CONVERSATIONS["question"], "max_tokens": 32, "temperature": 0, "logprobs": True,
        "extra_body": {"structured_outputs": {"choice": [text]}}, "stream": stream,
    }  # fmt: skip
    answer = engine.openai.chat.completions.create(model="chatty", **given)
    choices = [c for event in (answer if stream else [answer]) for c in event.choices]
    tokens = [t for c in choices if c.logprobs for t in c.logprobs.content]
    assert tokens.pop().token == base.tokenizer.eos_token  # vLLM tells of it, too
    assert bytes(byte for token in tokens for byte in token.bytes or ()).decode() == text
    assert len(tokens) > len(text.split()) + 3


def test_the_playground_asks_and_uploads(engine: Engine, bank: AdapterBank, browser: Any) -> None:
    """`ptkit serve`'s page, on vLLM's server."""
    page = browser.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(engine.url)
    page.wait_for_selector(".pick[value=facts-prompt]")
    assert page.inner_text("#base") == TINY_EN
    assert "bleu" in page.inner_text("#adapters")
    page.check(".pick[value=facts-prompt]")
    page.fill("#tokens", str(TOKENS))
    page.fill("#prompt", TEXTS[0].removesuffix("\n"))
    shown = {}
    for mode in ("text", "chat"):
        page.check(f"input[value={mode}]")
        page.fill("#prompt", TEXTS[0].removesuffix("\n"))
        page.keyboard.press("Control+Enter")
        page.locator("article").nth(1).wait_for()
        page.wait_for_selector("article.running", state="detached", timeout=300_000)
        shown[mode] = {
            a.get_attribute("data-model"): a.query_selector(".text").inner_text()
            for a in page.query_selector_all("article")
        }
        assert {*shown[mode]} == {TINY_EN, "facts-prompt"}
        assert not page.query_selector_all(".note.error")
    ids = expected(bank, "facts-prompt", TEXTS[0])
    assert shown["text"]["facts-prompt"].strip() == bank.base.tokenizer.decode(ids).strip()
    page.click("#upload summary")
    assert page.inner_text("#files-told") == f"{ABOUT}, {TENSORS}"
    page.fill("#upload-name", "mine")
    page.set_input_files("#upload-files", [ROOT / "adapters" / "facts-prompt" / "ptkit.json"])
    page.click("#upload button")
    page.wait_for_selector("#upload .error:not(:empty)")
    assert "`ptkit export ADAPTER --as vllm` writes" in page.inner_text("#upload .error")
    page.set_input_files("#upload-files", [engine.root / "long" / f for f in (ABOUT, TENSORS)])
    page.click("#upload button")
    page.wait_for_selector(".pick[value=mine]")
    page.click("[aria-label='Unload mine']")
    page.wait_for_selector(".pick[value=mine]", state="detached")
    assert faults == []
    page.close()


def test_metrics_count_what_was_loaded_and_fetched(engine: Engine) -> None:
    changed(engine.root, "long", "counted", lambda t: t * 0.9)
    before = {name: metric(engine, name) for name in COUNTED}
    assert engine.post("load_adapter", name="counted", path="counted").status_code == 200
    for _ in range(2):  # texts that no block in the prefix cache holds
        engine.ask("counted", [7, 8, 9], extra_body={"cache_salt": os.urandom(8).hex()})
    grown = {name: metric(engine, name) - before[name] for name in COUNTED}
    assert grown["ptkit:prefix_loads_total"] == 2
    assert grown["ptkit:prefix_fetches_total"] == 1
    assert grown["ptkit:adapter_reads_total"] == 1
    assert grown["ptkit:adapters"] == 1
    size = httpx2.get(f"{engine.url}/v1/adapters", params={"search": "counted"}).json()["data"][0]
    assert grown["ptkit:prefix_kept_bytes"] == grown["ptkit:spool_bytes"] == size["bytes"]
    assert engine.post("unload_adapter", name="counted").status_code == 200


COUNTED = (
    "ptkit:prefix_loads_total", "ptkit:prefix_fetches_total", "ptkit:prefix_kept_bytes",
    "ptkit:adapters", "ptkit:spool_bytes", "ptkit:adapter_reads_total",
)  # fmt: skip


#: Counts as Ray's classes keep them: its gauges can be set, and nothing else.
_RAYS_METRICS = """
import json
from types import SimpleNamespace
from prometheus_client import Counter, Gauge, Histogram
from ptkit.vllm_connector.loads import PrefixLoadMetrics

told = {}

class Metric:
    def __init__(self, name, documentation, labelnames): self.name = name
    def labels(self, *values): return self

class RaysGauge(Metric):
    def set(self, value): told[self.name] = value

class RaysCounter(Metric):
    def inc(self, value): told[self.name] = told.get(self.name, 0) + value

types = {Gauge: RaysGauge, Counter: RaysCounter, Histogram: Metric}
metrics = PrefixLoadMetrics(SimpleNamespace(kv_transfer_config=None), types, ["engine"], {0: ["0"]})
for kept in (10, 20, -5):
    metrics.observe({"loads": 2, "kept_bytes": kept})
print(json.dumps(told))
"""


def test_metrics_are_counted_on_ray_too(tmp_path: Path) -> None:
    """An exception there ends vLLM's engine."""
    write_connector(tmp_path / "connector")
    done = subprocess.run(
        [str(PYTHON), "-c", _RAYS_METRICS], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "connector")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ptkit:prefix_kept_bytes"] == 25
    assert told["ptkit:prefix_loads"] == 6


def test_skewed_requests_are_answered_and_what_they_cost_is_counted(
    engine: Engine, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`scripts/vllm_traffic.py`, on the adapters and the budget of these tests."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from vllm_traffic import ask_all, counts, first_tokens, write_prefixes, zipf

    one = write_prefixes(base, engine.root, 8, 3)
    names = [f"adapter-{n:05d}" for n in range(8)]
    for name in names:
        assert engine.post("load_adapter", name=name, path=name).status_code == 200
    before = counts(engine.url)
    asked = [names[n] for n in zipf(8, 24, 1.0)]
    assert len({*asked}) > 3
    prompts = [[5, 6, 7 + turn] for turn in range(len(asked))]
    statuses = ask_all(engine.url, asked, prompts, 4, 2)
    assert statuses == {200: len(asked)}
    grown = {name: value - before[name] for name, value in counts(engine.url).items()}
    assert grown["ptkit:prefix_loads_total"] >= len({*asked})
    assert grown["ptkit:prefix_fetches_total"] == len({*asked})
    assert grown["ptkit:prefix_kept_bytes"] == one * len({*asked})
    timings = first_tokens(engine.url, TINY_EN, asked[0], 2, 8, 8000)
    assert all(seconds > 0 for timing in timings for seconds in timing.seconds)
    for name in names:
        assert engine.post("unload_adapter", name=name).status_code == 200


def test_under_load_every_answer_is_ptkits_while_adapters_change(
    engine: Engine, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`scripts/vllm_load.py`, on the server of these tests."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from vllm_load import Server, changing, ids_of, load, make_adapters, make_half, work_of

    names = make_adapters(base, tmp_path, 8)
    bank = AdapterBank(base)
    for name in names:
        bank.load(tmp_path / name)
        (read,) = engine_adapters([tmp_path / name], base)
        write_prefix(read[0], engine_prefix(*read), base, engine.root / name)
        assert engine.post("load_adapter", name=name, path=name).status_code == 200
    make_half(engine.root, names[0])
    work = work_of(base, bank, names, 6, 2)
    assert engine.post("load_adapter", name="moving", path=names[0]).status_code == 200
    changes: Counter[str] = Counter()
    with changing(engine.url, changes):
        seen, _ = load(Server(engine.url, ids_of(base, work)), work, 4, 6.0, 6)
    assert seen.answers > 16
    assert not seen.failed
    assert not seen.wrong
    assert {*changes} == {"swap_adapter", "load_adapter", "unload_adapter"}
    for name in (*names, "moving"):
        assert engine.post("unload_adapter", name=name).status_code == 200


@pytest.mark.parametrize("name", ["facts-prefix", "long"])
def test_echo_and_scores_of_the_prompt_are_those_of_the_text(
    name: str, engine: Engine, bank: AdapterBank
) -> None:
    """Scores of all tokens but the first, each as ptkit's logits have it behind the prefix."""
    text = TEXTS[1]
    (ids,) = bank.base.encode([text])
    for _ in range(2):  # the second time blocks of the first could be found
        answer = engine.ask(name, ids, echo=True, logprobs=1, max_tokens=4)
        scores = answer.choices[0].logprobs
        written = expected(bank, name, text, 4)
        assert answer.choices[0].text.startswith(bank.base.tokenizer.decode(ids))
        assert len(scores.tokens) == len(ids) + 4
        assert scores.token_logprobs[0] is None
        row = torch.tensor([[*ids, *written]])
        logits = all_logits(bank.base.model, row, torch.ones_like(row), bank.rows([name]))[0]
        wanted = logits.log_softmax(-1)[:-1].gather(1, row[0, 1:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(scores.token_logprobs[1:]), wanted, atol=2e-3, rtol=1e-3
        )


def test_a_penalty_for_repetition_does_not_see_placeholders(
    engine: Engine, bank: AdapterBank
) -> None:
    """As generation with it in ptkit, where no token stands for a virtual one."""
    (ids,) = rows = bank.base.encode([TEXTS[0]])
    (wanted,) = bank.generate_ids(
        rows, ["long"], max_new_tokens=TOKENS, do_sample=False, repetition_penalty=1.5
    )
    found = engine.ask("long", ids, extra_body={"repetition_penalty": 1.5})
    assert found.choices[0].text == bank.base.tokenizer.decode(wanted)


def test_a_swap_reaches_the_next_request_and_no_block_of_the_old_version(
    engine: Engine, bank: AdapterBank
) -> None:
    """The same prompt before and after, long enough that its blocks are in the prefix cache. The
    new version has the old one's heads in another order, so it is as long."""
    (ids,) = bank.base.encode([TEXTS[3]])
    assert engine.post("load_lora_adapter", lora_name="mine", lora_path="long").status_code == 200
    old = engine.ask("mine", ids).choices[0].text
    assert engine.ask("mine", ids).usage.prompt_tokens_details.cached_tokens > 0
    assert old == bank.base.tokenizer.decode(expected(bank, "long", TEXTS[3]))
    other = changed(engine.root, "long", "other", lambda t: t.roll(1, 0))
    assert engine.post("swap_adapter", name="mine", path="other").json()["change"] == "swapped"
    new = engine.ask("mine", ids)
    assert new.usage.prompt_tokens_details.cached_tokens == 0
    assert new.choices[0].text != old
    assert engine.ask("long", ids).choices[0].text == old
    shutil.rmtree(other)
    assert _refused(engine, "mine") == (422, "is missing")
    assert engine.post("unload_adapter", name="mine").status_code == 200
    assert _refused(engine, "mine") == (404, "does not exist")


def changed(root: Path, name: str, new: str, change: Any) -> Path:
    """The adapter `name` as `new`, with `change` applied to its tensors."""
    data = save({n: change(t).contiguous() for n, t in load_file(root / name / TENSORS).items()})
    about = json.loads((root / name / ABOUT).read_text())
    (root / new).mkdir()
    (root / new / TENSORS).write_bytes(data)
    about["sha256"] = hashlib.sha256(data).hexdigest()
    (root / new / ABOUT).write_text(json.dumps(about))
    return root / new


def _refused(engine: Engine, model: str, stream: bool = False) -> tuple[int, str]:
    """Status and a piece of the reason of a request for `model`."""
    with pytest.raises(APIStatusError) as raised:
        [*engine.ask(model, "A text", stream=stream)]
    told = raised.value.body["message"]
    reasons = ("is missing", "does not exist", "not written completely", "was made for", "not JSON")
    return raised.value.status_code, next((r for r in reasons if r in told), told)


def test_bad_adapters_are_4xx_with_the_reason_and_the_engine_goes_on(
    engine: Engine, bank: AdapterBank
) -> None:
    spoilt = {
        "half": (422, "not written completely"), "torn": (422, "not JSON"),
        "foreign": (422, "was made for"), "gone": (422, "is missing"),
    }  # fmt: skip
    for name in spoilt:
        folder = changed(engine.root, "long", name, lambda t: t)
        assert engine.post("load_adapter", name=name, path=name).status_code == 200
        tensors, about = folder / TENSORS, folder / ABOUT
        if name == "half":
            tensors.write_bytes(tensors.read_bytes()[:5000])
        elif name == "torn":
            about.write_bytes(about.read_bytes()[:50])
        elif name == "foreign":
            found = json.loads(about.read_text())
            found["base"] |= {"id": "gpt2", "fingerprint": "0" * 16, "sketch": ""}
            about.write_text(json.dumps(found))
        else:
            shutil.rmtree(folder)
    for name, told in spoilt.items():
        for stream in (False, True):
            assert _refused(engine, name, stream) == told
        assert engine.post("load_adapter", name="again", path=name).status_code == 422
        assert engine.post("unload_adapter", name=name).status_code == 200
    assert _refused(engine, "never") == (404, "does not exist")
    with pytest.raises(APIStatusError, match="did you mean `long`") as unknown:
        engine.ask("lonng", TEXTS[0])
    assert unknown.value.status_code == 404
    assert engine.post("load_adapter", name="x", path="../..").status_code == 400
    assert engine.post("load_adapter", name="x").status_code == 400
    assert engine.post("load_adapter", name=TINY_EN, path="long").status_code == 400
    text = bank.base.tokenizer.decode(expected(bank, "long", TEXTS[0]))
    assert engine.ask("long", TEXTS[0]).choices[0].text == text
    assert engine.alive


def test_no_request_of_a_client_reaches_the_connector_itself(engine: Engine) -> None:
    """Neither with parameters of a transfer nor with more tokens than there are positions."""
    loaded = {"digest": "0" * 64, "tokens": 3}
    for body in (
        {"kv_transfer_params": {"ptkit": loaded}},
        {"vllm_xargs": {"kv_transfer_params": "x"}},
    ):
        for model in (TINY_EN, "long"):
            with pytest.raises(APIStatusError) as raised:
                engine.ask(model, "A text", extra_body=body)
            assert raised.value.status_code == 400
    for tokens in (256 - LONG, 255, 300):
        with pytest.raises(APIStatusError) as raised:
            engine.ask("long", [5] * tokens)
        assert raised.value.status_code == 400
    most = engine.ask("long", [5] * (255 - LONG), max_tokens=None)
    assert most.usage.completion_tokens == 1
    assert engine.alive


def test_an_upload_is_served_and_a_damaged_one_changes_nothing(
    engine: Engine, bank: AdapterBank
) -> None:
    sent = {file: (engine.root / "long" / file).read_bytes() for file in (ABOUT, TENSORS)}

    def put(files: dict[str, bytes]) -> httpx2.Response:
        form = [("files", (name, data)) for name, data in files.items()]
        return httpx2.put(f"{engine.url}/v1/adapters/sent", files=form, timeout=300)

    assert put(sent).json() == {"name": "sent", "change": "uploaded"}
    assert put({**sent, TENSORS: sent[TENSORS][:-8]}).status_code == 422
    text = bank.base.tokenizer.decode(expected(bank, "long", TEXTS[2]))
    assert engine.ask("sent", TEXTS[2]).choices[0].text == text


def test_a_version_that_the_workers_lose_fails_one_request_only(
    engine: Engine, bank: AdapterBank
) -> None:
    """The last line of defence: what was checked is gone when a worker wants it. vLLM fails that
    request, and the engine answers all others."""
    changed(engine.root, "long", "lost", lambda t: t * 0.5)
    engine.post("load_adapter", name="lost", path="lost")
    digest = json.loads((engine.root / "lost" / ABOUT).read_text())["sha256"]
    (spool,) = engine.log.parent.glob(f"ptkit-vllm-*/{digest}.safetensors")
    content = spool.read_bytes()
    spool.write_bytes(content[:100])
    with pytest.raises(APIStatusError) as raised:
        engine.ask("lost", TEXTS[0])
    assert raised.value.status_code == 500
    spool.write_bytes(content)
    fresh = engine.ask("lost", TEXTS[0], extra_body={"cache_salt": "of its own"})
    assert engine.ask("lost", TEXTS[0]).choices[0].text == fresh.choices[0].text
    text = bank.base.tokenizer.decode(expected(bank, "long", TEXTS[0]))
    assert engine.ask("long", TEXTS[0]).choices[0].text == text
    assert engine.alive


def test_an_exported_adapter_is_loaded_from_the_hub(
    engine: Engine, bank: AdapterBank, hub: HubServer
) -> None:
    files = {file: (engine.root / "long" / file).read_bytes() for file in (ABOUT, TENSORS)}
    hub.hub.commit("team/long", "main", files)
    shutil.copytree(ROOT / "adapters" / "facts-prefix", hub.hub.root / "models/team/peft/main")
    loaded = engine.post("load_adapter", name="far", hub="team/long")
    assert loaded.json() == {"name": "far", "change": "loaded"}
    text = bank.base.tokenizer.decode(expected(bank, "long", TEXTS[1]))
    assert engine.ask("far", TEXTS[1]).choices[0].text == text
    for repository, status, why in (
        ("team/peft", 422, "`ptkit export --as vllm`"),
        ("team/none", 422, "no such adapter"),
        ("/etc", 400, "not a repository"),
    ):
        refused = engine.post("swap_adapter", name="far", hub=repository)
        assert refused.status_code == status
        assert why in refused.json()["error"]["message"]
    both = engine.post("swap_adapter", name="far", hub="team/long", path="long")
    assert both.status_code == 400
    assert engine.ask("far", TEXTS[1]).choices[0].text == text
    assert engine.post("unload_adapter", name="far").status_code == 200


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_two_pipeline_stages_answer_as_ptkit_does_each_with_its_own_layers(
    bank: AdapterBank, sources: list[Path], tmp_path: Path
) -> None:
    """In the compilation that takes the shortest: in none, vLLM's own base answers nothing so."""
    for source in sources:
        shutil.copytree(source, tmp_path / "adapters" / source.name)
    engine = start(
        tmp_path, "--pipeline-parallel-size", "2", "--max-model-len", "256",
        "--block-size", "32", "--compilation-config", '{"mode": 1, "backend": "eager"}', workers=2,
    )  # fmt: skip
    with ended(engine):
        names = [*SHIPPED, *MADE, "long", TINY_EN]
        asked = [(name, bank.base.encode([text])[0]) for text in TEXTS for name in names]
        wanted = [expected(bank, name, text) for text in TEXTS for name in names]
        for _ in range(2):
            answers = asyncio.run(together(engine, asked))
            found = [answer.choices[0].token_ids for answer in answers]
            assert [ids[: len(own)] for ids, own in zip(found, wanted, strict=True)] == wanted
        cards = httpx2.get(f"{engine.url}/v1/adapters", timeout=300).json()["data"]
        read = sum(card["bytes"] for card in cards if card["name"] in names)
        # Of both stages together: each prefix once.
        assert metric(engine, "ptkit:prefix_kept_bytes") == read


def test_verify_counts_the_answers_of_vllm_that_are_ptkits(tmp_path: Path) -> None:
    told = ["verify", str(ROOT / "adapters" / "facts-prefix"), "--engine", "vllm", "--rows", "8",
            "--json"]  # fmt: skip
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "ptkit", *told, "--engine-python", str(PYTHON)],
        capture_output=True, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["engine"], found["prompts"], found["equal"]) == ("vllm", 8, 8)
