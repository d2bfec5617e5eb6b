"""Models, data and adapters by hub id: the real clients against a Hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from test_cli import QUICK

from ptkit.data.sources import BUILTIN
from ptkit.runtime.base_model import TINY_EN_FOLDER

SHIPPED = Path(__file__).resolve().parents[1] / "adapters"
FACTS = "kind[boat], name[Orwick]"
SHORT = ("--max-new-tokens", "8", "--json")


@dataclass
class Client:
    """Runs ptkit in a process of its own, with a cache and an address of the Hub."""

    url: str
    cache: Path
    cwd: Path

    def __call__(self, *arguments: str | Path, code: int = 0, offline: bool = False):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        env |= {
            "HF_ENDPOINT": self.url, "HF_HOME": str(self.cache),
            "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "ptkit", *map(str, arguments)], cwd=self.cwd, env=env,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(TINY_EN_FOLDER, root / "models/team/tiny/main")
    pickled = root / "models/team/pickled/main"
    shutil.copytree(TINY_EN_FOLDER, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    adapter = root / "models/team/facts"
    shutil.copytree(SHIPPED / "facts-prefix", adapter / "main")
    torch.save({}, adapter / "main" / "training_args.bin")
    shutil.copytree(SHIPPED / "facts-prompt", adapter / "v1.0")
    shutil.copytree(SHIPPED / "facts-prefix", root / "models/team/secret/main")
    shutil.copytree(TINY_EN_FOLDER, root / "models/team/gated-base/main")
    for revision, rows in (("main", 60), ("small", 30)):
        data = root / "datasets/team/facts-data" / revision / "data"
        data.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            lines = (BUILTIN / "facts-to-text" / f"{split}.jsonl").read_text().splitlines()
            (data / f"{split}.jsonl").write_text("\n".join(lines[:rows]) + "\n")
    with HubServer(root) as running:
        running.hub.gated |= {"team/secret", "team/gated-base"}
        yield running


@pytest.fixture(scope="module")
def client(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Client:
    folder = tmp_path_factory.mktemp("client")
    return Client(server.url, folder / "cache", folder)


def output(done: subprocess.CompletedProcess[str]) -> str:
    return json.loads(done.stdout.splitlines()[-1])["output"]


def test_model_and_adapter_by_hub_id_and_offline_afterwards(client: Client, server) -> None:
    local = output(client("generate", FACTS, "-a", SHIPPED / "facts-prefix", *SHORT))
    hub = ("generate", FACTS, "--model", "team/tiny", "-a", "team/facts", *SHORT)
    asked = len(server.hub.requests)
    assert output(client(*hub)) == local
    fetched = server.hub.requests[asked:]
    assert any("model.safetensors" in request for request in fetched)
    assert not any(".bin" in request and "training_args" in request for request in fetched)
    asked = len(server.hub.requests)
    assert output(client(*hub, offline=True)) == local
    assert len(server.hub.requests) == asked
    revision = output(client("generate", FACTS, "-a", "team/facts@v1.0", *SHORT))
    assert revision == output(client("generate", FACTS, "-a", SHIPPED / "facts-prompt", *SHORT))
    assert revision != local


def test_trains_and_compares_on_a_hub_model_and_hub_data(client: Client) -> None:
    (client.cwd / "hub.yaml").write_text(
        "name: hub\n"
        "model: {id: team/tiny, attention: eager, dtype: bfloat16}\n"
        "task:\n"
        "  kind: generation\n"
        "  data: {hub: team/facts-data, revision: small, limits: {test: 4, validation: 8}}\n"
        "  input: '{facts}\\n'\n"
        "  target: '{text}'\n"
        "  metrics: [bleu]\n"
        "  max_target_tokens: 24\n"
        "methods:\n"
        "  - {kind: base}\n"
        "  - {kind: prefix_tuning, num_virtual_tokens: 4}\n"
        "seeds: [0]\n"
        "train: {steps: 4, eval_every: 2, save_every: 2, batch_size: 4}\n"
    )
    done = client("train", "hub.yaml", "--quiet", "--json")
    assert json.loads(done.stdout)["train_steps"] == 4
    # From the cache alone afterwards.
    again = client("compare", "hub.yaml", "--quiet", offline=True)
    assert "prefix_tuning" in again.stdout
    record = json.loads(
        next((client.cwd / "runs/hub").rglob("prefix_tuning-seed0/record.json")).read_text()
    )
    assert record["train_steps"] == 4


def test_what_the_hub_refuses_is_told_with_exit_code_2(client: Client) -> None:
    def message(*arguments: str) -> str:
        return client(*arguments, code=2).stderr

    def with_data(*settings: str) -> str:
        pairs = [p for s in settings for p in ("--set", s)]
        return message("train", "quickstart", *QUICK, "--set", "task.data.builtin=null", *pairs)

    assert "`team/nothing`" in message("generate", "x", "--model", "team/nothing")
    assert "gated" in message("generate", "x", "--model", "team/gated-base")
    assert "safetensors" in message("generate", "x", "--model", "team/pickled")
    unknown = message("generate", "x", "-a", "team/nothing")
    assert "no such adapter: team/nothing is neither a folder here nor" in unknown
    assert "team/facts has no revision `v9`" in message("generate", "x", "-a", "team/facts@v9")
    assert "team/secret is gated" in message("generate", "x", "-a", "team/secret")
    assert "adapter_config.json" in message("generate", "x", "-a", "team/tiny")
    assert "`team/nothing` cannot be loaded" in with_data("task.data.hub=team/nothing")
    assert "`team/facts-data` cannot be loaded" in with_data(
        "task.data.hub=team/facts-data", "task.data.revision=v9"
    )
    assert "has no split `dev`; known: test, train, validation" in with_data(
        "task.data.hub=team/facts-data", "task.data.splits.validation=dev"
    )


def test_no_hub_and_an_empty_cache(server, tmp_path: Path) -> None:
    nowhere = Client("http://127.0.0.1:9", tmp_path / "cache", tmp_path)
    down = nowhere("generate", "x", "--model", "team/tiny", code=2).stderr
    assert "cannot load the base model `team/tiny`" in down
    down = nowhere("generate", "x", "-a", "team/facts", code=2).stderr
    assert "nor in the Hub's cache, and the Hub cannot be reached" in down


def test_stand_in_knows_commits(server: HubServer, monkeypatch) -> None:
    """The stand-in itself: what the tests above rest on."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=server.url)
    commit = api.model_info("team/facts").sha
    assert commit != api.model_info("team/facts", revision="v1.0").sha
    assert api.model_info("team/facts", revision=commit).sha == commit
    assert "adapter_config.json" in api.list_repo_files("team/facts")
