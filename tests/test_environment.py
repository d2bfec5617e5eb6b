"""`ptkit env`: what a report of a fault needs, and nothing that names a person or a folder."""

from __future__ import annotations

import getpass
import json
from importlib.metadata import version
from pathlib import Path

import torch
from test_cli import ptkit


def test_env_says_versions_devices_and_extras(tmp_path: Path) -> None:
    told = ptkit("env", cwd=tmp_path).stdout
    for package in ("torch", "peft", "transformers"):
        assert version(package) in told
    assert f"{torch.get_num_threads()} threads" in told
    assert str(Path.home()) not in told
    assert getpass.getuser() not in told.split()


def test_env_as_json_says_the_same(tmp_path: Path) -> None:
    told = json.loads(ptkit("env", "--json", cwd=tmp_path).stdout)
    assert told["torch"] == version("torch")
    assert "evaluate" in told["extras"]
    assert "evaluate" not in told["missing"]
    assert ptkit("env", "--quiet", cwd=tmp_path).stdout.strip() == version("ptkit")
