"""Print the table of docs/foreign.md: what becomes of other libraries' adapters.

python scripts/make_foreign_table.py
"""

from pathlib import Path

from ptkit.declared import declared
from ptkit.hub import foreign


def main() -> None:
    print("| written by | files | becomes | why | test |")
    print("|---|---|---|---|---|")
    for rows in declared(Path(foreign.__file__).parent, "FORMATS").values():
        for row in rows:
            print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
