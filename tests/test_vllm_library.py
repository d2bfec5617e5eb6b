"""The adapters a vLLM server knows, and its files, without vLLM."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_base
from hub_server import Fault, Hub, own_hub
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st
from jinja2 import Template, TemplateError
from safetensors.torch import load_file, save
from test_cli import refused
from test_peft_parity import LEARNT, make_adapter
from transformers.utils.chat_template_utils import render_jinja_template

from ptkit.data.templates import filled
from ptkit.errors import AdapterError, UserError
from ptkit.families.matrix import model_under_test
from ptkit.formats.adapter_files import write_adapter
from ptkit.formats.adapter_info import ChatInfo
from ptkit.hub import vllm_server
from ptkit.hub.engines.vllm import ADAPTERS, CODE, asked_as, write
from ptkit.hub.transfer import push
from ptkit.hub.vllm_server import VLLMServer
from ptkit.methods import Demonstrations, create_adapter
from ptkit.methods.catalogue import method_section
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.model_names import TINY_EN
from ptkit.vllm_connector.files import (
    ABOUT,
    TENSORS,
    ChatRecord,
    PrefixRecord,
    read_checked,
    read_record,
    tensors_of,
)
from ptkit.vllm_connector.library import (
    NotAllowedError,
    PrefixLibrary,
    UnknownAdapterError,
    spooled,
)
from ptkit.vllm_connector.memory import PrefixMemory
from ptkit.vllm_connector.names import tell_known_names
from ptkit.vllm_connector.running import RunningBase, require_runs

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(TINY_EN, device="cpu")


@pytest.fixture(scope="module")
def exported(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vllm") / "served"
    write([ROOT / "adapters" / n for n in ("facts-prefix", "facts-prompt")], out, base=base)
    return out


@pytest.fixture(scope="module")
def running(base: Base) -> RunningBase:
    return running_base(base)


def running_base(base: Base, **changed: Any) -> RunningBase:
    shape = base.layout.widest
    same = RunningBase(
        base.id, len(base.layout), shape.kv_heads, shape.key_dim, base.precision, 512,
        dict(base.model.config.rope_parameters), base.identity,
    )  # fmt: skip
    return replace(same, **changed)


@pytest.fixture
def root(exported: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for name in ("facts-prefix", "facts-prompt"):
        (folder / name).mkdir(parents=True)
        for file in (ABOUT, TENSORS):
            (folder / name / file).write_bytes((exported / ADAPTERS / name / file).read_bytes())
    return folder


@pytest.fixture
def library(root: Path, running: RunningBase, tmp_path: Path) -> PrefixLibrary:
    (tmp_path / "spool").mkdir()
    made = PrefixLibrary(root, tmp_path / "spool", running)
    assert made.register_all() == []
    return made


def test_an_export_holds_the_prefix_and_what_it_was_made_for(base: Base, exported: Path) -> None:
    from ptkit.bank import AdapterBank

    bank = AdapterBank(base)
    bank.load(ROOT / "adapters" / "facts-prompt")
    prefix = bank.prefix("facts-prompt")
    record = read_record(exported / ADAPTERS / "facts-prompt")
    assert record.virtual_tokens == prefix.virtual_tokens
    assert record.base["fingerprint"] == base.fingerprint
    assert record.made_from["method"] == "PROMPT_TUNING"
    found = load_file(exported / ADAPTERS / "facts-prompt" / TENSORS)
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        assert torch.equal(found[f"keys.{layer}"], keys)
        assert torch.equal(found[f"values.{layer}"], values)


CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|pad|>' }}{% endfor %}"


def test_an_export_says_how_conversations_are_asked(
    base: Base, exported: Path, tmp_path: Path
) -> None:
    facts = read_record(exported / ADAPTERS / "facts-prompt").chat
    assert (facts.template, facts.ends, facts.lead) == (None, (), ())
    assert facts.question is not None
    assert _rendered(facts.question, "an inn") == "an inn\n"
    files = make_adapter(base, LEARNT["prefix"]).files()
    chat = ChatInfo(template=CHAT, system="Be brief.")
    info = files.info.model_copy(update={"chat": chat})
    write_adapter(tmp_path / "chatty", replace(files, info=info))
    write([tmp_path / "chatty"], tmp_path / "out", base=base)
    found = read_record(tmp_path / "out" / ADAPTERS / "chatty").chat
    assert found == ChatRecord(CHAT, "Be brief.", None, (base.tokenizer.pad_token_id,), ())
    assert "trained on conversations" in (tmp_path / "out" / "README.md").read_text()


def _rendered(template: str, question: str) -> str:
    (text,), _ = render_jinja_template(
        conversations=[[{"role": "user", "content": question}]], chat_template=template
    )
    return text


@given(st.text(st.sampled_from("ab \n'\"\\{}%#é😀"), max_size=12), st.text(max_size=8))
def test_a_question_stands_where_the_template_has_its_column(around: str, question: str) -> None:
    """Whatever stands around it; Jinja gets no part of it as its own."""
    literal = around.replace("{", "{{").replace("}", "}}")
    for template in (f"{literal}{{text}}{literal}", f"{{text}}{literal}{{text}}"):
        assert _rendered(asked_as(template), question) == filled(template, question)


def test_a_question_for_an_adapter_of_several_columns_is_refused_with_the_reason() -> None:
    with pytest.raises(TemplateError, match=r"inputs are made of `a`, `b`.*template: false"):
        _rendered(asked_as("{a}\n{b}"), "x")


def test_a_list_tells_of_an_adapter_what_its_record_says(library: PrefixLibrary) -> None:
    card = library.card("facts-prompt")
    assert (card["method"], card["template"], card["fault"]) == (
        "prompt_tuning", "{facts}\n", None,
    )  # fmt: skip
    assert card["n"] > 0
    assert card["low"] <= card["score"] <= card["high"]
    odd = {"method": 5, "score": "x", "template": ["a"]}
    _about(library.root / "facts-prompt", made_from=odd)
    card = library.card("facts-prompt")
    assert (card["method"], card["score"], card["template"]) == (None, None, None)


def test_what_vllm_runs_imports_nothing_that_its_environment_lacks(exported: Path) -> None:
    """Without PEFT, typer, pydantic and all else of ptkit, and without its own folder on the path:
    what needs no vLLM is imported, and everything else is searched for imports."""
    code = exported / CODE
    program = (
        "import sys\n"
        f"sys.path[:] = [{str(code)!r}] + [p for p in sys.path if 'ptkit' not in p]\n"
        "for name in ('peft', 'typer', 'datasets', 'accelerate', 'rich', 'pandas', 'ruamel'):\n"
        "    sys.modules[name] = None\n"
        "import ptkit, ptkit.vllm_connector.library\n"
        f"assert ptkit.__file__.startswith({str(code)!r}), ptkit.__file__\n"
        "own = {m for m in sys.modules if m.split('.')[0] == 'ptkit'}\n"
        "print(sorted(own))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import site; site.main()\n{program}"], capture_output=True,
        text=True, check=False, cwd=exported,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "ptkit.formats.checkpoint" in done.stdout
    here = {path.relative_to(code / "ptkit") for path in (code / "ptkit").rglob("*.py")}
    assert len(here) > 8
    for path in here:
        for word in (
            "import peft",
            "import typer",
            "import pydantic",
            "from peft",
            "from pydantic",
        ):
            assert word not in (code / "ptkit" / path).read_text(), path
    (facts,) = code.glob("*.dist-info")
    assert "ptkit.vllm_connector.plugin:PtkitAdapters" in (facts / "entry_points.txt").read_text()


def test_what_is_no_kv_prefix_is_refused_by_name(base: Base, tmp_path: Path) -> None:
    lora = method_section({"kind": "lora", "rank": 2, "alpha": 4})
    write_adapter(tmp_path / "lora", create_adapter(lora, base, Demonstrations([], 0)).files())
    with pytest.raises(AdapterError, match="changes the base's weights"):
        write([tmp_path / "lora"], tmp_path / "out", base=load_base(TINY_EN, device="cpu"))
    for kind, settings, why in (
        ("infix", {**LEARNT["prefix"], "position": "infix"}, "before the last word"),
    ):
        write_adapter(tmp_path / kind, make_adapter(base, settings).files())
        with pytest.raises(AdapterError, match=why):
            write([tmp_path / kind], tmp_path / "out", base=base)
    window = model_under_test("mistral").base()
    write_adapter(tmp_path / "window", make_adapter(window, LEARNT["prefix"]).files())
    with pytest.raises(AdapterError, match="see a window"):
        write([tmp_path / "window"], tmp_path / "out", base=window)
    assert not (tmp_path / "out").exists()
    found = refused(
        "export", ROOT / "adapters" / "facts-prefix", "--as", "vllm", "--dtype", "int8",
        "--out", tmp_path / "out", cwd=tmp_path,
    )  # fmt: skip
    assert "are stored in float32" in found


def test_an_adapter_is_served_as_it_was_checked(library: PrefixLibrary, root: Path) -> None:
    """What happens to the files later reaches no request that holds the version."""
    version = library.version("facts-prefix")
    with library.held(version):
        (root / "facts-prefix" / TENSORS).write_bytes(b"half")
        kept = spooled(library.spool, version.digest).read_bytes()
        assert tensors_of(kept)["keys.0"].shape[1] == version.virtual_tokens
        with pytest.raises(AdapterError, match="not written completely"):
            library.version("facts-prefix")
    assert library.version("facts-prompt").name == "facts-prompt"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda f: (f / TENSORS).unlink(), "prefix.safetensors is missing"),
        (lambda f: (f / ABOUT).unlink(), "adapter.json is missing"),
        (lambda f: _cut(f / TENSORS), "not written completely"),
        (lambda f: _cut(f / ABOUT), "not JSON"),
        (lambda f: _flip(f / TENSORS), "is damaged"),
        (lambda f: _about(f, format=1), "expected 2"),
        (lambda f: _about(f, layers=3), "of 3 layers"),
        (lambda f: _about(f, virtual_tokens=True), "expected a positive number"),
        (lambda f: _about(f, sha256="../../etc/passwd"), "64 hex digits"),
        (lambda f: _about(f, virtual_tokens=600), "leave no room"),
        (lambda f: _about(f, chat=None), "`chat` is missing"),
        (lambda f: _about(f, chat={"ends": [], "lead": [], "system": 5}), "neither a text"),
        (lambda f: _about(f, chat={"ends": [True], "lead": []}), "no list of token ids"),
        (lambda f: _about(f, made_from={"score": float("nan")}), "is not JSON"),
        (lambda f: _about(f, rope={"rope_theta": 500.0, "rope_type": "default"}), "rotary"),
        (lambda f: _about(f, base={"id": "gpt2", "fingerprint": "0" * 16}), "for the base `gpt2`"),
        (lambda f: _tensors(f, "keys.1", torch.zeros(4, 32, 10)), "expected float32"),
        (lambda f: _tensors(f, "odd", torch.zeros(2, 2)), "`odd` is not expected"),
        (lambda f: _tensors(f, "values.0", None), "not finite"),
    ],
)
def test_files_that_cannot_be_served_are_refused_with_the_reason(
    spoil: Any, why: str, library: PrefixLibrary, root: Path
) -> None:
    spoil(root / "facts-prefix")
    for _ in range(2):  # from disk, then from memory
        with pytest.raises(AdapterError, match=why) as raised:
            library.version("facts-prefix")
        assert str(root) not in str(raised.value)
    assert library.version("facts-prompt")


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-7] ^= 0x10
    file.write_bytes(bytes(data))


def _about(folder: Path, **changed: Any) -> None:
    found = json.loads((folder / ABOUT).read_text())
    (folder / ABOUT).write_text(json.dumps({**found, **changed}))


def _tensors(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    import hashlib

    found = load_file(folder / TENSORS)
    found[name] = torch.full_like(found[name], torch.nan) if tensor is None else tensor
    data = save(found)
    (folder / TENSORS).write_bytes(data)
    _about(folder, sha256=hashlib.sha256(data).hexdigest())


@trials(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_files_make_reading_fail_otherwise(
    data: st.DataObject, exported: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever bytes the two files hold: they are read, or an AdapterError says why not."""
    folder = tmp_path_factory.mktemp("any")
    good = exported / ADAPTERS / "facts-prefix"
    for file in (ABOUT, TENSORS):
        content = bytearray((good / file).read_bytes())
        kind = data.draw(st.sampled_from(["whole", "cut", "changed", "other"]))
        if kind == "cut":
            content = content[: data.draw(st.integers(0, len(content)))]
        elif kind == "changed":
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        elif kind == "other":
            content = bytearray(data.draw(st.binary(max_size=200)))
        (folder / file).write_bytes(bytes(content))
    with suppress(AdapterError):
        record = read_record(folder)
        read_checked(folder, record)
        assert isinstance(record, PrefixRecord)


