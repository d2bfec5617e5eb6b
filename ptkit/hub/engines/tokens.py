"""A copy of the base with soft prompts as tokens of its vocabulary, for any engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from ptkit.errors import PtkitError, UserError
from ptkit.formats import atomic
from ptkit.hub.engines import Written
from ptkit.hub.soft_prompts import PROMPTS, Soft, embedding_scale, prompts_file, soft_prompts
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.compile import compile_embeddings
from ptkit.runtime.forward import all_logits
from ptkit.runtime.progress import no_weights_bar

#: Largest difference of a logit between the exported tokens and the adapter.
_TOLERANCE = 1e-3


def write(
    sources: Sequence[Path], out: Path, *, base: Base | None = None, replace_out: bool = False
) -> Written:
    """Write a copy of the base to `out` whose vocabulary holds the soft prompts of `sources`.

    A request for an adapter begins with its tokens' text (in `prompts.json`). Their rows of the
    output head are the mean of all others'. So their logit, the mean logit, never exceeds the
    largest, and no engine generates one greedily. `generation_config.json` suppresses them
    altogether where it is read. A base with tied embeddings is untied. The result is read back and
    compared with the adapters' own logits.
    """
    given = base is not None
    base, softs = soft_prompts(sources, base)
    base.remember()
    expected = [_logits(base, soft) for soft in softs]
    model: Any = deepcopy(base.model) if given else base.model
    tokenizer = deepcopy(base.tokenizer)
    added = [text for soft in softs for text in soft.tokens]
    if set(added) & set(tokenizer.get_vocab()):
        raise UserError("the base's vocabulary holds tokens of these adapters already")
    known = len(tokenizer)
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in added])
    new_ids = _ids(tokenizer, added)
    _extend(model, max(len(tokenizer), base.embedding.num_embeddings), known)
    scale = embedding_scale(model)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    with torch.no_grad():
        rows = torch.cat([soft.embeddings for soft in softs]) / scale
        table[new_ids] = rows.to(table.device, table.dtype)
        head.weight[new_ids] = head.weight[:known].float().mean(0).to(head.weight.dtype)
        if head.bias is not None:
            head.bias[new_ids] = head.bias[:known].mean()
    suppressed = model.generation_config.suppress_tokens or []
    model.generation_config.suppress_tokens = [*suppressed, *new_ids]
    begin = _beginning(base)
    prompts = {soft.name: "".join(soft.tokens) + begin for soft in softs}
    with atomic.folder(out, replace=replace_out) as scratch, no_weights_bar():
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        atomic.write_json(scratch / PROMPTS, prompts_file(base, softs, prompts))
        atomic.write_text(scratch / "README.md", _readme(base, softs, prompts))
        _require_same(scratch, base, softs, expected)
        size = sum(p.stat().st_size for p in scratch.iterdir())
    return Written(out, len(added), size, prompts)


def _extend(model: Any, rows: int, known: int) -> None:
    """Give `model` a vocabulary of `rows`, and an output head of its own.

    known: rows that stand for real tokens
    """
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(rows, mean_resizing=False)
    if not tied:
        return
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False


def _beginning(base: Base) -> str:
    """The text of what the tokenizer puts before every text: it comes after the virtual tokens."""
    lead = base.lead
    return str(base.tokenizer.decode(lead)) if lead else ""


def _ids(tokenizer: Any, tokens: list[str]) -> list[int]:
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]


def _probe(base: Base) -> list[int]:
    """A short input of several different tokens."""
    (ids,) = base.encode(["The quick brown fox, 1984."])
    return ids or [0]


def _logits(base: Base, soft: Soft) -> Tensor:
    """What the base says after the probe with `soft` before it, `[tokens, vocabulary]`."""
    ids = torch.tensor([_probe(base)], device=base.model.device)
    with torch.no_grad():
        prefix = compile_embeddings(base.model, soft.embeddings.to(base.model.device))
        logits = all_logits(base.model, ids, torch.ones_like(ids), PrefixBatch.shared(prefix, 1))
    return logits[0].float().cpu()


def _require_same(
    folder: Path, base: Base, softs: Sequence[Soft], expected: Sequence[Tensor]
) -> None:
    """Raise PtkitError unless plain transformers reads the adapters' logits off `folder`."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=base.model.dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for soft, logits in zip(softs, expected, strict=True):
        ids = [*_ids(tokenizer, soft.tokens), *_probe(base)]
        with torch.no_grad():
            found = model(input_ids=torch.tensor([ids])).logits[0, len(soft.tokens) :].float()
        known = len(base.tokenizer)
        difference = float((found[:, :known] - logits[:, :known]).abs().max())
        if difference > _TOLERANCE * max(1.0, float(logits.abs().max())):
            raise PtkitError(
                f"{soft.name}: as tokens its logits differ by {difference:.2g}; "
                f"{type(model).__name__} treats looked-up and given embeddings differently"
            )


def _readme(base: Base, softs: Sequence[Soft], prompts: Mapping[str, str]) -> str:
    names = ", ".join(f"`{soft.name}` ({len(soft.embeddings)} virtual tokens)" for soft in softs)
    first = softs[0]
    template = json.dumps(first.template or "{text}")
    shown = f"{prompts[first.name][: prompts[first.name].index('>') + 1]}..."
    return f"""# {base.id} with adapters as vocabulary

Adapters: {names}.

Each adapter is a run of special tokens, `prompt` in `{PROMPTS}`. A request for it is that text
followed by the input, without special tokens added by the engine (`prompt` holds the one the
tokenizer would begin with, if there is one):

    prompt = json.load(open("{PROMPTS}"))["adapters"]["{first.name}"]["prompt"]   # {shown}
    POST /v1/completions  {{"prompt": prompt + text, "add_special_tokens": false, ...}}

`{first.name}` was trained on inputs written as {template}. Without the tokens the model is the
base: its weights are the same. Rows of the output head that belong to the new tokens are the mean
of all others, so none is ever the likeliest; sampling engines should suppress them too
(`suppress_tokens` in `generation_config.json`).

Written by `ptkit export --as tokens`.
"""
