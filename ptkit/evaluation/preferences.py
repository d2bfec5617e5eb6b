"""How much likelier than the base an adapter finds the preferred answers of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ptkit.data.encoded import EncodedExample, PairExample, passes_of
from ptkit.data.examples import Example
from ptkit.methods import Adapter
from ptkit.prefix import Compiled
from ptkit.recipe.tasks import PreferenceTask
from ptkit.runtime.architecture import evaluating
from ptkit.runtime.forward import row_nats, rows_for


@torch.no_grad()
def pair_details(
    adapter: Adapter,
    rows: Sequence[EncodedExample],
    compiled: Compiled | None,
    task: PreferenceTask,
) -> list[dict[str, Any]]:
    """What metrics of pairs ask for, of each pair (see `ptkit.metrics.preference`).

    rows: `PairExample`s as the base reads them; compiled: the compiled adapter

    `log_probability_margin`: log-probability in nats of the chosen answer minus that of the
    rejected one. `reward_margin`: by how much the adapter has raised it beside the base, times
    `task.beta`.
    """
    pairs = [row for row in rows if isinstance(row, PairExample)]
    assert len(pairs) == len(rows)
    own = passes_of(pair.with_inputs(adapter.behind) for pair in pairs)
    base = adapter.base
    with evaluating(adapter.model):
        batch = rows_for(compiled, [row.input_ids for row in own])
        adapted = row_nats(base, adapter.model, own, batch).double().view(-1, 2)
    with adapter.off(), evaluating(base.model):
        plain = row_nats(base, base.model, passes_of(pairs), None).double().view(-1, 2)
    likelier = adapted[:, 1] - adapted[:, 0]
    rewards = task.beta * (likelier - (plain[:, 1] - plain[:, 0]))
    return [
        {"reward_margin": reward, "log_probability_margin": margin}
        for reward, margin in zip(rewards.tolist(), likelier.tolist(), strict=True)
    ]


def preferred(example: Example, details: dict[str, Any]) -> str:
    """The answer that the adapter has made likelier beside the base; the likelier one where it has
    changed neither."""
    assert example.rejected is not None
    margin = details["reward_margin"] or details["log_probability_margin"]
    return example.target if margin > 0 else example.rejected.target
