"""Files both ways with PEFT, and damaged, unsafe or foreign files refused."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from pathlib import Path

import forked
import pytest
import torch
from conftest import random_base, random_model
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from test_cli import ptkit
from test_peft_parity import LEARNT, make_adapter, rows_of

from ptkit.errors import AdapterError, UserError
from ptkit.formats import atomic
from ptkit.formats.adapter_files import (
    AdapterFiles,
    read_adapter,
    write_adapter,
)
from ptkit.formats.adapter_info import AdapterInfo, BaseInfo
from ptkit.formats.fingerprint import of_loaded
from ptkit.methods import (
    ADAPTERS,
    Demonstrations,
    adapter_from_files,
    compile_files,
    require_same_base,
)
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import all_logits

IDS = torch.tensor(rows_of([9, 9]))


def logits_of(adapter) -> torch.Tensor:
    prefix = adapter.prefix()
    batch = None if prefix is None else PrefixBatch.shared(prefix.detach(), len(IDS))
    with torch.no_grad():
        return all_logits(adapter.model, IDS, torch.ones_like(IDS), batch)


def lora_adapter(base: Base, target_modules: str | list[str] = "all-linear"):
    cls = ADAPTERS["lora"]
    adapter = cls.create(
        cls.section_class(kind="lora", rank=2, target_modules=target_modules),
        base,
        Demonstrations((), 0),
    )
    with torch.no_grad():  # B starts at zero, which would prove nothing
        for parameter in adapter.trainable().values():
            parameter.normal_(std=0.3)
    return adapter


WITHOUT_PTKIT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from safetensors.torch import load_file, save_file
base, adapter, ids, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
ids = load_file(ids)["ids"]
with torch.no_grad():
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1]:]
save_file({"logits": logits.contiguous()}, out)
assert not any(name.startswith("ptkit") for name in sys.modules)
"""


