"""Soft prompts for engines that know nothing of adapters.

What prompt tuning and P-tuning learn are input embeddings, so an engine that only knows a
vocabulary can serve them: as entries of it (`export_tokens`: a copied base with
adapters x virtual tokens more rows), or sent along with a request (`export_prompt_embeds`: what
vLLM's `prompt_embeds` takes). A prefix is keys and values of every layer and no embedding, so
neither can hold it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ptkit.bank.source import name_of
from ptkit.errors import AdapterError, PtkitError, UserError
from ptkit.evaluation.saved import find_adapter
from ptkit.formats import atomic
from ptkit.formats.adapter_files import read_adapter
from ptkit.methods import adapter_from_files, base_of, require_same_base
from ptkit.methods.soft_prompt import SoftPrompt
from ptkit.prefix import PrefixBatch
from ptkit.runtime.base_model import Base, no_weights_bar
from ptkit.runtime.compile import compile_embeddings
from ptkit.runtime.forward import all_logits

#: What an engine's client needs to know of the adapters.
PROMPTS = "prompts.json"
EMBEDDINGS = "prompt_embeds.safetensors"
CLIENT = "client.py"
#: Largest difference of a logit between the exported tokens and the adapter.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Soft:
    """A soft prompt: what an adapter puts before the input, `[virtual_tokens, hidden]`."""

    name: str
    embeddings: Tensor
    template: str | None

    @property
    def tokens(self) -> list[str]:
        """Its special tokens, one per row of the embeddings."""
        return [f"<|{self.name}:{i}|>" for i in range(len(self.embeddings))]


@dataclass(frozen=True)
class ForEngines:
    """What was written. prompts: adapter -> what its requests begin with (tokens only)."""

    path: Path
    prompts: dict[str, str]
    virtual_tokens: int
    bytes: int


def soft_prompts(sources: Sequence[Path], base: Base | None) -> tuple[Base, list[Soft]]:
    """The soft prompts of adapters of one base, which is loaded unless given.

    Raises AdapterError for a method that learns something else than input embeddings, UserError
    when two adapters have one name.
    """
    found: list[Soft] = []
    for source in sources:
        path = find_adapter(source)
        files = read_adapter(path)
        if base is None:
            base = base_of(files, None, str(source))
        require_same_base(files, base, str(source))
        if base.encoder_decoder or base.head is not None:
            raise AdapterError(f"{source}: only soft prompts of causal models can be exported so")
        adapter = adapter_from_files(files, base)
        try:
            if not isinstance(adapter, SoftPrompt):
                raise AdapterError(
                    f"{source} is a {files.peft_type} adapter: it learns no input embeddings, so "
                    "it cannot become tokens; serve it with `ptkit serve`"
                )
            embeddings = adapter.embeddings().detach().float().cpu()
        finally:
            adapter.close()
        name = name_of(path).replace("/", "--")
        if name in {soft.name for soft in found}:
            raise UserError(f"two adapters are called `{name}`; export one from a renamed folder")
        found.append(Soft(name, embeddings, files.info.template))
    assert base is not None
    if base.quantized:
        raise UserError(
            f"`{base.id}` is loaded in {base.precision}; engines are given "
            "floating-point weights: leave `quantize` out"
        )
    return base, found


def export_tokens(
    sources: Sequence[Path], out: Path, *, base: Base | None = None, replace_out: bool = False
) -> ForEngines:
    """Write a copy of the base to `out` whose vocabulary holds the soft prompts of `sources`.

    A request for an adapter begins with its tokens' text (in `prompts.json`). Their rows of the
    output head are the mean of all others', so that their logit, the mean logit, never exceeds
    the largest: no engine generates one greedily; `generation_config.json` suppresses them
    altogether where it is read. A base with tied embeddings is untied. The result is read back
    and compared with the adapters' own logits.
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
    scale = _embedding_scale(model)
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
        atomic.write_json(scratch / PROMPTS, _prompts_file(base, softs, prompts))
        atomic.write_text(scratch / "README.md", _readme("tokens", base, softs, prompts))
        _require_same(scratch, base, softs, expected)
        size = sum(p.stat().st_size for p in scratch.iterdir())
    return ForEngines(out, prompts, len(added), size)


def export_prompt_embeds(
    sources: Sequence[Path], out: Path, *, base: Base | None = None, replace_out: bool = False
) -> ForEngines:
    """Write the soft prompts of `sources` and a client that sends them with each request.

    The client puts the embeddings of the text behind those of the adapter, as vLLM's
    `prompt_embeds` wants them; the server is a plain vLLM with `--enable-prompt-embeds`.
    """
    base, softs = soft_prompts(sources, base)
    with atomic.folder(out, replace=replace_out) as scratch:
        tensors = {soft.name: soft.embeddings.contiguous() for soft in softs}
        save_file(tensors, scratch / EMBEDDINGS, metadata={"format": "pt"})
        about = _prompts_file(base, softs, {}) | {"lead": base.lead}
        about["embedding"] = {
            "tensor": _checkpoint_name(base.model),
            "scale": _embedding_scale(base.model),
        }
        atomic.write_json(scratch / PROMPTS, about)
        client = package_files("ptkit.hub") / "prompt_embeds_client.py"
        atomic.write_text(scratch / CLIENT, client.read_text(encoding="utf-8"))
        atomic.write_text(scratch / "README.md", _readme("prompt-embeds", base, softs, {}))
        size = sum(p.stat().st_size for p in scratch.iterdir())
    return ForEngines(out, {}, sum(len(soft.embeddings) for soft in softs), size)


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


def _embedding_scale(model: PreTrainedModel) -> float:
    """What the model multiplies the rows of its embedding by when it looks them up (Gemma does)."""
    table: Any = model.get_input_embeddings()
    row = int(table.weight.float().norm(dim=-1).argmax())
    with torch.no_grad():
        looked_up = table(torch.tensor([[row]], device=table.weight.device))[0, 0].float()
        stored = table.weight[row].float()
    return float((looked_up @ stored) / (stored @ stored))


def _checkpoint_name(model: PreTrainedModel) -> str:
    """Name of the embedding's tensor in the base's files."""
    table = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is table)


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


def _prompts_file(base: Base, softs: Sequence[Soft], prompts: dict[str, str]) -> dict[str, Any]:
    return {
        "base": {"id": base.id, "revision": base.revision, "fingerprint": base.fingerprint},
        "adapters": {
            soft.name: {
                "virtual_tokens": len(soft.embeddings),
                **({"prompt": prompts[soft.name]} if soft.name in prompts else {}),
                "template": soft.template,
            }
            for soft in softs
        },
    }


def _readme(kind: str, base: Base, softs: Sequence[Soft], prompts: dict[str, str]) -> str:
    names = ", ".join(f"`{soft.name}` ({len(soft.embeddings)} virtual tokens)" for soft in softs)
    first = softs[0]
    template = json.dumps(first.template or "{text}")
    if kind == "tokens":
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
    return f"""# Soft prompts for {base.id}, to send with requests

Adapters: {names}.

    vllm serve {base.id} --enable-prompt-embeds
    python {CLIENT} {first.name} "The text"      # --base FOLDER for a base that is not on the Hub

`{CLIENT}` looks the text's embeddings up in the base's files, puts the adapter's before them and
sends both as `prompt_embeds`. `{first.name}` was trained on inputs written as {template}.

Written by `ptkit export --as prompt-embeds`.
"""
