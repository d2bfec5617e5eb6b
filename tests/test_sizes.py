"""Sizes in bytes: one way to write them, one way to read them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_architecture import MODULES

from ptkit.bench.result import Figure
from ptkit.cli.bench_table import _value
from ptkit.comparison import figures
from ptkit.errors import UserError
from ptkit.formats.sizes import in_bytes, read_bytes


@given(st.integers(0, 10**13))
def test_what_is_written_is_read_again_up_to_rounding(count: int) -> None:
    assert read_bytes(in_bytes(count)) == pytest.approx(count, rel=0.05)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4 GB", 4 * 10**9), ("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("2G", 2 * 10**9),
        ("2gi", 2**31), (" 64 kb ", 64_000), ("750000", 750_000),
    ],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert read_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "-1MB", "1e3", "4 TBit", "four"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no size; write 500MB"):
        read_bytes(text)


@given(st.integers(1, 10**12))
def test_reports_and_benchmarks_write_them_alike(count: int) -> None:
    assert figures.size(count) == _value(Figure("", count, "bytes"), count) == in_bytes(count)


def test_no_other_module_writes_a_unit_of_bytes() -> None:
    unit = re.compile(r"\}\s?(?:[KMG]i?B)\b|/ ?(?:1e[369]|1024|10\*\*[369])[^\n]*[KMG]i?B")
    for module, path in MODULES.items():
        if module != "ptkit.formats.sizes":
            assert not unit.search(path.read_text()), module
