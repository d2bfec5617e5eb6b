"""What can be said of cells before the first one is trained."""

from __future__ import annotations

from collections.abc import Sequence

from ptkit.errors import UserError
from ptkit.evaluation.predict import require_inputs, require_positions
from ptkit.launched import require_supported_launch
from ptkit.methods import require_method_fits
from ptkit.methods.registry import not_on_split_base
from ptkit.recipe.schema import Recipe
from ptkit.runtime.dropout import require_no_dropout
from ptkit.section import MethodSection
from ptkit.training.cell import Cell
from ptkit.training.cell_folder import named_adapters
from ptkit.training.experiment import Experiment
from ptkit.training.retain import require_retainable


def require_ready(experiment: Experiment, cells: Sequence[Cell]) -> None:
    """Raise UserError for what a recipe asks of `cells` and cannot be carried out.

    Cases are a method that does not fit the base, and adapters to start from that are not there.
    Others are too few positions, and seeds in one batch on a base with dropout."""
    together = [cell for cell in cells if cell.method.shares_batch]
    if experiment.recipe.train.together > 1 and len({cell.seed for cell in together}) > 1:
        require_no_dropout(experiment.base)
    test = experiment.test
    require_inputs(test, experiment.recipe.task)
    if experiment.recipe.evaluate.curve_rows is not None:
        require_inputs(experiment.validation, experiment.recipe.task)
    for method in {cell.method.title: cell.method for cell in cells}.values():
        require_method_fits(method, experiment.base)
        named_adapters(method, experiment.folder)
        virtual = int(getattr(method, "num_virtual_tokens", 0))
        for rows in (experiment.rows.encoded, experiment.validation, test):
            require_positions(
                experiment.base, virtual, f"`{method.title}`", rows, experiment.recipe.task,
                asked=rows is test,
            )  # fmt: skip
    _ = experiment.retain_windows  # last: the base may have to write it


def require_supported(recipe: Recipe, methods: Sequence[MethodSection]) -> None:
    """Raise UserError, before anything is loaded, for what ptkit or one of `methods` does not work
    with: ways of training, and of spreading a base over processes."""
    require_supported_launch()
    if recipe.train.retain is not None:
        for method in methods:
            if method.trains:
                require_retainable(recipe.train.retain, method)
    if recipe.model.tp_plan is None:
        return
    for method in methods:
        if not method.on_split_base:
            raise UserError(not_on_split_base(method))
    if recipe.train.retain is not None:
        raise UserError("`train.retain` works in one process only; leave `model.tp_plan` out")
