"""Metrics equal what the field's libraries say; intervals behave as intervals should."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.meteor_score import meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score
from test_cli import ptkit

from ptkit.errors import UserError
from ptkit.evaluation.statistics import bootstrap_interval, seeds_interval
from ptkit.metrics import metric_modules
from ptkit.metrics.registry import metric

METRIC_NAMES = metric_modules().keys()

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", ".", "red"]
TEXT = st.lists(st.sampled_from(WORDS), max_size=8).map(" ".join)
CORPUS = st.lists(
    st.tuples(TEXT, st.lists(TEXT.filter(bool), min_size=1, max_size=3)), min_size=1, max_size=6
)
#: They need data or packages that are not there.
APART = {"meteor", *(n for n in METRIC_NAMES if n.endswith(("mecab", "flores200")))}
LABELS = st.lists(st.tuples(*[st.sampled_from("abcd")] * 2), min_size=1, max_size=30)


def streams(references: list[list[str]]) -> list[list[str | None]]:
    most = max(map(len, references))
    return [[r[i] if i < len(r) else None for r in references] for i in range(most)]


@given(CORPUS)
@settings(max_examples=60, deadline=None)
def test_text_metrics_equal_their_libraries(corpus) -> None:
    predictions = [p for p, _ in corpus]
    references = [r for _, r in corpus]
    # Sums of whole numbers: equal to the last bit, not nearly.
    bleu = sacrebleu.corpus_bleu(predictions, streams(references)).score
    assert metric("bleu")(predictions, references) == bleu
    chrf = sacrebleu.corpus_chrf(predictions, streams(references)).score
    assert metric("chrf")(predictions, references) == chrf
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = [
            max(scorer.score(r, p)[name].fmeasure for r in rs)
            for p, rs in zip(predictions, references, strict=True)
        ]
        assert metric(name)(predictions, references) == pytest.approx(100 * np.mean(expected))


@given(LABELS)
@settings(max_examples=40, deadline=None)
def test_label_metrics_equal_scikit_learn(pairs) -> None:
    gold, predicted = zip(*pairs, strict=True)
    references = [[g] for g in gold]
    assert metric("accuracy")(predicted, references) == 100 * accuracy_score(gold, predicted)
    assert metric("macro_f1")(predicted, references) == pytest.approx(
        100 * f1_score(gold, predicted, average="macro", zero_division=0)
    )


class SmallWordNet:
    """In place of the data nltk fetches: `cat` and `dog` mean the same."""

    def ensure_loaded(self) -> None:
        """There is nothing to load."""

    def synsets(self, word: str) -> list:
        names = ["cat", "dog"] if word in ("cat", "dog") else [word]
        lemmas = [SimpleNamespace(name=lambda name=name: name) for name in names]
        return [SimpleNamespace(lemmas=lambda: lemmas)]


@given(CORPUS.filter(lambda corpus: all(p for p, _ in corpus)))
@settings(max_examples=30, deadline=None)
def test_meteor_is_nltks(corpus) -> None:
    with mock.patch("nltk.corpus.wordnet", SmallWordNet()):
        found = metric("meteor")([p for p, _ in corpus], [r for _, r in corpus])
    expected = [
        meteor_score([r.split() for r in rs], p.split(), wordnet=SmallWordNet()) for p, rs in corpus
    ]
    assert found == pytest.approx(100 * np.mean(expected))


def test_meteor_without_wordnet_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(SmallWordNet):
        def ensure_loaded(self) -> None:
            raise LookupError("Resource wordnet not found.")

    monkeypatch.setattr("nltk.corpus.wordnet", Absent())
    with pytest.raises(UserError, match=r"nltk\.downloader wordnet"):
        metric("meteor")


def test_exact_match_accepts_any_reference() -> None:
    assert metric("exact_match")(["a b ", "c"], [["x", "a b"], ["d"]]) == 50.0


@pytest.mark.parametrize("name", sorted(METRIC_NAMES - APART))
def test_examples_that_do_not_match_up_are_refused(name: str) -> None:
    measure = metric(name)
    with pytest.raises(ValueError, match="2 predictions and 1 lists"):
        measure(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="0 predictions"):
        measure([], [])
    with pytest.raises(ValueError, match=r"example 2: .*\[\]"):
        measure(["a", "b"], [["a"], []])
    with pytest.raises(ValueError, match=r"example 1: .*'a'"):
        measure(["a"], ["a"])


@pytest.mark.parametrize("name", ["bleu", "chrf"])
@pytest.mark.parametrize("references", [[["a"], ["b"]], [["a", "c"], ["b"]]])
def test_signature_is_sacrebleus_own(name: str, references: list[list[str]]) -> None:
    library = {"bleu": sacrebleu.metrics.BLEU, "chrf": sacrebleu.metrics.CHRF}[name]()
    library.corpus_score(["a", "b"], streams(references))
    assert metric(name).signature(references) == f"sacrebleu {library.get_signature()}"


def test_every_metric_says_how_it_is_computed() -> None:
    assert all(metric(name).signature([["O"]]) for name in METRIC_NAMES - APART)


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean `bleu`"):
        metric("blue")
    assert len(METRIC_NAMES) >= 8


def test_bootstrap_of_bleu_agrees_with_sacrebleus_own() -> None:
    pick = random.Random(0)
    words = ["one", "two", "three", "four", "five", "six"]
    references = [[" ".join(pick.choices(words, k=8))] for _ in range(80)]
    predictions = [
        " ".join(w if pick.random() < 0.8 else pick.choice(words) for w in r[0].split())
        for r in references
    ]
    rows = metric("bleu").statistics(predictions, references)
    ours = bootstrap_interval(metric("bleu"), [rows], resamples=1000, seed=0)
    theirs = sacrebleu.metrics.BLEU().corpus_score(predictions, streams(references), 1000)
    assert ours.mean == pytest.approx(theirs.score)
    assert (ours.high - ours.low) / 2 == pytest.approx(theirs._ci, rel=0.15)


def test_interval_is_a_point_when_every_row_is_the_same() -> None:
    rows = np.ones((20, 1))
    interval = bootstrap_interval(metric("exact_match"), [rows, rows], resamples=100, seed=0)
    assert (interval.low, interval.mean, interval.high) == (100.0, 100.0, 100.0)
    assert (interval.n_seeds, interval.n_examples, interval.std) == (2, 20, 0.0)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        rows = (generator.random((100, 1)) < 0.7).astype(float)
        interval = bootstrap_interval(metric("exact_match"), [rows], resamples=200, seed=trial)
        covered += interval.low <= 70.0 <= interval.high
    assert 180 <= covered <= 199


def test_interval_widens_with_disagreement_between_seeds() -> None:
    generator = np.random.default_rng(2)
    same = [(generator.random((200, 1)) < 0.5).astype(float)] * 3
    apart = [(generator.random((200, 1)) < p).astype(float) for p in (0.2, 0.5, 0.8)]

    def width(per_seed: list) -> float:
        interval = bootstrap_interval(metric("exact_match"), per_seed, resamples=300, seed=0)
        return interval.high - interval.low

    assert width(apart) > 2 * width(same)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("perplexity", [[52.0, 10.0], [48.0, 10.0], [61.0, 12.0]]),
        ("ter", [[9.0, 3.0], [5.0, 3.0], [12.0, 4.0]]),
        ("reward_margin", [[-0.6], [-0.2], [-0.9]]),
    ],
)
def test_an_interval_holds_a_figure_outside_0_to_100(name: str, rows: list[list[float]]) -> None:
    measure = metric(name)
    found = bootstrap_interval(measure, [np.array(rows)], resamples=200, seed=0)
    assert not 0 <= found.mean <= 100
    assert found.within(*measure.limits) == found
    assert found.low < found.mean < found.high


def test_one_seed_gives_no_interval_over_seeds() -> None:
    assert seeds_interval([1.5]).low is None
    interval = seeds_interval([1.0, 2.0, 3.0])
    # Student's t with two degrees of freedom: 4.303 * 1 / sqrt(3).
    assert interval.high - interval.mean == pytest.approx(2.484, abs=1e-3)


def test_ter_equals_sacrebleu_with_any_number_of_references() -> None:
    predictions = ["the cat sat", "a dog", "no", ""]
    references = [["the cat sat down", "cat sat"], ["a big dog"], ["yes"], ["it is"]]
    streams = [["the cat sat down", "a big dog", "yes", "it is"], ["cat sat", None, None, None]]
    theirs = sacrebleu.metrics.TER().corpus_score(predictions, streams).score
    measure = metric("ter")
    assert measure(predictions, references) == pytest.approx(theirs)
    assert not measure.higher_is_better


@given(data=st.data(), labels=st.integers(2, 5), rows=st.integers(1, 30))
def test_figures_of_any_resample_are_scikit_learns(
    data: st.DataObject, labels: int, rows: int
) -> None:
    """Labels that are missing, never right or never predicted, and equal scores."""
    from sklearn import metrics as theirs

    some = st.lists(st.integers(0, labels - 1), min_size=rows, max_size=rows)
    gold, predicted = np.array(data.draw(some)), np.array(data.draw(some))
    pairs = np.stack([gold, predicted], axis=1).astype(float)
    for name, function in (
        ("macro_f1", theirs.f1_score),
        ("macro_precision", theirs.precision_score),
        ("macro_recall", theirs.recall_score),
    ):
        expected = function(gold, predicted, average="macro", zero_division=0)
        assert metric(name).score(pairs) == pytest.approx(100 * expected)
    shares = np.array([data.draw(some) for _ in range(labels)], dtype=float).T
    present = np.unique(gold)
    areas = [theirs.roc_auc_score(gold == c, shares[:, c]) for c in present if len(present) > 1]
    found = metric("roc_auc").score(np.hstack([gold[:, None], shares]))
    assert found == pytest.approx(100 * np.mean(areas) if areas else 50.0)


@pytest.mark.parametrize("labels", [2, 4])
def test_roc_auc_precision_and_recall_equal_scikit_learn(labels: int) -> None:
    from sklearn import metrics as theirs

    generator = np.random.default_rng(labels)
    names = [f"label {i}" for i in range(labels)]
    scores = generator.normal(size=(60, labels))
    gold = generator.integers(labels, size=60)
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    references = [[names[g]] for g in gold]
    predictions = [names[i] for i in scores.argmax(1)]
    details = [{"label_scores": dict(zip(names, row, strict=True))} for row in scores.tolist()]
    measure = metric("roc_auc")
    found = measure.score(measure.statistics(predictions, references, details))
    expected = (
        theirs.roc_auc_score(gold, shares[:, 1])
        if labels == 2
        else theirs.roc_auc_score(gold, shares, multi_class="ovr", average="macro")
    )
    assert found == pytest.approx(100 * expected)
    plain = [names[g] for g in gold]
    for name, function in (
        ("macro_f1", theirs.f1_score),
        ("macro_precision", theirs.precision_score),
        ("macro_recall", theirs.recall_score),
    ):
        value = function(plain, predictions, average="macro", zero_division=0)
        assert metric(name)(predictions, references) == pytest.approx(100 * value)
    with pytest.raises(ValueError, match="needs the `label_scores`"):
        measure.statistics(predictions, references)


def test_own_metric_is_the_mean_of_its_values(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "mine_for_test.py").write_text(
        "def longer(prediction, references):\n    return len(prediction) - len(references[0])\n"
    )
    monkeypatch.chdir(tmp_path)
    measure = metric("mine_for_test:longer")
    assert measure(["abc", "a"], [["a"], ["b"]]) == 1.0
    with pytest.raises(UserError, match="cannot be imported"):
        metric("mine_for_test:shorter")


def test_perplexity_is_exp_of_transformers_own_loss(base) -> None:
    from ptkit.data.examples import Example
    from ptkit.evaluation.predict import predict
    from ptkit.methods import ADAPTERS, Demonstrations, create_adapter
    from ptkit.recipe.tasks import GenerationTask

    task = GenerationTask(
        kind="generation", data={"builtin": "facts-to-text"}, input="{a}", target="{b}",
        metrics=["perplexity"], max_target_tokens=4,
    )  # fmt: skip
    rows = [("w5 w6", "w7"), ("w8", "w9 w10 w11"), ("w12 w13 w14", "w15 w16")]
    examples = [Example(a, b, (b,)) for a, b in rows]
    untouched = create_adapter(
        ADAPTERS["base"].section_class(kind="base"), base, Demonstrations((), 0)
    )
    found = predict(untouched, examples, task, batch_size=2)
    nats, tokens = 0.0, 0
    for (a, b), prediction in zip(rows, found, strict=True):
        before, after = (base.tokenizer(t)["input_ids"] for t in (a, b))
        after = [*after, base.tokenizer.eos_token_id]
        ids = torch.tensor([[*before, *after]])
        labels = ids.clone()
        labels[:, : len(before)] = -100
        with torch.no_grad():
            loss = float(base.model(input_ids=ids, labels=labels).loss)
        assert prediction.details["tokens"] == len(after)
        assert prediction.details["nats"] == pytest.approx(loss * len(after), abs=1e-4)
        nats, tokens = nats + loss * len(after), tokens + len(after)
    measure = metric("perplexity")
    rows_of = measure.statistics(
        [p.prediction for p in found], [p.references for p in found], [p.details for p in found]
    )
    assert measure.score(rows_of) == pytest.approx(float(np.exp(nats / tokens)), rel=1e-4)


def test_scores_of_a_run_are_the_libraries_on_its_saved_predictions(tmp_path: Path) -> None:
    """From `predictions.jsonl` alone, without any code of ptkit's."""
    quick = ("--set", "task.data.limits.test=20", "--set", "retention=null")
    metrics = ("--set", "task.metrics=[bleu, chrf, rouge1, rougeL]",
               "--set", "task.max_target_tokens=16")  # fmt: skip
    ptkit("train", "table-to-text", "-m", "base", "--out", "texts", *quick, *metrics, cwd=tmp_path)
    record = json.loads((tmp_path / "texts/record.json").read_text())["metrics"]
    rows = [json.loads(r) for r in (tmp_path / "texts/predictions.jsonl").read_text().splitlines()]
    predictions, references = [r["prediction"] for r in rows], [r["references"] for r in rows]
    assert record["bleu"] == sacrebleu.corpus_bleu(predictions, streams(references)).score
    assert record["chrf"] == sacrebleu.corpus_chrf(predictions, streams(references)).score
    for name in ("rouge1", "rougeL"):
        scorer = RougeScorer([name], use_stemmer=True)
        best = [scorer.score_multi(r, p)[name].fmeasure
                for p, r in zip(predictions, references, strict=True)]  # fmt: skip
        assert record[name] == pytest.approx(100 * np.mean(best))
    ptkit("train", "message-routing", "-m", "base", "--out", "labels", *quick, cwd=tmp_path)
    record = json.loads((tmp_path / "labels/record.json").read_text())["metrics"]
    rows = [json.loads(r) for r in (tmp_path / "labels/predictions.jsonl").read_text().splitlines()]
    gold, predicted = [r["label"] for r in rows], [r["prediction"] for r in rows]
    assert record["accuracy"] == pytest.approx(100 * accuracy_score(gold, predicted))
    assert record["macro_f1"] == pytest.approx(
        100 * f1_score(gold, predicted, average="macro", zero_division=0)
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON, JSON)
def test_json_is_equal_whatever_its_spaces_and_keys_order(value: object, other: object) -> None:
    """Python's own canonical text of both is the oracle."""

    def canonical(thing: object) -> str:
        return json.dumps(thing, sort_keys=True)

    def shuffled(thing: object) -> object:
        if isinstance(thing, dict):
            return {key: shuffled(thing[key]) for key in reversed(thing)}
        return [shuffled(inner) for inner in thing] if isinstance(thing, list) else thing

    told = json.dumps(shuffled(value), indent=2)
    assert metric("json_valid")([told], [[""]]) == 100
    assert metric("json_equal")([told], [[json.dumps(value)]]) == 100
    same = canonical(value) == canonical(other)
    assert metric("json_equal")([told], [[json.dumps(other)]]) == 100 * same


@pytest.mark.parametrize("text", ["", "{", "NaN", '{"a": 1, "a": 2}', "{'a': 1}", "1 2", "[1,]"])
def test_what_is_no_json_is_neither_valid_nor_equal(text: str) -> None:
    assert metric("json_valid")([text], [["1"]]) == 0
    assert metric("json_equal")([text], [["1"]]) == 0


def test_truth_is_no_number_in_json() -> None:
    assert metric("json_equal")(["true", "1.0"], [["1"], ["1"]]) == 50


def test_a_reference_that_is_no_json_is_said_before_a_run() -> None:
    with pytest.raises(UserError, match="the reference of example 2 is not JSON"):
        metric("json_equal").require([["1"], ["Hello"]])
