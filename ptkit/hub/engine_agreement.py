"""Does an engine generate with an adapter what transformers does?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptkit.data.inputs import table_inputs
from ptkit.data.task import load_task
from ptkit.data.templates import filled
from ptkit.errors import DataError, UserError
from ptkit.evaluation.evaluate import input_template
from ptkit.formats.places import find_adapter
from ptkit.hub.engine_adapters import engine_adapters, engine_prefix
from ptkit.hub.engine_runs import greedy_of
from ptkit.hub.verify import recipe_of
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import all_logits
from ptkit.runtime.generation import generate

_BATCH = 16


@dataclass(frozen=True)
class FirstDifference:
    """Where an answer of the engine first differs from transformers'.

    prompt: its number; place: the number of the token in the answer
    ours, theirs: the token that transformers, and the engine, wrote there; None: the end
    gap: between the logits of transformers' two likeliest tokens. A small one is a near tie
    """

    prompt: int
    place: int
    ours: int | None
    theirs: int | None
    gap: float


@dataclass(frozen=True)
class Agreement:
    """prompts: how many were asked; equal: answers that are the same to their ends."""

    engine: str
    prompts: int
    equal: int
    differences: tuple[FirstDifference, ...]

    @property
    def share(self) -> float:
        """Of answers that are the same."""
        return self.equal / self.prompts

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        differences = [vars(difference) for difference in self.differences]
        return {**vars(self), "share": self.share, "differences": differences}


def agreement(
    source: Path,
    base: Base,
    engine: str,
    texts: Sequence[str],
    *,
    max_new_tokens: int = 32,
    ours: Sequence[list[int]] | None = None,
    **settings: Any,
) -> Agreement:
    """Compare greedy answers of `engine` with those of transformers on `base`.

    source: of the adapter; texts: whole inputs; settings: see the engine's `greedy`
    ours: transformers' answers (`own_answers`), where they are known already
    """
    prompts = base.encode(texts)
    (prefix,) = [engine_prefix(*read) for read in engine_adapters([source], base)]
    theirs = greedy_of(engine)(source, base, prompts, max_new_tokens, **settings)
    if ours is None:
        ours = own_answers(source, base, texts, max_new_tokens)
    differences = [
        first_difference(base, prefix, number, prompts[number], *answers)
        for number, answers in enumerate(zip(ours, theirs, strict=True))
        if answers[0] != answers[1]
    ]
    equal = len(prompts) - len(differences)
    return Agreement(engine, len(prompts), equal, tuple(differences))


def own_answers(
    source: Path, base: Base, texts: Sequence[str], max_new_tokens: int
) -> list[list[int]]:
    """Transformers' greedy answers to `texts` with the adapter `source`, as token ids."""
    prompts = base.encode(texts)
    (prefix,) = [engine_prefix(*read) for read in engine_adapters([source], base)]
    return [
        answer for start in range(0, len(prompts), _BATCH)
        for answer in _generated(base, prefix, prompts[start : start + _BATCH], max_new_tokens)
    ]  # fmt: skip


def prompts_of(
    source: Path, count: int, *, file: Path | None = None, recipe: Path | None = None
) -> list[str]:
    """`count` inputs for the adapter `source`: from `file`, else of its recipe's test.

    file: a text file with one input per line, or one of rows and columns; both are put into the
        adapter's template
    recipe: a recipe file to use instead of the adapter's own

    Raises UserError where there is none.
    """
    path = find_adapter(source)
    template = input_template(path)
    if file is None:
        loaded = recipe_of(path, recipe)
        try:
            texts = [example.input for example in load_task(loaded.recipe.task, loaded.folder).test]
        except DataError as error:
            raise DataError(f"{error}; give inputs with --prompts FILE") from error
    elif file.suffix.lower() in (".txt", ""):
        if not file.is_file():
            raise UserError(f"--prompts {file}: no such file")
        lines = file.read_text(encoding="utf-8").splitlines()
        texts = [filled(template, line) for line in lines if line.strip()]
    else:
        texts = table_inputs(file, template)
    if not texts:
        raise UserError("there are no inputs to compare answers to; give some: --prompts FILE")
    return texts[:count]


def _generated(
    base: Base, prefix: KVPrefix, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    batch = PrefixBatch.shared(prefix, len(prompts))
    return generate(
        base.model, prompts, batch, pad_token_id=base.pad_token_id,
        max_new_tokens=max_new_tokens, do_sample=False,
    )  # fmt: skip


def first_difference(
    base: Base, prefix: KVPrefix, number: int, prompt: list[int], ours: list[int], theirs: list[int]
) -> FirstDifference:
    """Where two answers, token ids, to the prompt of this number part; one of them may end there.

    prefix: of the adapter that answered; ours: the answer of transformers, or ptkit
    """
    pairs = zip(ours, theirs, strict=False)
    shorter = min(len(ours), len(theirs))
    place = next((i for i, (one, other) in enumerate(pairs) if one != other), shorter)

    def at(answer: list[int]) -> int | None:
        return answer[place] if place < len(answer) else None

    row = torch.tensor([[*prompt, *ours[:place]]], device=base.model.device)
    with torch.no_grad():
        logits = all_logits(base.model, row, torch.ones_like(row), PrefixBatch.shared(prefix, 1))
    best = logits[0, -1].float().topk(2).values
    return FirstDifference(number, place, at(ours), at(theirs), float(best[0] - best[1]))
