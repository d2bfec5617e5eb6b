"""`ptkit inspect`: what is in an adapter."""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptkit.cli.completion import complete_adapters
from ptkit.cli.options import JsonOutput, OwnModelOption, Quiet
from ptkit.cli.places import require_model, require_something
from ptkit.errors import AdapterError

if TYPE_CHECKING:
    from ptkit.evaluation.anatomy import Anatomy
    from ptkit.hub.imports import DescribedSource


def inspect(
    adapter: Annotated[
        Path,
        typer.Argument(
            help="Adapter or run folder, or whatever another library wrote.",
            autocompletion=complete_adapters,
        ),
    ],
    model: OwnModelOption = None,
    words: Annotated[int, typer.Option(min=1, help="Nearest words per virtual token.")] = 3,
    json_output: JsonOutput = False,
    quiet: Quiet = False,
) -> None:
    """Show an adapter's tensors, size, norms per layer, attention and nearest words.

    Of another library's folder, file or repository it names what it is and what can be done with
    it. Nothing in it is run.
    """
    require_model(model)
    from ptkit.formats.places import find_adapter

    try:
        find_adapter(adapter)
    except AdapterError:  # another library's, if anything is there
        require_something(adapter)

    from ptkit.evaluation.anatomy import dissect
    from ptkit.formats.adapter_files import read_adapter
    from ptkit.hub.imports import describe_source
    from ptkit.methods import base_of

    try:
        path = find_adapter(adapter)
        files = read_adapter(path)
    except AdapterError:
        described = describe_source(str(adapter))
        if described is None:
            raise
        _show_foreign(described, str(adapter), json_output)
        return
    base = base_of(files, model, str(adapter))
    anatomy = dissect(path, base, words=words, chosen=model is not None)
    if json_output:
        typer.echo(json.dumps(_as_dict(anatomy), ensure_ascii=False))
    elif quiet:
        typer.echo(path)
    else:
        _show(anatomy, path)


def _show_foreign(described: DescribedSource, where: str, json_output: bool) -> None:
    if json_output:
        typer.echo(json.dumps(vars(described), ensure_ascii=False))
        return
    typer.echo(f"{where} is {described.what}")
    if described.base is not None:
        typer.echo(f"it names the base {described.base}")
    if described.refused is not None:
        typer.echo(f"it is not imported: {described.refused}")
    if described.command is not None:
        typer.echo(f"this reads it:\n{described.command}")


def _as_dict(anatomy: Anatomy) -> dict[str, object]:
    from ptkit.formats.adapter_folder import base_revision

    info = anatomy.files.info
    return {
        "peft_type": anatomy.files.peft_type,
        "base": {
            "id": anatomy.files.base_id,
            **info.base.model_dump(),
            "revision": base_revision(anatomy.files.config, info),
        },
        "parameters": anatomy.parameters,
        "share": anatomy.share,
        "bytes": anatomy.bytes,
        "virtual_tokens": anatomy.virtual_tokens,
        "prefix_bytes": anatomy.prefix_bytes,
        "tensors": {n: [str(t.dtype), list(t.shape)] for n, t in anatomy.files.tensors.items()},
        "metrics": info.metrics and {name: s.model_dump() for name, s in info.metrics.items()},
        "n_test": info.n_test,
        "test_split": info.test_split,
        "test_chose": info.test_chose,
        "test_repeats": info.test_repeats,
        "gate": info.gate,
        "layers": [vars(layer) for layer in anatomy.layers],
        "nearest": anatomy.nearest,
        "attention": anatomy.attention,
    }


def _show(anatomy: Anatomy, path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from ptkit.formats.adapter_folder import base_revision
    from ptkit.formats.sizes import in_bytes

    console = Console()
    info, files = anatomy.files.info, anatomy.files
    console.print(f"[bold]{path}[/]  {files.peft_type}", highlight=False)
    revision = base_revision(files.config, info)
    console.print(
        f"base {files.base_id}"
        + (f" at the revision {revision}" if revision else "")
        + (f" ({info.base.fingerprint})" if info.base.fingerprint else ""),
        highlight=False,
    )
    console.print(
        f"{anatomy.parameters:,} parameters ({anatomy.share:.3%} of the base), "
        f"{in_bytes(anatomy.bytes)} on disk, {anatomy.virtual_tokens} virtual tokens, "
        f"{in_bytes(anatomy.prefix_bytes)} as a KV prefix",
        highlight=False,
    )
    if info.metrics:
        scores = "  ".join(f"{name} {score.value:.2f}" for name, score in info.metrics.items())
        said = f"{scores}  (n={info.n_test} {info.rows_scored}, seed {info.seed})"
        console.print(said, markup=False)
    if info.gate:
        opened = ", ".join(f"{share:.1%} of {name}" for name, share in info.gate.items())
        console.print(f"a gate opens for {opened}", highlight=False)
    tensors = Table("tensor", "dtype", "shape", title=None)
    shown = list(files.tensors.items())
    for name, tensor in shown[:12]:
        tensors.add_row(name, str(tensor.dtype).removeprefix("torch."), str(list(tensor.shape)))
    console.print(tensors)
    if len(shown) > 12:
        console.print(f"... and {len(shown) - 12} more tensors")
    if anatomy.layers:
        norms = Table("layer", "|key|", "of text", "|value|", "of text")
        for row in anatomy.layers:
            values = (row.key, row.text_key, row.value, row.text_value)
            norms.add_row(str(row.layer), *(f"{v:.2f}" for v in values))
        console.print(norms)
    if anatomy.attention or anatomy.nearest:
        # A prefix is no embedding, so no word is near it; then that column is left out.
        titles = ["virtual token", "attention", "nearest words (cosine)"]
        tokens = Table(*titles[: 3 if anatomy.nearest else 2])
        rows = zip_longest(anatomy.attention, anatomy.nearest)
        for i, (share, found) in enumerate(rows):
            words = "   ".join(f"{word!r} {s:.2f}" for word, s in found or [])
            cells = [str(i), "" if share is None else f"{share:.1%}", words]
            tokens.add_row(*cells[: len(tokens.columns)])
        console.print(tokens)
