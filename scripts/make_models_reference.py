"""Writes docs/models.md and docs/models.json: ptkit and PEFT, asked the same of every family.

python scripts/make_models_reference.py [FAMILY ...]     # some families only: the rest is kept
python scripts/make_models_reference.py --kind "encoder as token classifier"       # one kind only
"""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft_candidate import Peft

from ptkit.families.candidate import NOT_ASKED, PtkitCandidate
from ptkit.families.kinds import KINDS, ModelKind
from ptkit.families.matrix import (
    Make,
    MatrixCell,
    Status,
    family_kinds,
    model_under_test,
    run_matrix,
)
from ptkit.families.properties import PROPERTIES
from ptkit.families.shapes import FAMILIES

DOCS = Path(__file__).resolve().parents[1] / "docs"
PROGRAMS: dict[str, Make] = {"ptkit": PtkitCandidate.made, "PEFT": Peft.made}
MARKS = {
    Status.works: "✓", Status.wrong: "✗", Status.refused: "r", Status.raises: "!",
    Status.not_applicable: "·",
}  # fmt: skip

LETTERS = {
    Status.works: "w", Status.wrong: "x", Status.refused: "r", Status.raises: "!",
    Status.not_applicable: "-",
}  # fmt: skip

#: Program -> its cells.
Results = dict[str, list[MatrixCell]]
#: What is asked together: a family, as one of its kinds.
Asked = tuple[str, ModelKind]

HEAD = """# Models

This page says which methods work on which family of models, in ptkit and in plain PEFT. One program
asked both the same questions. Each family was made small and random: few layers, narrow, with the
family's own kinds of layers, heads, windows and positions. An *oracle* decides what is right: the
plain model that reads one row at a time, unpadded, with no cache. `ptkit models check` asks the
same questions of your model:

```console
$ ptkit models check llama
$ ptkit models check mistralai/Mistral-7B-v0.1 --method prompt
$ ptkit models check path/to/my-finetune --full     # the real weights
```

An encoder is asked as a sequence and as a token classifier, a decoder as a language model and as a
sequence classifier.

This page is made by `scripts/make_models_reference.py`; a test runs parts of it again.
"""

ORACLES = """## What is asked

Each method has an oracle of its own:

- soft prompt: its embeddings before those of the words;
- text prompt: its tokens before the row's;
- prefix: `softmax(q [p; k]) [p; v]` written out in every attention (Li & Liang 2021, section 4),
  where every word sees the whole prefix; the model's own cache where attention cannot be replaced;
- infix: on one layer, the base that reads it in its place;
- LoRA: the weights with the matrices added;
- linear probe: the base with the trained head.

A layer's window hides a soft prompt or a text prompt as it hides text. It never hides a prefix.

In encoders, also those of encoder-decoders, ptkit's virtual tokens take no positions. Words keep
theirs, and a head finds `[CLS]`, or the mean of the words, at its usual place. In PEFT virtual
tokens take the first positions. This is judged as PEFT defines it, and so is its prefix of an
encoder-decoder, the decoder's part only. These results are wrong under either definition:

- a virtual token is pooled in place of `[CLS]`;
- words are read as the base does not read them (Marian and Pegasus scale their embeddings);
- the prefix is lost;
- a part of the head comes back at random (DeBERTa's layer before the classifier, for which
  pretrained checkpoints have no weights).

Each classifier is asked with the task type that PEFT has for it. PEFT's LoRA of token classifiers
and of DistilBERT gets the setting to leave the head alone. Its prompts of DistilBERT get the sizes
that PEFT asks for.
"""


def measured(asked: Iterable[Asked]) -> Results:
    """Both programs on the families, as the kinds `asked`."""
    tested_models = [model_under_test(family, kind.name) for family, kind in asked]
    return {
        name: [cell for tested in tested_models for cell in run_matrix(tested, make=make)]
        for name, make in PROGRAMS.items()
    }


