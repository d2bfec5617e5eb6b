"""GGUF files as base models: read once by transformers, kept in its own format from then on.

A file's weights are rounded in blocks. transformers unpacks them into float32. The result is
written to the cache under the SHA-256 of the file, so the same content is converted once, wherever
the file is. Values are those of the file, bit for bit.
"""

from __future__ import annotations

import glob
import json
import os
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from gguf import GGUFReader
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from ptkit.errors import ModelError
from ptkit.formats import atomic
from ptkit.formats.adapter_folder import sha256
from ptkit.formats.cache_home import cache_home

try:
    from transformers.integrations.gguf.reader import read_gguf_metadata
    from transformers.integrations.gguf.utils import GGUF_ARCHS
except ModuleNotFoundError:  # older releases read the architectures above alone, through `gguf`
    read_gguf_metadata = None  # type: ignore[assignment]
    GGUF_ARCHS = {}

SUFFIX = ".gguf"
#: Part of a conversion's name in the cache; a change of what is written needs another one.
CONVERTER = 2
#: What a conversion's folder says of the file.
_ABOUT = "gguf.json"
#: Sections of transformers' table that are no architectures.
_NOT_ARCHITECTURES = {"general", "tokenizer"}

#: How texts are split before byte pairs are merged, where transformers' reading of the file does
#: not ask for `tokenizer.ggml.pre`. The patterns are those of the models' own tokenizer files.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _digits_apart() -> PreTokenizer:
    return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])


def _by_pattern(digits: str) -> PreTokenizer:
    pattern = Regex(_CL100K.replace("{DIGITS}", digits))
    return Sequence(
        [Split(pattern, "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )


_SPLITS = {
    "smollm": _digits_apart,
    "starcoder": _digits_apart,
    "refact": _digits_apart,
    "command-r": _digits_apart,
    "llama-bpe": lambda: _by_pattern("{1,3}"),
    "qwen2": lambda: _by_pattern(""),
}


def is_gguf(id: str) -> bool:
    """Whether a recipe's `model.id` names a GGUF file."""
    return id.lower().endswith(SUFFIX)


def known_architectures() -> list[str]:
    """The architectures of GGUF files that transformers reads."""
    return sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_ARCHS} - _NOT_ARCHITECTURES)


def gguf_file(id: str, revision: str | None = None) -> Path:
    """The file that `id` names: a path, or `user/repo/file.gguf` on the Hub (fetched).

    Raises ModelError where there is none.
    """
    path = Path(id).expanduser()
    if path.is_file():
        return path
    parts = id.split("/")
    if id.startswith((".", "/", "~")) or len(parts) < 3:
        raise ModelError(
            f"cannot load the base model `{id}`: no such file (a file on the hub is named "
            "`user/repo/model.gguf`)"
        )
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:]), revision=revision))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"cannot fetch the base model `{id}`: {(str(error).splitlines() or [''])[0]}"
        ) from error


