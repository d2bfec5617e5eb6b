"""Between soft prompts and KV prefixes.

A soft prompt compiles to a prefix exactly. The way back is a fit. A prefix has twice as many values
per layer as a soft prompt has in all, so most prefixes are no soft prompt's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles, read_adapter, write_adapter
from ptkit.formats.adapter_folder import CARD, RECIPE, read_texts
from ptkit.formats.adapter_info import AdapterInfo, MethodInfo
from ptkit.formats.places import find_adapter
from ptkit.hub.card import card_text
from ptkit.methods import ADAPTERS, Adapter, adapter_from_files, base_of, require_same_base
from ptkit.methods.gate_files import with_gate
from ptkit.methods.peft_tensors import MULTITASK, task_of
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.methods.soft_prompt import SoftPrompt
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.compile import compile_embeddings


@dataclass(frozen=True)
class Converted:
    """What was written. error: see `FittedPrompt`; 0 for exact conversions."""

    path: Path
    virtual_tokens: int
    error: float


def convert_adapter(
    source: str | Path,
    out: Path,
    *,
    to: Literal["prefix", "prompt"],
    task: int | None = None,
    model: str | None = None,
    base: Base | None = None,
    max_error: float = 0.05,
    replace: bool = False,
) -> Converted:
    """Write the adapter `source` (a folder or a hub id) to `out` as a prefix or a soft prompt.

    task: of a multi-task prompt; model: id of the base, default the one the adapter names;
    base: a loaded one instead; max_error: the largest share of a prefix a fit may miss

    Raises AdapterError when it cannot be converted, or not closely enough.
    """
    path = find_adapter(Path(source))
    files = one_task(read_adapter(path), task)
    if base is None:
        base = base_of(files, model, str(source))
    require_same_base(files, base, str(source), chosen=model is not None)
    require_convertible(base, str(source))
    error = 0.0
    if to == "prefix":
        made = as_prefix(files, base)
    else:
        fitted = as_prompt(files, base)
        made, error = fitted.files, fitted.error
    if error > max_error:
        raise AdapterError(
            f"no soft prompt comes close to {source}: the best found misses {error:.1%} of the "
            f"prefix, {max_error:.1%} are allowed (--max-error)"
        )
    kept = {name: text for name, text in read_texts(path).items() if name == RECIPE}
    made = dataclasses.replace(made, texts=kept)
    size = sum(t.nbytes for t in made.tensors.values())
    made = dataclasses.replace(made, texts={**kept, CARD: card_text(out.name, made, size)})
    write_adapter(out, made, replace=replace)
    return Converted(out, int(made.config["num_virtual_tokens"]), error)


def require_convertible(base: Base, where: str) -> None:
    """Raise AdapterError where a soft prompt and a prefix are no two forms of one thing."""
    if base.head is not None or base.encoder_decoder:
        raise AdapterError(
            f"{where}: only adapters of causal language models can be converted; what an encoder "
            "makes of a soft prompt depends on the input, and a trained head belongs to its method"
        )


def one_task(files: AdapterFiles, task: int | None) -> AdapterFiles:
    """`files`, or one task of them where they hold several. Raises AdapterError for a task of an
    adapter that has none."""
    if files.peft_type == MULTITASK:
        return task_of(files, task)
    if task is not None:
        raise AdapterError(f"a {files.peft_type} adapter has no tasks to choose from")
    return files


def as_prefix(files: AdapterFiles, base: Base) -> AdapterFiles:
    """The adapter as PREFIX_TUNING, which costs no prompt tokens when a text is read.

    Raises AdapterError for methods without virtual tokens.
    """
    adapter = adapter_from_files(files, base)
    try:
        _require_prefix_alone(adapter, files)
        prefix = adapter.prefix()
        if prefix is None:
            raise AdapterError(f"a {files.peft_type} adapter has no virtual tokens to compile")
        own = PrefixTuning.from_prefix(prefix.detach(), base).files()
        compiled = with_gate(own, adapter.input_gate)
    finally:
        adapter.close()
    return dataclasses.replace(files, config=compiled.config, tensors=compiled.tensors,
                   info=_converted(files, "prefix_tuning", prefix.virtual_tokens))  # fmt: skip


def _require_prefix_alone(adapter: Adapter, files: AdapterFiles) -> None:
    """Raise AdapterError when there is more to `adapter` than what is before the input."""
    if adapter.changes_weights and adapter.virtual_tokens:
        raise AdapterError(
            f"a {files.peft_type} adapter changes the base's weights too, which no prefix or "
            "prompt holds; `ptkit export --as parts` writes what PEFT can load"
        )


@dataclass(frozen=True)
class FittedPrompt:
    """A soft prompt whose prefix is close to a given one.

    error: share of the prefix's squared length that is not reached, over all keys and values;
    each layer counts the same
    """

    files: AdapterFiles
    error: float


def as_prompt(files: AdapterFiles, base: Base, *, steps: int = 600) -> FittedPrompt:
    """The adapter as PROMPT_TUNING: exactly for soft prompts, by a fit of `steps` for a prefix.

    Raises AdapterError for methods without virtual tokens.
    """
    adapter = adapter_from_files(files, base)
    try:
        if isinstance(adapter, SoftPrompt):
            embeddings, error = adapter.embeddings().detach(), 0.0
        else:
            _require_prefix_alone(adapter, files)
            prefix = adapter.prefix()
            if prefix is None or prefix.infix:
                raise AdapterError(
                    f"a {files.peft_type} adapter has no virtual tokens before the input"
                )
            if prefix.placeless:
                raise AdapterError(
                    f"a {files.peft_type} adapter takes no positions, and a soft prompt takes some"
                )
            embeddings, error = fitted_embeddings(prefix.detach(), base, steps=steps)
    finally:
        adapter.close()
    cls = ADAPTERS["prompt_tuning"]
    section = cls.section_class(kind="prompt_tuning", num_virtual_tokens=len(embeddings))  # type: ignore[call-arg]
    plain = AdapterFiles({"peft_type": "PROMPT_TUNING"}, {"prompt_embeddings": embeddings})
    made = with_gate(cls.from_files(plain, section, base).files(), adapter.input_gate)
    info = _converted(files, "prompt_tuning", len(embeddings))
    if error:  # the scores are the prefix's own
        info = info.without(
            "metrics", "n_test", "test_split", "test_chose", "test_repeats", "retention"
        )
    fitted = dataclasses.replace(files, config=made.config, tensors=made.tensors, info=info)
    return FittedPrompt(fitted, error)


def fitted_embeddings(prefix: KVPrefix, base: Base, *, steps: int) -> tuple[Tensor, float]:
    """Embeddings `[virtual_tokens, hidden]` whose prefix is close to `prefix`, and the share of
    its squared length they miss. Adam on that share, started from the base's closest words."""
    with torch.enable_grad():
        embeddings = _closest_words(prefix, base).requires_grad_(True)
        optimizer = torch.optim.Adam([embeddings], lr=float(base.word_vectors.std()) / 10)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        best, least = embeddings.detach().clone(), float("inf")
        for _ in range(steps):
            missed = _missed(compile_embeddings(base.model, embeddings), prefix)
            if float(missed) < least:
                best, least = embeddings.detach().clone(), float(missed)
            optimizer.zero_grad()
            missed.backward()
            optimizer.step()
            schedule.step()
    return best, least


