"""A base that keeps a GGUF file's blocks computes what its float conversion computes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from hypothesis import given
from hypothesis import strategies as st
from test_cli import ptkit, refused
from test_gguf import TOKENS, write
from torch import nn

from ptkit import load_base
from ptkit.data.encoded import EncodedExample
from ptkit.errors import AdapterError, ModelError
from ptkit.families.kinds import used_as
from ptkit.families.matrix import Status, run_matrix
from ptkit.families.model_under_test import real_model
from ptkit.formats.adapter_files import AdapterFiles, read_adapter, write_adapter
from ptkit.formats.adapter_info import AdapterInfo
from ptkit.methods import ADAPTERS, Demonstrations, create_adapter, require_same_base
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.base_model import Base
from ptkit.runtime.block_head import block_head_divergences, block_head_losses
from ptkit.runtime.block_layers import (
    BlockEmbedding,
    BlockLinear,
    row_bytes,
    unpacked,
)
from ptkit.runtime.fused import head_divergences, head_losses
from ptkit.runtime.ggml_types import BLOCKS, NAMES
from ptkit.training.adapter_trainer import Job
from ptkit.training.loop import fit
from ptkit.training.provenance import base_info

KINDS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def both(path: Path, kind: str = "Q4_1", **options: Any) -> tuple[Base, Base]:
    write(path, GGMLQuantizationType[kind], **options)
    return tuple(load_base(str(path), quantize=q) for q in (None, "blocks"))


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**20), rows=st.integers(1, 5), blocks=st.integers(1, 4))
def test_blocks_are_unpacked_to_the_values_ggml_gives_them(
    kind: str, seed: int, rows: int, blocks: int
) -> None:
    from gguf.quants import dequantize

    number = GGMLQuantizationType[kind]
    values = torch.randn(rows, 32 * blocks, generator=torch.Generator().manual_seed(seed))
    packed = quantize(values.numpy(), number)
    theirs = torch.from_numpy(dequantize(packed, number))
    assert packed.shape == (rows, row_bytes(int(number), 32 * blocks))
    assert torch.equal(unpacked(torch.from_numpy(packed), int(number)), theirs)


def test_every_type_with_a_reader_has_a_name_and_a_size() -> None:
    assert NAMES.keys() == BLOCKS.keys()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_those_of_the_float_weights(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    floats, blocks = both(tmp_path / "m.gguf", kind, tied=tied)
    layer = blocks.model.model.layers[0]
    assert isinstance(layer.self_attn.q_proj, BlockLinear)  # whose rows lie in another order
    assert isinstance(blocks.embedding, BlockEmbedding)
    assert layer.mlp.down_proj.weight.dtype == torch.uint8
    assert (blocks.model.lm_head.weight is blocks.embedding.weight) is tied
    ids = torch.randint(0, len(TOKENS), (2, 12))
    found = []
    for base in (floats, blocks):
        read = base.embedding(ids).detach().requires_grad_(True)
        logits = base.model(inputs_embeds=read).logits
        logits.square().mean().backward()
        found.append((logits.detach(), read.grad))
    torch.testing.assert_close(found[1], found[0])
    assert torch.equal(floats.word_vectors, blocks.word_vectors)
    assert floats.parameters == blocks.parameters


def test_a_large_weight_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    floats, blocks = both(tmp_path / "m.gguf")
    torch.manual_seed(0)
    ids = torch.randint(0, len(TOKENS), (2, 12))
    monkeypatch.setattr("ptkit.runtime.block_layers.PIECE", 5 * 64)
    with torch.no_grad():
        # Pieces are summed in another order; rounding reached 1.3e-5.
        torch.testing.assert_close(
            blocks.model(input_ids=ids).logits, floats.model(input_ids=ids).logits,
            atol=1e-4, rtol=1e-4,
        )  # fmt: skip


@pytest.mark.parametrize("piece", [1, 7 * 64, 10**9])
@pytest.mark.parametrize("positions", [1, 4, 1000])
def test_losses_under_a_head_in_blocks_are_those_under_its_values(
    piece: int, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptkit.runtime.block_layers.PIECE", piece)
    monkeypatch.setattr("ptkit.runtime.block_head.POSITIONS", positions)
    torch.manual_seed(0)
    kind = int(GGMLQuantizationType.Q8_0)
    packed = torch.from_numpy(quantize(torch.randn(50, 64).numpy(), GGMLQuantizationType.Q8_0))
    head = BlockLinear(64, 50, kind, bias=True)
    head.weight.data, head.bias.data = packed, torch.randn(50)
    plain = nn.Linear(64, 50)
    plain.weight.data, plain.bias.data = unpacked(packed, kind), head.bias.data.clone()
    plain.requires_grad_(False)
    hidden, wanted = torch.randn(9, 64) * 3, torch.randn(9, 64)
    targets = torch.tensor([0, 49, 7, 7, 13, 14, 20, 21, 22])
    for ours, theirs, second in (
        (block_head_losses, head_losses, targets),
        (block_head_divergences, head_divergences, wanted),
    ):
        found = []
        for loss, of in ((ours, head), (theirs, plain)):
            read = hidden.clone().requires_grad_(True)
            values = loss(of, read, second)
            (values * torch.arange(1, 10)).sum().backward()
            found.append((values.detach(), read.grad))
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=2e-4)


def test_every_property_of_prompts_and_lora_holds_on_it(tmp_path: Path) -> None:
    _, blocks = both(tmp_path / "m.gguf", "Q8_0")
    asked = ["exact", "padding", "checkpointing", "generation", "padded generation", "beams",
             "no cache", "saved", "off"]  # fmt: skip
    cells = list(
        run_matrix(real_model(blocks, used_as(blocks)), ["prefix", "prompt"], properties=asked)
    )
    assert {c.status for c in cells} == {Status.works}, [c for c in cells if c.status != "works"]
    lora = run_matrix(
        real_model(blocks, used_as(blocks)), ["lora"], properties=["checkpointing", "off"]
    )
    assert {c.status for c in lora} == {Status.works}


def test_what_cannot_be_kept_or_trained_says_so(tmp_path: Path) -> None:
    write(tmp_path / "half.gguf", GGMLQuantizationType.F16)
    with pytest.raises(ModelError, match=r"keeps no weight of .*half\.gguf"):
        load_base(str(tmp_path / "half.gguf"), quantize="blocks")
    with pytest.raises(ModelError, match=r"`tiny-en` is none; use nf4 or int8"):
        load_base("tiny-en", quantize="blocks")
    _, blocks = both(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=r"leave `model.quantize` out"):
        create_adapter(ADAPTERS["full"].section_class(kind="full"), blocks, Demonstrations([], 0))


def prefix(base: Base) -> Any:
    section = ADAPTERS["prefix_tuning"].section_class(
        kind="prefix_tuning", num_virtual_tokens=3, start="random"
    )
    return create_adapter(section, base, Demonstrations([], 0))


def made_on(base: Base, folder: Path) -> AdapterFiles:
    """An adapter's files, with what training records of its base."""
    files = prefix(base).files()
    write_adapter(folder, replace(files, info=AdapterInfo(base=base_info(base))))
    return read_adapter(folder)