def test_the_same_base_in_another_precision_is_the_same(
    exported: Path, running: RunningBase
) -> None:
    record = read_record(exported / ADAPTERS / "facts-prefix")
    running.require_made_for(record)
    other = running_base(random_base("qwen3"))
    same_shape = replace(running, identity=other.identity)
    with pytest.raises(AdapterError, match="the weights here are"):
        same_shape.require_made_for(record)
    assert running.identity is not None
    halved = replace(
        running, precision="bfloat16", identity=replace(running.identity, fingerprint="f" * 16)
    )
    halved.require_made_for(record)
    replace(running, identity=None).require_made_for(record)  # by its shape only


def test_adapters_are_loaded_swapped_and_unloaded(library: PrefixLibrary, root: Path) -> None:
    with pytest.raises(UnknownAdapterError, match="did you mean `facts-prompt`"):
        library.version("facts-promt")
    library.load("mine", "facts-prefix", replace=False)
    assert library.version("mine").digest == library.version("facts-prefix").digest
    with pytest.raises(UserError, match="is served already"):
        library.load("mine", "facts-prompt", replace=False)
    library.load("mine", "facts-prompt", replace=True)
    assert library.version("mine").digest == library.version("facts-prompt").digest
    _flip(root / "facts-prefix" / TENSORS)
    with pytest.raises(AdapterError):
        library.load("mine", "facts-prefix", replace=True)
    assert library.version("mine").digest == library.version("facts-prompt").digest
    library.unload("mine")
    with pytest.raises(UnknownAdapterError):
        library.version("mine")
    assert library.card("facts-prompt")["virtual_tokens"] > 0
    assert (root / "facts-prompt" / ABOUT).is_file()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("facts-prefx", "did you mean `facts-prefix`? (GET /v1/models lists all)"),
        ("bsae", "did you mean `base`?"),
        ("zzz", "known: base, facts-prefix, a00, a01, a02, a03, a04, a05, a06, a07 and 92 more "
         "(GET /v1/models lists all)"),
        ("q" * 9_000, f"the model `{'q' * 130}` does not exist; known: base, "),
    ],
)  # fmt: skip
def test_an_unknown_name_is_told_with_near_ones_or_where_all_are(asked: str, told: str) -> None:
    names = ["facts-prefix", *(f"a{number:02}" for number in range(100))]
    models = SimpleNamespace(
        base_model_paths=[SimpleNamespace(name="base")], lora_requests=dict.fromkeys(names),
        is_base_model=lambda name: name == "base",
    )  # fmt: skip
    tell_known_names(models, LookupError)
    assert models.is_base_model("base")
    assert not models.is_base_model("a07")
    with pytest.raises(LookupError, match="does not exist") as refused:
        models.is_base_model(asked)
    assert told in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("path", ["..", "/etc", "../adapters", ".", "facts-prefix/../.."])
