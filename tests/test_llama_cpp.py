"""Adapters on llama.cpp's own server: the tokens that transformers generates with them.

The server is the package `xllamacpp`, in a process of its own; `make setup-engines` puts it apart.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_base
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp import SERVER, needs_server, shifted
from scipy.linalg import hadamard
from test_cli import refused
from test_peft_parity import LEARNT, make_adapter

from ptkit.bank import AdapterBank
from ptkit.errors import AdapterError, UserError
from ptkit.formats.adapter_files import write_adapter
from ptkit.hub.engines.llama_cpp import write
from ptkit.methods import Adapter
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.forward import all_logits
from ptkit.runtime.slot_file import CacheLayout, slot_file

#: How far a token may lie below the likeliest, by what the server keeps keys and values in.
TIES = {"F32": 0.6, "F16": 0.6, "Q8_0": 1.0}
#: What rounding to each type loses.
CLOSE: dict[str, dict[str, float]] = {
    "F32": {"atol": 1e-6, "rtol": 1e-6}, "F16": {"atol": 1e-3, "rtol": 1e-3},
    "Q8_0": {"atol": 0.03, "rtol": 0.02},
}  # fmt: skip
TEXTS = ["The capital of France is", "name[The Eagle], food[Italian]\n", "Once upon a time"]
PROGRAM = """
import sys, json, socket, os
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import xllamacpp as xl
import client
gguf, cache, flash, texts = json.loads(sys.argv[3])
params = xl.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = gguf, 512, 1, False
params.slot_save_path, params.endpoint_slots = sys.argv[2] + "/", True
params.cpuparams.n_threads = 1
kind = "ENABLED" if flash else "DISABLED"
params.flash_attn_type = getattr(xl.llama_flash_attn_type, "LLAMA_FLASH_ATTN_TYPE_" + kind)
params.cache_type_k = params.cache_type_v = getattr(xl.ggml_type, "GGML_TYPE_" + cache)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    params.port = free.getsockname()[1]
running = xl.Server(params)  # it ends with the object
server = running.listening_address
names = json.load(open(sys.argv[2] + "/adapters.json"))
told = {
    name: [
        client.complete(server, name, text, n_predict=16, return_tokens=True, ignore_eos=True)
        for text in texts
    ]
    for name in [*names, *names]  # and again, after the others were in the slot
}
print("TOLD" + json.dumps({n: [a["tokens"] for a in all] for n, all in told.items()}))
os._exit(0)
"""


@pytest.fixture(scope="module")
def gguf(smollm2: Path) -> Path:
    return next(smollm2.glob("*.gguf"))


@pytest.fixture(scope="module")
def base(gguf: Path) -> Base:
    return load_base(id=str(gguf), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def adapters(base: Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A prefix that no text made, and the soft prompt of a text."""
    folder = tmp_path_factory.mktemp("adapters")
    prefix = shifted(base, 0, "Answer like a pirate, and rhyme", 0.05)
    made: dict[str, Adapter] = {"prefix": PrefixTuning.from_prefix(prefix, base)}
    section = {"kind": "prompt_tuning", "num_virtual_tokens": 6, "start_text": "You write haiku."}
    made["prompt"] = make_adapter(base, section, start="text")
    for name, adapter in made.items():
        write_adapter(folder / name, adapter.files())
    return {name: folder / name for name in made}


