"""An adapter on disk, in PEFT's layout: `adapter_model.safetensors` + `adapter_config.json`.

`ptkit.json` beside them records what PEFT has no place for: a fingerprint of the base, the
method, scores, versions (`ptkit.formats.adapter_info`). `recipe.yaml` is how it was made, and
`README.md` its card. Adapters without them (made by plain PEFT) are read as well.

Files come from strangers: only regular files of bounded size are opened, and every fault of
their contents is an AdapterError.
"""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats import atomic
from ptkit.formats.adapter_info import ADAPTER_INFO, AdapterInfo, WeightsInfo
from ptkit.formats.int8 import dequantised, quantised

WEIGHTS = "adapter_model.safetensors"
#: Weights PEFT does not read (see `ptkit.formats.int8`), in place of `WEIGHTS`.
INT8_WEIGHTS = "adapter_model.int8.safetensors"
CONFIG = "adapter_config.json"
INFO = "ptkit.json"
RECIPE = "recipe.yaml"
CARD = "README.md"
#: Everything an adapter folder may hold that ptkit reads.
ADAPTER_FILES = (CONFIG, WEIGHTS, INT8_WEIGHTS, INFO, RECIPE, CARD)

#: No adapter's settings come near these; what does is refused before it is read.
MAX_JSON_BYTES = 4_000_000
MAX_HEADER_BYTES = 4_000_000
#: safetensors' names of floats that share a byte; torch has no arithmetic for them.
_PACKED = ("F4", "F6")
#: Serialisations that can run code when read. They are named in the refusal, never opened.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
#: PEFT's pickled weights, all that there were up to its version 0.6.
PICKLED_WEIGHTS = "adapter_model.bin"
#: What an adapter is said to be that another library made.
ADAPTERHUBS = (
    "is an adapter of AdapterHub's `adapters`; `ptkit import` writes it in PEFT's layout, where "
    "that holds what it is"
)
#: How pickled weights are called that a library opens without being asked for them by name.
_OPENED = ("adapter_model", "pytorch_model")


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter folder holds.

    config: PEFT's `adapter_config.json`
    tensors: the trained parameters only
    info: what `ptkit.json` says, nothing for adapters made by plain PEFT
    texts: other files by name: the recipe, the card
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    info: AdapterInfo = field(default_factory=AdapterInfo)
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def peft_type(self) -> str:
        """PEFT's name of the method, `PREFIX_TUNING` for example."""
        return str(self.config.get("peft_type"))

    @property
    def base_id(self) -> str | None:
        """Id of the base model the adapter names."""
        return base_id(self.config, self.info)

    def to(self, dtype: torch.dtype) -> AdapterFiles:
        """The same adapter with floating tensors in `dtype`."""
        tensors = {
            name: t.to(dtype) if t.is_floating_point() else t for name, t in self.tensors.items()
        }
        return replace(self, tensors=tensors)


def is_pickle(name: str) -> bool:
    """Whether a file of this name can run code when it is read."""
    return name.endswith(PICKLES)


def is_pickled_weights(name: str) -> bool:
    """Whether it is a pickle that PEFT or transformers open in search of weights. Others, such as
    a Trainer's `training_args.bin`, lie there until somebody opens them by name."""
    return is_pickle(name) and name.rpartition("/")[2].startswith(_OPENED)


def conversion(source: str | Path) -> str:
    """The command that converts PEFT's pickled weights in the folder or repository `source` without
    running code of theirs."""
    here = Path(str(source).partition("@")[0]).name
    return shlex.join(["ptkit", "import", str(source), "--out", f"{here}-safetensors"])


def adapter_folders(folder: Path) -> list[Path]:
    """The adapter folders directly below `folder`, by name. Raises AdapterError without it."""
    if not folder.is_dir():
        raise AdapterError(f"no such folder of adapters: {folder}")
    atomic.settle_all(folder)
    return sorted(path for path in folder.iterdir() if (path / CONFIG).is_file())


