"""Model cards: what an adapter is, what it scored, what it forgets, how to use it.

Mitchell et al. 2019, "Model Cards for Model Reporting"; the metadata are the Hub's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ptkit.formats.adapter_files import AdapterFiles
from ptkit.formats.adapter_folder import RECIPE
from ptkit.formats.adapter_info import AdapterInfo
from ptkit.methods.base_names import hub_name, is_here
from ptkit.methods.catalogue import file_type, method_of_files
from ptkit.methods.head import labels_of_files
from ptkit.runtime.model_names import PACKAGED, TINY_EN, WHEELS

#: Stands in a card for the repository it will be in; `ptkit push` puts the name in.
PLACE = "USER/REPO"

_TASKS = {
    "generation": "text-generation",
    "classification": "text-classification",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
}


def card_text(
    name: str,
    files: AdapterFiles,
    stored_bytes: int,
    *,
    int8: bool = False,
    table: str | None = None,
    license: str | None = None,
    language: str | None = None,
) -> str:
    """The card of the adapter `files`, whose weights take `stored_bytes` on disk.

    int8: they are stored as 8-bit integers, which PEFT does not read
    table: Markdown of the comparison it was part of
    license, language: the Hub's identifiers (`apache-2.0`, `en`); left out when not known
    """
    metadata = _metadata(name, files, license, language)
    return f"---\n{metadata}\n---\n\n{_body(name, files, stored_bytes, int8, table)}"


def named(card: str, repository: str) -> str:
    """The card with the repository's id wherever it says how to load the adapter."""
    return card.replace(PLACE, repository)


def shown_base(base: str) -> str:
    """What a card calls the base: its id, or a placeholder for a place on this machine."""
    name = hub_name(base)
    if not is_here(name):
        return name
    return f"path/to/{name.replace(chr(92), '/').rstrip('/').rpartition('/')[2]}"


def with_base(card: str, before: str | None, base: str) -> str:
    """The card of an adapter whose base, called `before` so far, is `base` on the Hub."""
    from huggingface_hub import ModelCard

    if before is not None:
        # An old card has the place itself; where a name may be a word, only as a name is written.
        for name in dict.fromkeys([before, shown_base(before)]):
            for left, right in (("`", "`"), ('"', '"'), ("--model ", " ")):
                card = card.replace(f"{left}{name}{right}", f"{left}{base}{right}")
    found: Any = ModelCard(card)
    found.data.base_model, found.data.base_model_relation = base, "adapter"
    others = [tag for tag in found.data.tags or [] if not tag.startswith("base_model:")]
    found.data.tags = [*others, f"base_model:adapter:{base}"]
    return str(found)


def _metadata(name: str, files: AdapterFiles, license: str | None, language: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    info, data = files.info, files.info.data
    named = None if files.base_id is None else hub_name(files.base_id)
    # The Hub takes an id; a place on this machine says nothing there.
    base = None if named is None or is_here(named) else named
    task = _TASKS.get("" if info.task is None else info.task.kind, "text-generation")
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data.hub or f"ptkit/{data.builtin or 'unpublished'}",
            dataset_name=data.hub or data.builtin or "unpublished",
            dataset_config=data.config,
            dataset_revision=data.revision,
            dataset_split=info.test_split,
            metric_type=metric,
            metric_value=round(score.value, 2),
        )
        for metric, score in (info.metrics or {}).items()
    ]
    tags = ["ptkit", files.peft_type.lower().replace("_", "-")]
    tags += [f"base_model:adapter:{base}"] if base is not None else []
    return ModelCardData(
        base_model=base,
        base_model_relation="adapter" if base is not None else None,
        library_name="peft",
        pipeline_tag=task if labels_of_files(files) else "text-generation",
        license=license,
        language=language,
        datasets=[data.hub] if data.hub else None,
        tags=tags,
        model_name=name,
        eval_results=results or None,
    ).to_yaml()


def _body(name: str, files: AdapterFiles, stored_bytes: int, int8: bool, table: str | None) -> str:
    from jinja2 import Environment, PackageLoader

    info, base = files.info, "its base" if files.base_id is None else shown_base(files.base_id)
    section = method_of_files(files.peft_type, info.method_kind)
    kind = file_type(files.peft_type, info.method_kind)
    method = files.peft_type
    if section is not None and kind is not None:
        method = kind.name or section.display_name
    labels = labels_of_files(files)
    if info.method is not None and info.method.settings.get("reparameterize"):
        method += " (made by an MLP, folded in)"
    values = sum(t.numel() for t in files.tensors.values())
    parameters, template = info.base.parameters, info.template or ""
    words = info.task and info.task.verbalizer
    environment = Environment(
        loader=PackageLoader("ptkit.hub", "."), trim_blocks=True, lstrip_blocks=True,
        autoescape=False,  # Markdown, not HTML
    )  # fmt: skip
    text = environment.get_template("card.md.jinja").render(
        name=name,
        place=PLACE,
        info=None if info.empty else info,
        base=base,
        base_source=_source_of_base(base),
        place_of_base=base == TINY_EN or base in PACKAGED,
        method=f"{method[:1].upper()}{method[1:]}",
        data=_data(info),
        parameters=values,
        share=values / parameters if parameters else None,
        bytes=stored_bytes,
        dtype=info.dtype or _dtype(files),
        virtual_tokens=files.config.get("num_virtual_tokens"),
        metrics=info.metrics,
        rows_scored=info.rows_scored,
        lost=info.int8_lost if int8 else None,
        table=table and table.strip(),
        retention=info.retention,
        gate=info.gate,
        distilled=info.distilled,
        unreadable="8-bit integers" if int8 else kind and kind.unreadable,
        template=template.encode("unicode_escape").decode(),
        example=repr(template or "..."),
        labels=", ".join(f"`{word.strip()}`" for word in (words or {}).values())
        or ", ".join(f"`{name}`" for name in (labels.names if labels else ())),
        head={
            None: "CausalLM",
            "sequence": "SequenceClassification",
            "token": "TokenClassification",
        }[labels and labels.kind],
        outputs=len(labels.names) if labels else None,
        fingerprint=info.base.fingerprint,
        recipe=RECIPE in files.texts,
        versions=_versions(info.versions),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _source_of_base(base: str) -> str:
    """What transformers loads the base by: an id of the Hub, or a placeholder for its folder."""
    if base == TINY_EN or base in PACKAGED:
        return f"path/to/{base}"
    return WHEELS[base].hub if base in WHEELS else base


def _data(info: AdapterInfo) -> str:
    if info.distilled is not None:
        return "texts it wrote itself"
    if info.data.hub:
        return f"`{info.data.hub}`"
    if info.data.builtin:
        return f"`{info.data.builtin}`, a data set that ships with ptkit"
    return "data that is not published"


def _dtype(files: AdapterFiles) -> str:
    return str(next(iter(files.tensors.values())).dtype).removeprefix("torch.")


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
