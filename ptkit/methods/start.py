"""Where a prompt method starts from: the choice that, with the learning rate, decides most.

Real tokens are the good start (PEFT's own benchmark: a prefix from real activations forgets
2x less than a zero start and 9x less than a random one). The token ids chosen here become
soft embeddings in prompt tuning and P-tuning, and keys and values in prefix tuning. Another
adapter is a start as well (Vu et al. 2022, SPoT, https://arxiv.org/abs/2110.07904), and so is
a mean of several.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ptkit.errors import UserError
from ptkit.formats.adapter_files import AdapterFiles, read_adapter
from ptkit.methods.adapter import Demonstrations, require_same_base
from ptkit.recipe.schema import MethodSection, resolve_path
from ptkit.runtime.base_model import Base

Start = Literal["task", "examples", "text", "labels", "vocabulary", "adapter", "random", "auto"]

#: What a start needs beside its name, and the key that holds it.
_NEEDS = {"text": "start_text", "adapter": "start_adapter"}


class PromptMethodSection(MethodSection):
    """Settings shared by the methods that learn virtual tokens."""

    shares_batch: ClassVar[bool] = True
    num_virtual_tokens: int = Field(default=10, ge=1, le=4096)
    """Virtual tokens: learnt positions before the input."""
    start: Start = "auto"
    """Values before training: `task` (in classification the template's own words, once with the
    words of each label; in generation as `examples`), `examples` (tokens of training rows), `text`
    (of `start_text`), `labels` (the words of a classification task's labels), `vocabulary` (random
    tokens), `adapter` (what `start_adapter` learnt), `random` (noise; PEFT's default, and the
    worst), `auto` (`task`, or where its loss on a few training rows is clearly lower one of the
    others or a text made from the task; `task` where a run is too short to tell, and with a
    classification head)."""
    start_text: str | None = None
    """The text `start: text` reads; repeated or cut to `num_virtual_tokens` tokens."""
    start_adapter: Annotated[list[str], Field(min_length=1)] | None = None
    """Adapter folders `start: adapter` begins from, of the same base and length; of several, the
    mean. Relative paths start at the recipe's folder."""
    start_weights: list[float] | None = None
    """What each of `start_adapter` counts in the mean; they add up to 1. null: all the same."""
    learning_rate: float | Literal["auto"]
    """AdamW's peak learning rate, or `auto`: of a few, the one nearest the default that learns
    enough in a short test before the run."""
    beta2: float = Field(default=0.95, gt=0, lt=1)
    """How long AdamW remembers the size of gradients. Those of a prompt's first steps, which learn
    what answers look like, are many times the later ones; with 0.999 (PyTorch's default) they keep
    the steps small for the rest of a short run."""

    @field_validator("start", "learning_rate")
    @classmethod
    def _can_be_found(cls, value: str | float) -> str | float:
        if value == "auto" and not cls.shares_batch:
            raise ValueError(
                f"`auto` tries several adapters in one batch, which this method cannot share: "
                f"{cls.alone}; give a value"
            )
        return value

    @model_validator(mode="after")
    def _start_is_complete(self) -> PromptMethodSection:
        for start, key in _NEEDS.items():
            if (self.start == start) != (getattr(self, key) is not None):
                raise ValueError(f"`{key}` is needed with `start: {start}`, and only there")
        if self.start_weights is not None:
            if len(self.start_weights) != len(self.start_adapter or ()):
                raise ValueError("`start_weights` needs one weight per adapter of `start_adapter`")
            if abs(sum(self.start_weights) - 1) > 1e-6:
                raise ValueError("`start_weights` must add up to 1")
        return self


def start_tokens(
    section: PromptMethodSection, base: Base, demonstrations: Demonstrations
) -> Tensor | None:
    """Token ids `[num_virtual_tokens]` to start from; None for `random`.

    `auto` is `task` here: what is better is found by a run, which then names it.
    """
    count = section.num_virtual_tokens
    if section.start == "random":
        return None
    # Either may have more tokens than the other.
    vocabulary = min(len(base.tokenizer), base.embedding.num_embeddings)
    if section.start == "vocabulary":
        return torch.randint(vocabulary, (count,))
    if section.start == "text":
        assert section.start_text is not None
        ids = token_ids(base, section.start_text)
    elif section.start == "labels":
        if not demonstrations.labels:
            raise UserError("`start: labels` needs a classification task, whose labels have words")
        ids = token_ids(base, "".join(demonstrations.labels))
    elif section.start in ("task", "auto") and demonstrations.labels:
        frame = demonstrations.frame
        ids = token_ids(base, "".join(frame + label for label in demonstrations.labels))
    else:
        ids = []
        for text in demonstrations.shuffled():
            ids += token_ids(base, text)
            if len(ids) >= count:
                break
    if not ids:
        return torch.randint(vocabulary, (count,))
    repeats = -(-count // len(ids))
    return torch.tensor((ids * repeats)[:count])


def token_ids(base: Base, text: str) -> list[int]:
    """`text` as ids, without the tokens a tokenizer puts around it."""
    return base.encode_part(text)


def start_embeddings(base: Base, tokens: Tensor) -> Tensor:
    """What the base's input embedding gives for `tokens`, `[num_virtual_tokens, hidden]`."""
    with torch.no_grad():
        embedded = base.embedding(tokens.to(base.model.device))
    return embedded.float().clone()


def rms(start: Tensor) -> Tensor:
    """The size of a start's values, a scalar; 1 where they are all zero."""
    size = start.square().mean().sqrt()
    return size.masked_fill(size == 0, 1.0)


def named_adapter(name: str, folder: Path) -> Path:
    """The adapter folder that a recipe in `folder` calls `name`; a run's own is found in it."""
    path = resolve_path(name, folder)
    return path / "adapter" if (path / "adapter").is_dir() else path


def start_files(
    section: PromptMethodSection, base: Base, demonstrations: Demonstrations
) -> list[AdapterFiles]:
    """The adapters `start: adapter` begins from, checked against the base and the length.

    Raises AdapterError for another base, UserError for another number of virtual tokens.
    """
    found = []
    for name in section.start_adapter or ():
        path = named_adapter(name, demonstrations.folder)
        files = read_adapter(path)
        require_same_base(files, base, str(path))
        tokens = files.config.get("num_virtual_tokens")
        if tokens != section.num_virtual_tokens:
            raise UserError(
                f"{path} has {tokens or 'no'} virtual tokens, `{section.title}` has "
                f"{section.num_virtual_tokens}: "
                + (f"set `num_virtual_tokens: {tokens}`" if tokens else "start from a prompt")
            )
        found.append(files)
    return found


def start_shares(section: PromptMethodSection) -> list[float]:
    """What each adapter of `start: adapter` counts."""
    count = len(section.start_adapter or ())
    return section.start_weights or [1 / count] * count