def adapters_below(path: Path) -> list[str]:
    """Names of the adapter folders in `path`, as PEFT saves several adapters of one model."""
    return [folder.name for folder in adapter_folders(path)] if path.is_dir() else []


def write_adapter(
    path: Path, files: AdapterFiles, *, replace: bool = False, int8: bool = False
) -> None:
    """Write `files` to the folder `path`; it appears complete or not at all.

    int8: store the weights as 8-bit integers, which ptkit reads and PEFT does not
    """
    tensors = quantised(files.tensors) if int8 else files.tensors
    name = INT8_WEIGHTS if int8 else WEIGHTS
    with atomic.folder(path, replace=replace) as scratch:
        contiguous = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
        save_file(contiguous, scratch / name, metadata={"format": "pt"})
        atomic.write_json(scratch / CONFIG, files.config)
        if not files.info.empty:
            digest = WeightsInfo(file=name, sha256=sha256(scratch / name))
            info = files.info.updated(weights=digest)
            atomic.write_json(scratch / INFO, ADAPTER_INFO.as_file(info))
        for text_name, text in files.texts.items():
            atomic.write_text(scratch / text_name, text)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_path(path: Path) -> Path:
    """The weights' file of the adapter folder `path`: PEFT's, else ptkit's int8 (there or not)."""
    int8 = path / INT8_WEIGHTS
    return int8 if int8.is_file() and not (path / WEIGHTS).exists() else path / WEIGHTS


def read_adapter(path: Path) -> AdapterFiles:
    """Read an adapter folder.

    Raises AdapterError when the folder, a file or a field is missing, or the only weights are a
    pickle. Raises it, too, when the safetensors file is damaged or a value is not finite.
    """
    atomic.settle(path)
    if not path.is_dir():
        raise AdapterError(f"{path} is not an adapter folder (no such directory)")
    return AdapterFiles(read_config(path), _read_tensors(path), read_info(path))


def read_config(path: Path) -> dict[str, Any]:
    """PEFT's `adapter_config.json` in the folder `path`. Raises AdapterError when it is not one."""
    config = _read_json(path / CONFIG)
    if config is None:
        raise AdapterError(
            f"{path / CONFIG} is missing; an adapter folder holds {CONFIG} and {WEIGHTS}"
        )
    if not isinstance(config.get("peft_type"), str):
        if is_adapterhubs(path):
            raise AdapterError(f"{path} {ADAPTERHUBS}")
        raise AdapterError(f"{path / CONFIG}: `peft_type` is missing; this is not a PEFT adapter")
    return config


def is_adapterhubs(path: Path) -> bool:
    """Whether the folder `path` is an adapter of AdapterHub's `adapters`, whose settings have the
    name of PEFT's file."""
    config = _read_json(path / CONFIG) or {}
    return "peft_type" not in config and isinstance(config.get("config"), dict | str) and (
        "model_type" in config or "model_class" in config
    )  # fmt: skip


def read_info(path: Path) -> AdapterInfo:
    """What `ptkit.json` in the folder `path` says, brought up to date; nothing where there is none.

    Raises AdapterError where it is damaged, or of a newer version.
    """
    values = _read_json(path / INFO)
    return AdapterInfo() if values is None else ADAPTER_INFO.read(values, path / INFO)


def read_texts(path: Path) -> dict[str, str]:
    """The recipe and the card in the folder `path`, where they are there."""
    texts = {name: _read_bytes(path / name) for name in (RECIPE, CARD)}
    try:
        return {name: content.decode() for name, content in texts.items() if content is not None}
    except UnicodeDecodeError as error:
        raise AdapterError(f"{path}: the recipe or the card is not UTF-8 text") from error


def base_id(config: dict[str, Any], info: AdapterInfo) -> str | None:
    """Id of the base model an adapter names: in ptkit's record, else in PEFT's settings."""
    named = info.base.id or config.get("base_model_name_or_path")
    return named if isinstance(named, str) else None


