"""Soft prompts for engines without adapters: plain transformers says what the adapter says."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import ptkit, refused
from test_peft_parity import LEARNT, make_adapter
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from ptkit.bank import AdapterBank
from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles, write_adapter
from ptkit.formats.adapter_info import AdapterInfo, BaseInfo
from ptkit.hub.engines.prompt_embeds import write as export_prompt_embeds
from ptkit.hub.engines.tokens import write as export_tokens
from ptkit.hub.engines.transformers import write as export_transformers
from ptkit.methods import Demonstrations, create_adapter
from ptkit.methods.catalogue import method_section
from ptkit.runtime.base_model import Base, frozen_base, load_base
from ptkit.runtime.gate import Gate
from ptkit.runtime.generation import generate
from ptkit.runtime.model_names import TINY_EN, TINY_EN_FOLDER

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["facts-prompt", "routing-ptuning"]
TEXTS = ["kind[boat], name[Ashmere], colour[green]\n", "My parcel is late", "The"]


@pytest.fixture(scope="module")
def bank() -> AdapterBank:
    bank = AdapterBank(load_base(TINY_EN, device="cpu"))
    bank.register_all(ROOT / "adapters")
    return bank


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    sources = [ROOT / "adapters" / name for name in NAMES]
    done = ptkit("export", *sources, "--as", "tokens", "--out", "served", cwd=folder)
    assert "2 adapters, 40 virtual tokens" in done.stderr
    return folder / "served"


def plain(folder: Path, prompts: list[str], **options: Any) -> list[list[int]]:
    """What transformers alone generates, all prompts in one left-padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    output = model.generate(**inputs, do_sample=False, **options)[:, inputs["input_ids"].shape[1] :]
    end = model.generation_config.eos_token_id
    return [row[: row.index(end)] if end in row else row for row in output.tolist()]


def test_plain_transformers_says_what_every_adapter_says_at_once(
    exported: Path, bank: AdapterBank
) -> None:
    adapters = json.loads((exported / "prompts.json").read_text())["adapters"]
    begins = [adapters[name]["prompt"] for name in NAMES] + [""]
    prompts = [begin + text for begin in begins for text in TEXTS]
    rows = [name for name in (*NAMES, None) for _ in TEXTS]
    options = {"max_new_tokens": 16, "do_sample": False}
    ids = bank.base.tokenizer(TEXTS * 3)["input_ids"]
    assert plain(exported, prompts, max_new_tokens=16) == bank.generate_ids(ids, rows, **options)