def _missed(found: KVPrefix, wanted: KVPrefix) -> Tensor:
    """Mean over all keys and values of ||found - wanted||^2 / ||wanted||^2."""
    pairs = zip((*found.keys, *found.values), (*wanted.keys, *wanted.values), strict=True)
    shares = [(a.float() - b.float()).square().sum() / b.float().square().sum().clamp(min=1e-12)
              for a, b in pairs]  # fmt: skip
    return torch.stack(shares).mean()


@torch.no_grad()
def _closest_words(prefix: KVPrefix, base: Base) -> Tensor:
    """For every virtual token the word embedding with the closest values in the first layer,
    `[virtual_tokens, hidden]`. Values carry no position, so one reading of each word is enough."""
    words = base.word_vectors
    wanted = prefix.values[0].float().transpose(0, 1).flatten(1)  # [tokens, heads * dim]
    nearest = torch.full((len(wanted),), float("inf"), device=wanted.device)
    chosen = torch.zeros(len(wanted), dtype=torch.long, device=wanted.device)
    # In chunks short enough for the base's positions.
    for start in range(0, len(words), 256):
        values = compile_embeddings(base.model, words[start : start + 256].float()).values[0]
        read = values.float().transpose(0, 1).flatten(1)
        distance, index = torch.cdist(wanted, read).min(dim=1)
        closer = distance < nearest
        nearest = torch.where(closer, distance, nearest)
        chosen = torch.where(closer, index + start, chosen)
    return words[chosen].float().clone()


def _converted(files: AdapterFiles, kind: str, tokens: int) -> AdapterInfo:
    """ptkit's record of an adapter that became another kind of file."""
    if files.info.empty:
        return files.info
    method = MethodInfo.model_validate({"kind": kind, "num_virtual_tokens": tokens})
    origin = files.info.converted_from or files.info.method
    return files.info.updated(method=method, converted_from=origin)
