"""Tiny random models and the data folder, shared by all tests."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpcore2
import pytest
import torch
import typer.main
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ptkit.evaluation import latency
from ptkit.formats.cache_home import cache_home
from ptkit.hub.foreign.unpickle import tensors_of
from ptkit.runtime.base_model import Base, frozen_base

os.environ.setdefault("HF_HUB_OFFLINE", "1")
#: What the user fetched (`ptkit models get`) is read there, and nothing is written.
#: Kept in the environment: pytest-xdist's workers find the cache moved already.
FETCHED = Path(os.environ.setdefault("PTKIT_TEST_FETCHED", str(cache_home() / "models")))
# Nothing a test encodes is left in, or taken from, the user's own cache.
os.environ["PTKIT_CACHE"] = tempfile.mkdtemp(prefix="ptkit-cache-")
torch.set_num_threads(1)  # tiny models: threads only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # in processes that tests start, too


def _written(file: Any) -> None:
    """`os.fsync` without the wait for the disk: no test cuts the power."""
    os.fstat(file if isinstance(file, int) else file.fileno())


os.fsync = _written

# Half of what a short training takes is measuring its latency, which no test reads closely.
latency.NEW_TOKENS, latency.SECONDS = 1, 0.0

# Typer makes all commands anew whenever one is run, which takes longer than most of them.
typer.main.get_command = functools.cache(typer.main.get_command)

# Each cell records the versions of packages, which are read from their files every time.
importlib.metadata.version = functools.cache(importlib.metadata.version)

# Each request without a client of its own reads all certificates, for 40 ms; none is needed here.
httpcore2.default_ssl_context = functools.cache(httpcore2.default_ssl_context)

VOCABULARY = 97
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=128, n_embd=32, n_layer=3, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def qwen3() -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


FAMILIES = {"gpt2": gpt2, "llama": llama, "qwen3": qwen3}


def random_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A random model of `family` whose initial weights are large enough to make tokens differ."""
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model.eval()


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words w1..w95 are tokens 1..95; token 0 ends a text, 96 is unknown."""
    vocabulary = {"<end>": 0} | {f"w{i}": i for i in range(1, 96)} | {"<unk>": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    )


def random_base(family: str, seed: int = 0) -> Base:
    """A frozen random base model with a word tokenizer."""
    return frozen_base(random_model(family, seed), word_tokenizer(), f"random-{family}-{seed}")


def beginning_tokenizer() -> PreTrainedTokenizerFast:
    """`word_tokenizer`, but token 95 is `<start>` and stands before every text."""
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, 95)} | {"<start>": 95, "<unk>": 96}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", 95)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<start>", eos_token="<end>", pad_token="<end>",
        unk_token="<unk>",
    )  # fmt: skip


def beginning_base(family: str, seed: int = 0) -> Base:
    """`random_base` whose tokenizer puts a begin-of-text token before every text."""
    return frozen_base(random_model(family, seed), beginning_tokenizer(), f"begins-{family}-{seed}")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Of what a file of tests loads nothing is garbage: it is not searched for any meanwhile."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """What the libraries hold for ever is not searched for garbage at each training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def _what_a_file_of_tests_leaves_loaded() -> Iterator[None]:
    """Of libraries and caches: it is not searched for garbage by the files that come later."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def base(family: str) -> Base:
    return random_base(family)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real datasets; tests that need it skip where it is absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PTKIT_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder} (set PTKIT_DATA)")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (.ci/run installs it)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(autouse=True)
def _float32_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`autocast: auto` computes in float32, as the oracles do, whatever the machine has."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2; skips where it was not fetched."""
    folder, here = FETCHED / "smollm2-135m", cache_home() / "models" / "smollm2-135m"
    if not any(folder.glob("*.gguf")):
        pytest.skip("SmolLM2 is not here: ptkit models get smollm2-135m")
    if not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        here.symlink_to(folder)
    return here


@pytest.fixture
def opened_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles that a test knows need no process of their own, that loads torch."""

    def tensors(path: Path) -> dict[str, torch.Tensor]:
        return dict(tensors_of(torch.load(path, weights_only=True)))

    monkeypatch.setattr("ptkit.hub.foreign.source.unpickled", tensors)