def test_another_precision_of_the_same_model_is_named_and_another_model_refused(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    floats, blocks = both(tmp_path / "m.gguf", "Q4_1")
    assert (floats.precision, blocks.precision) == ("Q4_1", "Q4_1")
    files = made_on(blocks, tmp_path / "a")
    require_same_base(files, floats, "a")
    assert not recwarn.list
    # The model that the file was rounded from, and it in half precision: other values, other files.
    write(tmp_path / "original.gguf", GGMLQuantizationType.F32)
    original = load_base(str(tmp_path / "original.gguf"))
    assert original.fingerprint != blocks.fingerprint
    with pytest.warns(UserWarning, match="in Q4_1, used on .* in F32: the same model"):
        require_same_base(files, original, "a")
    half = load_base(str(tmp_path / "m.gguf"), dtype="float16")
    assert half.fingerprint == blocks.fingerprint
    with pytest.warns(UserWarning, match="in Q4_1, used on .* in float16"):
        require_same_base(files, half, "a")
    write(tmp_path / "other.gguf", GGMLQuantizationType.Q8_0, seed=1)
    other = load_base(str(tmp_path / "other.gguf"))
    with pytest.raises(AdapterError, match="was made for the base model"):
        require_same_base(files, other, "a")


@pytest.mark.parametrize("trained_by", [0.01, 0.05])
def test_a_finetuned_model_is_another_one(trained_by: float, tmp_path: Path) -> None:
    """Of the same precision, however close; of another, once its norms have moved."""
    base = load_base("tiny-en")
    files = made_on(base, tmp_path / "a")
    torch.manual_seed(0)
    model = copy.deepcopy(base.model)
    for value in model.parameters():
        value.data *= 1 + trained_by * torch.randn_like(value)
    model.save_pretrained(tmp_path / "tuned")
    base.tokenizer.save_pretrained(tmp_path / "tuned")
    for dtype in ("float32", "bfloat16", "float16"):
        tuned = load_base(str(tmp_path / "tuned"), dtype=dtype)
        with pytest.raises(AdapterError, match="was made for the base model"):
            require_same_base(files, tuned, "a")


def test_a_checkpoint_has_one_fingerprint_in_every_type_and_shard(tmp_path: Path) -> None:
    base = load_base("tiny-en")
    base.model.save_pretrained(tmp_path / "m", max_shard_size="2MB")
    base.tokenizer.save_pretrained(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    made = [load_base(str(tmp_path / "m"), dtype=d)
            for d in ("float32", "bfloat16", "float16")]  # fmt: skip
    assert {b.fingerprint for b in made} == {base.fingerprint}
    assert {b.legacy_fingerprint for b in made} == {base.legacy_fingerprint}


def test_adapters_of_earlier_versions_are_recognised(tmp_path: Path) -> None:
    """They recorded a fingerprint of the loaded modules' names."""
    shipped = read_adapter(next(p.parent for p in Path("adapters").rglob("adapter_config.json")))
    assert shipped.info.base.sketch is None
    for dtype in ("float32", "float16"):
        require_same_base(shipped, load_base("tiny-en", dtype=dtype), "shipped")


def test_a_run_in_blocks_that_was_killed_ends_where_it_would_have(tmp_path: Path) -> None:
    """At any step, also between two checkpoints."""
    _, blocks = both(tmp_path / "m.gguf")
    rows = [EncodedExample([2, 3 + i % 5], [4, 5 + i % 7, 0]) for i in range(24)]
    settings = TrainSection(
        steps=6, batch_size=4, eval_every=2, save_every=2, gradient_checkpointing=True
    )

    def trained(run: Path, stop_after: int | None) -> torch.Tensor:
        def told(report: Any) -> None:
            if report.step == stop_after:
                raise KeyboardInterrupt

        torch.manual_seed(0)
        adapter = prefix(blocks)
        job = Job(adapter, rows, rows[:4], settings, 0.1, 0, run, told)
        try:
            fit([job])
            return adapter.flat()
        except KeyboardInterrupt:
            return trained(run, None)
        finally:
            adapter.close()

    whole = trained(tmp_path / "whole", None)
    for step in range(1, 6):
        assert torch.equal(trained(tmp_path / f"killed-{step}", step), whole), step


def test_one_adapter_in_several_precisions_is_one_table(tmp_path: Path) -> None:
    adapter = Path("adapters/routing-prefix").resolve()
    asked = [
        "evaluate",
        "message-routing",
        "-a",
        adapter,
        "--set",
        "task.data.limits.test=6",
        "--set",
        "retention=null",
        "--no-base",
    ]
    kinds = ["float32", "bfloat16", "float16"]
    done = ptkit(*asked, *(w for kind in kinds for w in ("--precision", kind)), cwd=tmp_path)
    assert all(kind in done.stdout for kind in kinds)
    assert "n=6" in done.stdout
    assert "no precision `four`" in refused(*asked, "--precision", "four", cwd=tmp_path)
