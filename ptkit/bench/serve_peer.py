"""What people write today to serve PEFT adapters: FastAPI, `set_adapter`, `generate`, one request
at a time. Run by `ptkit bench serve` as the peer:

    python -m ptkit.bench.serve_peer MODEL_FOLDER ADAPTERS PORT
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptkit.extras import extra

with extra("serve", "`ptkit bench serve`"):
    import uvicorn
    from fastapi import FastAPI


def peer_app(model_folder: str, adapters: Path) -> FastAPI:
    """`POST /v1/completions` with `model`, `prompt` and `max_tokens`; greedy."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    base: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    names = sorted(path.name for path in adapters.iterdir())
    model: Any = PeftModel.from_pretrained(base, adapters / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(adapters / name, adapter_name=name)
    model.eval()
    lock = threading.Lock()
    app = FastAPI()

    @app.get("/ready")
    def ready() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/completions")
    def complete(body: dict[str, Any]) -> dict[str, Any]:
        inputs = tokenizer(body["prompt"], return_tensors="pt")
        with lock, torch.no_grad():
            model.set_adapter(body["model"])
            output = model.generate(
                **inputs, max_new_tokens=body["max_tokens"], do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        new = output[0, inputs["input_ids"].shape[1] :]
        return {"choices": [{"text": tokenizer.decode(new, skip_special_tokens=True)}]}

    return app


if __name__ == "__main__":
    folder, adapters, port = sys.argv[1:]
    uvicorn.run(peer_app(folder, Path(adapters)), port=int(port), log_level="warning")