def base_revision(config: dict[str, Any], info: AdapterInfo) -> str | None:
    """The base's revision an adapter was made on: in ptkit's record, else in PEFT's settings.

    Each belongs to the base that is named beside it: PEFT's is not asked where ptkit's record
    names the base.
    """
    found = info.base.revision if info.base.id else config.get("revision")
    return found if isinstance(found, str) else None


def read_dtypes(path: Path) -> set[str]:
    """Names of the tensors' dtypes (safetensors': `F32`, `BF16`), from the file's header alone.

    Raises AdapterError as `read_adapter` does.
    """
    with _opened(path) as weights:
        return {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118


def _read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`, None when there is no such file."""
    content = _read_bytes(path)
    if content is None:
        return None
    value = _json(content, path)
    if not isinstance(value, dict):
        raise AdapterError(f"{path} should hold a JSON object, found {type(value).__name__}")
    return value


def _json(content: bytes, path: Path) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("a key is given twice")
        return dict(pairs)

    try:
        return json.loads(content, object_pairs_hook=once)
    except RecursionError:
        raise AdapterError(f"{path} is not valid JSON (nested too deeply)") from None
    except ValueError as error:  # malformed, not UTF-8, or a key given twice
        raise AdapterError(f"{path} is not valid JSON ({error})") from error


def _read_bytes(path: Path) -> bytes | None:
    """A small file's content, None when there is no such file."""
    size = _size(path)
    if size is None:
        return None
    if size > MAX_JSON_BYTES:
        raise AdapterError(f"{path} has {size:,} bytes, more than any adapter needs")
    return path.read_bytes()


def _size(path: Path) -> int | None:
    """Bytes of a regular file, None when there is none. Raises AdapterError for anything else:
    reading a device or a pipe might never end."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # a loop of links, a name too long
        raise AdapterError(f"{path} cannot be opened ({error.strerror})") from error
    if not stat.S_ISREG(found.st_mode):
        raise AdapterError(f"{path} is not a regular file")
    return found.st_size


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The folder's safetensors file, open. Raises AdapterError when it is missing or damaged."""
    weights = weights_path(path)
    if _size(weights) is None:
        pickles = [p.name for p in sorted(path.iterdir()) if p.suffix in PICKLES]
        if pickles:
            way = "ask its author for safetensors"
            if PICKLED_WEIGHTS in pickles:
                way = f"this converts them without running any:\n{conversion(path)}"
            raise AdapterError(
                f"{path} holds only pickled weights ({', '.join(pickles)}), which can run code "
                f"when read; {way}"
            )
        raise AdapterError(f"{weights} is missing")
    _require_plain_header(weights)
    try:
        with safe_open(weights, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, OSError) as error:
        raise _damaged(weights, str(error)) from error


def _require_plain_header(weights: Path) -> None:
    """Raise AdapterError for a header that is absurdly long or names a tensor twice: readers
    would differ in which of the two they take."""
    with weights.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > MAX_HEADER_BYTES:
            raise _damaged(weights, f"its header claims {length:,} bytes")
        header = file.read(length)
    if len(header) < length or not length:
        raise _damaged(weights, "it ends within its header")
    _json(header, weights)


def _damaged(weights: Path, reason: str) -> AdapterError:
    return AdapterError(
        f"{weights} is damaged or not a safetensors file ({reason}); fetch or export it again"
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    weights = weights_path(path)
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118
            kind = file.get_slice(name).get_dtype()
            if kind.startswith(_PACKED):
                raise AdapterError(
                    f"{weights}: `{name}` holds {kind} values, floats of less than a byte, which "
                    "ptkit does not read; store it as F16 or F32"
                )
        # Copies: what is checked here must not change with the file below it.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if not tensors:
        raise AdapterError(f"{weights} holds no tensors")
    if weights.name == INT8_WEIGHTS:
        tensors = dequantised(tensors)
    for name, tensor in tensors.items():
        if not _finite(tensor):
            raise AdapterError(f"{weights}: `{name}` holds values that are not finite")
    return tensors


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() < 2:  # 8-bit floats have no arithmetic
        tensor = tensor.float()
    # One pass without a mask: the extremes of a tensor with NaN are NaN.
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())