def test_no_path_leaves_the_folder(path: str, library: PrefixLibrary) -> None:
    with pytest.raises(UserError, match="below the adapters' folder"):
        library.load("mine", path, replace=False)


@pytest.mark.parametrize("name", ["", "../x", ".x", "a b", "x" * 129, "text", "image", "a/b"])
def test_names_that_mean_something_else_are_refused(name: str, library: PrefixLibrary) -> None:
    with pytest.raises(UserError):
        library.load(name, "facts-prefix", replace=False)


def test_an_upload_is_kept_whole_or_not_at_all(library: PrefixLibrary, root: Path) -> None:
    sent = {file: (root / "facts-prefix" / file).read_bytes() for file in (ABOUT, TENSORS)}
    library.upload("sent", sent)
    assert library.version("sent").digest == library.version("facts-prefix").digest
    with pytest.raises(AdapterError):
        library.upload("sent", {**sent, TENSORS: sent[TENSORS][:-1]})
    with pytest.raises(UserError, match="expected the files"):
        library.upload("sent", {**sent, "adapter_model.bin": b""})
    assert library.version("sent").digest == library.version("facts-prefix").digest
    assert sorted(p.name for p in root.iterdir()) == ["facts-prefix", "facts-prompt", "sent"]
    (root / "mine").mkdir()
    (root / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"holds `notes\.txt`"):
        library.upload("mine", sent)
    assert (root / "mine" / "notes.txt").read_text() == "precious"


