"""A GGUF file is a base model: its values, texts and ties are those of the file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from transformers import AutoModelForCausalLM

from ptkit.errors import ModelError
from ptkit.runtime import gguf_model, named_models
from ptkit.runtime.base_model import load_base
from ptkit.runtime.gguf_model import converted, known_architectures

HIDDEN, HEADS, KV_HEADS, WIDTH, LAYERS = 64, 4, 2, 96, 2
#: Bytes as GPT-2 writes them, a space, and pairs that only digits kept apart prevent.
LETTERS = [chr(c) for c in range(33, 127)]
TOKENS = ["<end>", "<start>", *LETTERS, "Ġ", "ĠĠ", "Ċ", "12", "Ġ1", "Ġa"]
MERGES = ["Ġ Ġ", "1 2", "Ġ 1", "Ġ a"]


def write(path: Path, kind: GGMLQuantizationType, *, pre: str = "smollm", arch: str = "llama",
          leave_out: str = "", tied: bool = True, seed: int = 0,
          more: Mapping[str, tuple[int, ...]] | None = None, head: int = HIDDEN // HEADS,
          ) -> dict[str, np.ndarray]:  # fmt: skip
    """A small random Llama as GGUF; the values its tensors have once they are unpacked.

    more: tensors that each layer has, too, with their shapes; head: width of a head
    """
    random = np.random.default_rng(seed)
    writer = GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_rope_dimension_count(head)
    if head * HEADS != HIDDEN:
        writer.add_key_length(head)
        writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}<start>{{ m.content }}{% endfor %}")
    wide, small = head * HEADS, head * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(TOKENS), HIDDEN), "output_norm.weight": (HIDDEN,),
    }  # fmt: skip
    if not tied:
        shapes["output.weight"] = (len(TOKENS), HIDDEN)
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (wide, HIDDEN),
                "attn_k": (small, HIDDEN), "attn_v": (small, HIDDEN),
                "attn_output": (HIDDEN, wide), "ffn_gate": (WIDTH, HIDDEN),
                "ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH),
            }.items()
        }  # fmt: skip
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in (more or {}).items()}
    values = {}
    for name, shape in shapes.items():
        tensor = (random.normal(size=shape) * 0.2).astype(np.float32)
        if len(shape) == 1:
            tensor = tensor + np.float32(1)
            writer.add_tensor(name, tensor) if name != leave_out else None
        elif kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            tensor = tensor.astype(np.float16 if kind is GGMLQuantizationType.F16 else np.float32)
            writer.add_tensor(name, tensor) if name != leave_out else None
        else:
            blocks = quantize(tensor, kind)
            if name != leave_out:
                writer.add_tensor(name, blocks, raw_dtype=kind)
            tensor = dequantize(blocks, kind)
        values[name] = tensor.astype(np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def base_at(path: Path) -> Any:
    return load_base(str(path))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_logits_are_those_of_transformers_own_loading(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    values = write(path, GGMLQuantizationType[kind])
    base = base_at(path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    ).eval()
    ids = torch.randint(0, len(TOKENS), (2, 12))
    with torch.no_grad():
        assert torch.equal(base.model(input_ids=ids).logits, theirs(input_ids=ids).logits)
    embedding = base.embedding.weight.numpy()
    np.testing.assert_array_equal(embedding, values["token_embd.weight"])
    gate = base.model.model.layers[1].mlp.gate_proj.weight.numpy()
    np.testing.assert_array_equal(gate, values["blk.1.ffn_gate.weight"])
    assert base.model.config.rope_parameters["rope_theta"] == 5000.0


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_where_the_file_has_none(tied: bool, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", GGMLQuantizationType.Q8_0, tied=tied)
    model = base_at(tmp_path / "m.gguf").model
    same = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert same is tied


def test_texts_are_split_as_the_file_says(tmp_path: Path) -> None:
    """`tokenizer.ggml.pre: smollm` keeps digits apart from each other and from spaces."""
    write(tmp_path / "m.gguf", GGMLQuantizationType.Q8_0)
    write(tmp_path / "gpt.gguf", GGMLQuantizationType.Q8_0, pre="gpt-2")
    digits = base_at(tmp_path / "m.gguf").tokenizer
    assert digits.tokenize("a  12 a") == ["a", "ĠĠ", "1", "2", "Ġa"]
    gpt = base_at(tmp_path / "gpt.gguf").tokenizer
    assert gpt.tokenize("a  12 a") == ["a", "Ġ", "Ġ", "12", "Ġa"]
    assert (digits.eos_token_id, digits.bos_token_id) == (0, 1)
    assert digits.apply_chat_template([{"content": "a"}], tokenize=False) == "<start>a"


def test_a_file_is_converted_once_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.gguf", GGMLQuantizationType.Q8_0)
    folder = converted(tmp_path / "m.gguf")
    (tmp_path / "elsewhere.gguf").write_bytes((tmp_path / "m.gguf").read_bytes())
    monkeypatch.setattr(gguf_model, "_read", lambda _: pytest.fail("read a second time"))
    assert converted(tmp_path / "elsewhere.gguf") == folder


@pytest.mark.parametrize("made", [False, True])
def test_conversions_of_earlier_versions_are_deleted_and_no_others(
    made: bool, tmp_path: Path
) -> None:
    write(tmp_path / "m.gguf", GGMLQuantizationType.Q8_0)
    home = tmp_path / "cache"
    if made:
        converted(tmp_path / "m.gguf", home / "transformers-12")
    kept = ("transformers-13", "transformers-next", "other-1", "transformers-x-1")
    for name in ("transformers-1", "transformers-2", *kept):
        (home / name).mkdir(parents=True)
        (home / name / "model.safetensors").write_bytes(b"weights")
    folder = converted(tmp_path / "m.gguf", home / "transformers-12")
    found = {p.name for p in home.iterdir() if p.suffix != ".lock"}
    assert found == {"transformers-12", *kept}
    assert (folder / "config.json").is_file()


def test_an_earlier_conversion_stays_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.gguf", GGMLQuantizationType.Q8_0)
    (tmp_path / "out-1").mkdir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_model, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        converted(tmp_path / "m.gguf", tmp_path / "out-2")
    assert {p.name for p in tmp_path.iterdir() if p.suffix != ".lock"} == {"m.gguf", "out-1"}


def test_a_conversion_that_is_killed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.gguf", GGMLQuantizationType.Q8_0)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_model, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            converted(tmp_path / "m.gguf", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if p.suffix != ".lock"] == ["m.gguf"]
    assert (converted(tmp_path / "m.gguf", tmp_path / "out") / "config.json").is_file()


def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "other.gguf", GGMLQuantizationType.F32, arch="rwkv6")
    with pytest.raises(ModelError, match=r"architecture `rwkv6`.*it reads .*llama.*qwen2"):
        base_at(tmp_path / "other.gguf")
    (tmp_path / "text.gguf").write_text("no model at all")
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        base_at(tmp_path / "text.gguf")
    with pytest.raises(ModelError, match=r"no such file.*user/repo/model\.gguf"):
        base_at(tmp_path / "absent.gguf")
    write(tmp_path / "part.gguf", GGMLQuantizationType.Q8_0, leave_out="blk.1.ffn_up.weight")
    with pytest.raises(ModelError, match=r"lacks weights of LlamaForCausalLM: .*1\.mlp\.up_proj"):
        base_at(tmp_path / "part.gguf")


def test_every_architecture_named_is_one_transformers_has() -> None:
    known = known_architectures()
    assert {"llama", "qwen2", "gemma3", "phi3", "gpt2"} <= {*known}
    assert not {"general", "tokenizer"} & {*known}


def test_a_known_model_that_is_not_here_names_the_line_that_fetches_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PTKIT_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="ptkit models get smollm2-135m"):
        load_base("smollm2-135m")
    with pytest.raises(ModelError, match="needs no download"):
        named_models.fetch("tiny-en")
    with pytest.raises(ModelError, match=r"did you mean .?smollm2-135m"):
        named_models.fetch("smolm2-135m")


def test_smollm2_is_the_model_its_makers_describe(smollm2: Path) -> None:
    """Facts of the original's config and tokenizer files, which are on the Hub."""
    base = load_base("smollm2-135m")
    config = base.model.config
    assert base.parameters == 134_515_008
    assert config.rope_parameters["rope_theta"] == 100_000
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    assert config.tie_word_embeddings
    assert config.max_position_embeddings == 8192
    words = base.tokenizer.convert_ids_to_tokens(base.tokenizer("Hello  12 345").input_ids)
    assert words == ["Hello", "ĠĠ", "1", "2", "Ġ", "3", "4", "5"]
    assert base.tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    ).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
