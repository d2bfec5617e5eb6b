"""`ptkit serve --engine vllm`: adapters compiled for vLLM, and its server started with them."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch import nn

from ptkit.errors import PtkitError, UserError
from ptkit.formats.adapter_folder import adapter_folders
from ptkit.hub.engine_adapters import engine_adapters, engine_prefix
from ptkit.hub.engines.vllm import ADAPTERS, CODE, transfer_config, write_connector, write_prefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.named_models import source_of

logger = logging.getLogger(__name__)

#: What vLLM's server is in every version tried; `vllm serve` needs the package's own metadata.
_SERVER = ("-m", "vllm.entrypoints.openai.api_server")
#: vLLM's option for the share of memory it may take; on a CPU of the machine's, whatever its name.
_SHARE = "--gpu-memory-utilization"
#: vLLM's variable for the cores of a CPU that do not compute. With a connector these are two, of
#: which ptkit's needs none. Of two cores both compute then, which is left as it is.
_RESERVED = "VLLM_CPU_NUM_OF_RESERVED_CPU"


@dataclass(frozen=True)
class VLLMServer:
    """What the server is started with.

    python: of vLLM's environment; keys: what requests may present, none: nothing is asked
    model_name: what requests call the base; options: vLLM's own, as its command takes them
    settings: further ones of the connector (docs/engines.md)
    """

    base: Base
    adapters: Path | None
    python: Path
    host: str
    port: int
    dtype: str
    model_name: str
    max_batch: int
    keys: tuple[str, ...] = ()
    read_only: bool = False
    options: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def run(self, told: Callable[[str], None] = lambda _: None) -> None:
        """Compile the adapters, start vLLM with them, and wait until it ends.

        told: is told what is served

        Signals to end reach vLLM, which finishes as it does. Adapters that no engine's cache can
        hold are left out, each with its reason. Raises UserError where `python` has no vLLM, and
        PtkitError where the server fails.
        """
        require_vllm(self.python)
        with tempfile.TemporaryDirectory(prefix="ptkit-vllm-") as scratch:
            folder = Path(scratch)
            names = self.write(folder)
            told(
                f"vLLM starts with {self.model_name} and "
                + (f"the adapters {', '.join(names)}" if names else "no adapter")
                + f", at http://{self.host}:{self.port}; its own messages follow"
            )
            command, environment = self.command(folder), self.environment(folder)
            nn.Module.to(self.base.model, "meta")  # vLLM has weights of its own
            process = subprocess.Popen(command, env=environment)
            if (code := _ended(process)) > 0:
                raise PtkitError(
                    f"vLLM ended with exit code {code}; the first line with `Error` above says why"
                )

    def write(self, folder: Path) -> list[str]:
        """Write the connector, and the adapters it can hold, into `folder`; their names."""
        write_connector(folder / CODE)
        (folder / ADAPTERS).mkdir()
        names = []
        for path in [] if self.adapters is None else adapter_folders(self.adapters):
            try:
                for source, adapter in engine_adapters([path], self.base):
                    prefix = engine_prefix(source, adapter)
                    write_prefix(source, prefix, self.base, folder / ADAPTERS / source.name)
                    names.append(source.name)
            except UserError as error:
                logger.warning("left out: %s", error)
        return names

    def command(self, folder: Path) -> list[str]:
        """vLLM's command for what `write` wrote."""
        command = [
            str(self.python), *_SERVER, "--model", source_of(self.base.id, self.base.revision),
            "--served-model-name", self.model_name, "--dtype", self.dtype,
            "--host", self.host, "--port", str(self.port), "--max-num-seqs", str(self.max_batch),
            "--kv-transfer-config",
            transfer_config(folder / ADAPTERS, read_only=self.read_only, **self.settings),
        ]  # fmt: skip
        if self.base.revision is not None:
            command += ["--revision", self.base.revision]
        if self.base.tokenizer.chat_template is None and "--chat-template" not in self.options:
            template = folder / "chat.jinja"
            template.write_text(_lines(self.base), encoding="utf-8")
            command += ["--chat-template", str(template)]
        return [*command, *_memory(self.options), *self.options]

    def environment(self, folder: Path) -> dict[str, str]:
        """The variables that vLLM's processes get. Keys are no arguments, which others may read."""
        plugins = [p for p in os.environ.get("VLLM_PLUGINS", "").split(",") if p]
        found = {**os.environ, "PYTHONPATH": str(folder / CODE)}
        found["VLLM_PLUGINS"] = ",".join([*plugins, "ptkit"])
        if _cores() > 2:
            found.setdefault(_RESERVED, "1")
        if len(self.keys) > 1:
            raise UserError("vLLM's server takes one key from --api-key-file")
        if self.keys:
            found["VLLM_API_KEY"] = self.keys[0]
        return found


def _cores() -> int:
    """Physical cores that this process may run on, as vLLM counts them."""
    allowed = len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else 0
    return min(filter(None, (allowed, psutil.cpu_count(logical=False))), default=0)


def _memory(options: Sequence[str]) -> list[str]:
    """The share of memory that vLLM may take on a CPU, where nothing says it: half of what is free.
    By itself vLLM asks for 0.92 of all memory, and does not start where less is free."""
    named = any(option.split("=")[0] == _SHARE for option in options)
    if named or "VLLM_CPU_KVCACHE_SPACE" in os.environ or torch.cuda.is_available():
        return []
    memory = psutil.virtual_memory()
    free = 0.5 * memory.available / memory.total
    return [_SHARE, f"{free:.2f}"]


def require_vllm(python: Path) -> None:
    """Raise UserError unless the interpreter `python` finds vLLM."""
    look = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    try:
        found = subprocess.run([str(python), "-c", look], capture_output=True, check=False)
    except OSError as error:
        raise UserError(f"--engine-python {python} cannot be run: {error.strerror}") from error
    if found.returncode:
        raise UserError(
            f"{python} has no vLLM; name the Python of an environment that has it with "
            "--engine-python (`make setup-engines` builds one, .venv/vllm/bin/python)"
        )


def _lines(base: Base) -> str:
    """A chat template that joins messages line by line, as `ptkit serve` does without one."""
    (ids,) = base.encode(["a"])
    begin = base.tokenizer.bos_token_id
    first = base.tokenizer.bos_token if ids and ids[0] == begin else ""
    return f"{first}{{{{ messages | map(attribute='content') | join('\n') }}}}"


def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of `process`; signals to end this one are passed on to it."""

    def passed_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    ending = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, passed_on) for number in ending}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()


def options_of(given: Sequence[str]) -> tuple[str, ...]:
    """vLLM's own options. Raises UserError for those that ptkit sets."""
    ours = {"--model", "--served-model-name", "--kv-transfer-config", "--host", "--port", "--dtype",
            "--max-num-seqs", "--api-key", "--enable-lora"}  # fmt: skip
    for option in given:
        if (name := option.split("=")[0]) in ours:
            raise UserError(f"{name} is set by ptkit's own options, or cannot be used with them")
    return tuple(given)