@needs_server
@pytest.mark.parametrize(
    ("dtype", "flash"),
    [("float32", True), ("float32", False), ("float16", True), ("int8", True)],
)
def test_the_server_generates_what_transformers_does(
    dtype: str, flash: bool, gguf: Path, base: Base, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Two adapters in turns in one slot. The server multiplies by the file's blocks, with rounded
    activations, so an answer may part where the two likeliest tokens are close, and only there."""
    out = tmp_path / "served"
    write(list(adapters.values()), out, base=base, gguf=gguf, dtype=dtype, flash_attention=flash)
    cache = {"float32": "F32", "float16": "F16", "int8": "Q8_0"}[dtype]
    given = json.dumps([str(gguf), cache, flash, TEXTS])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(SERVER), str(out), given],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert "TOLD" in done.stdout, done.stderr[-2000:]
    told = json.loads(done.stdout.partition("TOLD")[2])
    bank = AdapterBank(base)
    for name, path in adapters.items():
        bank.load(path, name=name)
        for text, found in zip(TEXTS, told[name], strict=True):
            _require_same_but_for_ties(base, bank, name, text, found, cache)


def _require_same_but_for_ties(
    base: Base, bank: AdapterBank, name: str, text: str, found: list[int], cache: str
) -> None:
    (ids,) = base.encode([text])
    row = torch.tensor([[*ids, *found]])
    logits = all_logits(base.model, row, torch.ones_like(row), bank.rows([name]))[0]
    for place, token in enumerate(found):
        scores = logits[len(ids) + place - 1]
        assert scores.max() - scores[token] < TIES[cache], (name, text, place)
    plain = all_logits(base.model, row, torch.ones_like(row), None)[0, len(ids) - 1]
    assert plain.argmax() != found[0] or torch.dist(plain, logits[len(ids) - 1]) > 10


@settings(deadline=None, max_examples=25)
@given(
    tokens=st.integers(1, 5),
    layers=st.integers(1, 3),
    heads=st.integers(1, 3),
    kind=st.sampled_from(["F32", "F16", "Q8_0"]),
    flash=st.booleans(),
)
def test_a_slot_file_says_its_own_shape(
    tokens: int, layers: int, heads: int, kind: str, flash: bool
) -> None:
    """Read back by what the server documents of the format: every record where it should be, and
    every value that of the prefix, turned and permuted."""
    generator = torch.Generator().manual_seed(tokens + 10 * layers)
    states = [torch.randn(heads, tokens, 64, generator=generator) for _ in range(2 * layers)]
    prefix = KVPrefix(tuple(states[:layers]), tuple(states[layers:]))
    cache = GGMLQuantizationType[kind]
    if kind == "Q8_0" and not flash:
        with pytest.raises(UserError, match="needs flash attention"):
            slot_file(prefix, range(tokens), CacheLayout(True, cache, flash))
        return
    data = slot_file(prefix, range(100, 100 + tokens), CacheLayout(True, cache, flash))
    read = _Reader(data)
    assert read("<3I") == (0x67677371, 4, tokens + 4)
    assert read(f"<{tokens + 4}i") == (-1, 1, tokens, *range(100, 100 + tokens), 0)
    assert read("<2I") == (1, tokens)
    assert [read("<iII")[:2] for _ in range(tokens)] == [(i, 1) for i in range(tokens)]
    turned = 64 if kind == "Q8_0" else 0
    assert read("<4I") == (0 if flash else 1, layers, turned, turned)
    turn = torch.tensor(hadamard(64) / 8.0).float() if turned else torch.eye(64)
    for keys in prefix.keys:
        pairs = torch.stack((keys[..., :32], keys[..., 32:]), -1).flatten(-2)
        assert read("<i") == (int(cache),)
        found = read.rows(read("<Q")[0], tokens, cache)
        torch.testing.assert_close(found, (pairs @ turn).transpose(0, 1).flatten(1), **CLOSE[kind])
    for values in prefix.values:
        assert read("<i") == (int(cache),)
        if flash:
            found = read.rows(read("<Q")[0], tokens, cache)
        else:
            size, width = read("<2I")
            assert width == heads * 64
            found = read.rows(size * tokens, width, cache).T
        expected = (values @ turn).transpose(0, 1).flatten(1)
        torch.testing.assert_close(found, expected, **CLOSE[kind])
    assert not read.left


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.left = data

    def __call__(self, form: str) -> tuple[int, ...]:
        size = struct.calcsize(form)
        head, self.left = self.left[:size], self.left[size:]
        return struct.unpack(form, head)

    def rows(self, size: int, count: int, cache: GGMLQuantizationType) -> torch.Tensor:
        """`count` rows of `size` bytes."""
        head, self.left = self.left[: size * count], self.left[size * count :]
        stored = np.frombuffer(head, np.uint8).reshape(count, size)
        return torch.from_numpy(quants.dequantize(stored, cache).astype(np.float32))


def test_no_two_adapters_begin_a_prompt_alike(
    base: Base, gguf: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The server shares what it keeps of prompts that begin with the same ids."""
    write(list(adapters.values()), tmp_path / "served", base=base, gguf=gguf)
    about = json.loads((tmp_path / "served" / "adapters.json").read_text())
    firsts = [entry["placeholders"] for entry in about.values()]
    assert firsts[0][:2] != firsts[1][:2]
    special = set(base.tokenizer.all_special_ids)
    assert not special & {i for ids in firsts for i in ids}


def test_what_llama_cpp_cannot_be_given_is_refused(
    gguf: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    out, prefix = tmp_path / "out", adapters["prefix"]
    as_slots = ["export", prefix, "--as", "llama-cpp", "--out", out]
    assert "needs --gguf" in refused(*as_slots, cwd=tmp_path)
    found = refused(*as_slots, "--gguf", gguf, "--dtype", "bfloat16", cwd=tmp_path)
    assert "takes float32, float16 or int8" in found
    found = refused("export", prefix, "--gguf", gguf, "--out", out, cwd=tmp_path)
    assert "does not take --gguf" in found
    other = tmp_path / "other"
    write_adapter(other, make_adapter(random_base("llama"), LEARNT["prefix"]).files())
    with pytest.raises(AdapterError):
        write([other], out, gguf=gguf)
    assert not out.exists()