def converted(path: Path, folder: Path | None = None) -> Path:
    """The folder that holds the model of the GGUF file `path` in transformers' format.

    folder: where to keep it, its name ending in `-CONVERTER`; default: in the cache, under the
        SHA-256 of the file

    It is made when it is not there yet, and appears whole or not at all. Then those that an earlier
    converter made of the file are deleted. Raises ModelError for a file that is damaged, or of an
    architecture that transformers does not read.
    """
    _require_readable(path)
    if folder is None:
        folder = cache_home() / "models" / "gguf" / f"{sha256(path)[:32]}-{CONVERTER}"
    if not (folder / "config.json").is_file() or _earlier(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Others wait, and find it made. The lock of a process that was killed is free at once.
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not (folder / "config.json").is_file():
                model, tokenizer = _read(path)
                with atomic.folder(folder, replace=folder.exists()) as scratch:
                    _write(model, tokenizer, scratch)
                    atomic.write_json(scratch / _ABOUT, {"stored": _commonest_type(path)})
            for other in _earlier(folder):
                with atomic.scratch(other) as gone:  # moved first: no reader finds a part of it
                    os.replace(other, gone / "earlier")
    return folder


def _earlier(folder: Path) -> list[Path]:
    """Conversions of the same file by earlier converters, which this version never reads."""
    stem, _, number = folder.name.rpartition("-")
    if not number.isdecimal():
        return []
    return [
        other
        for other in folder.parent.glob(f"{glob.escape(stem)}-*")
        if (version := other.name.removeprefix(f"{stem}-")).isdecimal()
        and int(version) < int(number)
        and other.is_dir()
    ]


def stored_type(folder: Path) -> str:
    """The ggml type that most values of the file were in which `folder` is a conversion of: `Q4_1`,
    `F16`."""
    return str(json.loads((folder / _ABOUT).read_text(encoding="utf-8"))["stored"])


def _commonest_type(path: Path) -> str:
    counts: Counter[str] = Counter()
    for tensor in GGUFReader(path).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return counts.most_common(1)[0][0]


def _metadata(path: Path) -> dict[str, Any]:
    """The file's metadata by key, at least what is a text or a number."""
    if read_gguf_metadata is not None:
        return read_gguf_metadata(str(path))[0]
    fields = GGUFReader(path).fields.items()
    return {key: field.contents() for key, field in fields if "ARRAY" not in str(field.types)}


def _require_readable(path: Path) -> dict[str, Any]:
    """The file's metadata. Raises ModelError where transformers cannot read such a file."""
    try:
        metadata = _metadata(path)
    except (ValueError, struct.error, UnicodeDecodeError, KeyError, IndexError) as error:
        raise ModelError(
            f"{path} is not a whole GGUF file ({error or type(error).__name__})"
        ) from error
    architecture = metadata["general.architecture"]
    # transformers looks for the names of some families anywhere in the file's.
    known = known_architectures()
    plain = architecture.replace("-", "_")
    if not ({architecture, plain} & {*known} or plain.replace("moe", "_moe") in known):
        raise ModelError(
            f"{path} holds a model of architecture `{architecture}`, which transformers does not "
            f"read from GGUF; it reads {', '.join(known)}. Use the model's safetensors instead"
        )
    return metadata


def _read(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    source: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    folder = str(path.parent)
    try:
        config = AutoConfig.from_pretrained(folder, **source)
        kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model, found = kind.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **source
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **source)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"cannot read the GGUF file {path}: {first}") from error
    if found["missing_keys"]:
        raise ModelError(
            f"{path} lacks weights of {type(model).__name__}: "
            + ", ".join(sorted(found["missing_keys"])[:5])
        )
    _split_as_trained(tokenizer, path)
    _end_as_trained(tokenizer, path)
    return model, tokenizer


def _split_as_trained(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Let `tokenizer` split texts as the file's `tokenizer.ggml.pre` says.

    transformers 5.23 gives byte-level BPE GPT-2's pattern whatever the file says: SmolLM2's reads
    two spaces before a digit as two tokens, where the model was trained with one.
    """
    metadata = _metadata(path)
    split = _SPLITS.get(metadata.get("tokenizer.ggml.pre", ""))
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if split is not None and backend is not None and metadata["tokenizer.ggml.model"] == "gpt2":
        backend.pre_tokenizer = split()


def _end_as_trained(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Let texts begin and end with the tokens that the file names: transformers 5.16 takes one of
    its own table for the end."""
    metadata = _metadata(path)
    for name in ("bos", "eos"):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and getattr(tokenizer, f"{name}_token_id") != number:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(number)))


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    # `save_pretrained` of a model that was read from GGUF raises (it is taken for a packed one).
    config = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    config["architectures"] = [type(model).__name__]
    tied: dict[int, str] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tied.setdefault(tensor.data_ptr(), name) == name:
            tensors[name] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
