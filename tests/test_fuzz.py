"""Files from strangers: ten thousand damaged adapters, and nothing but clear errors.

Whatever is in the folder, reading and compiling it ends in an adapter or in an AdapterError,
soon, within the memory the real one takes.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import gpt2, word_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_adapter_files import lora_adapter
from test_peft_parity import LEARNT, make_adapter
from transformers import GPT2LMHeadModel

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles, read_adapter, write_adapter
from ptkit.formats.adapter_folder import CONFIG, INFO, INT8_WEIGHTS, WEIGHTS
from ptkit.formats.adapter_info import AdapterInfo, BaseInfo, MethodInfo, TaskInfo
from ptkit.methods import adapter_from_files, compile_files, require_same_base
from ptkit.runtime.base_model import Base, frozen_base


def small_base() -> Base:
    """Two layers: every case of a LoRA changes the modules of all layers, three times."""
    config = gpt2().config
    config.n_layer = 2
    torch.manual_seed(0)
    return frozen_base(GPT2LMHeadModel(config).eval(), word_tokenizer(), "two-layers")


BASE = small_base()
#: Of each of the eight tests below.
CASES = 1250
SECONDS, MEMORY = 5.0, 400_000_000


def good_files(kind: str) -> AdapterFiles:
    """What a sound adapter of this kind holds."""
    if kind == "lora":
        files = lora_adapter(BASE, ["c_attn", "c_fc"]).files()
        BASE.model.requires_grad_(False)
        return files
    if kind == "multitask":
        hidden = BASE.embedding.embedding_dim
        tensors = {
            "prompt_embeddings": torch.randn(4, hidden),
            "prefix_task_cols": torch.randn(1, 4, 2),
            "prefix_task_rows": torch.randn(1, 2, hidden),
        }
        config = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 4,
                  "task_type": "CAUSAL_LM", "base_model_name_or_path": BASE.id}  # fmt: skip
        return AdapterFiles(config, tensors)
    torch.manual_seed(3)
    files = make_adapter(BASE, LEARNT[kind]).files()
    info = AdapterInfo(
        base=BaseInfo(id=BASE.id, fingerprint=BASE.fingerprint),
        method=MethodInfo(kind="prefix_tuning"),
        task=TaskInfo(kind="generation", input="{x}"),
    )
    return AdapterFiles(files.config, files.tensors, info)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of sound adapters by kind, made when first asked for."""
    home = tmp_path_factory.mktemp("sound")

    def folder(kind: str) -> Path:
        path = home / kind
        if not path.exists():
            plain = kind.removesuffix("-int8")
            write_adapter(path, good_files(plain), int8=kind.endswith("-int8"))
        return path

    return folder


def judged(path: Path) -> None:
    """Read, check and compile the adapter in `path`; anything but an AdapterError is a fault."""
    started = time.monotonic()
    try:
        files = read_adapter(path)
        require_same_base(files, BASE, "it")
        prefix = compile_files(files, BASE)
        assert prefix is None or all(torch.isfinite(t).all() for t in prefix.values)
        adapter_from_files(files, BASE).close()
    except AdapterError:
        pass
    assert time.monotonic() - started < SECONDS


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["LORA", "PREFIX_TUNING", "CPT", "SEQ_CLS", "../../x", 10**12, -1, 0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner,
                                                                max_size=3),
    max_leaves=4,
)  # fmt: skip
KINDS = ["prefix", "prompt", "p-tuning-lstm", "lora", "multitask", "prefix-int8"]

