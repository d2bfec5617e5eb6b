"""Ask an adapter on llama.cpp's server: python client.py NAME "The text" [--server URL].

Needs nothing but Python. `ptkit export --as llama-cpp` writes it beside the slot files.
"""

import argparse
import json
import urllib.request
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def post(server: str, path: str, body: dict[str, Any]) -> Any:
    """The server's answer to `body`."""
    request = urllib.request.Request(
        server + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def complete(server: str, name: str, text: str, slot: int = 0, **options: Any) -> Any:
    """What the server's `/completion` answers for `text` behind the adapter `name`.

    The adapter's slot file is restored first. It is small, and a slot may have served another one.
    """
    adapter = json.loads((FOLDER / "adapters.json").read_text(encoding="utf-8"))[name]
    post(server, f"/slots/{slot}?action=restore", {"filename": f"{name}.bin"})
    ids = post(server, "/tokenize", {"content": text, "add_special": True})["tokens"]
    prompt = [*adapter["placeholders"], *ids]
    body = {"prompt": prompt, "id_slot": slot, "cache_prompt": True, "temperature": 0}
    return post(server, "/completion", {**body, **options})


def main() -> None:
    """Print the answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("text")
    parser.add_argument("--server", default="http://localhost:8080")
    parser.add_argument("--slot", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=128)
    given = parser.parse_args()
    answer = complete(given.server, given.name, given.text, given.slot, n_predict=given.max_tokens)
    print(answer["content"])


if __name__ == "__main__":
    main()
