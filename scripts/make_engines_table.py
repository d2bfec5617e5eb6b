"""Writes the tables of docs/engines.md: what every engine does with every method.

python scripts/make_engines_table.py

What an engine is given is asked of the code: an adapter of each method is made on `tiny-en` and
exported. How many answers are equal to transformers' is read from docs/engines.json, which holds
the results of `ptkit verify ADAPTER --engine NAME --json`.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptkit.bank import AdapterBank
from ptkit.errors import PtkitError
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.hub.engine_adapters import engine_adapters, engine_prefix
from ptkit.hub.engines import engines, writer
from ptkit.methods import Demonstrations, create_adapter
from ptkit.methods.catalogue import method_sections
from ptkit.recipe.schema import method_section
from ptkit.runtime.base_model import Base, load_base

DOCS = Path(__file__).resolve().parents[1] / "docs"
#: Column -> the settings of an adapter of that method.
METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"kind": "prompt_tuning", "num_virtual_tokens": 4},
    "P-tuning": {"kind": "p_tuning", "num_virtual_tokens": 4},
    "prefix": {"kind": "prefix_tuning", "num_virtual_tokens": 4},
    "infix": {"kind": "prefix_tuning", "num_virtual_tokens": 4, "position": "infix"},
    "mixture": {"kind": "prefix_mixture", "num_virtual_tokens": 4},
    "prefix with LoRA": {"kind": "prefix_lora", "num_virtual_tokens": 4},
    "LoRA": {"kind": "lora"},
}
WORKS, REFUSED = "✓", "·"


@dataclass(frozen=True)
class EngineRow:
    """What is known of an engine, beside what it is given.

    engine: its name in `ptkit export --as`; None: it is none of those
    mixed: different adapters in one batch; swap: adapters change while it runs
    test: the file of tests that compares its answers
    """

    title: str
    engine: str | None
    mixed: str
    swap: str
    api: str
    test: str


ROWS = (
    EngineRow("PEFT", None, "no", "no", "Python", "test_peft_parity"),
    EngineRow(
        "[`ptkit serve`](serve.md)", None, "yes", "yes", "OpenAI's",
        "test_serve",
    ),
    EngineRow("[vLLM](#vllm)", "vllm", "yes", "yes", "OpenAI's", "test_vllm"),
    EngineRow(
        "[llama.cpp](#llamacpp)", "llama-cpp", "yes, a slot each", "yes", "OpenAI's",
        "test_llama_cpp_serve",
    ),
    EngineRow(
        "AdapterHub's `adapters`, `--as adapterhub` (Llama, Mistral, GPT-2, BERT)",
        "adapterhub", "no", "no",
        "Python", "test_import",
    ),
    EngineRow("MLX, `--as mlx`", "mlx", "no", "no", "Python", "test_mlx"),
    EngineRow(
        "`--as transformers`", "transformers", "no", "no", "Python",
        "test_engines_export",
    ),
    EngineRow(
        "`--as tokens`", "tokens", "yes", "no", "the engine's",
        "test_engines_export",
    ),
    EngineRow(
        "`--as prompt-embeds`", "prompt-embeds", "yes", "yes", "vLLM's",
        "test_engines_export",
    ),
)  # fmt: skip


@contextmanager
def made(base: Base) -> Iterator[dict[str, Path]]:
    """The folders of an adapter of each method."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = {}
        for name, settings in METHODS.items():
            demonstrations = Demonstrations(("name[The Eagle], food[Italian]",), 0)
            adapter = create_adapter(method_section(settings), base, demonstrations)
            folders[name] = Path(scratch) / name.replace(" ", "-")
            write_adapter(folders[name], adapter.files())
            adapter.close()
        yield folders


def takes(row: EngineRow, folder: Path, base: Base) -> bool:
    """Whether the engine of `row` can be given the adapter in `folder`."""
    if row.title == "PEFT":
        kind = read_adapter(folder).peft_type
        types = [s.file_types[kind] for s in method_sections().values() if kind in s.file_types]
        return all(type.unreadable is None for type in types)
    try:
        if row.engine is None:
            AdapterBank(base).load(folder, "adapter")
        elif row.engine in ("llama-cpp", "adapterhub"):  # they want a GGUF file, or a Llama
            [engine_prefix(*read) for read in engine_adapters([folder], base)]
        else:
            with tempfile.TemporaryDirectory() as out:
                writer(row.engine)([folder], Path(out) / "out", base=base)
    except PtkitError:
        return False
    return True


def table(base: Base) -> str:
    """Engines by methods and properties."""
    shown = [row for row in ROWS if row.engine is None or row.engine in engines()]
    columns = ["", *METHODS, "adapters in one batch", "swap while it runs", "API", "compared in"]
    lines = [columns, ["---"] * len(columns)]
    with made(base) as folders:
        for row in shown:
            marks = [WORKS if takes(row, path, base) else REFUSED for path in folders.values()]
            tested = f"[{row.test}](../tests/{row.test}.py)"
            lines.append([row.title, *marks, row.mixed, row.swap, row.api, tested])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def runs(results: dict[str, Any]) -> str:
    """Shares of equal answers on llama.cpp: files by caches and methods."""
    kept = results["llama-cpp"]["runs"]
    methods = list(dict.fromkeys(run["method"] for run in kept))
    lines = [["file", "cache", *methods, "largest gap"], ["---"] * (3 + len(methods))]
    for file, cache in dict.fromkeys((run["file"], run["cache"]) for run in kept):
        found = {r["method"]: r for r in kept if (r["file"], r["cache"]) == (file, cache)}
        shares = [
            f"{found[m]['equal']} of {found[m]['prompts']}" if m in found else "" for m in methods
        ]
        gaps = [gap for run in found.values() for gap in run["gaps"]]
        lines.append([file, cache, *shares, f"{max(gaps):.2f}" if gaps else ""])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(page: str, name: str, text: str) -> str:
    """`page` with `text` between the comments `<!-- NAME -->` and `<!-- end of NAME -->`."""
    start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    found, times = pattern.subn(lambda _: f"{start}{text}{end}", page)
    if times != 1:
        raise SystemExit(f"docs/engines.md has {times} places for `{name}`, expected one")
    return found


def page() -> str:
    """docs/engines.md as it should be."""
    results = json.loads((DOCS / "engines.json").read_text(encoding="utf-8"))
    text = (DOCS / "engines.md").read_text(encoding="utf-8")
    text = filled(text, "engines", table(load_base("tiny-en", device="cpu")))
    return filled(text, "llama.cpp runs", runs(results))


if __name__ == "__main__":
    (DOCS / "engines.md").write_text(page(), encoding="utf-8")
