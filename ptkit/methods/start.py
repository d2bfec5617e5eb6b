"""Where a prompt method starts from: the choice that, with the learning rate, decides most.

Real tokens are the good start. In PEFT's own benchmark a prefix from real activations forgets 2x
less than a zero start and 9x less than a random one. The token ids chosen here become soft
embeddings in prompt tuning and P-tuning, and keys and values in prefix tuning. Another adapter is a
start as well (Vu et al. 2022, SPoT, https://arxiv.org/abs/2110.07904), and so is a mean of several.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ptkit.errors import UserError
from ptkit.formats.adapter_files import AdapterFiles, read_adapter
from ptkit.methods.adapter import Demonstrations
from ptkit.methods.of_base import require_same_base
from ptkit.methods.prompt_settings import PromptMethodSection
from ptkit.runtime.base_model import Base
from ptkit.section import resolve_path


def start_tokens(
    section: PromptMethodSection, base: Base, demonstrations: Demonstrations
) -> Tensor | None:
    """Token ids `[num_virtual_tokens]` to start from; None for `random`.

    `auto` is `task` here: what is better is found by a run, which then names it. `task` without
    any rows starts from random tokens. Raises UserError where a start that is named has no tokens.
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
    if not ids and section.start in ("task", "auto") and not demonstrations.texts:
        return torch.randint(vocabulary, (count,))
    if not ids:
        what = {
            "text": f"`start_text` ({section.start_text!r})",
            "labels": f"the labels' words ({', '.join(map(repr, demonstrations.labels))})",
        }.get(section.start, "the training rows")
        raise UserError(
            f"`{section.title}`: `start: {section.start}` has nothing to start from, because the "
            f"base's tokenizer finds no token in {what}; give a text with words, or "
            "`start: vocabulary` for random tokens"
        )
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
