"""Models, data and adapters by hub id: the real clients against a Hub on this machine."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, List, Value
from hub_server import HubServer
from serving import Serving
from test_cli import QUICK

from ptkit.data.read_files import read_files
from ptkit.data.sources import BUILTIN
from ptkit.recipe.load import load_recipe, shipped_recipes
from ptkit.runtime.model_names import TINY_EN_FOLDER, WHEELS

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
        done = self._run("-m", "ptkit", *map(str, arguments), offline=offline)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    def python(
        self, code: str, *arguments: str, offline: bool = False
    ) -> subprocess.CompletedProcess[str]:
        """Run a Python program with the same cache and address."""
        done = self._run("-c", code, *arguments, offline=offline)
        assert done.returncode == 0, done.stderr
        return done

    def refusals(self, *commands: Sequence[str]) -> list[str]:
        """The messages of commands that must exit with 2, all run in one process: starting one
        takes seconds."""
        code = (
            "import contextlib, io, json, sys\n"
            "from ptkit.cli.main import run\n"
            "for words in json.loads(sys.argv[1]):\n"
            "    message, ended = io.StringIO(), 0\n"
            "    sys.argv = ['ptkit', *words]\n"
            "    with contextlib.redirect_stderr(message):\n"
            "        try:\n"
            "            run()\n"
            "        except SystemExit as error:\n"
            "            ended = error.code\n"
            "    print(json.dumps([ended, message.getvalue()]), flush=True)\n"
        )
        lines = self.python(code, json.dumps(commands)).stdout.splitlines()
        results = [json.loads(line) for line in lines]
        assert [ended for ended, _ in results] == [2] * len(commands), results
        assert not any("Traceback" in message for _, message in results)
        return [message for _, message in results]

    def _run(self, *words: str, offline: bool) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        env |= {
            "HF_ENDPOINT": self.url, "HF_HOME": str(self.cache),
            "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip
        return forked.run(
            [sys.executable, *words], cwd=self.cwd, env=env, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip


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
    theirs = root / "models/team/theirs/main"
    theirs.mkdir(parents=True)
    (theirs / "adapter_config.json").write_text(
        '{"config": {"architecture": "prefix_tuning"}, "model_type": "gpt2"}'
    )
    (theirs / "pytorch_adapter.bin").write_bytes(b"pickled")
    shutil.copytree(TINY_EN_FOLDER, root / "models/team/gated-base/main")
    for revision, rows in (("main", 60), ("small", 30)):
        data = root / "datasets/team/facts-data" / revision / "data"
        data.mkdir(parents=True)
        for split in ("train", "validation", "test"):
            lines = (BUILTIN / "facts-to-text" / f"{split}.jsonl").read_text().splitlines()
            if (revision, split) != ("small", "validation"):
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


def test_the_original_of_a_named_model_is_fetched_whole_or_not_at_all(
    client: Client, server: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`ptkit models get --hub`; what is there under the original's name is the embedded model."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("PTKIT_CACHE", str(cache))
    original = WHEELS["smollm2-135m"].hub
    get = ("models", "get", "smollm2-135m", "--hub")
    missing = client(*get, code=1)
    assert f"cannot download {original} from the hub" in missing.stderr
    assert not [*cache.rglob("config.json")]

    shutil.copytree(TINY_EN_FOLDER, server.hub.root / "models" / original / "main")
    got = client(*get)
    assert f"downloading {original}" in got.stderr
    folder = Path(got.stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == (
        TINY_EN_FOLDER / "model.safetensors"
    ).read_bytes()
    adapter = ("generate", FACTS, "-a", SHIPPED / "facts-prefix", *SHORT)
    named = (*adapter, "--model", "smollm2-135m")
    assert output(client(*named, offline=True)) == output(client(*adapter))
    asked = len(server.hub.requests)
    client(*get)
    assert len(server.hub.requests) == asked


def test_a_server_loads_an_adapter_from_the_hub_where_that_is_allowed(
    server: HubServer, tmp_path: Path
) -> None:
    env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
    options = ["--model", "team/tiny", "--allow-hub", "--budget", "1MB"]
    with Serving(SHIPPED, tmp_path / "log", *options, env=env) as serving:
        for hub, like in (("team/facts", "facts-prefix"), ("team/facts@v1.0", "facts-prompt")):
            assert serving.post("/v1/load_adapter", {"name": "new", "hub": hub}).status_code == 200
            assert serving.completion("new", FACTS) == serving.completion(like, FACTS)
            assert serving.post("/v1/unload_adapter", {"name": "new"}).status_code == 200
        for hub, message in (
            ("team/secret", "team/secret"),
            ("team/none", "team/none"),
            ("../etc", "not a repository"),
        ):
            refused = serving.post("/v1/load_adapter", {"name": "new", "hub": hub})
            assert refused.status_code in (400, 422)
            assert message in refused.json()["error"]["message"]
        assert serving.post("/v1/completions", {"model": "new", "prompt": "x"}).status_code == 404


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
    # Rows without a validation split, once more by the recipe that the run wrote with its adapter.
    adapter = next((client.cwd / "runs/hub").rglob("prefix_tuning-seed0/adapter"))
    assert "bleu" in client("evaluate", "hub.yaml", "-a", adapter, offline=True).stdout
    client("verify", adapter, "--score", offline=True)


def test_what_the_hub_refuses_is_told_with_exit_code_2(client: Client) -> None:
    def with_model(name: str) -> list[str]:
        return ["generate", "x", "--model", name]

    def with_adapter(name: str) -> list[str]:
        return ["generate", "x", "-a", name]

    def with_data(*settings: str) -> list[str]:
        pairs = [p for s in ("task.data.builtin=null", *settings) for p in ("--set", s)]
        return ["train", "quickstart", *QUICK, *pairs]

    expected = [
        (with_model("team/nothing"), "`team/nothing`"),
        (with_model("team/gated-base"), "gated"),
        (with_model("team/pickled"), "only safetensors are read, never pickles"),
        (with_adapter("team/nothing"), "no such adapter: team/nothing is neither a folder here"),
        (with_adapter("team/facts@v9"), "team/facts has no revision `v9`"),
        (with_adapter("team/secret"), "team/secret is gated"),
        (with_adapter("team/theirs"), "team/theirs is an adapter of AdapterHub's `adapters`"),
        (with_adapter("team/tiny"), "team/tiny is on the Hub but holds no adapter"),
        (with_data("task.data.hub=team/nothing"), "`team/nothing` cannot be loaded"),
        (
            with_data("task.data.hub=team/facts-data", "task.data.revision=v9"),
            "`team/facts-data` cannot be loaded",
        ),
        (
            with_data("task.data.hub=team/facts-data", "task.data.splits.validation=dev"),
            "has no split `dev`; known: test, train, validation",
        ),
    ]
    messages = client.refusals(*(command for command, _ in expected))
    for message, (command, said) in zip(messages, expected, strict=True):
        assert said in message, command


def test_no_hub_and_an_empty_cache(server, tmp_path: Path) -> None:
    nowhere = Client("http://127.0.0.1:9", tmp_path / "cache", tmp_path)
    model, adapter = nowhere.refusals(
        ["generate", "x", "--model", "team/tiny"], ["generate", "x", "-a", "team/facts"]
    )
    assert "cannot load the base model `team/tiny`" in model
    assert "nor in the Hub's cache, and the Hub cannot be reached" in adapter


def test_stand_in_knows_commits(server: HubServer, monkeypatch) -> None:
    """The stand-in itself: what the tests above rest on."""
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=server.url)
    commit = api.model_info("team/facts").sha
    assert commit != api.model_info("team/facts", revision="v1.0").sha
    assert api.model_info("team/facts", revision=commit).sha == commit
    assert "adapter_config.json" in api.list_repo_files("team/facts")


#: Hub recipe -> configuration, and one row of its data set as its card describes it.
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, list[str]]]] = {
    "e2e-gpt2": ("e2e_nlg", {"meaning_representation": "name[A]", "target": "A.",
                             "references": ["A."]}, {}),
    "webnlg-gpt2": ("en", {"input": ["A | b | C"], "target": "A b C.", "references": ["A."]}, {}),
    "dart-gpt2": ("dart", {"tripleset": [["A", "b", "C"]], "target": "A b C.",
                           "references": ["A."]}, {}),
    "translation-gpt2": ("default", {"en": "a dog", "de": "ein Hund"}, {}),
    "xsum-bart": ("default", {"document": "It rained.", "summary": "Rain.", "id": "1"}, {}),
    "persona-gpt2": ("default", {"user 1 personas": "I sing.", "user 2 personas": "I swim.",
                                 "Best Generated Conversation": "User 1: Hi"}, {}),
    "sst2-gpt2": ("default", {"sentence": "good", "label": 1}, {"label": ["negative", "positive"]}),
    "agnews-gpt2": ("default", {"text": "goal", "label": 1},
                    {"label": ["World", "Sports", "Business", "Sci/Tech"]}),
    "trec-gpt2": ("default", {"text": "who ?", "coarse_label": 3, "fine_label": 1},
                  {"coarse_label": ["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]}),
    "boolq-gpt2": ("boolq", {"question": "is it", "passage": "It is.", "label": 1},
                   {"label": ["False", "True"]}),
    "rte-gpt2": ("rte", {"premise": "a", "hypothesis": "b", "label": 0},
                 {"label": ["entailment", "not_entailment"]}),
    "cb-gpt2": ("cb", {"premise": "a", "hypothesis": "b", "label": 2},
                {"label": ["entailment", "contradiction", "neutral"]}),
}  # fmt: skip
UNLABELLED = ("sst2-gpt2", "boolq-gpt2", "rte-gpt2", "cb-gpt2")


def test_hub_recipes_read_their_data_sets(client: Client, server: HubServer) -> None:
    """Columns, labels, configurations and revisions of every hub recipe fit its data set."""
    hub_recipes = {n for n, path in shipped_recipes().items() if "hub:" in path.read_text()}
    assert hub_recipes == set(SHAPES)
    readmes: dict[Path, list[str]] = {}
    for name, (config, row, labels) in SHAPES.items():
        section = load_recipe(name).recipe.task.data
        revision = (section.revision or "main").replace("/", ",")
        home = server.hub.root / "datasets" / str(section.hub) / revision
        types = {k: ClassLabel(names=v) for k, v in labels.items()}
        for split in ("train", "validation", "test"):
            if name in ("agnews-gpt2", "trec-gpt2") and split == "validation":
                continue
            unknown = dict.fromkeys(labels, -1) if name in UNLABELLED and split == "test" else {}
            # GEM gives training rows no references.
            bare = {"references": []} if "references" in row and split == "train" else {}
            rows = Dataset.from_list([{**row, **unknown, **bare}] * 12)
            if bare:
                rows = rows.cast_column("references", List(Value("string")))
            for column, label in types.items():
                rows = rows.cast_column(column, label)
            folder = home / config / split
            folder.mkdir(parents=True)
            rows.to_parquet(folder / "0000.parquet")
        if revision == "main":
            readmes.setdefault(home, []).append(config)
    for home, configs in readmes.items():
        described = [
            {"config_name": c, "data_files": [{"split": s, "path": f"{c}/{s}/*.parquet"}
                                              for s in ("train", "validation", "test")
                                              if (home / c / s).is_dir()]}
            for c in configs
        ]  # fmt: skip
        (home / "README.md").write_text(f"---\n{json.dumps({'configs': described})}\n---\n")
    code = (
        "import json, sys\n"
        "from ptkit.data.task import load_task\n"
        "from ptkit.recipe.load import load_recipe\n"
        "for name in sys.argv[1:]:\n"
        "    loaded = load_recipe(name)\n"
        "    data = load_task(loaded.recipe.task, loaded.folder)\n"
        "    print(json.dumps([name, len(data.train), data.test[0].input, data.test[0].target]))\n"
    )
    done = client.python(code, *SHAPES)
    found = {line[0]: line[1:] for line in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == SHAPES.keys()
    assert found["webnlg-gpt2"] == [12, "A | b | C\n", "A b C."]
    assert found["dart-gpt2"][1] == "A | b | C\n"
    assert found["sst2-gpt2"] == [11, "good\nThe review is", " good"]
    assert found["trec-gpt2"] == [11, "who ?\nThe answer is", " a person"]
    assert found["boolq-gpt2"][2] == " yes"
    assert found["xsum-bart"] == [12, "It rained.", "Rain."]


def test_cells_of_csv_data_on_the_hub_are_learnt_as_they_are_written(
    client: Client, server: HubServer
) -> None:
    """By the rule for local files: online, from the cache, and beside what `datasets` keeps."""
    folder = server.hub.root / "datasets/team/odd/main"
    values = {"w": "NA", "x": "02108", "y": "3.10", "z": "TRUE", "d": "1996-12-19", "e": "12E4"}
    lines = ["q;a;note;label", *(f"{q};{a};;{i % 2}" for i, (q, a) in enumerate(values.items()))]
    for part in ("semi", "plain"):
        (folder / part).mkdir(parents=True)
        for split in ("train", "test"):
            text = "\n".join(lines) if part == "semi" else "\n".join(lines).replace(";", "\t")
            name = f"{split}.{'csv' if part == 'semi' else 'tsv'}"
            (folder / part / name).write_text(text + "\n")
    for split in ("train", "test"):
        packed = folder / "packed" / f"{split}.csv.gz"
        packed.parent.mkdir(exist_ok=True)
        packed.write_bytes(gzip.compress("\n".join(lines).encode()))
    names = {"class_label": {"names": {"0": "even", "1": "odd"}}}
    described = {
        "configs": [
            {"config_name": "semi", "sep": ";", "data_files": [
                {"split": s, "path": f"semi/{s}.csv"} for s in ("train", "test")]},
            {"config_name": "packed", "sep": ";", "data_files": [
                {"split": s, "path": f"packed/{s}.csv.gz"} for s in ("train", "test")]},
            {"config_name": "plain", "sep": "\t", "data_files": [
                {"split": s, "path": f"plain/{s}.tsv"} for s in ("train", "test")]},
        ],
        "dataset_info": [{"config_name": "semi", "features": [
            *({"name": n, "dtype": "string"} for n in ("q", "a", "note")),
            {"name": "label", "dtype": names}]}],
    }  # fmt: skip
    (folder / "README.md").write_text(f"---\n{json.dumps(described)}\n---\n")
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from datasets import load_dataset\n"
        "from ptkit.data.sources import load_rows\n"
        "from ptkit.recipe.tasks import DataSection\n"
        "for config in ('plain', 'semi', 'packed'):\n"
        "    if sys.argv[1] == 'first' and config == 'plain':\n"
        "        load_dataset('team/odd', 'plain')\n"
        "    rows = load_rows(DataSection(hub='team/odd', config=config), Path())\n"
        "    print(json.dumps([dict(row) for row in rows.train]))\n"
    )
    for when in ("first", "again", "offline"):
        done = client.python(code, when, offline=when == "offline")
        plain, semi, packed = map(json.loads, done.stdout.splitlines()[-3:])
        for rows in (plain, semi, packed):
            kept = {row["q"]: row["a"] for row in rows}
            assert kept.items() <= values.items()
            assert len(kept) >= len(values) - 1, when  # a tenth is held out for validation
            assert all(row["note"] is None for row in rows)
        assert {row["label"] for row in plain} == {"0", "1"}
        assert {row["label"] for row in semi} == {"even", "odd"}


#: What a reader that gives columns types would change.
ODD_ROWS = (
    '{"q": "a", "n": 1, "day": "1996-12-19", "id": 12345678901234567890, "label": 0}',
    '{"q": "b", "n": 2.50, "day": "NA", "note": null, "label": 1, "tags": [1, 0]}',
    '{"q": "c", "n": 1e3, "day": "2020-01-02T03:04:05", "note": NaN, "label": -1}',
    '{"q": "d", "n": true, "turns": [{"role": "user", "content": 2.0}], "label": 1}',
    '{"q": "e", "n": "x", "turns": [{"role": "tool", "content": {"k": null}}], "label": 0}',
    '{"q": "f\\u2028g", "n": [], "turns": "none", "label": 0}',
)


def test_json_data_on_the_hub_is_the_same_file_read_here(
    client: Client, server: HubServer, tmp_path: Path
) -> None:
    """Lines, lists, one object, a field and compressed ones: online, again, and without a network
    where the common cache holds them with types."""
    folder = server.hub.root / "datasets/team/loose/main"
    folder.mkdir(parents=True)
    lines, listed = "\n".join(ODD_ROWS) + "\n", f"[{', '.join(ODD_ROWS)}]"
    files = {
        "lines": ("train.jsonl", lines.encode()), "list": ("train.json", listed.encode()),
        "marked": ("marked.jsonl", b"\xef\xbb\xbf" + lines.encode()),
        "packed": ("train.jsonl.gz", gzip.compress(lines.encode())),
        "field": ("field.json", f'{{"version": 1, "data": {listed}}}'.encode()),
        "one": ("one.json", b'{\n "q": "a",\n "n": 1\n}\n'),
        "named": ("train.jsonl", lines.encode()),
    }  # fmt: skip
    configs: list[dict[str, Any]] = [
        {"config_name": c,
         "data_files": [{"split": split, "path": name} for split in ("train", "test")]}
        for c, (name, _) in files.items()
    ]  # fmt: skip
    next(c for c in configs if c["config_name"] == "field")["field"] = "data"
    for name, content in files.values():
        (folder / name).write_bytes(content)
    label = {"class_label": {"names": {"0": "even", "1": "odd"}}}
    described = {"configs": configs, "dataset_info": [{"config_name": "named", "features": [
        {"name": "label", "dtype": label}, {"name": "tags", "list": label}]}]}  # fmt: skip
    (folder / "README.md").write_text(f"---\n{json.dumps(described)}\n---\n")
    for name, text in (("lines.jsonl", lines), ("one.json", files["one"][1].decode())):
        (tmp_path / name).write_text(text)
    wanted = {
        name: [dict(row) for row in read_files([tmp_path / name])]
        for name in ("lines.jsonl", "one.json")
    }
    code = (
        "import json, sys\n"
        "from ptkit.data.hub_rows import hub_rows\n"
        "from ptkit.recipe.tasks import DataSection\n"
        "for config in sys.argv[1:]:\n"
        "    rows = hub_rows(DataSection(hub='team/loose', config=config))['test']\n"
        "    print(json.dumps([dict(row) for row in rows]))\n"
    )
    typed = "from datasets import load_dataset\nload_dataset('team/loose', 'one')\n"
    client.python(typed)
    for offline in (False, False, True):
        done = client.python(code, *files, offline=offline)
        found = dict(zip(files, map(json.loads, done.stdout.splitlines()), strict=True))
        named = found.pop("named")
        assert found.pop("one") == wanted["one.json"]
        for rows in found.values():
            assert rows == wanted["lines.jsonl"]
        assert [row["label"] for row in named] == ["even", "odd", None, "odd", "even", "even"]
        assert named[1]["tags"] == ["odd", "even"]
        assert named[1]["n"] == "2.50"


def test_cells_that_only_the_typed_cache_has_are_refused(client: Client, server: HubServer) -> None:
    folder = server.hub.root / "datasets/team/seen/main"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text('{"n": 1}\n{"n": 2.5}\n')
    client.python("from datasets import load_dataset\nload_dataset('team/seen')\n")
    code = (
        "from ptkit.data.hub_rows import hub_rows\n"
        "from ptkit.errors import DataError\n"
        "from ptkit.recipe.tasks import DataSection\n"
        "try:\n"
        "    hub_rows(DataSection(hub='team/seen'))\n"
        "except DataError as error:\n"
        "    print(error)\n"
    )
    told = client.python(code, offline=True).stdout
    assert "`team/seen` cannot be loaded" in told
    assert "inferred types alone; read it once with a network" in told


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "ragged/main/train.csv",
            "a,b\n1,2\n1,2,3\n",
            ["`team/ragged` cannot be loaded", "Expected 2 fields in line 3, saw 3"],
        ),
        (
            "broken/main/train.jsonl",
            '{"a": 1}\n{"a": \n',
            ["`team/broken` cannot be loaded: train.jsonl:2: not valid JSON"],
        ),
    ],
)
def test_a_bad_file_on_the_hub_is_told(
    name: str, content: str, said: list[str], client: Client, server: HubServer
) -> None:
    file = server.hub.root / "datasets/team" / name
    file.parent.mkdir(parents=True)
    file.write_text(content)
    data = f"task.data.hub=team/{name.partition('/')[0]}"
    settings = [p for s in ("task.data.builtin=null", data) for p in ("--set", s)]
    (told,) = client.refusals(["train", "quickstart", *QUICK, *settings])
    assert all(part in told for part in said)


STREAM = (
    "import json, sys\n"
    "from pathlib import Path\n"
    "from ptkit.data.sources import load_rows\n"
    "from ptkit.recipe.tasks import DataSection\n"
    "for name in ('lines', 'typed'):\n"
    "    for draw, limit in (('balanced', 12), ('first', 12), ('balanced', 900)):\n"
    "        section = DataSection(hub=f'team/{name}', streaming=True, draw=draw,\n"
    "                              limits={'train': limit, 'test': 3})\n"
    "        rows = load_rows(section, Path())\n"
    "        parts = (rows.train, rows.validation, rows.test)\n"
    "        print(json.dumps([[row['id'] for row in part] for part in parts]))\n"
    "        assert {row['turns'][0]['role'] for row in rows.train} == {'user'}\n"
)


def test_a_stream_is_drawn_once_and_read_again_as_it_was(client: Client, server: HubServer) -> None:
    """JSON and Parquet, shuffled and in order; fewer rows than the limit too."""
    rows = [{"id": f"{i}", "turns": [{"role": "user", "content": f"w{i}"}]} for i in range(80)]
    for name in ("lines", "typed"):
        folder = server.hub.root / f"datasets/team/{name}/main"
        folder.mkdir(parents=True)
        for split, own in (("train", rows[:60]), ("test", rows[60:])):
            frame = pd.DataFrame(own)
            if name == "lines":
                frame.to_json(folder / f"{split}.jsonl", orient="records", lines=True)
            else:
                frame.to_parquet(folder / f"{split}.parquet")
    first = client.python(STREAM).stdout
    found = [json.loads(line) for line in first.splitlines()]
    for lines, typed in zip(found[:3], found[3:], strict=True):
        assert lines == typed
    drawn, in_order, whole = found[:3]
    assert sorted(map(int, drawn[0] + drawn[1])) != [*range(12)]  # a draw from all
    assert len({*drawn[0], *drawn[1]}) == 12
    assert len(drawn[1]) == 1  # a tenth is held out
    assert in_order == [[str(i) for i in range(11)], ["11"], ["60", "61", "62"]]
    assert sorted(map(int, whole[0] + whole[1])) == [*range(60)]
    assert client.python(STREAM).stdout == first