def test_plain_peft_in_another_process_gives_the_same_logits(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    for name in ("prefix-mlp", "prompt", "p-tuning-lstm", "lora"):
        torch.manual_seed(8)
        base = random_base("llama")
        base.model.save_pretrained(tmp_path / "base")
        adapter = lora_adapter(base) if name == "lora" else make_adapter(base, LEARNT[name])
        write_adapter(tmp_path / name, adapter.files())
        forked.run(
            [
                sys.executable, "-c", WITHOUT_PTKIT, str(tmp_path / "base"), str(tmp_path / name),
                str(tmp_path / "ids.safetensors"), str(tmp_path / "out.safetensors"),
            ],
            check=True, env={**os.environ, forked.WITHOUT_PTKIT: "1"},
        )  # fmt: skip
        theirs = load_file(tmp_path / "out.safetensors")["logits"]
        torch.testing.assert_close(theirs, logits_of(adapter), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", LEARNT)
def test_what_is_written_plain_peft_loads(family: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(8)
    adapter = make_adapter(random_base(family), LEARNT[method])
    write_adapter(tmp_path / "adapter", adapter.files())
    theirs = PeftModel.from_pretrained(random_model(family), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        logits = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(logits[:, -IDS.shape[1] :], logits_of(adapter), atol=1e-5, rtol=1e-5)


PEFT_CONFIGS = {
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix-mlp": PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=24
    ),
    "prompt": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=24
    ),
    "lora": LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False,
                       target_modules="all-linear"),
}  # fmt: skip


@pytest.mark.parametrize("method", PEFT_CONFIGS)
def test_what_peft_saved_ptkit_loads(family: str, method: str, tmp_path: Path) -> None:
    import copy

    torch.manual_seed(9)
    theirs = get_peft_model(random_model(family), copy.deepcopy(PEFT_CONFIGS[method])).eval()
    theirs.save_pretrained(str(tmp_path))
    with torch.no_grad():
        expected = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    base = random_base(family)
    adapter = adapter_from_files(read_adapter(tmp_path), base)
    torch.testing.assert_close(
        logits_of(adapter), expected[:, -IDS.shape[1] :], atol=1e-5, rtol=1e-5
    )
    before = base.model(input_ids=IDS).logits if method != "lora" else None
    adapter.close()
    if before is not None:
        assert torch.equal(base.model(input_ids=IDS).logits, before)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapter = make_adapter(random_base("llama"), LEARNT["prefix"])
    write_adapter(tmp_path / "saved", adapter.files())
    return tmp_path / "saved"


def test_truncated_safetensors_are_refused(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for keep in (0, 4, 50, len(whole) - 1):
        weights.write_bytes(whole[:keep])
        with pytest.raises(AdapterError, match="damaged"):
            read_adapter(saved)


def test_pickle_only_folder_is_refused_unread(saved: Path) -> None:
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(AdapterError, match=r"pickled weights \(adapter_model.bin\)"):
        read_adapter(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(saved: Path, value: float) -> None:
    files = read_adapter(saved)
    files.tensors["prompt_embeddings"][2, 3] = value
    write_adapter(saved, files, replace=True)
    with pytest.raises(AdapterError, match="not finite"):
        read_adapter(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[]", "JSON object"), ("{}", "peft_type"), (None, "is missing")],
)
def test_bad_config_is_refused(saved: Path, content: str | None, message: str) -> None:
    config = saved / "adapter_config.json"
    config.unlink() if content is None else config.write_text(content)
    with pytest.raises(AdapterError, match=message):
        read_adapter(saved)


def test_prefix_of_another_shape_is_refused(saved: Path) -> None:
    with pytest.raises(AdapterError, match="another shape"):
        adapter_from_files(read_adapter(saved), random_base("gpt2"))


def test_same_shape_but_other_weights_is_refused_by_fingerprint(saved: Path) -> None:
    files = read_adapter(saved)
    made_for = random_base("llama", seed=0)
    info = AdapterInfo(base=BaseInfo(id="random-llama-0", fingerprint=made_for.fingerprint))
    named = AdapterFiles(files.config, files.tensors, info)
    require_same_base(named, made_for, "it")
    with pytest.raises(AdapterError, match=r"random-llama-0.*random-llama-1"):
        require_same_base(named, random_base("llama", seed=1), "it")


def test_fingerprint_survives_loading_in_bfloat16() -> None:
    model = random_model("qwen3")
    expected = of_loaded(model)
    assert of_loaded(model.bfloat16()) == expected
    assert of_loaded(model.bfloat16().float()) == expected


def test_fingerprint_reaches_the_end_of_a_table_larger_than_float32_can_count() -> None:
    table = torch.nn.Embedding.from_pretrained(torch.zeros(2**24 // 64 + 3, 64))
    before = of_loaded(table)
    table.weight.data[-1, -1] = 1.0
    assert of_loaded(table) != before


def test_unknown_peft_type_names_the_known_ones(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "XLORA"}))
    with pytest.raises(AdapterError, match=r"XLORA.*PREFIX_TUNING"):
        adapter_from_files(read_adapter(saved), random_base("llama"))


def test_existing_folder_is_kept_unless_replaced(saved: Path) -> None:
    files = read_adapter(saved)
    with pytest.raises(UserError, match="exists"):
        write_adapter(saved, files)
    write_adapter(saved, files, replace=True)
    assert read_adapter(saved).tensors.keys() == files.tensors.keys()


def test_a_failed_write_leaves_nothing_behind(saved: Path) -> None:
    def fails() -> None:
        with atomic.folder(saved, replace=True) as scratch:
            (scratch / "part").write_text("half")
            raise OSError(28, "No space left on device")

    before = {p: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(OSError, match="No space"):
        fails()
    assert {p: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]
    with pytest.raises(TypeError):
        atomic.write_json(saved / "x.json", object())
    assert not (saved / "x.json").exists()


def test_embeddings_too_large_for_the_base_are_refused() -> None:
    """Finite in the file, as a flipped bit leaves them, and not finite once the base has read."""
    base = random_base("gpt2")
    files = make_adapter(base, LEARNT["prompt"]).files()
    files.tensors["prompt_embeddings"][0, 0] = 3e38
    with pytest.raises(AdapterError, match="what it makes of it is not finite"):
        compile_files(files, base)


def with_tensor_of(saved: Path, dtype: str, bits: int, values: int) -> None:
    """Let the weights' file hold one tensor of `values` values of a type of `bits` each."""
    size = values * bits // 8
    header = {"prompt_embeddings": {"dtype": dtype, "shape": [values // 64, 64],
                                    "data_offsets": [0, size]}}  # fmt: skip
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (saved / "adapter_model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + b"\x11" * size
    )


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6)])
def test_floats_that_share_a_byte_are_refused_and_others_still_reported(
    dtype: str, bits: int, tmp_path: Path
) -> None:
    folder = tmp_path / "adapters"
    shipped = Path(__file__).resolve().parents[1] / "adapters"
    shutil.copytree(shipped / "facts-prefix", folder / "zz-good")
    shutil.copytree(folder / "zz-good", folder / "bad")
    with_tensor_of(folder / "bad", dtype, bits, 640)
    with pytest.raises(AdapterError, match=f"`prompt_embeddings` holds {dtype} values"):
        read_adapter(folder / "bad")
    done = ptkit("bank", "verify", folder, "--json", cwd=tmp_path, code=2)
    reported = {r["adapter"]: r for r in map(json.loads, done.stdout.splitlines())}
    assert reported["zz-good"]["ok"]
    assert dtype in reported["bad"]["fault"]


def test_what_was_read_does_not_change_with_its_file(saved: Path) -> None:
    """A file that is written over in place, as `cp` and `rsync --inplace` do."""
    tensors = read_adapter(saved).tensors
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    weights = saved / "adapter_model.safetensors"
    content = weights.read_bytes()
    with weights.open("r+b") as file:
        file.seek(len(content) // 2)
        file.write(b"\x7f" * (len(content) - len(content) // 2))
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name])