def test_the_new_tokens_are_never_generated(exported: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    known = 8192
    assert model.generation_config.suppress_tokens == [*range(known, known + 40)]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        ids = torch.randint(0, known + 40, (16, 24), generator=generator)
        logits = model(input_ids=ids).logits
    best = logits[..., :known].max(-1).values
    assert (logits[..., known:].max(-1).values < best).all()
    # Nor by engines that read no generation_config and sample: hardly ever.
    share = logits.softmax(-1)[..., known:].sum(-1)
    assert share.mean() < 40 / known


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**16), scale=st.floats(0.01, 30))
def test_a_mean_row_never_has_the_largest_logit(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(50, 8, generator=generator) * scale
    hidden = torch.randn(20, 8, generator=generator)
    logits = hidden @ torch.cat([head, head.mean(0, keepdim=True)]).T
    assert (logits[:, -1] < logits[:, :-1].max(-1).values).all()


def scaled() -> Base:
    """A base that scales its embedding as it looks it up, and is tied."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, intermediate_size=48, eos_token_id=0, bos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return frozen_base(Gemma2ForCausalLM(config), random_base("gpt2").tokenizer, "random-gemma2")


def beginning() -> Base:
    """A base whose tokenizer begins every text with a token, and whose head is its own."""
    from tokenizers.processors import TemplateProcessing

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, eos_token_id=0, bos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    tokenizer = random_base("gpt2").tokenizer
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 0)]
    )
    return frozen_base(LlamaForCausalLM(config), tokenizer, "random-begins")


@pytest.mark.parametrize("make", [scaled, beginning, lambda: random_base("gpt2")])
@pytest.mark.parametrize("method", ["prompt", "p-tuning-lstm"])
def test_families_that_scale_tie_or_begin_with_a_token(
    make: Any, method: str, tmp_path: Path
) -> None:
    base = make()
    adapter = make_adapter(base, LEARNT[method])
    info = AdapterInfo(base=BaseInfo(id=base.id, fingerprint=base.fingerprint))
    files = adapter.files()
    write_adapter(tmp_path / "mine", AdapterFiles(files.config, files.tensors, info))
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    done = export_tokens([tmp_path / "mine"], tmp_path / "out", base=base)
    assert all(torch.equal(t, before[n]) for n, t in base.model.state_dict().items())
    text = "w5 w6 w7 w8"
    # The word tokenizer splits at spaces, so the special tokens need none.
    options = {"max_new_tokens": 10, "eos_token_id": None}
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer(done.prompts["mine"] + text, add_special_tokens=False, return_tensors="pt")
    theirs = model.generate(**ids, do_sample=False, pad_token_id=0, **options)
    prompt = list(base.tokenizer(text)["input_ids"])
    assert ids["input_ids"][0, 5:].tolist() == prompt
    (ours,) = generate(
        base.model, [prompt], adapter.prefix().detach().alone, pad_token_id=0, do_sample=False,
        **options,
    )  # fmt: skip
    assert theirs[0, ids["input_ids"].shape[1] :].tolist() == ours


def test_the_client_sends_what_the_model_reads(tmp_path: Path, bank: AdapterBank) -> None:
    """client.py in a process of its own against a server that does what vLLM documents."""
    sources = [ROOT / "adapters" / name for name in NAMES]
    export_prompt_embeds(sources, tmp_path / "embeds")
    base = bank.base

    class Engine(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            encoded = io.BytesIO(base64.b64decode(body["prompt_embeds"]))
            embeds = torch.load(encoded, weights_only=True)[None]
            generator: Any = base.model
            ids = generator.generate(
                inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]),
                max_new_tokens=body["max_tokens"], do_sample=body["temperature"] > 0,
            )  # fmt: skip
            text = base.tokenizer.decode(ids[0], skip_special_tokens=True)
            answer = json.dumps({"choices": [{"text": text}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Engine) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in NAMES:
            done = forked.run(
                [sys.executable, tmp_path / "embeds" / "client.py", name, TEXTS[0], "--base",
                 str(TINY_EN_FOLDER), "--url", f"http://127.0.0.1:{server.server_port}",
                 "--max-tokens", "12"],
                capture_output=True, text=True, check=True,
                env={**os.environ, forked.WITHOUT_PTKIT: "1"},
            )  # fmt: skip
            (expected,) = bank.generate([TEXTS[0]], [name], max_new_tokens=12, do_sample=False)
            assert done.stdout == f"{expected}\n"
        server.shutdown()


def test_what_cannot_become_tokens_is_refused(tmp_path: Path) -> None:
    prefix = ROOT / "adapters" / "facts-prefix"
    for form in ("tokens", "prompt-embeds"):
        message = refused("export", prefix, "--as", form, "--out", "no", cwd=tmp_path)
        assert "learns no input embeddings" in message
    soft = ROOT / "adapters" / "facts-prompt"
    twice = refused("export", soft, soft, "--as", "tokens", "--out", "no", cwd=tmp_path)
    assert "two adapters are called `facts-prompt`" in twice
    assert "one run at a time" in refused("export", soft, soft, "--out", "no", cwd=tmp_path)
    bf16 = refused("export", soft, "--as", "tokens", "--dtype", "int8", "--out", "no", cwd=tmp_path)
    assert "--dtype" in bf16


def test_plain_transformers_reads_an_adapter_of_any_method(
    bank: AdapterBank, tmp_path: Path
) -> None:
    """Two prefixes, a prompt and a P-tuning, by the client that is written, in its own process."""
    names = ["facts-prefix", "facts-prompt", "routing-ptuning"]
    sources = [ROOT / "adapters" / name for name in names]
    done = ptkit("export", *sources, "--as", "transformers", "--out", "served", cwd=tmp_path)
    assert "3 adapters" in done.stderr
    client = tmp_path / "served" / "client.py"
    text = client.read_text()
    client.write_text(text.replace(f"base = {bank.base.id!r}", f"base = {str(TINY_EN_FOLDER)!r}"))
    for name in names:
        command = [sys.executable, str(client), name, TEXTS[0]]
        run = forked.run(
            command, capture_output=True, text=True, check=True,
            env={**os.environ, forked.WITHOUT_PTKIT: "1"},
        )  # fmt: skip
        (expected,) = bank.generate_ids(
            bank.base.encode([TEXTS[0]]), [name], max_new_tokens=64, do_sample=False
        )
        assert run.stdout.rstrip("\n") == bank.base.tokenizer.decode(
            expected, skip_special_tokens=True
        ).rstrip("\n")


@pytest.mark.parametrize("kind", ["infix", "lora", "gate"])
def test_what_no_cache_can_hold_is_refused_with_its_reason(kind: str, tmp_path: Path) -> None:
    base = random_base("llama")
    changed = {"infix": {"position": "infix"}, "lora": {"kind": "lora"}}.get(kind, {})
    section = changed if kind == "lora" else LEARNT["prefix"] | {"start": "random"} | changed
    adapter = create_adapter(method_section(section), base, Demonstrations([], 0))
    if kind == "gate":
        hidden = base.embedding.embedding_dim
        adapter.input_gate = Gate(torch.ones(2 * hidden), torch.zeros(1), base.embedding)
    folder = tmp_path / "adapter"
    write_adapter(folder, adapter.files())
    why = {
        "infix": "before the last word",
        "lora": "changes the base's weights",
        "gate": "a gate sets its strength",
    }[kind]
    with pytest.raises(AdapterError, match=why):
        export_transformers([folder], tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