def as_json(results: Results) -> str:
    """The cells as the file keeps them: per kind, family and method one letter for each property,
    and the number of the reason for each that does not work."""
    reasons = sorted({c.detail for cells in results.values() for c in cells if c.detail})
    number = {reason: i for i, reason in enumerate(reasons)}
    table: dict[str, Any] = {}
    for name, cells in results.items():
        for cell in cells:
            kind = table.setdefault(name, {}).setdefault(cell.kind, {})
            entry = kind.setdefault(cell.model, {}).setdefault(cell.method, ["", []])
            entry[0] += LETTERS[cell.status]
            if cell.status is not Status.works:
                entry[1].append(number[cell.detail])
    data = {
        "versions": {"peft": peft.__version__, "transformers": transformers.__version__,
                     "torch": torch.__version__.partition("+")[0]},
        "properties": list(PROPERTIES), "reasons": reasons, "cells": table,
    }  # fmt: skip
    text = json.dumps(data, ensure_ascii=False, indent=1)
    return re.sub(r"\[[^\[\]]*\]", lambda m: re.sub(r"\n\s*", " ", m[0]), text) + "\n"


def from_json(text: str) -> tuple[Results, dict[str, str]]:
    """The cells, and the versions they were measured with."""
    data = json.loads(text)
    statuses = {letter: status for status, letter in LETTERS.items()}
    results: Results = {}
    for name, kinds in data["cells"].items():
        entries = [(kind, family, method, *found) for kind, families in kinds.items()
                   for family, methods in families.items()
                   for method, found in methods.items()]  # fmt: skip
        results[name] = []
        for kind, family, method, letters, numbers in entries:
            why = iter(numbers)
            for asked, letter in zip(data["properties"], letters, strict=True):
                status = statuses[letter]
                detail = "" if status is Status.works else data["reasons"][next(why)]
                results[name].append(MatrixCell(family, kind, method, asked, status, detail))
    return results, data["versions"]


def page(results: Results, versions: dict[str, str]) -> str:
    """docs/models.md."""
    parts = [HEAD, _summary(results, versions), ORACLES, _questions()]
    for kind in KINDS:
        parts.append(_tables(results, kind))
    parts += [_reasons(results), ""]
    return "\n".join(parts)


def _counts(cells: Iterable[MatrixCell]) -> Counter[Status]:
    return Counter(cell.status for cell in cells)


def _possible(counts: Counter[Status]) -> int:
    return sum(counts.values()) - counts[Status.not_applicable]