quick = settings(
    max_examples=CASES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture
def case(sound: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a sound adapter to damage, in place of the last one."""

    contents: dict[str, dict[str, bytes]] = {}

    def copied(kind: str) -> Path:
        path = tmp_path / "case"
        if kind not in contents:
            contents[kind] = {file.name: file.read_bytes() for file in sound(kind).iterdir()}
        path.mkdir(exist_ok=True)
        for file in path.iterdir():
            if file.name not in contents[kind]:
                file.unlink()
        for name, content in contents[kind].items():
            (path / name).write_bytes(content)
        return path

    return copied


@pytest.fixture(autouse=True)
def memory_stays_small():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY / 1024


def weights_of(path: Path) -> Path:
    return next(p for p in (path / WEIGHTS, path / INT8_WEIGHTS) if p.exists())


@quick
@given(kind=st.sampled_from(KINDS), share=st.floats(0, 1), name=st.sampled_from([0, 1, 2]))
def test_truncated(case, kind: str, share: float, name: int) -> None:
    path = case(kind)
    file = [weights_of(path), path / CONFIG, path / INFO][name]
    if file.exists():
        content = file.read_bytes()
        file.write_bytes(content[: int(share * len(content))])
    judged(path)


@quick
@given(
    kind=st.sampled_from(KINDS),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=9),
    header=st.booleans(),
)
def test_flipped_bits_of_the_weights(case, kind: str, flips, header: bool) -> None:
    path = case(kind)
    file = weights_of(path)
    content = bytearray(file.read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0] if header else len(content)
    for place, bit in flips:
        content[min(end - 1, int(place * end))] ^= 1 << bit
    file.write_bytes(content)
    judged(path)


@quick
@given(
    kind=st.sampled_from(KINDS),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 7)), min_size=1, max_size=5),
    name=st.sampled_from([CONFIG, INFO]),
)
def test_flipped_bits_of_the_settings(case, kind: str, flips, name: str) -> None:
    path = case(kind)
    if not (path / name).exists():
        return
    content = bytearray((path / name).read_bytes())
    for place, bit in flips:
        content[min(len(content) - 1, int(place * len(content)))] ^= 1 << bit
    (path / name).write_bytes(content)
    judged(path)


@quick
@given(kind=st.sampled_from(KINDS), key=st.integers(0, 60), value=VALUES)
def test_settings_that_mean_nothing(case, kind: str, key: int, value: Any) -> None:
    path = case(kind)
    config = json.loads((path / CONFIG).read_text())
    names = sorted(config)
    config[names[key % len(names)]] = value
    (path / CONFIG).write_text(json.dumps(config))
    judged(path)


@quick
@given(kind=st.sampled_from(KINDS[:3]), part=st.sampled_from(
    ["base", "method", "task", "base.id", "base.fingerprint", "method.kind", "metrics",
     "format", "retention", "weights", "task.input", "n_test", "another"]
), value=VALUES)  # fmt: skip
def test_records_that_mean_nothing(case, kind: str, part: str, value: Any) -> None:
    path = case(kind)
    info = json.loads((path / INFO).read_text())
    *parents, last = part.split(".")
    place = info
    for name in parents:
        place = place[name]
    place[last] = value
    (path / INFO).write_text(json.dumps(info))
    judged(path)


@quick
@given(
    kind=st.sampled_from(KINDS),
    entry=st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "I64", "BOOL", "F64", "F8_E4M3",
                                      "U8", "XX", ""]),
            "shape": st.lists(st.integers(-1, 40) | st.sampled_from([2**31, 2**62]), max_size=4),
            "data_offsets": st.lists(st.integers(-8, 5000) | st.just(2**63), max_size=3),
        }
    ),
    which=st.integers(0, 30),
    twice=st.booleans(),
)  # fmt: skip
def test_headers_that_lie(case, kind: str, entry: dict, which: int, twice: bool) -> None:
    path = case(kind)
    file = weights_of(path)
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    name = names[which % len(names)]
    if twice:
        text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
    else:
        text = json.dumps({**header, name: entry})
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + content[8 + length :])
    judged(path)


@quick
@given(
    kind=st.sampled_from(KINDS),
    shape=st.lists(st.integers(0, 40), max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool,
                           torch.int8, torch.float64, torch.float8_e4m3fn]),
    value=st.sampled_from([0.0, 1.0, 3e38, float("nan"), float("inf"), -float("inf")]),
    which=st.integers(0, 30),
    extra=st.booleans(),
)  # fmt: skip
def test_tensors_of_other_shapes_types_and_values(
    case, kind: str, shape: list[int], dtype: torch.dtype, value: float, which: int, extra: bool
) -> None:
    from safetensors.torch import load_file, save_file

    path = case(kind)
    file = weights_of(path)
    tensors = load_file(file)
    name = "another" if extra else sorted(tensors)[which % len(tensors)]
    odd = torch.full(shape, value) if dtype.is_floating_point else torch.ones(shape)
    tensors[name] = odd.to(dtype)
    save_file(tensors, file)
    judged(path)


@quick
@given(length=st.integers(0, 2**64 - 1), rest=st.binary(max_size=64), kind=st.sampled_from(KINDS))
def test_bytes_of_any_kind(case, length: int, rest: bytes, kind: str) -> None:
    path = case(kind)
    weights_of(path).write_bytes(struct.pack("<Q", length) + rest)
    judged(path)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG, INFO])
@pytest.mark.parametrize("what", ["loop", "nowhere", "folder", "zero", "pipe", "long"])
def test_links_devices_and_pipes(case, name: str, what: str) -> None:
    path = case("prefix")
    place = path / name
    place.unlink()
    if what == "folder":
        place.mkdir()
    elif what == "pipe":
        os.mkfifo(place)  # opening it would wait for a writer for ever
    elif what == "long":
        place.symlink_to("x" * 200)
    else:
        target = {"loop": place, "nowhere": path / "nowhere", "zero": Path("/dev/zero")}[what]
        place.symlink_to(target)
    judged(path)


def test_deep_and_huge_json(case) -> None:
    path = case("prompt")
    (path / CONFIG).write_text("[" * 100_000)
    with pytest.raises(AdapterError, match="nested too deeply"):
        read_adapter(path)
    with (path / CONFIG).open("wb") as file:
        file.truncate(3 * 2**30)  # sparse: no disk is used
    with pytest.raises(AdapterError, match="more than any adapter needs"):
        read_adapter(path)
    (path / CONFIG).write_text('{"peft_type": "LORA", "peft_type": "PROMPT_TUNING"}')
    with pytest.raises(AdapterError, match="a key is given twice"):
        read_adapter(path)