def test_a_server_whose_adapters_are_fixed_changes_none(
    root: Path, running: RunningBase, tmp_path: Path
) -> None:
    fixed = PrefixLibrary(root, tmp_path, running, read_only=True)
    fixed.register_all()
    for change in (
        lambda: fixed.load("mine", "facts-prefix", replace=False),
        lambda: fixed.unload("facts-prefix"),
        lambda: fixed.upload("mine", {}),
    ):
        with pytest.raises(NotAllowedError, match="are fixed"):
            change()


def test_the_spool_stays_within_its_budget_but_for_what_is_in_use(
    root: Path, running: RunningBase, tmp_path: Path
) -> None:
    now = [0.0]
    spool = tmp_path / "spool"
    spool.mkdir()
    library = PrefixLibrary(root, spool, running, budget=1, clock=lambda: now[0])
    library.register_all()
    first = library.version("facts-prefix")
    with library.held(first):
        now[0] += 100
        library.version("facts-prompt")
        assert len([*spool.iterdir()]) == 2
    now[0] += 100
    library.load("again", "facts-prompt", replace=False)
    assert [p.stem for p in spool.iterdir()] == [library.version("facts-prompt").digest]
    before = library.reads
    assert library.version("facts-prefix") == first  # read again
    assert library.reads == before + 1
    assert library.version("facts-prefix") == first  # as it is
    assert library.reads == before + 1
    assert library.spool_bytes >= first.nbytes
    spooled(spool, first.digest).unlink()  # somebody cleans up
    assert library.version("facts-prefix") == first
    assert spooled(spool, first.digest).is_file()


