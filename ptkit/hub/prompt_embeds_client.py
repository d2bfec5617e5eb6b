"""Asks an engine that takes `prompt_embeds` (vLLM with --enable-prompt-embeds) for an adapter.

    python client.py ADAPTER TEXT [--url http://localhost:8000] [--base FOLDER] [--max-tokens 64]

Needs torch, safetensors, transformers and huggingface_hub; knows nothing of ptkit. Only the
embedding table of the base is read.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import urllib.request
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoTokenizer

HERE = Path(__file__).resolve().parent
ABOUT = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))


def text_embeddings(base: Path, ids: list[int]) -> torch.Tensor:
    """Rows of the base's embedding, `[tokens, hidden]`, as the model would look them up."""
    name = ABOUT["embedding"]["tensor"]
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, "pt") as weights:
            # Some checkpoints leave out the first part of the name.
            stored = [key for key in weights.keys() if name.endswith(key)]  # noqa: SIM118
            if stored:
                table = weights.get_tensor(stored[0])
                break
    else:
        raise SystemExit(f"no tensor {name} in {base}")
    return table[torch.tensor(ids)].float() * ABOUT["embedding"]["scale"]


def prompt_embeds(adapter: str, text: str, base: Path) -> str:
    """The adapter's virtual tokens, then the text: what the engine reads, in its encoding."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    with safe_open(HERE / "prompt_embeds.safetensors", "pt") as file:
        soft = file.get_tensor(adapter)
    lead, ids = ABOUT["lead"], tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids[: len(lead)] != lead:  # what stands before every text of the base, once
        ids = [*lead, *ids]
    whole = torch.cat([soft, text_embeddings(base, ids)])
    buffer = io.BytesIO()
    torch.save(whole, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", choices=sorted(ABOUT["adapters"]))
    parser.add_argument("text")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--base", type=Path, help="the base's folder; default: from the Hub")
    parser.add_argument("--model", default=ABOUT["base"]["id"], help="what the engine calls it")
    parser.add_argument("--max-tokens", type=int, default=64)
    asked = parser.parse_args()
    base = asked.base
    if base is None:
        base = Path(snapshot_download(ABOUT["base"]["id"], revision=ABOUT["base"]["revision"]))
    body = {
        "model": asked.model,
        "prompt_embeds": prompt_embeds(asked.adapter, asked.text, base),
        "max_tokens": asked.max_tokens,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{asked.url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        print(json.load(answer)["choices"][0]["text"])


if __name__ == "__main__":
    main()
