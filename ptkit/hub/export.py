"""Exporting a run's adapter: parameters only, in PEFT's layout, verified by reloading."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ptkit.errors import AdapterError, PtkitError
from ptkit.evaluation.evaluate import Evaluation, evaluate
from ptkit.formats.adapter_files import AdapterFiles, read_adapter, write_adapter
from ptkit.formats.adapter_folder import CARD, RECIPE, read_texts, weights_path
from ptkit.formats.adapter_info import AdapterInfo, CardInfo
from ptkit.formats.int8 import dequantised, quantised
from ptkit.formats.places import find_adapter
from ptkit.hub.card import card_text
from ptkit.hub.convert import as_prefix, require_convertible
from ptkit.hub.verify import recipe_of
from ptkit.methods import adapter_from_files, base_of, require_same_base
from ptkit.methods.base_names import peft_name
from ptkit.recipe.load import LoadedRecipe
from ptkit.runtime.base_model import Base
from ptkit.training.experiment import prepare

Dtype = Literal["float32", "bfloat16", "float16", "int8"]
#: `peft`: as trained. `kv`: compiled to a prefix, whatever the method.
Format = Literal["peft", "kv"]


@dataclass(frozen=True)
class Exported:
    """What was written. bytes: size of the weights file; parameters: values in it.

    trained: values that were trained, from which these were folded; None where no record tells
    lost: for int8, what each metric lost against the original on the recipe's test rows
    """

    path: Path
    parameters: int
    bytes: int
    largest_rounding: float
    lost: dict[str, float] | None
    trained: int | None


def export_run(
    run: Path,
    out: Path,
    *,
    dtype: Dtype = "float32",
    format: Format = "peft",
    replace_out: bool = False,
    base: Base | None = None,
    recipe: Path | None = None,
    license: str | None = None,
    language: str | None = None,
) -> Exported:
    """Write the adapter of `run` (a finished run or an adapter folder) to `out` in `dtype`.

    The result is read back, compared with what was trained, and loaded on its base. An int8 file is
    scored on the recipe's test rows (`recipe`: instead of the run's own). Raises UserError when
    `out` exists, and AdapterError when the run is not finished or for another base.
    """
    path = find_adapter(run)
    trained = read_adapter(path)
    texts = read_texts(path)
    tested: LoadedRecipe | None = None
    if dtype == "int8":
        if recipe is None and not (path / RECIPE).is_file():
            raise AdapterError(
                "int8 loses accuracy, which is measured on the recipe's test rows, but "
                f"{path / RECIPE} is missing; give the recipe with --recipe FILE, or choose "
                "another --dtype"
            )
        tested = recipe_of(path, recipe)
    if base is None:
        base = base_of(trained, None, str(run))
    require_same_base(trained, base, str(run))
    if format == "kv":
        require_convertible(base, str(run))
        trained = as_prefix(trained, base)
    if tested is not None:
        stored = replace(trained, tensors=dequantised(quantised(trained.tensors)))
        info, lost = _scored(trained, stored, base, tested)
    else:
        stored, lost = trained.to(getattr(torch, dtype)), None
        info = trained.info
    if not info.empty:
        info = info.updated(dtype=dtype, card=CardInfo(license=license, language=language))
    kept = {RECIPE: texts[RECIPE]} if RECIPE in texts else {}
    config = {**stored.config, "base_model_name_or_path": peft_name(base.id)}
    files = replace(stored, config=config, info=info, texts=kept)
    tensors = quantised(trained.tensors) if dtype == "int8" else stored.tensors
    card = card_text(
        out.name, files, sum(t.nbytes for t in tensors.values()), int8=dtype == "int8",
        table=_table_above(path), license=license, language=language,
    )  # fmt: skip
    files = replace(files, texts={**kept, CARD: card})
    write_adapter(out, files, replace=replace_out, int8=dtype == "int8")
    reloaded = read_adapter(out)
    if any(not torch.equal(reloaded.tensors[n], t.cpu()) for n, t in stored.tensors.items()):
        raise PtkitError(f"{out}: what was read back differs from what was written")
    adapter_from_files(reloaded, base).close()
    rounding = max(
        float((t.float() - reloaded.tensors[n].float()).abs().max())
        for n, t in trained.tensors.items()
    )
    return Exported(
        out,
        sum(t.numel() for t in trained.tensors.values()),
        weights_path(out).stat().st_size,
        rounding,
        lost,
        trained.info.trainable_parameters,
    )


def _scored(
    original: AdapterFiles, stored: AdapterFiles, base: Base, recipe: LoadedRecipe
) -> tuple[AdapterInfo, dict[str, float]]:
    """The record with the scores of `stored`, and what each metric lost against `original`."""
    experiment = prepare(recipe, base)

    def measured(files: AdapterFiles) -> Evaluation:
        adapter = adapter_from_files(files, base)
        try:
            return evaluate(experiment, adapter, str(recipe.path))
        finally:
            adapter.close()

    before, after = measured(original), measured(stored)
    lost = {name: before.metrics[name].mean - i.mean for name, i in after.metrics.items()}
    info = original.info.updated(
        metrics={name: interval.recorded for name, interval in after.metrics.items()},
        n_test=len(after.predictions),
        retention=after.retention and after.retention.recorded,
        test_split=after.test_split,
        test_chose=after.test_chose,
        test_repeats=after.test_repeats,
        int8_lost=lost,
    )
    return info, lost


def _table_above(path: Path) -> str | None:
    """The Markdown table of the comparison the adapter folder `path` is in, if it is in one."""
    for folder in path.resolve().parents[:5]:
        if (folder / "table.md").is_file() and (folder / RECIPE).is_file():
            return (folder / "table.md").read_text(encoding="utf-8")
    return None