@given(asked=st.lists(st.integers(0, 5), min_size=1, max_size=30), room=st.integers(0, 4))
def test_a_worker_keeps_the_prefixes_that_were_used_last(
    asked: list[int], room: int, versions: Path
) -> None:
    """As many as its budget holds, and one in any case; each is what its file holds."""
    one = 2 * 3 * 4 * 5 * 4
    memory = PrefixMemory(versions, torch.float32, room * one, [0])
    for turn, number in enumerate(asked):
        keys, values = memory[str(number)][0]
        assert torch.equal(keys, torch.full((4, 3, 5), float(number)))
        assert torch.equal(values, -keys)
        last = [*dict.fromkeys(reversed(asked[: turn + 1]))]
        kept = last[: max(1, room)]
        assert [n for n in range(6) if str(n) in memory] == sorted(kept)
        assert memory.nbytes == one * len(kept)


def test_a_worker_keeps_the_layers_that_it_has(exported: Path) -> None:
    """Of a stage of a pipeline, those and no others, under their own numbers."""
    folder = exported / ADAPTERS / "facts-prefix"
    record, whole = read_record(folder), load_file(folder / TENSORS)
    shutil.copyfile(folder / TENSORS, spooled(folder.parent, record.sha256))
    stages = [[0, 1], [2, 3, 4, 5]]
    kept = [PrefixMemory(folder.parent, torch.float32, 2**30, layers) for layers in stages]
    assert record.layers == 6
    for memory, layers in zip(kept, stages, strict=True):
        prefix = memory[record.sha256]
        assert [*prefix] == layers
        for layer, states in prefix.items():
            for part, found in zip(("keys", "values"), states, strict=True):
                assert torch.equal(found, whole[f"{part}.{layer}"].transpose(0, 1))
    assert sum(memory.nbytes for memory in kept) == record.nbytes


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    for number in range(6):
        states = torch.full((3, 4, 5), float(number))
        data = save({"keys.0": states, "values.0": -states})
        spooled(folder, str(number)).write_bytes(data)
    return folder


