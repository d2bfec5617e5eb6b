"""`ptkit serve`: an OpenAI-compatible server over one base and many adapters."""

from __future__ import annotations

import sys
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.options import DeviceMapOption, ModelOption, gguf_named
from ptkit.cli.places import require_file, require_model
from ptkit.errors import UserError, nearest
from ptkit.extras import require
from ptkit.formats.sizes import read_bytes


class ServingEngine(StrEnum):
    """What runs the model."""

    ptkit = "ptkit"
    vllm = "vllm"
    llama_cpp = "llama-cpp"


_OF_VLLM = ("engine_python", "engine_options")
_OF_LLAMA_CPP = ("gguf", "llama_server", "slots", "context", "slot_folder")
#: Options that have no meaning for an engine.
_WITHOUT = {
    ServingEngine.ptkit: (*_OF_VLLM, *_OF_LLAMA_CPP),
    ServingEngine.vllm: (
        "max_queue", "max_tokens", "timeout", "budget", "kv_budget", "packed", "device",
        "device_map", "drain_seconds", *_OF_LLAMA_CPP,
    ),
    ServingEngine.llama_cpp: (
        "model", "max_batch", "kv_budget", "packed", "device_map", *_OF_VLLM,
    ),
}  # fmt: skip
_LLAMA_CPP = "With --engine llama-cpp"


def size(text: str) -> int:
    """Bytes from `2GB`, `500 MB`, `1.5GiB` or a plain number."""
    try:
        return read_bytes(text)
    except UserError as error:
        raise typer.BadParameter(str(error)) from error


