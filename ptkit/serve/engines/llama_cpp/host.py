"""llama.cpp's server in a process that ends with its parent.

`python host.py` reads its settings, one line of JSON, from stdin and ends when stdin does. It runs
in the engine's environment and needs nothing but Python and the engine: the program `llama-server`,
or the package `xllamacpp`.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Serve until stdin ends or the server does."""
    given = json.loads(sys.stdin.readline())
    if given["program"] is not None:
        environment = {**os.environ, "LLAMA_API_KEY": given["api_key"]}
        child = subprocess.Popen(command(given), stdin=subprocess.DEVNULL, env=environment)
        threading.Thread(target=_when_alone, args=(child.kill,), daemon=True).start()
        code = child.wait()
        os._exit(code if code >= 0 else 128 - code)
    running = library_server(given)
    print(f"listening on {running.listening_address}", flush=True)
    _when_alone(lambda: os._exit(0))


def _when_alone(end: Callable[[], Any]) -> None:
    """Call `end` when whoever started this process is gone."""
    sys.stdin.read()
    end()


def command(given: dict[str, Any]) -> list[str]:
    """The command line of `llama-server`."""
    options = {
        "--model": given["gguf"],
        "--host": "127.0.0.1",
        "--port": given["port"],
        "--parallel": given["slots"],
        "--ctx-size": given["positions"],
        "--flash-attn": "on" if given["flash_attention"] else "off",
        "--cache-type-k": given["cache"],
        "--cache-type-v": given["cache"],
        "--slot-save-path": given["folder"],
        # Or the server would put what idle slots hold elsewhere.
        "--cache-ram": 0,
        "--verbosity": 2,  # warnings and errors: the log is kept
    }
    if given["threads"] is not None:
        options["--threads"] = given["threads"]
    words = [str(word) for option in options.items() for word in option]
    # A slot file holds one stream of cells, as the slots of a unified cache do.
    return [given["program"], *words, "--kv-unified"]


def library_server(given: dict[str, Any]) -> Any:
    """The server of `xllamacpp`, which runs until the object ends."""
    if given["library"] is not None:
        sys.path.insert(0, given["library"])
    import xllamacpp as xl

    params = xl.CommonParams()
    params.model.path, params.port = given["gguf"], given["port"]
    params.n_parallel, params.n_ctx = given["slots"], given["positions"]
    params.kv_unified, params.cache_ram_mib, params.warmup = True, 0, False
    params.verbosity = 2
    params.slot_save_path = os.path.join(given["folder"], "")
    params.endpoint_slots, params.api_keys = True, [given["api_key"]]
    if given["threads"] is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = given["threads"]
    kind = "ENABLED" if given["flash_attention"] else "DISABLED"
    params.flash_attn_type = getattr(xl.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{kind}")
    cache = getattr(xl.ggml_type, f"GGML_TYPE_{given['cache'].upper()}")
    params.cache_type_k = params.cache_type_v = cache
    return xl.Server(params)


if __name__ == "__main__":
    main()