class _Config:
    """vLLM's settings as far as they decide; attributes as given."""

    def __init__(self, **given: Any) -> None:
        self.__dict__.update(given)


def _engine(**changed: Any) -> _Config:
    transfer = {
        "kv_connector": "PtkitConnector", "kv_role": "kv_consumer",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"adapters": "x"},
    }  # fmt: skip
    parallel: dict[str, Any] = {"data_parallel_size": 1, "pipeline_parallel_size": 1}
    model = {"use_mla": False, "is_encoder_decoder": False, "is_multimodal_model": False}
    speculative = changed.pop("speculative_config", None)
    cache, compilation, device = {"cache_dtype": "auto"}, {"mode": 0}, {"device_type": "cpu"}
    for group in (transfer, parallel, model, cache, compilation, device):
        group.update({k: v for k, v in changed.items() if k in group})
    return _Config(
        kv_transfer_config=_Config(**transfer), parallel_config=_Config(**parallel),
        model_config=_Config(**model), speculative_config=speculative,
        cache_config=_Config(**cache), compilation_config=_Config(**compilation),
        device_config=_Config(**device),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"kv_connector": "NixlConnector"}, "--kv-transfer-config"),
        ({"kv_role": "kv_both"}, "kv_consumer"),
        ({"kv_load_failure_policy": "recompute"}, "must be fail"),
        ({"kv_connector_extra_config": {}}, "must name a folder"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"data_parallel_size": 2}, "data-parallel"),
        ({"cache_dtype": "fp8"}, "a cache of `fp8` was not tried"),
        ({"pipeline_parallel_size": 2}, "--enforce-eager"),
        ({"use_mla": True}, "latent vectors"),
        ({"is_multimodal_model": True}, "images"),
    ],
)
def test_engines_that_would_answer_wrongly_do_not_start(changed: dict[str, Any], why: str) -> None:
    require_runs(_engine())
    require_runs(_engine(pipeline_parallel_size=2, mode=2))
    require_runs(_engine(pipeline_parallel_size=2, device_type="cuda"))
    with pytest.raises(UserError, match=why):
        require_runs(_engine(**changed))


