"""Makes the adapters that ship in `adapters/`, with the shipped recipes and the embedded base.

    python scripts/make_adapters.py [--runs DIR]

Run it again whenever the embedded base model changes: an adapter fits one base only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: name -> (recipe, method)
ADAPTERS = {
    "facts-prefix": ("table-to-text", "prefix_tuning"),
    "facts-prompt": ("table-to-text", "prompt_tuning"),
    "routing-prefix": ("message-routing", "prefix_tuning"),
    "routing-ptuning": ("message-routing", "p_tuning"),
}


def ptkit(*arguments: str) -> None:
    """Run a command as a user would."""
    subprocess.run([sys.executable, "-m", "ptkit", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "shipped")
    runs: Path = parser.parse_args().runs
    for name, (recipe, method) in ADAPTERS.items():
        run, out = runs / name, ROOT / "adapters" / name
        ptkit("train", recipe, "--method", method, "--seed", "0", "--out", str(run))
        card = ("--license", "apache-2.0", "--language", "en")
        ptkit("export", str(run), "--out", str(out), "--dtype", "bfloat16", "--force", *card)


if __name__ == "__main__":
    main()
