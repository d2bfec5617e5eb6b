"""Makes a data set whose test rows are of kinds that training and validation never show.

python scripts/hold_out.py COLUMN=VALUE[,VALUE...] --train FILE --validation FILE
    [--test FILE ...] --out DIR

Rows of the training and validation files whose COLUMN has one of the values are left out of
OUT/train.jsonl and OUT/validation.jsonl; those of the validation and test files that have one
become OUT/test.jsonl.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path


def rows_of(files: Iterable[Path]) -> list[dict[str, object]]:
    """The rows of JSON Lines files."""
    # By lines of the file: `splitlines` would also end one at a U+2028 or U+0085 within a text.
    lines = (line for file in files for line in file.read_text(encoding="utf-8").split("\n"))
    return [json.loads(line) for line in lines if line]


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """Write `rows` to `path` as JSON Lines, and say how many."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("held", metavar="COLUMN=VALUE[,VALUE...]")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--validation", type=Path, required=True)
    parser.add_argument("--test", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    column, _, values = given.held.partition("=")
    held = set(values.split(","))
    found = {str(row.get(column)) for row in rows_of([given.train])}
    if missing := held - found:
        parser.error(f"no training row has {column} {', '.join(sorted(missing))}")
    given.out.mkdir(parents=True, exist_ok=True)
    for split, files in (("train", [given.train]), ("validation", [given.validation])):
        kept = [row for row in rows_of(files) if str(row.get(column)) not in held]
        write(given.out / f"{split}.jsonl", kept)
    unseen = [r for r in rows_of([given.validation, *given.test]) if str(r.get(column)) in held]
    write(given.out / "test.jsonl", unseen)


if __name__ == "__main__":
    main()