def test_the_server_is_started_with_what_was_compiled(base: Base, tmp_path: Path) -> None:
    given = VLLMServer(
        base, ROOT / "adapters", Path("python"), "127.0.0.1", 8000, "float32", TINY_EN, 8,
        keys=("secret-key",), read_only=True, options=("--max-model-len", "256"),
    )  # fmt: skip
    names = given.write(tmp_path)
    assert names == sorted(p.parent.name for p in (tmp_path / ADAPTERS).glob(f"*/{ABOUT}"))
    assert len(names) == 4
    command = given.command(tmp_path)
    assert command[-2:] == ["--max-model-len", "256"]
    settings = json.loads(command[command.index("--kv-transfer-config") + 1])
    assert settings["kv_connector_extra_config"] == {
        "adapters": str(tmp_path / ADAPTERS), "read_only": True,
    }  # fmt: skip
    assert "secret-key" not in command
    environment = given.environment(tmp_path)
    assert environment["VLLM_API_KEY"] == "secret-key"
    assert environment["PYTHONPATH"] == str(tmp_path / CODE)
    template = Path(command[command.index("--chat-template") + 1]).read_text()
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert Template(template).render(messages=messages) == "a\nb"


@pytest.mark.parametrize(
    ("allowed", "physical", "reserved"),
    [
        (1, 1, None),
        (2, 2, None),
        (4, 2, None),
        (2, 8, None),
        (3, 3, "1"),
        (16, 8, "1"),
        (8, None, "1"),
    ],
)
def test_the_connector_takes_no_core_from_the_model(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    allowed: int, physical: int | None, reserved: str | None,
) -> None:  # fmt: skip
    name = "VLLM_CPU_NUM_OF_RESERVED_CPU"
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        vllm_server.psutil.Process, "cpu_affinity", lambda _: [*range(allowed)], raising=False
    )
    monkeypatch.setattr(vllm_server.psutil, "cpu_count", lambda logical=True: physical)
    given = VLLMServer(base, None, Path("python"), "127.0.0.1", 8000, "float32", TINY_EN, 8)
    assert given.environment(tmp_path).get(name) == reserved
    monkeypatch.setenv(name, "3")
    assert given.environment(tmp_path)[name] == "3"


