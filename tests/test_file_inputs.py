"""Files of rows and columns as inputs of `ptkit generate` and `ptkit classify`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ptkit.cli.main import app
from ptkit.data.inputs import table_inputs, table_sentences
from ptkit.errors import DataError, UserError

ADAPTERS = Path(__file__).resolve().parents[1] / "adapters"
FACTS = ["kind[boat], name[Rosen]", "kind[inn], name[Orwick], seats[six]"]
MESSAGES = ["the parcel was left in the rain", "I was charged twice\u2028for it"]


def ptkit(*words: str | Path) -> list[dict[str, str]]:
    done = CliRunner().invoke(app, [*map(str, words), "--json"], catch_exceptions=False)
    return [json.loads(line) for line in done.stdout.split("\n") if line]


def write(folder: Path, ending: str, column: str, values: list[str]) -> Path:
    path = folder / f"rows{ending}"
    rows = [{"id": str(i), column: value} for i, value in enumerate(values)]
    with path.open("w", encoding="utf-8", newline="") as file:
        if ending == ".csv":
            writer = csv.DictWriter(file, ["id", column])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_generate_reads_the_columns_of_the_adapters_template(ending: str, tmp_path: Path) -> None:
    file = write(tmp_path, ending, "facts", FACTS)
    options = ("-a", ADAPTERS / "facts-prefix", "--base", "--max-new-tokens", "6")
    by_column = ptkit("generate", "--input", file, *options)
    by_hand = ptkit("generate", *FACTS, *options)
    assert [row["output"] for row in by_column] == [row["output"] for row in by_hand]
    assert [row["input"] for row in by_column] == [f"{facts}\n" for facts in FACTS for _ in "ab"]


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_classify_reads_the_columns_of_the_adapters_template(ending: str, tmp_path: Path) -> None:
    file = write(tmp_path, ending, "message", MESSAGES)
    by_column = ptkit("classify", "--input", file, "-a", ADAPTERS / "routing-prefix")
    by_hand = ptkit("classify", *MESSAGES, "-a", ADAPTERS / "routing-prefix")
    assert [row["probabilities"] for row in by_column] == [row["probabilities"] for row in by_hand]


def test_what_a_data_file_lacks_is_told(tmp_path: Path) -> None:
    other = write(tmp_path, ".csv", "texts", ["a"])
    with pytest.raises(DataError, match=r"`input` names the column `text`.*did you mean `texts`"):
        table_inputs(other, "{text}\n")
    empty = write(tmp_path, ".jsonl", "text", ["a", "b"])
    empty.write_text(empty.read_text() + '{"text": null}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, row 3: `input` names `text`, .*missing"):
        table_inputs(empty, "{text}\n")
    with pytest.raises(DataError, match="no adapter's template says what an input is made of"):
        table_inputs(other, None)
    with pytest.raises(UserError, match="--raw takes inputs as they are"):
        ptkit("generate", "--raw", "--input", other, "-a", ADAPTERS / "facts-prefix")
    with pytest.raises(UserError, match="either as arguments or with --input"):
        ptkit("classify", "x", "--input", other, "-a", ADAPTERS / "routing-prefix")


def test_words_of_sentences_are_a_list_or_split_at_spaces(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"tokens": ["New York", "won"]}\n{"tokens": "it rained"}\n')
    assert table_sentences(path, "tokens") == [["New York", "won"], ["it", "rained"]]
    with pytest.raises(DataError, match="has no column `words`"):
        table_sentences(path, "words")
    path.write_text('{"tokens": []}\n')
    with pytest.raises(DataError, match=r"row 1: `tokens` should be a list of words"):
        table_sentences(path, "tokens")
