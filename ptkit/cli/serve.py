"""`ptkit serve`: an OpenAI-compatible server over one base and many adapters."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Optional

import typer

from ptkit.cli.options import ModelOption
from ptkit.errors import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Bytes from `2GB`, `500 MB`, `1.5GiB` or a plain number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in _UNITS:
        raise typer.BadParameter(f"`{text}` is no size; write 2GB, 500MB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def serve(
    model: ModelOption = "tiny-en",
    adapters: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads annotations at run time)
        typer.Option(help="Folder of adapters; each is served under its folder's name."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535)] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers written at the same time.")] = 32,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Answers that may wait; more get 429.")
    ] = 256,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 1024,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds an answer may take.")] = 600.0,
    budget: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            parser=size, metavar="SIZE", help="Memory for prefixes, `2GB`; default: no limit."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
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
        typer.Option("--insecure", help="Let everybody in who reaches an address beyond loopback."),
    ] = False,
    allow_hub: Annotated[
        bool, typer.Option("--allow-hub", help="Let requests load adapters from the Hub.")
    ] = False,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="No loading, swapping, unloading or uploading.")
    ] = False,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="At SIGTERM: seconds for answers under way.")
    ] = 120.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve a base and its adapters at /v1, and a playground at /.

    Each request's `model` picks its adapter; different ones share one running batch. Any OpenAI
    client works: base URL http://HOST:PORT/v1.
    """
    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise UserError("serving needs the extra: pip install 'ptkit[serve]'")

    from ptkit.serve.run import is_loopback, read_keys, run_server

    if log_level not in ("debug", "info", "warning", "error"):
        raise UserError(f"--log-level `{log_level}`: expected debug, info, warning or error")
    keys = () if api_key_file is None else read_keys(api_key_file)
    local = is_loopback(host)
    if not local and not keys and not insecure:
        raise UserError(
            f"--host {host} lets other machines in: give --api-key-file FILE, or --insecure to "
            "serve without a key"
        )
    if adapters is not None and not adapters.is_dir():
        raise UserError(f"--adapters {adapters}: no such folder")

    import logging

    from pydantic import ValidationError

    from ptkit.bank import AdapterBank
    from ptkit.recipe.schema import ModelSection
    from ptkit.runtime.base_model import load_base
    from ptkit.serve.answers import Limits
    from ptkit.serve.app import create_app
    from ptkit.serve.engine import Engine
    from ptkit.serve.library import Library
    from ptkit.serve.metrics import Metrics

    logging.basicConfig(level=log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    try:
        section = ModelSection.model_validate({"id": model, "dtype": dtype, "device": device})
    except ValidationError as error:
        raise UserError(f"--{error.errors()[0]['loc'][0]}: {error.errors()[0]['msg']}") from error
    bank = AdapterBank(load_base(section), budget=budget)
    metrics = Metrics(bank)
    engine = Engine(bank, max_rows=max_batch, max_waiting=max_queue, observer=metrics)
    metrics.watch(engine)
    name = model_name or (Path(model).name if Path(model).is_dir() else model)
    library = Library(
        engine, adapters, base_name=name, allow_hub=allow_hub, allow_changes=not read_only
    )
    for fault in library.register_all():
        typer.secho(f"left out: {fault}", fg=typer.colors.YELLOW, err=True)
    limits = Limits(max_tokens=max_tokens, timeout=timeout)
    app = create_app(library, metrics, limits, keys=keys, loopback_only=local)
    typer.secho(
        f"{name} with {len(library.names())} adapters on http://{host}:{port} "
        "(playground at /, OpenAI's API at /v1)",
        err=True,
    )
    try:
        run_server(app, engine, host, port, drain_seconds=drain_seconds, log_level=log_level)
    finally:
        engine.close()