def _summary(results: Results, versions: dict[str, str]) -> str:
    """The totals; PEFT's beside those of ptkit on the methods both have."""
    methods = {c.method for c in results["PEFT"] if c.status is not Status.not_applicable}
    both = [c for c in results["ptkit"] if c.method in methods]
    rows = [("ptkit, the methods asked about", results["ptkit"]),
            ("ptkit, those of them PEFT has", both),
            ("PEFT", [c for c in results["PEFT"] if c.method in methods])]  # fmt: skip
    lines = [
        "| | works | silently wrong | raises | refused | of |", "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for title, cells in rows:
        n = _counts(cells)
        lines.append(
            f"| {title} | {n[Status.works]} ({n[Status.works] / _possible(n):.1%}) | "
            f"{n[Status.wrong]} | {n[Status.raises]} | {n[Status.refused]} | {_possible(n)} |"
        )
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    names = ", ".join(dict.fromkeys(method for kind in KINDS for method in kind.methods))
    return "\n".join([
        "## In short", "", *lines, "", f"Measured with {said}.", "",
        f"Methods asked about: {names}.", "",
        "Each was asked on the kinds of models that have a table for it below.", "",
        "Methods not asked about:", "",
        *(f"- `{kind}`: {why}" for kind, why in NOT_ASKED.items()), "",
        "These have tests of their own, on small models of a few families.", "",
    ])  # fmt: skip


def _questions() -> str:
    lines = ["| property | what must hold |", "|---|---|"]
    for title, check in PROPERTIES.items():
        said = " ".join((check.__doc__ or "").split())
        lines.append(f"| {title} | {said} |")
    return "\n".join([*lines, ""])


def _tables(results: Results, kind: ModelKind) -> str:
    """One table per method: families by properties, ptkit's mark and PEFT's."""
    families = [n for n in FAMILIES if kind in family_kinds(n)]
    marks = {
        (name, c.model, c.method, c.property): MARKS[c.status]
        for name, cells in results.items()
        for c in cells
        if c.kind == kind.name
    }
    title, _, use = kind.name.partition(" ")
    lines = [f"## {title.capitalize()}s{use and f' {use}s'}", "",
             "Left ptkit, right PEFT: ✓ works, ✗ silently wrong, ! raises an error, r refused with "
             "the reason, · nothing to ask.", ""]  # fmt: skip
    for method in kind.methods:
        asked = [p for p in PROPERTIES if any(
            marks["ptkit", f, method, p] != "·" for f in families)]  # fmt: skip
        lines += [f"### {method}", "", f"| | {' | '.join(asked)} |",
                  "|---|" + ":-:|" * len(asked)]  # fmt: skip
        for family in families:
            cells = [marks["ptkit", family, method, p] + " " + marks["PEFT", family, method, p]
                     for p in asked]  # fmt: skip
            lines.append(f"| {family} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _reasons(results: Results) -> str:
    """Why, for every cell that does not work."""
    lines: list[str] = []
    for name, cells in results.items():
        for status, title in ((Status.refused, "refuses"), (Status.wrong, "gets wrong"),
                              (Status.raises, "raises")):  # fmt: skip
            found = [c for c in cells if c.status is status]
            if not found:
                continue
            lines += [f"## What {name} {title}", ""]
            lines += _grouped(found, with_detail=status is not Status.wrong)
            lines.append("")
    return "\n".join(lines)


def _grouped(cells: Sequence[MatrixCell], *, with_detail: bool) -> list[str]:
    """A table with a row per reason (or per method and property) and whom it is about."""
    groups: dict[str, list[MatrixCell]] = {}
    for cell in cells:
        # Sentences name the model and its class: the same reason whoever it is.
        named = (f"`{cell.model}`", f"a small {cell.model}", cell.model)
        reason = functools.reduce(lambda s, n: s.replace(n, "the model"), named, cell.detail)
        key = reason if with_detail else f"{cell.method}: {cell.property}"
        groups.setdefault(key, []).append(cell)
    head = ("reason", "methods") if with_detail else ("property", "method")
    lines = [f"| {head[0]} | {head[1]} | families |", "|---|---|---|"]
    for reason, about in groups.items():
        families = ", ".join(_names(about))
        methods = ", ".join(dict.fromkeys(c.method for c in about))
        what = reason if with_detail else about[0].property
        lines.append(f"| {what.replace('|', chr(92) + '|')} | {methods} | {families} |")
    return lines


def _names(cells: Iterable[MatrixCell]) -> list[str]:
    """Whom `cells` are about, each once."""
    labelled = {kind.name for kind in KINDS if kind.head is not None}
    names = (f"{c.model} ({c.kind.partition(' as ')[2]})" if c.kind in labelled else c.model
             for c in cells)  # fmt: skip
    return list(dict.fromkeys(names))


def main(families: Sequence[str], kind: str | None) -> None:
    """Measure `families` (all by default) as `kind` (all by default) and write both files."""
    order = [(name, k.name) for k in KINDS for name in FAMILIES if k in family_kinds(name)]
    asked = [(name, k) for name in families or FAMILIES for k in family_kinds(name)
             if kind in (None, k.name)]  # fmt: skip
    results: Results = {name: [] for name in PROGRAMS}
    kept = DOCS / "models.json"
    if kept.exists():
        results, _ = from_json(kept.read_text())
    new = {(name, k.name) for name, k in asked}
    for name, cells in measured(asked).items():
        places = [(c.model, c.kind) for c in results[name]]
        old = [c for c, at in zip(results[name], places, strict=True) if at in {*order} - new]
        results[name] = sorted([*old, *cells], key=lambda c: order.index((c.model, c.kind)))
    kept.write_text(as_json(results), encoding="utf-8")
    (DOCS / "models.md").write_text(page(*from_json(kept.read_text())), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS])
    arguments = parser.parse_args()
    main(arguments.families, arguments.kind)