def test_vllm_asks_for_memory_that_is_free_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(vllm_server.torch.cuda, "is_available", lambda: False)
    memory = SimpleNamespace(available=10 * 2**30, total=20 * 2**30)
    monkeypatch.setattr(vllm_server.psutil, "virtual_memory", lambda: memory)
    assert vllm_server._memory([]) == ["--gpu-memory-utilization", "0.25"]
    assert vllm_server._memory(["--gpu-memory-utilization=0.3"]) == []
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert vllm_server._memory([]) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--engine", "vllm", "--engine-python", sys.executable], "has no vLLM"),
        (["--engine", "vllm", "--engine-python", "./none"], "cannot be run"),
        (["--engine", "vllm", "--max-tokens", "5"], "does not take --max-tokens"),
        (["--engine", "vllm", "--", "--enable-lora"], "--enable-lora is set by"),
        (["--engine-python", "x"], "--engine ptkit does not take --engine-python"),
        (["--", "--block-size", "32"], "does not take options after"),
    ],
)
def test_options_that_do_not_fit_the_engine_are_refused(
    options: list[str], why: str, tmp_path: Path
) -> None:
    assert why in refused("serve", *options, cwd=tmp_path)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub for this process."""
    with own_hub(tmp_path, monkeypatch) as server:
        yield server.hub


@pytest.fixture
def open_library(library: PrefixLibrary) -> PrefixLibrary:
    """One that may load from the Hub."""
    library.allow_hub = True
    return library


def test_an_exported_adapter_is_pushed_and_loaded_from_the_hub(
    hub: Hub, open_library: PrefixLibrary, exported: Path
) -> None:
    library, folder = open_library, exported / ADAPTERS
    planned = push(folder / "facts-prefix", "team/facts", dry_run=True)
    assert (hub.requests, planned.url) == ([], None)
    done = push(folder / "facts-prefix", "team/facts")
    assert done.files == planned.files
    assert done.files.keys() == {ABOUT, TENSORS, "README.md"}
    push(folder / "facts-prompt", "team/facts", revision="other")
    card = (hub.root / "models" / "team" / "facts" / "main" / "README.md").read_text()
    assert '{"name": "facts", "hub": "team/facts"}' in card
    library.load("mine", hub="team/facts", replace=False)
    assert library.version("mine").digest == library.version("facts-prefix").digest
    assert not [request for request in hub.requests if request.endswith("README.md")]
    library.load("mine", hub="team/facts@other", replace=True)
    assert library.version("mine").digest == library.version("facts-prompt").digest
    asked = len(hub.requests)
    assert library.card("mine")["fault"] is None
    assert len(hub.requests) == asked
    with pytest.raises(UserError, match="one of `path`"):
        library.load("mine", "facts-prefix", "team/facts", replace=True)


def test_what_the_hub_holds_instead_is_told(
    hub: Hub, open_library: PrefixLibrary, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, models = open_library, hub.root / "models" / "team"
    shutil.copytree(ROOT / "adapters" / "facts-prefix", models / "peft" / "main")
    hub.commit("team/else", "main", {"config.json": b"{}"})
    push(exported / ADAPTERS / "facts-prefix", "team/facts")
    shutil.copytree(models / "facts", models / "damaged")
    _flip(models / "damaged" / "main" / TENSORS)
    hub.gated.add("team/secret")
    hub.commit("team/secret", "main", {ABOUT: b"{}"})
    for repository, why in (
        ("team/peft", "in PEFT's layout, .*`ptkit export --as vllm`"),
        ("team/else", "holds no adapter for vLLM"),
        ("team/damaged", "is damaged"),
        ("team/nothing", "no such adapter"),
        ("team/facts@v9", "no revision `v9`"),
        ("team/secret", "is gated"),
    ):
        with pytest.raises(AdapterError, match=why):
            library.load("mine", hub=repository, replace=False)
    with pytest.raises(UserError, match="not a repository"):
        library.load("mine", hub="../etc", replace=False)
    monkeypatch.setenv("PTKIT_MAX_DOWNLOAD_MB", "0.01")
    with pytest.raises(AdapterError, match="more than the limit"):
        library.load("mine", hub="team/facts", replace=False)
    monkeypatch.delenv("PTKIT_MAX_DOWNLOAD_MB")
    hub.faults.append(Fault("GET .*resolve.*", 403, times=9))
    with pytest.raises(UserError, match="token in use"):
        library.load("mine", hub="team/facts", replace=False)
    hub.faults.clear()
    library.allow_hub, asked = False, len(hub.requests)
    with pytest.raises(NotAllowedError, match="--allow-hub"):
        library.load("mine", hub="team/facts", replace=False)
    assert len(hub.requests) == asked
    assert "mine" not in library.names()


def test_only_what_others_can_use_is_pushed(hub: Hub, exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(exported / ADAPTERS / "facts-prefix", folder)
    _about(folder, base={**json.loads((folder / ABOUT).read_text())["base"], "id": str(tmp_path)})
    with pytest.raises(UserError, match="--base-model USER/NAME"):
        push(folder, "team/mine")
    push(folder, "team/mine", base_model="team/base")
    sent = hub.root / "models" / "team" / "mine" / "main"
    assert json.loads((sent / ABOUT).read_text())["base"]["id"] == "team/base"
    assert "base_model: team/base" in (sent / "README.md").read_text()
    assert str(tmp_path) not in "".join(p.read_text() for p in (sent / ABOUT, sent / "README.md"))
    read_checked(sent, read_record(sent))
    _flip(folder / TENSORS)
    asked = len(hub.requests)
    with pytest.raises(AdapterError, match="is damaged"):
        push(folder, "team/mine", base_model="team/base")
    assert len(hub.requests) == asked
