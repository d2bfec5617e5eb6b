"""`make demo`: the main job from end to end, offline, on the embedded base model.

1. compares prompt tuning, prefix tuning, P-tuning, LoRA and full fine-tuning,
2. exports two of the trained adapters, a few kilobytes each,
3. answers the same input with the base and both adapters in one mixed batch, and swaps one.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

#: Of the recipe's three seeds and 200 steps, so that old processors take minutes, too.
SHORTENED = ("--set", "seeds=[0, 1]", "--set", "train.steps=100")
EXAMPLE = "kind[robot], name[Ferro], task[waters the plants], colour[green], battery[9 hours]"


def run(*command: str) -> None:
    """Show a command as a user would type it, and run it."""
    print(f"\n$ ptkit {shlex.join(command)}", flush=True)
    subprocess.run([sys.executable, "-m", "ptkit", *command], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("comparisons/demo"))
    out: Path = parser.parse_args().out
    run("compare", "table-to-text", *SHORTENED, "--out", str(out))
    exported = []
    for method in ("prefix_tuning", "prompt_tuning"):
        cell = out / "cells" / f"{method}-seed0"
        target = out / "adapters" / method
        run("export", str(cell), "--out", str(target), "--dtype", "bfloat16", "--force")
        exported.append(target)
    run("inspect", str(exported[0]))
    adapters = [part for target in exported for part in ("--adapter", str(target))]
    run("generate", EXAMPLE, "--base", *adapters)
    print(f"\nOpen {out / 'report.html'} in a browser for the full report.")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except KeyboardInterrupt:
        sys.exit(2)
