"""Recipes: every fault named with its place, all at once, before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ptkit.errors import RecipeError
from ptkit.methods.catalogue import method_sections
from ptkit.recipe.json_schema import recipe_json_schema
from ptkit.recipe.load import load_recipe, shipped_recipes
from ptkit.recipe.schema import Recipe
from ptkit.recipe.yaml_source import parse_yaml

GOOD = """\
name: mine
task:
  kind: generation
  data:
    builtin: facts-to-text
  input: "{facts}"
  target: "{text}"
methods:
  - kind: prefix_tuning
    num_virtual_tokens: 5
  - kind: lora
train:
  steps: 10
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "r.yaml"
    path.write_text(text)
    return path


def faults(folder: Path, text: str, *overrides: str) -> str:
    path = write(folder, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value).replace(str(folder) + "/", "")


def test_good_recipe_has_the_documented_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD)).recipe
    assert recipe.model.id == "tiny-en"
    assert recipe.seeds == [0]
    assert recipe.methods[0].num_virtual_tokens == 5
    assert recipe.train.steps == 10


@pytest.mark.parametrize(
    ("change", "to", "expected"),
    [
        ("  steps: 10", "  stepps: 10", "r.yaml:13: `train.stepps` unknown; did you mean `steps`?"),
        ("  steps: 10", "  steps: many", "r.yaml:13: `train.steps` expected a valid integer"),
        ("  steps: 10", "  steps: 0", "r.yaml:13: `train.steps` expected greater than 0, found 0"),
        ("    num_virtual_tokens: 5", "    num_virtual_token: 5",
         "r.yaml:10: `methods.0.num_virtual_token` unknown; did you mean `num_virtual_tokens`?"),
        ("kind: prefix_tuning", "kind: prefx_tuning",
         "r.yaml:9: `methods.0.kind` `prefx_tuning` is not a method; did you mean `prefix_tu"),
        ("kind: generation", "kind: genration",
         "r.yaml:2: `task.kind` `genration` unknown; did you mean `generation`?"),
        ('  target: "{text}"\n', "", "r.yaml:2: `task.target` is missing; expected: Template of"),
        ("    builtin: facts-to-text", "    builtin: a\n    hub: b",
         "r.yaml:4: `task.data`: expected exactly one of `builtin`, `hub`, `files`"),
        ("    builtin: facts-to-text", "    bultin: a",
         "r.yaml:5: `task.data.bultin` unknown; did you mean `builtin`?"),
        ("name: mine", "name: mine\nname: yours", "r.yaml:2: duplicate key"),
        ("name: mine", "name: [", "r.yaml:"),
        ("name: mine", "name: !!python/object:os.system x", "r.yaml:1: YAML tags"),
        ("- kind: lora", "- kind: prefix_tuning", "two methods are called `prefix_tuning`"),
        ("name: mine", "name: My Recipe", "r.yaml:1: `name`"),
    ],
)  # fmt: skip
def test_fault_names_file_line_key_and_fix(tmp_path, change: str, to: str, expected: str) -> None:
    assert change in GOOD
    assert expected in faults(tmp_path, GOOD.replace(change, to))


def test_all_faults_come_in_one_error(tmp_path: Path) -> None:
    text = GOOD.replace("steps: 10", "steps: -1").replace("kind: lora", "kind: lora\n    rnk: 2")
    lines = faults(tmp_path, text.replace("name: mine", "name: mine\nseedz: [1]")).splitlines()
    assert len(lines) == 3
    assert any("`train.steps`" in line for line in lines)
    assert any("`methods.1.rnk` unknown; did you mean `rank`?" in line for line in lines)
    assert any("`seedz` unknown; did you mean `seeds`?" in line for line in lines)


def test_yaml_1_2_numbers_and_words(tmp_path: Path) -> None:
    text = GOOD.replace("num_virtual_tokens: 5", "learning_rate: 1e-5\n    label: off")
    method = load_recipe(write(tmp_path, text)).recipe.methods[0]
    assert method.learning_rate == 1e-5
    assert method.label == "off"


def test_overrides_reach_what_they_name(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, GOOD),
        ["train.steps=77", "seeds=[3,4]", "methods.0.num_virtual_tokens=9",
         "task.data.limits.train=5", "model.id=gpt2"],
    ).recipe  # fmt: skip
    assert recipe.train.steps == 77
    assert recipe.seeds == [3, 4]
    assert recipe.methods[0].num_virtual_tokens == 9
    assert recipe.task.data.limits.train == 5
    assert recipe.model.id == "gpt2"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stps=5", "--set train.stps=5: `train.stps` unknown; did you mean `steps`?"),
        ("train.steps=x", "--set train.steps=x: `train.steps` expected a valid integer"),
        ("train.steps", "expected KEY=VALUE"),
        ("methods.7.rank=2", "has entries 0 to 1"),
        ("name.x=2", "is a value, not a section"),
    ],
)
def test_faulty_override_is_named(tmp_path: Path, override: str, expected: str) -> None:
    if override == "name.x=2":
        expected = "`name`"
    assert expected in faults(tmp_path, GOOD, override)


