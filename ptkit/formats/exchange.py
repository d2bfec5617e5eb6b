"""Two folders trade names in one step, where the system can do that."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

#: What a kernel or file system without the exchange answers.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}
_AT_FDCWD = -100
_EXCHANGE = 2  # of renameat2(2) on Linux, and RENAME_SWAP of renamex_np(2) on macOS


def exchange(a: Path, b: Path) -> bool:
    """Let `a` be what `b` was and `b` what `a` was, in one step.

    Returns False, with nothing changed, where the system or the file system cannot. Raises OSError
    when it can and fails.
    """
    call = _call()
    if call is None:
        return False
    if call(os.fsencode(a), os.fsencode(b)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(a), None, str(b))


@functools.cache
def _call() -> Callable[[bytes, bytes], int] | None:
    if sys.platform not in ("linux", "darwin"):
        return None
    system = ctypes.CDLL(None, use_errno=True)
    name = "renameat2" if sys.platform == "linux" else "renamex_np"
    function = getattr(system, name, None)  # an older C library has none
    if function is None:
        return None
    if sys.platform == "linux":
        return lambda a, b: int(function(_AT_FDCWD, a, _AT_FDCWD, b, ctypes.c_uint(_EXCHANGE)))
    return lambda a, b: int(function(a, b, ctypes.c_uint(_EXCHANGE)))
