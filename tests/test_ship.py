"""Push, pull, verify, search: the real Hub client against a Hub on this machine."""

from __future__ import annotations

import json
import shutil
import traceback
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import random_base
from hub_server import CUT, READER, WRITER, Fault, HubServer, commit_of, own_hub
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from test_cli import ptkit as command
from test_cli import refused as refused_command
from test_peft_parity import LEARNT, make_adapter

from ptkit.errors import AdapterError, HubError, UserError
from ptkit.evaluation.statistics import Interval
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.formats.adapter_folder import ADAPTER_FILES, CARD, CONFIG, INFO, RECIPE, WEIGHTS
from ptkit.formats.figures import RecordedScore
from ptkit.formats.hub_repository import HubId, is_hub_id
from ptkit.hub.card import card_text
from ptkit.hub.search import search
from ptkit.hub.transfer import pull, push
from ptkit.hub.verify import _reproduced, check_files, verify
from ptkit.recipe.load import load_recipe
from ptkit.runtime.model_names import TINY_EN_FOLDER

ptkit = partial(command, cwd=Path())
refused = partial(refused_command, cwd=Path())

SHIPPED = Path(__file__).resolve().parents[1] / "adapters"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub for this process, which works in the test's folder."""
    with own_hub(tmp_path, monkeypatch) as server:
        monkeypatch.chdir(tmp_path)
        yield server


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A shipped adapter in a folder of the test's own."""
    return Path(shutil.copytree(SHIPPED / "facts-prefix", tmp_path / "mine"))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ADAPTER_FILES
            if (folder / name).is_file()}  # fmt: skip


def test_push_and_pull_give_back_every_byte(hub: HubServer, adapter: Path, tmp_path: Path) -> None:
    done = push(adapter, "team/facts")
    assert done.url.startswith(f"{hub.url}/team/facts/commit/")
    assert (adapter / CARD).read_text().count("team/facts") >= 3
    pulled = pull("team/facts", tmp_path / "back")
    assert contents(pulled.path) == contents(adapter)
    assert len(contents(adapter)) == 5
    # A large file goes outside git, before the commit.
    asked = [request.partition("?")[0] for request in hub.hub.requests]
    blob = next(i for i, r in enumerate(asked) if r.startswith("PUT /lfs/"))
    assert blob < asked.index("POST /api/models/team/facts/commit/main")
    assert verify(pulled.path).passed


@pytest.fixture
def local(adapter: Path, tmp_path: Path) -> Path:
    """The adapter as a run on a folder of this machine left it, with its card."""
    base = Path(shutil.copytree(TINY_EN_FOLDER, tmp_path / "secret place" / "own-base"))
    return on_base(adapter, str(base))


def on_base(adapter: Path, name: str) -> Path:
    """Let the files of `adapter` say that its base is `name`."""
    config, info = (json.loads((adapter / file).read_text()) for file in (CONFIG, INFO))
    config |= {"base_model_name_or_path": name, "revision": "old"}
    info["base"] |= {"id": name, "revision": "old"}
    recipe = (adapter / RECIPE).read_text()
    assert "id: tiny-en" in recipe
    (adapter / RECIPE).write_text(recipe.replace("id: tiny-en", f"id: {name}"))
    (adapter / CONFIG).write_text(json.dumps(config))
    (adapter / INFO).write_text(json.dumps(info))
    (adapter / CARD).write_text(card_text("mine", read_adapter(adapter), 1000))
    return adapter


def test_card_of_a_base_on_this_machine_names_no_place(local: Path, tmp_path: Path) -> None:
    card = (local / CARD).read_text()
    assert "secret place" not in card
    assert "`path/to/own-base`" in card
    data = ModelCard(card).data
    assert data.base_model is None
    assert not any(tag.startswith("base_model:") for tag in data.tags)


@pytest.mark.parametrize(
    "name", ["/some/base", "./base", "~/base", r"C:\\models\\base", "a/b/c", "here", "team/here"]
)
def test_a_base_on_this_machine_is_not_pushed_as_it_is(
    hub: HubServer, adapter: Path, name: str
) -> None:
    Path("here").mkdir()
    Path("team/here").mkdir(parents=True)
    on_base(adapter, name)
    for dry in (True, False):
        with pytest.raises(UserError, match="--base-model USER/NAME"):
            push(adapter, "team/facts", dry_run=dry)
    assert not any("team/facts" in request for request in hub.hub.requests)


