"""What can be said of cells before the first one is trained."""

from __future__ import annotations

from collections.abc import Sequence

from ptkit.evaluation.predict import require_positions
from ptkit.methods import require_method_fits
from ptkit.runtime.dropout import require_no_dropout
from ptkit.training.cell import Cell, named_adapters
from ptkit.training.experiment import Experiment


def require_ready(experiment: Experiment, cells: Sequence[Cell]) -> None:
    """Raise UserError for what a recipe asks of `cells` and cannot be carried out.

    Cases are a method that does not fit the base, and adapters to start from that are not there.
    Others are too few positions, and seeds in one batch on a base with dropout."""
    together = [cell for cell in cells if cell.method.shares_batch]
    if experiment.recipe.train.together > 1 and len({cell.seed for cell in together}) > 1:
        require_no_dropout(experiment.base)
    rows = (*experiment.rows.encoded, *experiment.validation)
    for method in {cell.method.title: cell.method for cell in cells}.values():
        require_method_fits(method, experiment.base)
        named_adapters(method, experiment.folder)
        virtual = int(getattr(method, "num_virtual_tokens", 0))
        require_positions(
            experiment.base, virtual, f"`{method.title}`", rows, experiment.recipe.task
        )
