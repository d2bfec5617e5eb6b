#!/usr/bin/env bash
# On a CPU, a new torch tensor often does not fit into the hole that a freed one of the same size left in the C library's
# heap. torch asks for aligned memory (posix_memalign, 64 bytes). glibc 2.36 looks for a free piece as large as the request
# plus the alignment, and what it cut off around the freed tensor may not have come back to the hole. So training that
# frees temporaries between tensors that are kept for the backward pass may hold much more memory than its tensors.
# numpy's arrays, whose memory is not asked to be aligned so, go into such holes.
#
# Versions: torch 2.13.0, numpy 2.3.5, glibc 2.36 (the system's).
# Seen: 200 equal tensors, every other one freed, 100 new ones of the same size: the heap grows by 0.5 to 0.9 of what was
#       freed, by size (300,000, 289,152 and 100,000 values of float32; a process each). With numpy it does not grow.
# Fails when torch's heap grows by less than 0.3 of it on average, or numpy's grows at all.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0
$pip install numpy==2.3.5
cat > "$work/grown.py" <<'PYTHON'
"""By how much of what was freed the heap grows when it is made again."""
import ctypes
import sys

import numpy as np
import torch


class Info(ctypes.Structure):
    """Of glibc's malloc.h; `arena` is the bytes of the heap."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
library, size = sys.argv[1], int(sys.argv[2])


def make():
    return torch.ones(size) if library == "torch" else np.ones(size, np.float32)


torch.ones(8_000_000)  # once freed, glibc keeps what is smaller than this on its heap
kept = [make() for _ in range(200)]
kept[::2] = [None] * 100
before = libc.mallinfo2().arena
kept[::2] = [make() for _ in range(100)]
print((libc.mallinfo2().arena - before) / (100 * 4 * size))
PYTHON
"$work/venv/bin/python" -c 'import platform; print(*platform.libc_ver())'
for library in torch numpy; do
    for size in 300000 289152 100000; do
        grown=$("$work/venv/bin/python" "$work/grown.py" "$library" "$size")
        echo "$library, $size values: the heap grew by $grown of what was freed"
        echo "$grown" >> "$work/$library"
    done
done
awk '{ sum += $1 } END { exit !(sum / NR >= 0.3) }' "$work/torch"
awk '$1 > 0.01 { found = 1 } END { exit found }' "$work/numpy"