@pytest.mark.parametrize("age", ["now", "before", "none"])
def test_with_its_name_on_the_hub_all_that_is_uploaded_has_it_and_files_here_stay(
    hub: HubServer, local: Path, age: str
) -> None:
    if age == "before":  # cards had the place itself
        place = json.loads((local / CONFIG).read_text())["base_model_name_or_path"]
        text = (local / CARD).read_text().replace("path/to/own-base", place)
        head, tag = f"---\nbase_model: {place}\n", f"tags:\n- base_model:adapter:{place}\n"
        text = text.replace("---\n", head, 1).replace("tags:\n", tag, 1)
        (local / CARD).write_text(text)
    elif age == "none":
        (local / CARD).unlink()
    before = contents(local)
    dry = ptkit("push", str(local), "team/facts", "--base-model", "team/base", "--dry-run")
    assert "nothing was sent" in dry.stderr
    push(local, "team/facts", base_model="team/base")
    assert contents(local) == before
    pulled = pull("team/facts", "back").path
    for name, content in contents(pulled).items():
        if name != WEIGHTS:
            text = content.decode()
            assert "secret place" not in text, name
            assert "own-base" not in text, name
            assert "team/base" in text, name
    files = read_adapter(pulled)
    assert files.base_id == files.config["base_model_name_or_path"] == "team/base"
    assert files.config["revision"] is files.info.base.revision is None
    assert load_recipe(pulled / RECIPE).recipe.model.id == "team/base"
    data = ModelCard((pulled / CARD).read_text()).data
    assert data.base_model == "team/base"
    assert [t for t in data.tags if t.startswith("base_model")] == ["base_model:adapter:team/base"]
    assert "team/facts" in (pulled / CARD).read_text()
    with pytest.raises(UserError, match="not a repository"):
        push(local, "team/facts", base_model="/some/where")


def test_a_base_in_the_hubs_cache_is_pushed_under_its_id(hub: HubServer, adapter: Path) -> None:
    on_base(adapter, "/home/me/.cache/hub/models--team--tiny/snapshots/" + "a" * 40)
    push(adapter, "team/facts")
    pulled = pull("team/facts", "back").path
    assert read_adapter(pulled).base_id == "team/tiny"
    assert not any(b"/home/me" in content for content in contents(pulled).values())


