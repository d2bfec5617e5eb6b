"""A GGUF file as a base that keeps the file's own blocks: a quarter of the memory and less.

The file's float conversion (`ptkit.runtime.gguf_model`) says what every weight of the model is.
Here each weight is looked up among the file's tensors by its rows. A weight whose rows are a
tensor's, in any order, keeps that tensor's blocks, and is equal to the float weight bit for bit.
That needs no table of names, and it finds what converters do (Llama's queries and keys change the
order of their rows). A weight without such a tensor stays in float32.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ptkit.errors import ModelError
from ptkit.formats import atomic
from ptkit.runtime.block_layers import BlockEmbedding, BlockLinear, unpacked
from ptkit.runtime.ggml_types import BLOCKS

#: `quant_method` in the configuration of what is written here.
METHOD = "ptkit_gguf_blocks"
#: Part of the folder's name; a change of what is written needs another one.
VERSION = 1


def in_blocks(path: Path, floats: Path) -> Path:
    """The folder that holds the model of the GGUF file `path` in its own blocks.

    floats: the folder of its conversion to float32

    It lies beside `floats`, is made when it is not there yet, and appears whole or not at all.
    Raises ModelError for a file that holds no weight in blocks which the model could keep.
    """
    folder = floats.with_name(f"{floats.name}-blocks-{VERSION}")
    if not (folder / "config.json").is_file():
        tensors, kinds = _matched(path, floats)
        with atomic.folder(folder, replace=folder.exists()) as scratch:
            save_file(tensors, scratch / "model.safetensors", {"format": "pt"})
            for file in floats.iterdir():
                if file.suffix != ".safetensors":
                    shutil.copyfile(file, scratch / file.name)
            config = json.loads((floats / "config.json").read_text(encoding="utf-8"))
            config["quantization_config"] = {"quant_method": METHOD, "kinds": kinds}
            atomic.write_json(scratch / "config.json", config)
    return folder


def _matched(path: Path, floats: Path) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors of the model, in blocks where they can be, and the ggml types of those."""
    by_rows: dict[tuple[int, int], tuple[Tensor, int, Tensor]] = {}
    for blocks, kind in _tensors(path):
        marks = _marks(unpacked(blocks, kind))
        by_rows[len(blocks), int(marks.sum())] = (blocks, kind, marks)
    able = _modules_that_can(floats)
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, int] = {}
    with safe_open(floats / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (no mapping: it has no iterator)
            weight = file.get_tensor(name)
            tensors[name] = weight
            if name not in able:
                continue
            marks = _marks(weight)
            found = by_rows.get((len(weight), int(marks.sum())))
            if found is None:
                continue
            blocks, kind, theirs = found
            order = torch.empty_like(marks)
            order[marks.argsort(stable=True)] = theirs.argsort(stable=True)
            blocks = blocks[order].contiguous()
            if torch.equal(unpacked(blocks, kind), weight):
                tensors[name], kinds[name] = blocks, kind
    if not kinds:
        raise ModelError(
            f"`model.quantize: blocks` keeps no weight of {path}: none of its linear layers is "
            "stored in blocks that are read here (GPT-2's are of another kind); leave "
            "`model.quantize` out"
        )
    return tensors, kinds


def _tensors(path: Path) -> list[tuple[Tensor, int]]:
    """The matrices that the file stores in blocks, `[rows, bytes]`, and their types."""
    return [
        (torch.from_numpy(tensor.data.copy()), int(tensor.tensor_type))
        for tensor in GGUFReader(path).tensors
        if int(tensor.tensor_type) in BLOCKS and tensor.data.ndim == 2
    ]


def _marks(weight: Tensor) -> Tensor:
    """A number of each row's values, `[rows]`: equal rows have equal ones, others hardly ever."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(-(2**62), 2**62, (weight.shape[1],), generator=generator) * 2 + 1
    bits = weight.contiguous().view(torch.int32).long()
    return torch.cat([(part * odd).sum(1) for part in bits.split(256)])


def _modules_that_can(floats: Path) -> set[str]:
    """Names of weights of plain linear layers and embeddings: what scales or transposes cannot."""
    config = AutoConfig.from_pretrained(floats)
    kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config)
    plain = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) in (nn.Linear, nn.Embedding)
    }
    return {
        name for name in plain
        if all(t in plain for t, source in _ties(model).items() if source == name)
    }  # fmt: skip


def _ties(model: PreTrainedModel) -> dict[str, str]:
    """Weights that are others': name -> the other's name."""
    ties = model._tied_weights_keys if model.config.get_text_config().tie_word_embeddings else None
    return dict(ties) if isinstance(ties, dict) else {}


@register_quantization_config(METHOD)
class BlocksConfig(QuantizationConfigMixin):
    """kinds: weight -> ggml type of its blocks."""

    def __init__(self, kinds: dict[str, int] | None = None, **_: Any):
        self.quant_method = METHOD  # type: ignore[assignment]  # of other packages: a plain name
        self.kinds = kinds or {}


@register_quantizer(METHOD)
class BlocksQuantizer(HfQuantizer):
    """Lets transformers load what `in_blocks` wrote: layers that hold blocks in place of floats."""

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **_: Any
    ) -> PreTrainedModel:
        assert isinstance(self.quantization_config, BlocksConfig)
        kinds = dict(self.quantization_config.kinds)
        kinds |= {t: kinds[s] for t, s in _ties(model).items() if s in kinds and t not in kinds}
        dtype = model.dtype
        for name, kind in kinds.items():
            path = name.removesuffix(".weight")
            module = model.get_submodule(path)
            with torch.device("meta"):
                if isinstance(module, nn.Embedding):
                    new: nn.Module = BlockEmbedding(
                        module.num_embeddings, module.embedding_dim, kind, dtype
                    )
                else:
                    assert isinstance(module, nn.Linear)
                    new = BlockLinear(
                        module.in_features, module.out_features, kind, bias=module.bias is not None
                    )
            model.set_submodule(path, new)
        return model

    def is_serializable(self) -> bool:
        """Whether `save_pretrained` writes it: not as transformers would read it elsewhere."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on it."""
        return True
