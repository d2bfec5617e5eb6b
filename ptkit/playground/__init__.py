"""The playground: one page, which `ptkit serve` and vLLM's server with ptkit's adapters show at /.

It needs no other file, and asks only the server that it came from.
"""

from __future__ import annotations

from importlib.resources import files

#: The page asks nobody else for anything, and nobody may frame it.
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def page() -> str:
    """The page, as HTML."""
    return (files("ptkit.playground") / "page.html").read_text(encoding="utf-8")
