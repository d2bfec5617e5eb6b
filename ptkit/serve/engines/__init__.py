"""Other engines that `ptkit serve --engine` starts: one module or package for each."""

from __future__ import annotations

import socket


def free_port() -> int:
    """A port of this machine that no server listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
