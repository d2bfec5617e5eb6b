"""`ptkit transfer`: every source's adapter as the start of every target."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import random_base
from test_cli import ptkit, refused

from ptkit.comparison.transfer import OWN_START, cosine, plan, run_transfer
from ptkit.errors import UserError
from ptkit.formats.adapter_files import read_adapter
from ptkit.methods import compile_files
from ptkit.prefix import KVPrefix
from ptkit.recipe.load import load_recipe
from ptkit.runtime.base_model import load_base
from ptkit.runtime.compile import compile_tokens
from ptkit.training.observer import RunObserver

QUICK = [
    "train.steps=2", "train.eval_every=2", "train.save_every=2", "train.batch_size=4",
    "task.data.limits={train: 16, validation: 4, test: 6}", "retention=null",
    "evaluate.bootstrap=100", "seeds=[0, 1]",
]  # fmt: skip
NAMES = ["message-routing", "passage-question-tiny"]


class Killed(KeyboardInterrupt):
    """Stands for a kill."""


class Killer(RunObserver):
    """Raises when a cell is finished that is not the first."""

    def __init__(self) -> None:
        self.finished = 0

    def cell_finished(self, record: object, reused: bool) -> None:
        self.finished += not reused
        if self.finished == 3:
            raise Killed


def test_map_of_two_tasks_goes_on_after_a_kill(tmp_path: Path) -> None:
    base = load_base("tiny-en", device="cpu")
    tokens = "methods.4.num_virtual_tokens=4"
    loaded = [load_recipe(name, [*QUICK, tokens]) for name in NAMES]
    planned = plan(loaded, loaded, "prefix_tuning")
    assert planned.cells == 2 + 2 * 3 * 2
    with pytest.raises(Killed):
        run_transfer(planned, tmp_path, base=base, observer=Killer())
    kept = (tmp_path / "sources/message-routing/cells/prefix_tuning-seed0/record.json").read_text()
    done = run_transfer(planned, tmp_path, base=base)
    assert (
        tmp_path / "sources/message-routing/cells/prefix_tuning-seed0/record.json"
    ).read_text() == kept
    assert done.sources == tuple(r.recipe.name for r in loaded)
    read = json.loads((tmp_path / "matrix.json").read_text())
    for target, of in zip(read["targets"], done.targets, strict=True):
        assert target["own_start"]["n_seeds"] == 2
        assert target["own_start"]["n_examples"] == 6
        for source in done.sources:
            found = target["from"][source]
            gain = found["score"]["mean"] - target["own_start"]["mean"]
            assert found["difference"]["mean"] == pytest.approx(gain)
            low, high = found["difference"]["low"], found["difference"]["high"]
            assert low <= found["difference"]["mean"] <= high
            assert 0 < found["p_value"] <= 1
            records = of.starts[source].records
            assert {r.train_steps for r in (*records, *of.own.records)} == {2}
            assert {r.seed for r in records} == {0, 1}
    # The start of a target is the source's adapter itself.
    adapters = [planned.source(tmp_path, source) for source in planned.sources]
    for source, adapter in zip(done.sources, adapters, strict=True):
        settings = done.targets[1].starts[source].records[0].settings
        assert settings["start_adapter"] == [str(adapter)]
    prefixes = [compile_files(read_adapter(path), base) for path in adapters]
    assert done.similarity[0][1] == pytest.approx(cosine(*prefixes))
    assert done.similarity[0][0] == pytest.approx(1)
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "matrix.md").read_text()
    assert f"from {done.sources[0]}" in table
    assert "p values are corrected for all differences of the table (Holm)" in table
    assert OWN_START in (tmp_path / "targets" / done.sources[0] / "table.md").read_text()
    other = plan([load_recipe(n, [*QUICK, tokens, "train.steps=3"]) for n in NAMES], loaded,
                 "prefix_tuning")  # fmt: skip
    with pytest.raises(UserError, match="a map of other recipes"):
        run_transfer(other, tmp_path, base=base)


def test_cosine_is_of_averaged_tokens_layer_by_layer() -> None:
    base = random_base("llama")
    one, other = (compile_tokens(base.model, torch.tensor(ids)) for ids in ([1, 2, 3], [9, 8, 7]))
    assert cosine(one, one) == pytest.approx(1)
    assert cosine(one, one.map(lambda t: -t)) == pytest.approx(-1)
    expected = [
        torch.nn.functional.cosine_similarity(a.mean(1).flatten(), b.mean(1).flatten(), dim=0)
        for a, b in zip((*one.keys, *one.values), (*other.keys, *other.values), strict=True)
    ]
    assert cosine(one, other) == pytest.approx(float(torch.stack(expected).mean()))
    # The order of the tokens does not count, nor does a layer's size.
    turned = one.map(lambda t: t.flip(1))
    assert cosine(one, turned) == pytest.approx(1, abs=1e-5)
    scaled = KVPrefix(tuple(k * 50 for k in one.keys), one.values)
    assert cosine(scaled, other) == pytest.approx(cosine(one, other), abs=1e-5)


def test_what_has_no_adapter_to_hand_on_is_refused(tmp_path: Path) -> None:
    recipes = {name: load_recipe(name, QUICK) for name in [*NAMES, "quickstart"]}
    first, second = recipes["message-routing"], recipes["passage-question-tiny"]
    with pytest.raises(UserError, match="two recipes are called `message-routing`"):
        plan([first, first], [first], "prefix_tuning")
    with pytest.raises(UserError, match="choose one method with --method: prompt_tuning"):
        plan([first, second], [first], None)
    with pytest.raises(UserError, match="`lora` has no virtual tokens"):
        plan([first, second], [first], "lora")
    headed = load_recipe("message-routing-minilm")
    with pytest.raises(UserError, match="each adapter has a head"):
        plan([first], [headed], "prefix_tuning")
    longer = load_recipe("quickstart", [*QUICK, "methods.0.num_virtual_tokens=33"])
    with pytest.raises(UserError, match=r"`num_virtual_tokens` .*, `quickstart` 33"):
        plan([first], [longer], "prefix_tuning")
    model = first.recipe.model.model_copy(update={"id": "gpt2"})
    elsewhere = replace(first, recipe=first.recipe.model_copy(update={"model": model}))
    with pytest.raises(UserError, match="has `model` tiny-en, `message-routing` gpt2: an adapter"):
        plan([second], [elsewhere], "prefix_tuning")
    assert "no recipe called" in refused("transfer", "nothing", "--out", "x", cwd=tmp_path)
    (tmp_path / "x").mkdir()
    assert "is not a map of transfer" in refused(
        "transfer", "quickstart", "--out", "x", "--fresh", cwd=tmp_path
    )


def test_few_rows_for_the_targets_alone_from_the_command_line(tmp_path: Path) -> None:
    sets = [part for value in QUICK[:-1] for part in ("--set", value)]
    options = ("transfer", "quickstart", "--out", "map", *sets, "--set", "task.max_target_tokens=8",
               "--target-set", "task.data.limits.train=5", "--json")  # fmt: skip
    found = json.loads(ptkit(*options, cwd=tmp_path).stdout)
    (target,) = found["targets"]
    assert target["target"] == "quickstart"
    assert list(target["from"]) == ["quickstart"]
    record = next((tmp_path / "map/targets").rglob("record.json"))
    assert json.loads(record.read_text())["n_train"] == 5
    record = next((tmp_path / "map/sources").rglob("record.json"))
    assert json.loads(record.read_text())["n_train"] == 16
    shown = ptkit(*options[:-1], cwd=tmp_path).stdout
    assert "from quickstart" in shown