def test_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    loaded = load_recipe(write(tmp_path, GOOD), ["train.steps=12"])
    (tmp_path / "again").mkdir()
    again = load_recipe(write(tmp_path / "again", loaded.resolved()))
    assert again.recipe == loaded.recipe


def test_unknown_recipe_name_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean `quickstart`"):
        load_recipe("quickstrat")
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe("nowhere/mine.yaml")


def test_every_shipped_recipe_is_valid_and_every_key_has_a_comment() -> None:
    recipes = shipped_recipes()
    assert len(recipes) >= 4
    for name, path in recipes.items():
        assert load_recipe(path).recipe.name == name
        lines = path.read_text().splitlines()
        for number, line in enumerate(lines):
            if re.match(r"\s*(- )?[\w-]+:", line) and not line.lstrip().startswith("#"):
                above = lines[number - 1].lstrip()
                before = "".join(lines[max(0, number - 9) : number])
                free = "verbalizer:" in before or "search:" in before  # keys of the author's
                assert above.startswith("#") or free, f"{name}:{number + 1}: {line}"


def test_every_setting_is_described() -> None:
    described = 0
    for section in (Recipe, *method_sections().values()):
        for key, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{key}"
            described += 1
    assert described > 40


def test_json_schema_knows_every_method_and_refuses_unknown_keys() -> None:
    schema = recipe_json_schema()
    json.dumps(schema)
    kinds = {
        schema["$defs"][ref["$ref"].rsplit("/", 1)[1]]["properties"]["kind"]["const"]
        for ref in schema["properties"]["methods"]["items"]["oneOf"]
    }
    assert kinds == set(method_sections()) >= {"prefix_tuning", "prompt_tuning", "p_tuning", "lora"}
    assert schema["additionalProperties"] is False


@given(
    st.recursive(
        st.one_of(st.integers(-999, 999), st.booleans(), st.text("abc xyz", max_size=8)),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("abcdef", min_size=1, max_size=5), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_any_yaml_mapping_reads_back_with_a_line_for_every_key(value) -> None:
    text = json.dumps({"top": value})  # JSON is YAML 1.2
    source = parse_yaml(text, "x.yaml")
    assert source.data == {"top": value}
    assert source.where(("top",)) == "x.yaml:1"


WRITTEN = {
    "name": "mine",
    "task": {"kind": "generation", "data": {"builtin": "facts-to-text"}, "input": "{facts}\n",
             "target": "{text}"},
    "methods": [{"kind": "prefix_tuning", "num_virtual_tokens": 5}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "fix"),
    [
        ({"train": {"lr": 0.1}}, "`train.lr` unknown; write it as `methods.N.learning_rate`"),
        ({"train": {"learning_rate": 0.1}}, "write it as `methods.N.learning_rate`"),
        ({"train": {"epochs": 3}}, "write `train.steps`, which is rows x epochs"),
        ({"train": {"max_steps": 3}}, "did you mean `steps`?"),
        ({"steps": 3}, "`steps` unknown; write it as `train.steps`"),
        ({"train": {"num_virtual_tokens": 3}}, "write it as `methods.N.num_virtual_tokens`"),
        ({"methods": [{"kind": "prefix_tuning", "lr": 1}]}, "did you mean `learning_rate`?"),
        ({"train": {"stpes": 3}}, "did you mean `steps`?"),
        ({"task": {**WRITTEN["task"], "data": {"files": "x.csv"}}}, "`files: {train: x.csv}`"),
    ],
)
def test_a_key_at_another_place_is_told_where_it_belongs(changed: Any, fix: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe({**WRITTEN, **changed})
    assert fix in str(refused.value)


def test_a_mapping_is_a_recipe_as_its_file_is(tmp_path: Path) -> None:
    loaded = load_recipe(WRITTEN, "train.steps=7")
    path = tmp_path / "recipe.yaml"
    path.write_text(loaded.text)
    assert load_recipe(path, "train.steps=7").recipe == loaded.recipe
    assert loaded.recipe.train.steps == 7
    for wrong, why in ((7, "a int is no recipe"), ({"name": object()}, "no text or number")):
        with pytest.raises(RecipeError, match=why):
            load_recipe(wrong)  # type: ignore[arg-type]
