"""The documentation as a site: every page is in it, and none of its links leads nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
MKDOCS = Path(sys.prefix) / "site" / "bin" / "mkdocs"
sys.path.append(str(ROOT / "scripts"))


class _Settings(yaml.SafeLoader):
    """Reads `!`-tags as nothing, which MkDocs gives a meaning."""


_Settings.add_multi_constructor("!", lambda *_: None)


def pages(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [page for value in values for page in pages(value)]


def test_every_page_is_in_the_site() -> None:
    settings = yaml.load((ROOT / "scripts/mkdocs.yml").read_text(), _Settings)
    written = {page.name for page in (ROOT / "docs").glob("*.md")}
    listed = pages(settings["nav"])
    assert sorted(listed) == sorted(written)


def test_a_link_out_of_the_pages_becomes_a_name() -> None:
    from site_hooks import inside

    assert inside("see [the suite](../tests) and [`a.py`](../scripts/a.py)") == (
        "see the suite (`tests`) and `a.py` (`scripts/a.py`)"
    )
    assert inside("[scripts/a.py](../scripts/a.py#L1)") == "scripts/a.py"
    kept = "[a page](faq.md#x) ![a picture](../p.png)\n```\n[a](../b)\n```\n"
    assert inside(kept) == kept


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    if not MKDOCS.exists():
        pytest.skip("MkDocs is not here: make site")
    command = [MKDOCS, "build", "--strict", "-f", ROOT / "scripts/mkdocs.yml", "-d", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api.html").read_text()
    assert "trainable_model" in page
    assert "fonts.googleapis" not in page
