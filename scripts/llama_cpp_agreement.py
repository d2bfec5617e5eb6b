"""How many answers of llama.cpp's server are transformers', for docs/engines.json.

python scripts/llama_cpp_agreement.py MODEL.gguf RUN... --rows 100

Each RUN is an adapter, or a run, on the base MODEL.gguf. Greedy answers to inputs of its recipe's
test are compared on the file as it is, and on a copy whose blocks are dequantised to float32. The
server's cache is f32, f16 and q8_0 in turn. Results that are there already are kept, so that a
second call goes on where the first one stopped. `scripts/make_engines_table.py` writes the table.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

from ptkit.formats import atomic
from ptkit.formats.adapter_files import read_adapter
from ptkit.formats.places import find_adapter
from ptkit.hub.engine_agreement import agreement, own_answers, prompts_of
from ptkit.runtime.base_model import load_base
from ptkit.runtime.slot_file import CACHES
from ptkit.serve.engines.llama_cpp.server import found as found_server

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "engines.json"
#: Between the method and the file's weights: what the copy is called.
PLAIN = "float32"


def dequantised(source: Path, target: Path) -> Path:
    """A copy of the GGUF file `source` with all weights in float32."""
    reader = GGUFReader(source)
    architecture = reader.get_field("general.architecture")
    assert architecture is not None
    writer = GGUFWriter(target, architecture.contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind is GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(0)  # all float32
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def versions(server: str | None) -> dict[str, str]:
    """Of what answers; the package of llama.cpp's server where that is one."""
    _, library = found_server(server)
    known = distributions() if library is None else distributions(path=[library])
    served = [d for d in known if d.name == "xllamacpp"]
    return {d.name: d.version for d in served} | {
        name: version(name) for name in ("transformers", "torch")
    }


def kept(
    results: dict[str, Any], inputs: str, tokens: int, rows: int, server: str | None
) -> dict[str, Any]:
    """What is known of runs of these settings; nothing where they were others."""
    found = results.get("llama-cpp", {})
    same = (found.get("inputs"), found.get("max_new_tokens")) == (inputs, tokens)
    runs = [run for run in found.get("runs", []) if same and run["prompts"] == rows]
    return {
        "base": "SmolLM2-135M-Instruct", "inputs": inputs, "max_new_tokens": tokens,
        "versions": versions(server),
        "runs": runs,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("adapters", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=24, help="of the longest answer")
    parser.add_argument("--caches", nargs="+", default=[*CACHES], choices=[*CACHES])
    parser.add_argument("--prompts", type=Path, help="a file of inputs, see ptkit verify")
    parser.add_argument("--recipe", type=Path, help="whose test is asked; default: the run's own")
    parser.add_argument("--inputs", default="persona-reply, test", help="what the page calls them")
    parser.add_argument("--llama-server", help="see ptkit verify")
    parser.add_argument("--work", type=Path, required=True, help="where the float32 copy is kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()

    plain = given.work / f"{given.gguf.stem}.float32.gguf"
    if not plain.is_file():
        given.work.mkdir(parents=True, exist_ok=True)
        dequantised(given.gguf, plain.with_suffix(".part")).rename(plain)
    torch.set_grad_enabled(False)
    base = load_base(str(given.gguf), device="cpu", dtype="float32")
    results = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {}
    told = kept(results, given.inputs, given.tokens, given.rows, given.llama_server)
    for adapter in given.adapters:
        method = str(read_adapter(find_adapter(adapter)).info.method_kind)
        texts = prompts_of(adapter, given.rows, file=given.prompts, recipe=given.recipe)
        if len(texts) < given.rows:
            raise SystemExit(f"{adapter}: {len(texts)} inputs, --rows {given.rows}")
        ours = own_answers(adapter, base, texts, given.tokens)
        for name, gguf in ((_weights(given.gguf), given.gguf), (PLAIN, plain)):
            for dtype in given.caches:
                cache = CACHES[dtype].name.lower()
                key = {"file": name, "cache": cache, "method": method}
                if any(key.items() <= run.items() for run in told["runs"]):
                    continue
                found = agreement(
                    adapter, base, "llama-cpp", texts, max_new_tokens=given.tokens, ours=ours,
                    gguf=gguf, dtype=dtype, llama_server=given.llama_server,
                )  # fmt: skip
                gaps = [round(difference.gap, 4) for difference in found.differences]
                told["runs"].append(
                    {**key, "equal": found.equal, "prompts": found.prompts, "gaps": gaps}
                )
                print(json.dumps(told["runs"][-1]), flush=True)
                text = json.dumps({**results, "llama-cpp": told}, indent=1)
                atomic.write_text(given.out, text + "\n")


def _weights(gguf: Path) -> str:
    """What the file's weights are in: `Q4_1` of `Model.Q4_1.gguf`."""
    return gguf.stem.rpartition(".")[2]


if __name__ == "__main__":
    main()
