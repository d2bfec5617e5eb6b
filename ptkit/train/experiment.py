"""Everything the cells of one recipe share: base, data, and the base's own measurements."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from ptkit.data import TaskData, general_text, load_task
from ptkit.data.encode import EncodedExample, encode_examples
from ptkit.evaluate.retention import (
    LanguageModelling,
    language_modelling,
    off_probe,
    text_windows,
)
from ptkit.recipe import LoadedRecipe
from ptkit.recipe.schema import Recipe
from ptkit.runtime.base_model import Base, load_base


@dataclass(frozen=True)
class Experiment:
    """A recipe made ready to run.

    windows: the retention text, `[windows, tokens]`; untouched: the base's score on it;
    probe: the base's logits on `probe_ids` `[1, tokens]`, before anything was attached to it.
    """

    recipe: Recipe
    base: Base
    data: TaskData
    train: list[EncodedExample]
    validation: list[EncodedExample]
    windows: torch.Tensor | None
    untouched: LanguageModelling | None
    probe_ids: torch.Tensor
    probe: torch.Tensor

    @property
    def data_fingerprint(self) -> str:
        """16 hex digits over the training and validation rows as token ids."""
        digest = hashlib.sha256()
        for row in (*self.train, *self.validation):
            digest.update(repr((row.input_ids, row.target_ids)).encode())
        return digest.hexdigest()[:16]


def prepare(loaded: LoadedRecipe, base: Base | None = None) -> Experiment:
    """Load the data, then the base (or use the given one), and measure the base on its own.

    The data comes first: a mistake in it should show before a large model is loaded.
    """
    recipe = loaded.recipe
    data = load_task(recipe.task, loaded.folder)
    text = general_text(recipe.retention.text, loaded.folder) if recipe.retention else None
    base = base or load_base(recipe.model)
    windows = untouched = None
    if recipe.retention is not None and text is not None:
        windows = text_windows(base, text, recipe.retention.max_tokens)
        untouched = language_modelling(base.model, windows, None)
    first = encode_examples(data.test[:1], base.tokenizer, recipe.task)[0].input_ids
    probe_ids = torch.tensor([first]) if windows is None else windows[:1]
    return Experiment(
        recipe,
        base,
        data,
        encode_examples(data.train, base.tokenizer, recipe.task),
        encode_examples(data.validation, base.tokenizer, recipe.task),
        windows,
        untouched,
        probe_ids,
        off_probe(base.model, probe_ids),
    )
