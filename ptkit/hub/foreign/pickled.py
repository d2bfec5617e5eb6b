"""Tensors of a pickle, read by a process of its own that may do nothing but hold tensors.

`torch.load(weights_only=True)` builds tensors and plain containers and runs nothing else. Its
process has a limit on memory and on time besides. So a file that claims to be huge, or never ends,
costs an error message.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ptkit.errors import AdapterError

#: The program that opens the file; it imports torch and safetensors only.
_READER = Path(__file__).with_name("unpickle.py")
#: Seconds for any file, and bytes that are read in one more.
_SECONDS, _BYTES_A_SECOND = 120, 20_000_000


def unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors in the pickle `path` by name; of nested dictionaries joined by dots.

    Raises AdapterError for a file that holds anything but tensors and plain values. It raises it,
    too, for one that takes more memory or time than its size explains.
    """
    limit = _SECONDS + path.stat().st_size // _BYTES_A_SECOND
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "tensors.safetensors"
        # Isolated: neither the environment nor the working folder brings modules into it.
        command = [sys.executable, "-I", str(_READER), str(path), str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise AdapterError(f"{path} was not read within {limit} seconds") from None
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
            raise AdapterError(f"{path} is not a file of tensors: {reason}")
        return load_file(out)
