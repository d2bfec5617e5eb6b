"""Writes docs/files.md from the models of the files that ptkit writes and reads back.

python scripts/make_files_reference.py
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ptkit.formats.adapter_info import ADAPTER_INFO
from ptkit.formats.cell_record import CELL_RECORD
from ptkit.formats.typed_file import FileKind, FileSection, Open

OUT = Path(__file__).resolve().parents[1] / "docs" / "files.md"
HEAD = """# Files that ptkit writes and reads back

This page is made from the models by `scripts/make_files_reference.py`. Two files have a documented
layout: `ptkit.json` beside an adapter, and `record.json` of a comparison's cell. Each has one model
in `ptkit/formats`, and all of ptkit reads and writes it through that model.

* **Versions.** The key `format` is the version of a file's layout. ptkit writes the newest one. An
  older file is read: one small function per step brings its values up to date, and the file itself
  stays as it is. A file of a newer version is refused with one line that says to update ptkit.
* **Types.** Values are checked and never converted: `"5"` is no number. The message names the file,
  the key and the fix.
* **Unknown keys.** `ptkit.json` travels with an adapter, so its unknown keys are kept, and written
  back when ptkit writes the adapter again. Records are compared with each other, and an unknown key
  may change what a figure means, so in `record.json` it is refused.
* **PEFT.** PEFT reads `adapter_config.json` and `adapter_model.safetensors`. It never opens the
  files of this page.

Keys that a table marks as required are always there. The others may be missing.
"""
TAIL = """## Other files

These are read back by the part of ptkit that wrote them. They have a `format` too, and are refused
when they are damaged or of a newer version.

| file | where | what |
|---|---|---|
| `failed.json` | a cell's or trial's folder | why there is no result, until the next try succeeds |
| `chosen.json` | a cell's folder | what `auto` settings became; in the record as `chosen` |
| `trial.json` | a trial's folder | the lowest validation loss of a trial |
| `record.json` | a distillation's or multi-task prompt's folder | its measurements |

These have no `format`:

| file | where | what |
|---|---|---|
| `predictions.jsonl` | a cell's folder | one line per test row, with its prediction |
| `cell.json` | a cell's folder | what the cell is; what resumes there must be equal to it |
| `distill.json`, `multitask.json`, `transfer.json` | those of other runs | the same |
| `progress.json` | `checkpoint-STEP/` | how far a run has come; gone when it is finished |
| `results.jsonl`, `results.csv` | a comparison's folder | the records; ptkit does not read them |
| `matrix.json` | a map of transfer | the map; ptkit does not read it |
"""


def sections(section: type[FileSection], path: str = "") -> Iterator[tuple[str, type[FileSection]]]:
    """`section` and all sections within it, each once, with the key that holds it."""
    many, seen = {list: "[]", dict: ".*"}, set[type[FileSection]]()
    waiting = [(path, section)]
    while waiting:
        here, current = waiting.pop(0)
        if current in seen:
            continue
        seen.add(current)
        yield here, current
        for name, field in current.model_fields.items():
            key = f"{here}.{name}" if here else name
            for part in inner(field.annotation):
                mark = next((many[o] for o in origins(field.annotation) if o in many), "")
                waiting.append((f"{key}{mark}", part))


def inner(annotation: Any) -> list[type[FileSection]]:
    """The sections that a type holds."""
    if isinstance(annotation, type) and issubclass(annotation, FileSection):
        return [annotation]
    return [part for own in get_args(annotation) for part in inner(own)]


def origins(annotation: Any) -> list[Any]:
    """`list` or `dict` where a type is one of them, or may be."""
    found = [get_origin(annotation)]
    if get_origin(annotation) in (Union, UnionType):
        found += [get_origin(own) for own in get_args(annotation)]
    return found


def written(annotation: Any) -> str:
    """A type in JSON's words."""
    words = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "any",
             NoneType: "null"}  # fmt: skip
    if annotation in words:
        return words[annotation]
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(written(own) for own in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {written(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return f"object of {written(get_args(annotation)[1])}"
    return "object"


def row(name: str, field: FieldInfo) -> str:
    """One key as a line of a table."""
    meaning = " ".join((field.description or "").split()).replace("|", "\\|")
    kind = written(field.annotation) + (", required" if field.is_required() else "")
    return f"| `{name}` | {kind} | {meaning} |"


def file_part(title: str, kind: FileKind[Any]) -> str:
    """The part of the page that is about one file."""
    parts = [f"## {title}\n\nFormat {kind.format}.\n"]
    for number, step in enumerate(kind.migrations):
        told = re.sub(r"^\d+ -> \d+: ", "", (step.__doc__ or "").strip())
        told = " ".join(told.split())
        parts.append(f"* From format {number} to {number + 1}: {told}")
    for path, section in sections(kind.model):
        summary = (section.__doc__ or "").strip().splitlines()[0]
        if path:
            parts.append(f"\n### `{path}`")
        open_ = " Unknown keys are kept." if issubclass(section, Open) else ""
        parts.append(f"\n{summary}{open_}\n\n| key | value | meaning |\n|---|---|---|")
        parts += [row(name, field) for name, field in section.model_fields.items()]
    return "\n".join(parts) + "\n"


def reference() -> str:
    """The whole page."""
    adapter = file_part("`ptkit.json`, beside an adapter", ADAPTER_INFO)
    record = file_part("`record.json`, of a comparison's cell", CELL_RECORD)
    return "\n".join([HEAD, adapter, record, TAIL])


if __name__ == "__main__":
    OUT.write_text(reference(), encoding="utf-8")
    print(OUT)
