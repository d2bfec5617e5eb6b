"""The generated share of the pre-training mix."""

from __future__ import annotations

import json
import re
import sys
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import hold_out
import pretrain_data
import text_to_text_mix as mix

LINES = [
    "The old boat drifted slowly past the quiet harbour in the morning.",
    "Two children in yellow coats are feeding the ducks by the pond.",
    "Nobody could say why the letter had taken eleven years to arrive.",
]


@pytest.fixture(scope="module")
def sample() -> list[mix.Document]:
    return list(islice(mix.described(7, LINES), 5000))


def test_same_seed_gives_the_same_documents() -> None:
    first = list(islice(mix.documents(3, LINES), 300))
    assert first == list(islice(mix.documents(3, LINES), 300))
    assert first != list(islice(mix.documents(4, LINES), 300))


def test_documents_are_not_empty_and_many_kinds_occur(sample: list[mix.Document]) -> None:
    assert all(document.text.strip() for document in sample)
    assert len({(d.task, d.layout, d.separator) for d in sample}) >= 200
    assert {d.task for d in sample} == {*mix.TASKS, "induction"}
    assert {d.layout for d in sample if d.task == "to-text"} == set(mix.LAYOUTS)


def test_no_template_is_left_unfilled(sample: list[mix.Document]) -> None:
    for document in sample:
        if not document.task.startswith("line-"):
            for mark in ("{v}", "{k}", "{n}", "{place}", "{person}", "{int:", "{pick:", "a(n)"):
                assert mark not in document.text, document


@pytest.mark.parametrize(
    "text",
    [
        "name : The Vaults | Type : pub | area : riverside",
        "Answer it.\nAarhus Airport | city served | Aarhus ; Aarhus Airport | runway | 2776",
        "name[The Hill], price[cheap]",
    ],
)
def test_evaluation_formats_are_recognised(text: str) -> None:
    assert mix.forbidden(text)


def test_evaluation_formats_and_domains_do_not_occur(sample: list[mix.Document]) -> None:
    banned = re.compile(
        r"\b(restaurants?|pubs?|robots?|customer rating|price range|family friendly|coffee shops?|"
        r"boats? for hire|mountain trails?|market stalls?|city librar(y|ies))\b",
        re.IGNORECASE,
    )
    for document in sample:
        assert not mix.forbidden(document.text), document
        assert not banned.search(document.text), document


def test_separators_within_a_text_end_no_line(tmp_path: Path) -> None:
    """U+2028, U+0085 and a vertical tab are letters of a line; `splitlines` would cut there."""
    rows = [{"text": f"a{mark}b"} for mark in ("\u2028", "\u0085", "\x0b")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert hold_out.rows_of([tmp_path / "rows.jsonl"]) == rows
    text = "".join(f"{line}\u2028{line}\n" for line in LINES * 200)
    blocks = pretrain_data.blocks_of(text)
    assert len(blocks) > 1
    assert "".join(blocks) == text
    assert all(block.endswith("\n") for block in blocks)
    line = f"{LINES[0]}\u2028and more"
    assert pretrain_data.mix_lines({f"{mix.CORPUS_FILES[0]}": [f"{line}\n{LINES[1]}\n"]}) == [
        " ".join(line.split()), LINES[1]
    ]  # fmt: skip
