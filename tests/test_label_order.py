"""A checkpoint's outputs go to the labels of the same name, in whatever order a task lists them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from encoders import DECODERS, ENCODERS, random_classifier
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import ptkit
from transformers import pipeline

from ptkit.data.encoded import EncodedExample
from ptkit.methods import Demonstrations, create_adapter
from ptkit.methods.linear_probe.settings import LinearProbeSection
from ptkit.recipe.load import load_recipe
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.forward import collate, head_logits
from ptkit.runtime.heads import Labels
from ptkit.runtime.label_order import order_of
from ptkit.training.experiment import prepare

TEXT = "w5 w9 w3 w7"


def checkpoint(folder: Path, family: str, names: list[str], kind: str = "sequence") -> Path:
    base = random_classifier(family, kind)
    base.model.config.id2label = dict(enumerate(names))
    base.model.config.label2id = {name: number for number, name in enumerate(names)}
    base.model.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def loaded(folder: Path, names: list[str], kind: str = "sequence") -> Base:
    return load_base(str(folder), device="cpu", labels=Labels(kind, tuple(names)))


def scores(base: Base, model=None) -> dict[str, float]:
    """The probability of each label for `TEXT` (of its last token, where tokens are labelled)."""
    row = EncodedExample(base.tokenizer(TEXT)["input_ids"], [0])
    tensors = collate([row], base)
    with torch.no_grad():
        found = head_logits(
            model or base.model, tensors["input_ids"], tensors["attention_mask"], None
        )
    found = found[0] if found.ndim == 2 else found[0, -1]
    return dict(zip(base.head.labels, found.softmax(-1).tolist(), strict=True))


def of_pipeline(folder: Path) -> dict[str, float]:
    answers = pipeline("text-classification", model=str(folder), device="cpu")(TEXT, top_k=None)
    return {answer["label"]: answer["score"] for answer in answers}


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_scores_by_name_are_those_of_transformers_whatever_the_order(
    family: str, tmp_path: Path
) -> None:
    names = ["bad", "fair", "good"]
    folder = checkpoint(tmp_path / "m", family, names)
    expected = of_pipeline(folder)
    for order in (names, ["good", "bad", "fair"], ["Good", "BAD", "fair"]):
        base = loaded(folder, order)
        assert base.model.config.id2label == dict(enumerate(order))
        found = {name.lower(): score for name, score in scores(base).items()}
        assert found == pytest.approx(expected, abs=1e-5)
        said = "another order (bad, fair, good); its outputs are taken by name"
        assert (said in base.head.told) is (order != names)
        # An adapter that trains a copy of the head begins with the same meaning.
        probe = create_adapter(LinearProbeSection(kind="linear_probe"), base, Demonstrations([], 0))
        started = {name.lower(): score for name, score in scores(base, probe.model).items()}
        assert started == pytest.approx(expected, abs=1e-5)


def test_labels_of_tokens_are_matched_too_and_the_base_stays_the_same(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "bert", ["O", "B-A", "I-A"], "token")
    first, other = loaded(folder, ["O", "B-A", "I-A"], "token"), loaded(
        folder, ["I-A", "O", "B-A"], "token"
    )  # fmt: skip
    assert scores(other) == pytest.approx(scores(first), abs=1e-6)
    assert other.fingerprint == first.fingerprint  # adapters of the one load on the other


def test_what_has_no_name_in_common_is_taken_by_position_and_said(tmp_path: Path) -> None:
    expected = list(scores(loaded(
        checkpoint(tmp_path / "m", "distilbert", ["a", "b", "c"]), ["a", "b", "c"]
    )).values())  # fmt: skip
    base = loaded(tmp_path / "m", ["x", "y", "z"])
    assert list(scores(base).values()) == pytest.approx(expected)
    assert base.head.told == (
        f"warning: head: {tmp_path / 'm'} names its labels a, b, c, the task x, y, z; they are "
        "taken by position and start with another meaning"
    )
    base = loaded(tmp_path / "m", ["x", "c", "z"])
    assert list(scores(base).values()) == pytest.approx([expected[i] for i in (0, 2, 1)])
    assert "taken by name: c; the others are taken by position" in base.head.told
    unnamed = checkpoint(tmp_path / "u", "distilbert", ["LABEL_0", "LABEL_1", "LABEL_2"])
    assert "has no names for its labels; they are taken by position" in (
        loaded(unnamed, ["x", "y", "z"]).head.told
    )


def test_another_number_of_labels_starts_a_new_head_and_says_so(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "bert", ["a", "b", "c"])
    head = loaded(folder, ["b", "a"]).head
    assert head.fresh == {"classifier"}
    assert "for 3 labels (a, b, c) and the task has 2, so a new one starts at random" in head.told


@given(st.permutations(["a", "B", "c", "d"]), st.permutations(["a", "b", "x", "C"]))
@settings(max_examples=60, deadline=None)
def test_every_label_gets_one_output_and_that_of_its_name_where_there_is_one(own, wanted) -> None:
    order = order_of(own, wanted)
    assert sorted(order) == [*range(len(own))]
    for label, number in zip(wanted, order, strict=True):
        if label.lower() in [name.lower() for name in own]:
            assert own[number].lower() == label.lower()
    assert order_of(own, own) == [*range(len(own))]
    assert [own[i] for i in order_of(own, ["A", "a", "c", "d"])].index("a") == 1


def test_a_run_says_what_became_of_the_head_and_evaluates_by_name(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "bert", ["bad", "fair", "good"])
    best = max(scores_of := of_pipeline(folder), key=scores_of.__getitem__)
    (tmp_path / "t.jsonl").write_text(json.dumps({"t": TEXT, "y": best}) + "\n")
    (tmp_path / "c.yaml").write_text(
        f"name: c\nmodel: {{id: {folder}, device: cpu}}\n"
        "task: {kind: sequence_classification, input: '{t}', label: y, metrics: [accuracy],\n"
        "  labels: [good, fair, bad], data: {files: {train: t.jsonl, validation: t.jsonl}}}\n"
        "methods: [{kind: linear_probe}]\ntrain: {steps: 1}\nretention: null\n"
    )
    assert any(
        "taken by name" in line for line in prepare(load_recipe(tmp_path / "c.yaml")).data_lines()
    )
    done = ptkit("evaluate", "c.yaml", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["metrics"]["accuracy"]["value"] == 100
    assert "its outputs are taken by name" in done.stderr
