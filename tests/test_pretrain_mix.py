"""The generated share of the pre-training mix."""

from __future__ import annotations

import re
import sys
from itertools import islice
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
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
