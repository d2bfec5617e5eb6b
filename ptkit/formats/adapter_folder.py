"""An adapter's folder: what its files are called, and what they say without their tensors.

No tensor library is loaded: listing a thousand adapters should take no second. Files come from
strangers: only regular files of bounded size are opened, and every fault of their contents is an
AdapterError.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ptkit.errors import AdapterError
from ptkit.formats import atomic
from ptkit.formats.adapter_info import ADAPTER_INFO, AdapterInfo

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
    """The adapter folders directly below `folder`, by name.

    Raises AdapterError without `folder`, and where an adapter or runs are in its place.
    """
    if not folder.is_dir():
        raise AdapterError(f"no such folder of adapters: {folder}")
    found = _below(folder)
    if not found or (folder / "cell.json").is_file():
        _require_no_other_place(folder)
    return found


def _below(folder: Path) -> list[Path]:
    atomic.settle_all(folder)
    return sorted(p for p in folder.iterdir() if not is_hidden(p) and (p / CONFIG).is_file())


def is_hidden(path: Path) -> bool:
    """Whether readers pass `path` by: it is what a writer has not finished (see `atomic`), or the
    system's own."""
    return path.name.startswith(".")


def runs_below(path: Path) -> list[Path]:
    """Finished runs below `path`, at most two folders down, and `path` itself where it is one."""
    found = {place.parent.parent for place in path.glob(f"adapter/{CONFIG}")}
    for depth in ("[!.]*", "[!.]*/[!.]*"):  # a run, runs of a recipe, and of several; none hidden
        found |= {place.parent.parent for place in path.glob(f"{depth}/adapter/{CONFIG}")}
    return sorted(found)


def _require_no_other_place(folder: Path) -> None:
    """Raise AdapterError where `folder`, which has no adapters below it, is one or holds runs."""
    if (folder / CONFIG).is_file():
        raise AdapterError(
            f"{folder} is an adapter; give the folder that holds it, {folder.resolve().parent}"
        )
    for run in runs_below(folder):
        export = shlex.join(["ptkit", "export", str(run), "--out", f"adapters/{run.name}"])
        raise AdapterError(f"{folder} holds runs, not adapters; first: {export}")


def adapters_below(path: Path) -> list[str]:
    """Names of the adapter folders in `path`, as PEFT saves several adapters of one model."""
    return [folder.name for folder in _below(path)] if path.is_dir() else []


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_path(path: Path) -> Path:
    """The weights' file of the adapter folder `path`: PEFT's, else ptkit's int8 (there or not)."""
    int8 = path / INT8_WEIGHTS
    return int8 if int8.is_file() and not (path / WEIGHTS).exists() else path / WEIGHTS


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


def base_id(config: Mapping[str, Any], info: AdapterInfo) -> str | None:
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
    weights = _weights_file(path)
    header = _header(weights)
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    try:
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        dtypes = {str(entry["dtype"]) for entry in entries}
    except (TypeError, KeyError, IndexError) as error:
        raise _damaged(weights, "its header does not describe its tensors") from error
    # Where the header ends, counted from the end of the file: the tensors lie between.
    if end != weights.stat().st_size - _header_bytes(weights):
        raise _damaged(weights, "it does not end where its last tensor does")
    return dtypes


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
def opened(path: Path) -> Iterator[Any]:
    """The folder's safetensors file, open. Raises AdapterError when it is missing or damaged."""
    weights = _weights_file(path)
    _header(weights)
    try:
        with safe_open(weights, framework="pt") as file:
            yield file
    except (SafetensorError, ValueError, OSError) as error:
        raise _damaged(weights, str(error)) from error


def _weights_file(path: Path) -> Path:
    """The safetensors file of the folder `path`. Raises AdapterError when it is missing."""
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
    return weights


def _header_bytes(weights: Path) -> int:
    """Bytes before the first tensor. Raises AdapterError for an absurdly long header."""
    with weights.open("rb") as file:
        start = file.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if length > MAX_HEADER_BYTES:
        raise _damaged(weights, f"its header claims {length:,} bytes")
    return int(8 + length)


def _header(weights: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors. Raises AdapterError for a header that is too
    long or names a tensor twice: readers would differ in which of the two they take."""
    length = _header_bytes(weights)
    with weights.open("rb") as file:
        content = file.read(length)[8:]
    if len(content) < length - 8 or not content:
        raise _damaged(weights, "it ends within its header")
    header = _json(content, weights)
    if not isinstance(header, dict):
        raise _damaged(weights, "its header is no JSON object")
    return header


def _damaged(weights: Path, reason: str) -> AdapterError:
    return AdapterError(
        f"{weights} is damaged or not a safetensors file ({reason}); fetch or export it again"
    )