def test_other_places_that_are_published_are_named(
    hub: HubServer, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = json.loads((adapter / INFO).read_text())
    info["method"]["start_adapter"] = [str(tmp_path / "hub")]
    (adapter / INFO).write_text(json.dumps(info))
    push(adapter, "team/facts", dry_run=True)
    (line,) = [r.getMessage() for r in caplog.records]
    assert str(tmp_path / "hub") in line


def test_push_again_to_a_branch_and_as_a_pull_request(hub: HubServer, adapter: Path) -> None:
    push(adapter, "team/facts", private=True)
    assert hub.hub.private["team/facts"]
    before = commit_of(hub.hub.revision("models", "team/facts", "main"))
    push(adapter, "team/facts", revision="v2", message="second")
    request = push(adapter, "team/facts", create_pr=True)
    assert request.url.endswith("/team/facts/discussions/1")
    assert commit_of(hub.hub.revision("models", "team/facts", "main")) == before
    assert pull("team/facts@v2", "v2").path == Path("v2")


def test_dry_run_asks_the_hub_nothing_and_writes_nothing(hub: HubServer, adapter: Path) -> None:
    before = contents(adapter)
    done = push(adapter, "team/facts", dry_run=True)
    assert done.url is None
    assert done.files[WEIGHTS] == (adapter / WEIGHTS).stat().st_size
    assert not hub.hub.requests
    assert contents(adapter) == before


@pytest.mark.parametrize("cut", ["PUT /lfs/", "POST .*/commit/"])
def test_push_cut_off_in_the_middle_leaves_no_broken_revision(
    hub: HubServer, adapter: Path, cut: str
) -> None:
    push(adapter, "team/facts")
    before = commit_of(hub.hub.revision("models", "team/facts", "main"))
    tensors = {name: t + 1 for name, t in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    record = json.loads((adapter / INFO).read_text())
    del record["weights"]
    (adapter / INFO).write_text(json.dumps(record))
    hub.hub.faults = [Fault(cut, CUT, times=100)]
    with pytest.raises(HubError, match="team/facts"):
        push(adapter, "team/facts")
    assert commit_of(hub.hub.revision("models", "team/facts", "main")) == before
    hub.hub.faults = []
    push(adapter, "team/facts")
    assert contents(pull("team/facts", "now").path) == contents(adapter)


def test_busy_hub_is_asked_again(hub: HubServer, adapter: Path) -> None:
    hub.hub.faults = [Fault("preupload", 503), Fault("objects/batch", 429), Fault("resolve", 503)]
    push(adapter, "team/facts")
    assert contents(pull("team/facts", "back").path) == contents(adapter)


def test_download_cut_off_in_the_middle_is_taken_up_again(hub: HubServer, adapter: Path) -> None:
    push(adapter, "team/facts")
    hub.hub.faults = [Fault(f"GET .*{WEIGHTS}", CUT, 1)]
    assert contents(pull("team/facts", "back").path) == contents(adapter)


REFUSALS = [
    ("POST /api/repos/create", 401, UserError, "hf auth login"),
    ("/commit/", 403, UserError, "no right"),
    ("/commit/", 409, UserError, "push again"),
    ("POST /api/repos/create", 429, HubError, "fewer requests"),
    ("POST /api/repos/create", 503, HubError, "the Hub failed"),
]


@pytest.mark.parametrize(("where", "status", "kind", "said"), REFUSALS)
def test_what_the_hub_answers_is_told_with_the_fix(
    hub: HubServer, adapter: Path, where: str, status: int, kind: type[Exception], said: str
) -> None:
    hub.hub.faults = [Fault(where, status, 100)]
    with pytest.raises(kind, match=said) as raised:
        push(adapter, "team/facts")
    assert WRITER not in str(raised.value)


def test_token_that_may_not_write(
    hub: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    with pytest.raises(UserError, match="write access"):
        push(adapter, "team/facts")


def test_token_appears_nowhere(hub: HubServer, adapter: Path, tmp_path: Path, capfd) -> None:
    push(adapter, "team/facts")
    pull("team/facts", "back")
    hub.hub.faults = [Fault("/commit/", 403, 9)]
    with pytest.raises(UserError) as raised:
        push(adapter, "team/facts")
    assert WRITER not in "".join(traceback.format_exception(raised.value))
    assert WRITER not in "".join(capfd.readouterr())
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or WRITER.encode() not in path.read_bytes(), path
    assert all(WRITER not in request for request in hub.hub.requests)


def test_repository_with_only_a_pickle_is_refused(hub: HubServer, adapter: Path) -> None:
    files = contents(adapter)
    del files[WEIGHTS]
    hub.hub.commit("team/pickled", "main", {**files, "adapter_model.bin": b"\x80\x04."})
    with pytest.raises(AdapterError, match=r"only pickled weights \(adapter_model.bin\)"):
        pull("team/pickled", "back")
    assert not any("resolve/" in r and ".bin" in r for r in hub.hub.requests)
    assert not Path("back").exists()


def test_pickle_beside_the_weights_fails_verification(hub: HubServer, adapter: Path) -> None:
    hub.hub.commit("team/both", "main", {**contents(adapter), "adapter_model.bin": b"\x80"})
    found = {check.name: check for check in verify("team/both").checks}
    assert found["no pickle"].passed is False
    assert "adapter_model.bin" in found["no pickle"].detail


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "team/..", "team/../x", "a/b/c", "team/x@../../y",
             "team/x@/etc", "https://x/y", "team", "team/.hidden", ""],
)  # fmt: skip
def test_names_that_are_paths_are_refused(hub: HubServer, adapter: Path, name: str) -> None:
    assert not is_hub_id(name)
    with pytest.raises(UserError, match="not a repository on the Hub"):
        pull(name)
    with pytest.raises(UserError, match="not a repository on the Hub"):
        push(adapter, name)
    assert not hub.hub.requests


def test_files_that_would_leave_the_folder_are_never_asked_for(
    hub: HubServer, adapter: Path
) -> None:
    hub.hub.commit("team/odd", "main", {**contents(adapter), "sub/adapter_config.json": b"{}"})
    path = hub.hub.root / "models/team/odd/main"
    (path / "..\\evil.txt").write_bytes(b"x")
    pulled = pull("team/odd", "back")
    assert sorted(p.name for p in pulled.path.iterdir()) == sorted(contents(adapter))


def test_damaged_or_altered_adapters_are_neither_pushed_nor_kept(
    hub: HubServer, adapter: Path
) -> None:
    good = contents(adapter)
    hub.hub.commit("team/bad", "main", {**good, WEIGHTS: good[WEIGHTS][:-4]})
    with pytest.raises(AdapterError, match=r"is not kept: .*damaged"):
        pull("team/bad", "back")
    assert not Path("back").exists()
    tensors = {name: t + 1 for name, t in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    with pytest.raises(AdapterError, match=r"is not the file that ptkit\.json was written for"):
        push(adapter, "team/facts")
    assert not any("team/facts" in request for request in hub.hub.requests)


def test_pull_does_not_overwrite_unless_told(hub: HubServer, adapter: Path) -> None:
    push(adapter, "team/facts")
    assert pull("team/facts").path == Path("adapters/facts")
    with pytest.raises(UserError, match="--force"):
        pull("team/facts")
    assert pull("team/facts", force=True).path == Path("adapters/facts")


def test_search_finds_adapters_of_a_base(hub: HubServer, adapter: Path) -> None:
    push(adapter, "team/facts")
    push(SHIPPED / "routing-ptuning", "team/routing", dry_run=True)
    shutil.copytree(SHIPPED / "routing-ptuning", "routing")
    push("routing", "team/routing")
    found = search("tiny-en")
    assert {f.id: f.method for f in found} == {
        "team/facts": "prefix_tuning", "team/routing": "p_tuning",
    }  # fmt: skip
    assert all(f.by_ptkit for f in found)
    assert [f.id for f in search("tiny-en", method="p_tuning")] == ["team/routing"]
    assert [f.id for f in search("tiny-en", text="fact")] == ["team/facts"]
    assert search("gpt2") == []
    with pytest.raises(UserError, match="did you mean `prefix_tuning`"):
        search("tiny-en", method="prefix-tuning")


def test_commands_speak_to_people_machines_and_pipes(hub: HubServer, adapter: Path) -> None:
    done = ptkit("push", str(adapter), "team/facts")
    assert done.stdout.strip().startswith(hub.url)
    assert WEIGHTS in done.stderr
    dry = ptkit("push", str(adapter), "team/x", "--dry-run", "--json")
    assert json.loads(dry.stdout)["url"] is None
    assert ptkit("pull", "team/facts", "--quiet").stdout.strip() == "adapters/facts"
    assert "team/facts" in ptkit("search", "tiny-en").stdout
    assert ptkit("search", "tiny-en", "--quiet").stdout.split() == ["team/facts"]
    listed = ptkit("adapters", "ls", "--quiet").stdout.split()
    assert listed == ["adapters/facts"]
    facts = json.loads(ptkit("adapters", "info", "team/facts", "--json").stdout)
    assert facts["method"] == "prefix_tuning"
    checks = json.loads(ptkit("verify", "team/facts", "--json").stdout)
    assert checks["passed"]
    assert "no pickle" in {check["name"] for check in checks["checks"]}


def test_adapters_are_removed_only_when_confirmed(adapter: Path, tmp_path: Path) -> None:
    refused = partial(refused_command, cwd=tmp_path)
    assert "give --yes" in refused("adapters", "rm", str(adapter))
    other = tmp_path / "not-an-adapter"
    other.mkdir()
    assert "is not an adapter folder" in refused("adapters", "rm", str(adapter), str(other), "-y")
    assert adapter.is_dir()
    twice = [str(adapter), str(adapter.parent / "." / adapter.name), f"{other}/../{adapter.name}"]
    done = ptkit("adapters", "rm", *twice, "--yes", "--json")
    assert len(done.stdout.splitlines()) == 1
    assert not adapter.exists()
    for place in ("outer", "outer/inner"):
        shutil.copytree(SHIPPED / "facts-prompt", tmp_path / place)
    done = ptkit("adapters", "rm", str(tmp_path / "outer"), str(tmp_path / "outer/inner"), "--yes")
    assert len(done.stdout.splitlines()) == 2
    assert not (tmp_path / "outer").exists()


def test_diff_names_what_differs() -> None:
    one, other = SHIPPED / "facts-prefix", SHIPPED / "facts-prompt"
    rows = json.loads(ptkit("adapters", "diff", str(one), str(other), "--json").stdout)
    names = {row["name"] for row in rows}
    assert {"method.kind", "metrics.bleu.value", "tensor prompt_embeddings"} <= names
    assert "base.fingerprint" not in names
    assert ptkit("adapters", "diff", str(one), str(one)).stdout.strip() == "no difference"


def test_adapter_of_plain_peft_is_pushed_with_a_card_that_claims_nothing(
    hub: HubServer, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "plain", make_adapter(random_base("gpt2"), LEARNT["prefix"]).files())
    push(tmp_path / "plain", "team/plain")
    card = (tmp_path / "plain" / CARD).read_text()
    assert "No score is claimed" in card
    assert "team/plain" in card
    back = pull("team/plain", "back")
    assert {c.name: c.passed for c in back.checks}["record"] is None


def test_card_has_the_hubs_metadata(adapter: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard.load(adapter / CARD)
    data = card.data.to_dict()
    assert data["library_name"] == "peft"
    assert data["base_model"] == "tiny-en"
    assert data["base_model_relation"] == "adapter"
    assert {"ptkit", "prefix-tuning"} <= set(data["tags"])
    results = {r.metric_type: r.metric_value for r in card.data.eval_results}
    claims = json.loads((adapter / INFO).read_text())["metrics"]
    assert results == {name: round(c["value"], 2) for name, c in claims.items()}


def altered(adapter: Path, **changes: object) -> Path:
    record = json.loads((adapter / INFO).read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = record
        for name in parents:
            place = place[name]
        place[last] = value
    (adapter / INFO).write_text(json.dumps(record))
    return adapter


def failed(adapter: Path) -> set[str]:
    return {check.name for check in check_files(adapter, str(adapter)) if check.passed is False}


def test_records_that_contradict_themselves_fail(adapter: Path) -> None:
    assert failed(adapter) == set()
    assert failed(altered(adapter, metrics__bleu__value=99.0)) == {"claims"}
    assert failed(altered(adapter, metrics={"bleu": 3.0})) == {"claims"}
    assert failed(altered(adapter, metrics={}, weights={"file": WEIGHTS, "sha256": "0"})) == {
        "weights"
    }


def test_a_score_without_an_interval_is_right_for_one_row_only(adapter: Path) -> None:
    rows = json.loads((adapter / INFO).read_text())["n_test"]
    bare = {"metrics__bleu__low": None, "metrics__bleu__high": None}
    assert failed(altered(adapter, n_test=1, **bare)) == set()
    assert failed(altered(adapter, n_test=rows, **bare)) == {"claims"}
    claimed = RecordedScore(value=12.5, low=None, high=None)
    for mean, same in ((12.5, True), (12.6, False)):
        assert _reproduced("bleu", claimed, Interval(mean, None, None, None, 1, 1)).passed == same


def test_verify_refuses_another_base_and_wrong_shapes(adapter: Path) -> None:
    base = random_base("llama")
    found = {c.name: c.passed for c in verify(adapter, base=base).checks}
    assert found["base"] is False
    plain = make_adapter(random_base("gpt2"), LEARNT["prompt"]).files()
    wide = {"prompt_embeddings": torch.randn(3, 77)}
    config = {**plain.config, "num_virtual_tokens": 3, "base_model_name_or_path": "random-llama-0"}
    write_adapter(adapter.parent / "wide", type(plain)(config, wide))
    found = {c.name: c.passed for c in verify(adapter.parent / "wide", base=base).checks}
    assert found["shapes"] is False
    assert found["base"] is None


def test_hub_ids_are_read() -> None:
    assert HubId.read("team/facts@refs/pr/1") == HubId("team/facts", "refs/pr/1")
    assert HubId.read("team/facts").name == "facts"
    assert str(HubId.read("team/a.b-c@v1.0")) == "team/a.b-c@v1.0"


def test_an_adapter_larger_than_the_limit_is_not_downloaded(
    hub: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(adapter, "team/facts")
    size = sum(len(content) for content in contents(adapter).values())
    monkeypatch.setenv("PTKIT_MAX_DOWNLOAD_MB", "0.001")
    hub.hub.requests.clear()
    with pytest.raises(AdapterError, match=r"limit of [0-9.]+ [KM]?B; .*PTKIT_MAX_DOWNLOAD_MB=1$"):
        pull("team/facts", "back")
    assert not [r for r in hub.hub.requests if r.startswith("GET") and "resolve/" in r]
    assert not Path("back").exists()
    monkeypatch.setenv("PTKIT_MAX_DOWNLOAD_MB", str(size / 1e6))
    assert contents(pull("team/facts", "back").path) == contents(adapter)
    monkeypatch.setenv("PTKIT_MAX_DOWNLOAD_MB", "0.001")  # what is there already counts no more
    assert contents(pull("team/facts", "again").path) == contents(adapter)
    for wrong in ("many", "-1", "nan", ""):
        monkeypatch.setenv("PTKIT_MAX_DOWNLOAD_MB", wrong)
        with pytest.raises(UserError, match="a number of megabytes"):
            pull("team/facts", "third")
