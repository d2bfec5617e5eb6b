"""A metric answers within its scope, and refuses with what to use outside of it."""

from __future__ import annotations

import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from seqeval.metrics import f1_score
from seqeval.scheme import BILOU, IOBES
from sklearn.metrics import f1_score as label_f1

from ptkit.errors import UserError
from ptkit.metrics.registry import metric

CHINESE = ["今天的会议改到下午三点。", "请把报告发给王经理。"]
GERMAN = ["Grüße aus Köln", "Größe der Tür"]


@pytest.mark.parametrize("letters", ["BIES", "BILU"])
@given(st.data())
@settings(max_examples=40, deadline=None)
def test_entities_are_seqevals_in_the_scheme_of_the_labels(letters: str, data) -> None:
    tag = st.sampled_from(["O", *(f"{a}-{b}" for a in letters for b in ("PER", "LOC"))])
    rows = data.draw(st.lists(st.lists(st.tuples(tag, tag), min_size=1, max_size=8), min_size=1))
    last = letters[-1]
    gold = [[g for g, _ in row] for row in rows] + [[f"{last}-PER"] * 2, [f"{letters[2]}-X"]]
    found = [[p for _, p in row] for row in rows] + [[f"{last}-PER", "O"], ["O"]]
    expected = f1_score(gold, found, mode="strict", scheme=IOBES if last == "S" else BILOU)
    texts = [" ".join(row) for row in found]
    references = [[" ".join(row)] for row in gold]
    assert metric("entity_f1")(texts, references) == pytest.approx(100 * expected)


@pytest.mark.parametrize("labels", ["PER O LOC", "BRAND O ITEM", "B-PER L-PER S-PER"])
def test_labels_of_no_scheme_are_refused(labels: str) -> None:
    with pytest.raises(UserError, match=r"IOB.*IOBES.*BILOU.*word_macro_f1"):
        metric("entity_f1")([labels], [[labels]])


def test_an_unread_word_is_wrong_and_no_class() -> None:
    found, gold = "N V N V N V N ?", "N V N V N V N V"
    expected = label_f1(gold.split(), found.split(), labels=["N", "V"], average="macro")
    assert metric("word_macro_f1")([found], [[gold]]) == pytest.approx(100 * expected)
    assert metric("word_accuracy")([found], [[gold]]) == 87.5
    assert metric("entity_f1")(["B-A ?"], [["B-A I-A"]]) == 0.0


@pytest.mark.parametrize("name", ["bleu", "ter", "rouge1", "rougeL", "rougeLsum"])
def test_a_script_that_is_not_split_is_refused_with_the_fix(name: str) -> None:
    references = [[text] for text in CHINESE]
    with pytest.raises(UserError, match=r"-zh|chrf"):
        metric(name)(CHINESE, references)
    with pytest.raises(UserError):
        metric(name).require(references)


def test_letters_that_rouge_drops_are_refused_and_other_words_judged() -> None:
    with pytest.raises(UserError, match="rouge1-intl"):
        metric("rouge1")(GERMAN, [[text] for text in GERMAN])
    assert metric("rouge1-intl")(["Grüße"], [["Größe"]]) == 0.0
    assert metric("rouge1-intl")(GERMAN, [[text] for text in GERMAN]) == 100.0
    # A name among English words is no other language.
    english = (
        "The café opened in the old harbour district after the long winter was over. "
        + "No fewer than forty people came to it on the first day. " * 3
    )
    assert metric("rougeL")([english], [[english]]) == 100.0


@pytest.mark.parametrize("tokenizer", ["zh", "char", "intl"])
def test_bleu_with_a_tokeniser_is_sacrebleus(tokenizer: str) -> None:
    found = [CHINESE[0], CHINESE[1][:-3]]
    theirs = sacrebleu.corpus_bleu(found, [CHINESE], tokenize=tokenizer).score
    measure = metric(f"bleu-{tokenizer}")
    references = [[text] for text in CHINESE]
    assert measure(found, references) == pytest.approx(theirs)
    assert f"tok:{tokenizer}" in measure.signature(references)


def test_rouge_of_characters_tells_chinese_apart() -> None:
    assert metric("rougeL-char")(CHINESE[:1], [CHINESE[:1]]) == 100.0
    assert 0 < metric("rougeL-char")([CHINESE[0][:6]], [CHINESE[:1]]) < 100


def test_rouge_lsum_is_rouge_scores_and_takes_lines_for_sentences() -> None:
    found, reference = "the dog sat\nthe cat ran", "the cat ran\nthe dog sat"
    theirs = RougeScorer(["rougeLsum"], use_stemmer=True).score(reference, found)["rougeLsum"]
    assert metric("rougeLsum")([found], [[reference]]) == pytest.approx(100 * theirs.fmeasure)
    assert metric("rougeLsum")([found], [[reference]]) > metric("rougeL")([found], [[reference]])
    assert "lines" in metric("rougeLsum").signature([[reference]])


@pytest.mark.parametrize("text", ["สวัสดีครับ วันนี้อากาศดี", "မင်္ဂလာပါ", *CHINESE])
def test_no_more_letters_are_lost_than_there_are(text: str) -> None:
    """Thai and Burmese write vowels as marks, which are no letters."""
    with pytest.raises(UserError, match=r"none: 100% of the references' letters"):
        metric("bleu").require([[text]])
