"""What a text becomes: where it ends, where it begins, and labels that can be told apart."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import random_base, random_model, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ptkit.bank import AdapterBank
from ptkit.bank.conversation import Conversation
from ptkit.data.encode import encode_examples, require_apart
from ptkit.data.examples import Example
from ptkit.errors import DataError, ModelError, UserError
from ptkit.evaluation.classify import Classifier
from ptkit.formats.adapter_info import AdapterInfo
from ptkit.loaded_adapter import LoadedAdapter
from ptkit.methods import ADAPTERS, Demonstrations, create_adapter
from ptkit.recipe.tasks import ClassificationTask, GenerationTask, TokenClassificationTask
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.generation import end_ids
from ptkit.runtime.precision import mixed_precision
from ptkit.training.provenance import task_info
from ptkit.training.self_study import _written

DATA = {"builtin": "none"}
WRITING = GenerationTask(kind="generation", data=DATA, input="{x}", target="{y}")


def choosing(**words: str) -> ClassificationTask:
    return ClassificationTask(kind="classification", data=DATA, input="{x}", verbalizer=words)


def ending_otherwise(own: int | list[int] | None, end: str = "w7") -> Base:
    """A base whose generation config ends texts with `own`, its tokenizer with `end`."""
    model, tokenizer = random_model("llama"), word_tokenizer()
    model.generation_config.eos_token_id = own
    tokenizer.eos_token = end
    return frozen_base(model, tokenizer, "ends-otherwise")


@pytest.mark.parametrize("own", [0, [0, 3], None])
def test_generation_stops_at_the_end_that_is_learnt(own: int | list[int] | None) -> None:
    base = ending_otherwise(own)
    bank = AdapterBank(base)
    (row,) = encode_examples([Example("w1", "w2 w3", ())], base.tokenizer, WRITING)
    learnt = row.target_ids[-1]
    assert learnt == 7
    kept = {own} if isinstance(own, int) else {*(own or ())}
    assert end_ids(base.model) == kept | {learnt}
    head = base.model.get_output_embeddings()
    assert head is not None

    def always(_module, _args, logits: torch.Tensor) -> torch.Tensor:
        wanted = torch.full_like(logits, -1e4)
        wanted[..., learnt] = 0.0
        return wanted

    hook = head.register_forward_hook(always)
    try:
        assert bank.generate_ids([[1, 2]], [None], max_new_tokens=5, do_sample=False) == [[]]
        assert Conversation(bank).say("w1 w2", max_new_tokens=5, do_sample=False) == ""
    finally:
        hook.remove()


def test_an_end_that_is_known_already_is_left_alone() -> None:
    assert ending_otherwise(7).model.generation_config.eos_token_id == 7
    assert ending_otherwise([0, 7]).model.generation_config.eos_token_id == [0, 7]


def test_studied_texts_end_as_targets_of_a_task_do(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ending_otherwise(0)
    monkeypatch.setattr("ptkit.training.self_study.generate", lambda *_, **__: [[5, 6]])
    prefix = SimpleNamespace()
    monkeypatch.setattr(
        "ptkit.training.self_study.PrefixBatch", SimpleNamespace(shared=lambda *_: None)
    )
    written = _written(base, prefix, [("train", [1])], 8, (0, 0), lambda _done: None)  # type: ignore[arg-type]
    assert written == [[5, 6, 7]]


@pytest.mark.parametrize("pairs", [False, True])
def test_a_tokenizer_without_an_end_is_refused_where_targets_need_one(pairs: bool) -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    rows = [Example("w1", "w2", ())]
    with pytest.raises(DataError, match="names no end token"):
        encode_examples(rows, tokenizer, WRITING, pairs=pairs)
    if not pairs:  # words of a label have no end of their own
        encode_examples(rows, tokenizer, choosing(a=" w2", b=" w3"))


# Label words


@given(st.dictionaries(st.text(max_size=3), st.lists(st.integers(0, 2), max_size=3), max_size=5))
def test_labels_are_refused_just_where_one_begins_another(ids: dict[str, list[int]]) -> None:
    rows = [*ids.values()]
    wrong = any(
        not a or any(i != j and b[: len(a)] == a for j, b in enumerate(rows))
        for i, a in enumerate(rows)
    )
    if wrong:
        with pytest.raises(DataError):
            require_apart(ids)
    else:
        require_apart(ids)


def test_both_labels_are_named_before_anything_is_trained() -> None:
    task = choosing(no=" w1", unsure=" w2").model_copy(
        update={"verbalizer": {"no": " w1", "unsure": " w1 w2", "yes": " w3"}}
    )
    with pytest.raises(DataError, match=r"`no` begin those of `unsure`.*begin otherwise"):
        encode_examples([Example("w4", " w3", ())], word_tokenizer(), task)
    unknown = choosing(a=" x", b=" y")  # both are the unknown token
    with pytest.raises(DataError, match="`a` and `b` are the same tokens"):
        encode_examples([Example("w4", " x", ())], word_tokenizer(), unknown)
    with pytest.raises(DataError, match="label `a` have no tokens"):
        encode_examples([Example("w4", " ", ())], word_tokenizer(), choosing(a=" ", b=" w1"))
    bank = AdapterBank(random_base("llama"))
    with pytest.raises(DataError, match="`w1` begin those of `w1 w2`"):
        bank.classify(["w3"], ["w1", "w1 w2"], [None])
    with pytest.raises(DataError, match="no tokens"):
        bank.classify(["w3"], ["w1", ""], [None])


def test_a_recipe_says_so_without_a_tokenizer() -> None:
    with pytest.raises(ValidationError, match="words of `no` begin those of `unsure`"):
        choosing(yes=" yes", unsure=" not sure", no=" not")
    with pytest.raises(ValidationError, match="label `no` has no words"):
        choosing(yes=" yes", no="")
    choosing(one=" 1", ten=" 10")  # tokens of their own
    require_apart({"one": [5], "ten": [6]})


def test_fp16_on_a_cpu_is_refused_with_what_to_use() -> None:
    with pytest.raises(ModelError, match=r"needs a GPU.*auto or bf16"):
        mixed_precision("fp16", torch.device("cpu"))
    assert mixed_precision("fp16", torch.device("cuda")) == "fp16"


# One text


def test_one_text_is_one_text_everywhere() -> None:
    base = random_base("llama")
    bank = AdapterBank(base)
    adapter = create_adapter(
        ADAPTERS["prefix_tuning"].section_class(kind="prefix_tuning", num_virtual_tokens=3),  # type: ignore[call-arg]
        base, Demonstrations(["w1 w2 w3"], 0),
    )  # fmt: skip
    bank.add("p", adapter)
    greedy = {"max_new_tokens": 3, "do_sample": False}
    text = "w1 w2 w3"
    compiled = adapter.compiled()
    assert compiled is not None
    loaded = LoadedAdapter(SimpleNamespace(), base, compiled.detach(), AdapterInfo())  # type: ignore[arg-type]
    assert loaded.generate(text, **greedy) == loaded.generate([text], **greedy)
    assert bank.generate(text, "p", **greedy) == bank.generate([text], ["p"], **greedy)
    assert bank.generate(text, None, **greedy) == bank.generate([text], [None], **greedy)
    assert bank.ensemble(text, "p", **greedy) == bank.ensemble([text], ["p"], **greedy)
    assert bank.classify(text, ["w5", "w6"], "p") == bank.classify([text], ["w5", "w6"], ["p"])
    talk = Conversation(bank)
    assert talk.compare(text, "p", **greedy) == talk.compare([text], ["p"], **greedy)
    task = choosing(a="w5", b="w6")
    info = AdapterInfo(task=task_info(task))
    files = SimpleNamespace(info=info, config={}, peft_type="", tensors={})
    asked = _classifier(adapter, task, files)
    assert asked.probabilities(text) == asked.probabilities([text])
    words = TokenClassificationTask(kind="token_classification", data=DATA, labels=["A", "B"])
    with pytest.raises(UserError, match=r"each a list of its words: \[text.split"):
        _classifier(adapter, words, files).words(["w1 w2", "w3"])  # type: ignore[list-item]


def _classifier(adapter, task, files) -> Classifier:
    found = Classifier.__new__(Classifier)
    found.adapter, found.task = adapter, task
    found._compiled = adapter.compiled().detach()
    return found