def _given(context: typer.Context) -> list[str]:
    """The options that were given, by the names of their variables."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source and source.name != "DEFAULT"]


def _require_engine_takes(engine: ServingEngine, given: list[str]) -> None:
    """Raise UserError where an option was given that means nothing to `engine`."""
    names = [f"--{name.replace('_', '-')}" for name in _WITHOUT[engine] if name in given]
    if names:
        told = ", ".join(names).replace("--engine-options", "options after `--`")
        raise UserError(f"--engine {engine.value} does not take {told}")


def serve(
    typer_context: typer.Context,
    engine_options: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads annotations at run time)
        typer.Argument(metavar="[-- OPTION...]", help="With vllm: options of its own, after `--`."),
    ] = None,
    model: ModelOption = None,
    adapters: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option(help="Folder of adapters; each is served under its folder's name."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on.")] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers written at the same time.")] = 64,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Answers that may wait; further requests get status 429.")
    ] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds an answer may take.")] = 600.0,
    budget: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            parser=size,
            metavar="SIZE",
            help="Memory for adapters' prefixes: `2GB`, say. Default: no limit.",
        ),
    ] = None,
    kv_budget: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            parser=size,
            metavar="SIZE",
            help="Memory for keys and values of running answers; default: half of what is free.",
        ),
    ] = None,
    packed: Annotated[
        bool,
        typer.Option(
            help="Keep copies of the weights that a CPU multiplies faster, in up to a quarter of "
            "the free memory."
        ),
    ] = True,
    dtype: Annotated[
        str,
        typer.Option(
            help="Data type of the model: float32, bfloat16 or float16. With llama-cpp, of its "
            "cache: float32, float16 or int8."
        ),
    ] = "float32",
    device: Annotated[
        str, typer.Option(help="Where the model runs: auto, cpu, cuda, cuda:1, mps.")
    ] = "auto",
    device_map: DeviceMapOption = None,
    model_name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What requests call the base; default: its id."),
    ] = None,
    api_key_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="File of keys, one per line; requests must bring one of them."),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Serve other machines (--host) without a key."),
    ] = False,
    allow_hub: Annotated[
        bool, typer.Option("--allow-hub", help="Let requests load adapters from the Hub.")
    ] = False,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="No loading, swapping, unloading or uploading.")
    ] = False,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="Seconds that running answers have to finish at SIGTERM.")
    ] = 120.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    engine: Annotated[
        ServingEngine,
        typer.Option(
            help="What writes the answers: ptkit, vLLM or llama.cpp's server (docs/engines.md)."
        ),
    ] = ServingEngine.ptkit,
    engine_python: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="With vllm: the Python of its environment; default: this one."),
    ] = None,
    gguf: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="With llama-cpp: the model's file, or `smollm2-135m`.",
            rich_help_panel=_LLAMA_CPP,
        ),
    ] = None,
    llama_server: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="The program llama-server, a folder with the package xllamacpp, or the URL of a "
            "running server; default: what is found.",
            rich_help_panel=_LLAMA_CPP,
        ),
    ] = None,
    slots: Annotated[
        int,
        typer.Option(
            min=1,
            help="Answers written at the same time, each in a slot.",
            rich_help_panel=_LLAMA_CPP,
        ),
    ] = 4,
    context: Annotated[
        int,
        typer.Option(
            min=16,
            rich_help_panel=_LLAMA_CPP,
            help="Positions of a slot: virtual tokens, prompt and answer.",
        ),
    ] = 4096,
    slot_folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="With a URL: the --slot-save-path of the running server.",
            rich_help_panel=_LLAMA_CPP,
        ),
    ] = None,
) -> None:
    """Serve a base model and its adapters: OpenAI's API at /v1, a playground at /.

    The `model` of a request names its adapter, or the base. Requests for different adapters share
    one running batch. Any OpenAI client works: base URL http://HOST:PORT/v1.
    """
    require("serve", "`ptkit serve`")
    _require_engine_takes(engine, _given(typer_context))
    if adapters is not None and not adapters.is_dir():
        beside = adapters.parent.iterdir() if adapters.parent.is_dir() else []
        close = nearest(adapters.name, [path.name for path in beside if path.is_dir()])
        meant = f"; did you mean `{adapters.with_name(close)}`?" if close else ""
        raise UserError(f"--adapters {adapters}: no such folder{meant}")

    require_file("--api-key-file", api_key_file)
    asked_for, gguf = gguf, gguf_named(gguf)
    require_file("--gguf", gguf)
    require_model(model)
    if log_level not in ("debug", "info", "warning", "error"):
        raise UserError(f"--log-level `{log_level}`: expected debug, info, warning or error")

    from ptkit.serve.run import is_loopback, read_keys, run_server

    keys = () if api_key_file is None else read_keys(api_key_file)
    local = is_loopback(host)
    if not local and not keys and not insecure:
        raise UserError(
            f"--host {host} lets other machines in: give --api-key-file FILE, or --insecure to "
            "serve without a key"
        )

    import logging

    from pydantic import ValidationError

    from ptkit.formats.adapter_folder import adapter_folders
    from ptkit.methods.own_base import own_base
    from ptkit.recipe.schema import ModelSection
    from ptkit.runtime.base_model import load_base
    from ptkit.serve.build import build_app, named

    executor = None
    if engine is ServingEngine.llama_cpp:
        from ptkit.serve.engines.llama_cpp.launch import started

        executor = started(gguf, dtype, slots, context, llama_server, slot_folder)
        model, dtype, max_batch = str(gguf), "float32", slots
    try:
        section = ModelSection.model_validate(
            {
                "id": model or own_base([] if adapters is None else adapter_folders(adapters)),
                "dtype": dtype,
                "device": "cpu" if engine is ServingEngine.vllm else device,
                "device_map": device_map,
            }
        )
    except ValidationError as error:
        raise UserError(f"--{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error
    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    # Every request of the Hub's client is not what an operator wants to read.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    base = load_base(**section.model_dump())
    if engine is ServingEngine.vllm:
        from ptkit.hub.vllm_server import VLLMServer, options_of

        VLLMServer(
            base, adapters, engine_python or Path(sys.executable), host, port, dtype,
            model_name or named(base), max_batch, keys, read_only, options_of(engine_options or ()),
            {"hub": True} if allow_hub else {},
        ).run(lambda line: typer.secho(line, err=True))  # fmt: skip
        return
    if engine is ServingEngine.ptkit and find_spec("vllm") is not None:
        typer.secho(
            "vLLM is installed here: for many clients, --engine vllm may be the faster one "
            "(docs/engines.md#beside-vllm)",
            err=True,
        )
    aliases = []
    if gguf is not None and gguf != asked_for:  # one of ptkit's names: that is what it is called
        model_name, aliases = model_name or str(asked_for), [gguf.name]
    app = build_app(
        base, adapters, model_name=model_name, model_aliases=aliases, budget=budget,
        kv_bytes=kv_budget, packed=packed, max_batch=max_batch, max_queue=max_queue,
        max_tokens=max_tokens, timeout=timeout, keys=keys, allow_hub=allow_hub, read_only=read_only,
        loopback_only=local, chosen=model is not None, executor=executor,
    )  # fmt: skip
    library = app.state.library
    count = len(library.names())
    typer.secho(
        f"{library.base_name} with {count} adapter{'s' * (count != 1)} on http://{host}:{port} "
        "(playground at /, OpenAI's API at /v1)",
        err=True,
    )
    try:
        run_server(
            app, library.engine, host, port, drain_seconds=drain_seconds, log_level=log_level
        )
    finally:
        library.engine.close()
