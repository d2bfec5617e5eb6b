"""Several adapters as one, against PEFT doing the same to one adapter or one merged model."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import beginning_base, random_base, random_model
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from test_peft_parity import LEARNT, make_adapter, rows_of
from transformers import GenerationConfig

from ptkit.bank import AdapterBank
from ptkit.bank.ensemble import label_votes, vote
from ptkit.errors import AdapterError, UserError
from ptkit.formats.adapter_files import AdapterFiles, write_adapter
from ptkit.methods import ADAPTERS, Demonstrations
from ptkit.runtime.forward import all_logits
from ptkit.runtime.scoring import continuation_scores

LINEAR = {
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen3": ["k_proj", "o_proj"],
}


def prefix_bank(
    family: str, lengths: dict[str, int]
) -> tuple[AdapterBank, dict[str, torch.Tensor]]:
    """A bank of prefixes, and each one's tensor in PEFT's layout."""
    torch.manual_seed(7)
    bank, flats = AdapterBank(random_base(family)), {}
    for name, length in lengths.items():
        adapter = make_adapter(bank.base, {**LEARNT["prefix"], "num_virtual_tokens": length})
        bank.add(name, adapter)
        flats[name] = adapter.flat().detach()
    return bank, flats


def peft_logits(model, bank: AdapterBank, flat: torch.Tensor, ids: torch.Tensor, folder: Path):
    """Logits of PEFT's PeftModel with the prefix `flat`, read from a file."""
    section = {**LEARNT["prefix"], "num_virtual_tokens": len(flat)}
    config = make_adapter(bank.base, section).files().config
    write_adapter(folder, AdapterFiles(config, {"prompt_embeddings": flat}), replace=True)
    with torch.no_grad():
        logits = PeftModel.from_pretrained(model, folder)(input_ids=ids).logits
    return logits[:, -ids.shape[1] :]


def save_lora(family: str, folder: Path, seed: int, rank: int = 2) -> PeftModel:
    """A LoRA adapter saved by PEFT, both of its matrices random; returns PEFT's own model."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, target_modules=LINEAR[family], task_type="CAUSAL_LM")
    model = get_peft_model(random_model(family), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model.eval()


def test_concatenated_prefixes_are_one_longer_prefix(family: str, tmp_path: Path) -> None:
    bank, flats = prefix_bank(family, {"style": 3, "task": 5})
    ids = torch.tensor(rows_of([8, 8]))
    with torch.no_grad():
        ours = all_logits(
            bank.base.model, ids, torch.ones_like(ids), bank.rows([("style", "task")] * 2)
        )
    joined = torch.cat([flats["style"], flats["task"]])
    theirs = peft_logits(random_model(family), bank, joined, ids, tmp_path / "joined")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    bank.compose("both", ["style", "task"])
    assert torch.equal(bank.prefix("both").flat(), joined)


def test_weighted_average_is_the_average_of_the_tensors() -> None:
    bank, flats = prefix_bank("llama", {"a": 4, "b": 4, "c": 3})
    bank.compose("mean", ["a", "b"], how="average", weights=[0.25, 0.75])
    torch.testing.assert_close(bank.prefix("mean").flat(), flats["a"] * 0.25 + flats["b"] * 0.75)
    bank.compose("even", ["a", "b"], how="average")
    torch.testing.assert_close(bank.prefix("even").flat(), (flats["a"] + flats["b"]) / 2)
    with pytest.raises(AdapterError, match="equal length"):
        bank.compose("uneven", ["a", "c"], how="average")
    assert "uneven" not in bank


def test_prefix_together_with_lora_equals_peft_on_the_merged_model(
    family: str, tmp_path: Path
) -> None:
    bank, flats = prefix_bank(family, {"task": 4})
    ids = torch.tensor(rows_of([7, 7, 7, 7]))
    peft_lora = save_lora(family, tmp_path / "lora", seed=1)
    plain = all_logits(bank.base.model, ids, torch.ones_like(ids), None)
    bank.load(tmp_path / "lora")
    names = [("task", "lora"), "lora", "task", None]
    with torch.no_grad(), bank.weights(names):
        ours = all_logits(bank.base.model, ids, torch.ones_like(ids), bank.rows(names))
        lora_only = peft_lora(input_ids=ids).logits
    merged = copy.deepcopy(peft_lora).merge_and_unload()
    both = peft_logits(merged, bank, flats["task"], ids, tmp_path / "p")
    prefix_only = peft_logits(random_model(family), bank, flats["task"], ids, tmp_path / "q")
    for row, expected in enumerate((both, lora_only, prefix_only, plain)):
        torch.testing.assert_close(ours[row], expected[row], atol=2e-5, rtol=1e-4)
    assert torch.equal(all_logits(bank.base.model, ids, torch.ones_like(ids), None), plain)
    bank.unload("lora")
    assert torch.equal(all_logits(bank.base.model, ids, torch.ones_like(ids), None), plain)
    assert not [n for n, _ in bank.base.model.named_parameters() if "lora" in n]


def test_rows_of_several_loras_and_beams_get_their_solo_tokens(family: str, tmp_path: Path) -> None:
    bank, _ = prefix_bank(family, {"p": 3})
    for i in range(2):
        save_lora(family, tmp_path / f"l{i}", seed=i, rank=2 + i)
        bank.load(tmp_path / f"l{i}")
    names = ["l0", ("p", "l1"), None, "p", "l1"]
    texts = ["w3 w4 w5", "w9", "w1 w2 w3 w4", "w7 w8", "w5 w5"]
    for beams in (1, 3):
        options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
        mixed = bank.generate(texts, names, **options)
        for text, name, answer in zip(texts, names, mixed, strict=True):
            assert bank.generate([text], [name], **options) == [answer]
    assert len(set(mixed)) == len(mixed)
    with pytest.raises(AdapterError, match="one LoRA adapter"):
        bank.generate(["w1"], [("l0", "l1")])


def test_lora_that_cannot_differ_by_row_is_refused(tmp_path: Path) -> None:
    bank, _ = prefix_bank("llama", {"p": 3})
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(random_model("llama"), config).save_pretrained(tmp_path / "dora")
    with pytest.raises(AdapterError, match="cannot differ from row to row"):
        bank.load(tmp_path / "dora")
    assert bank.list() == ["p"]
    assert not [n for n, _ in bank.base.model.named_parameters() if "lora" in n]


def test_averaged_ensemble_is_greedy_over_the_mean_log_probabilities(family: str) -> None:
    bank, _ = prefix_bank(family, {"a": 3, "b": 5, "c": 2})
    names = ["a", "b", "c"]
    text = "w4 w8 w15 w16"
    tokenizer = bank.base.tokenizer
    ids = tokenizer(text)["input_ids"]
    expected: list[int] = []
    for _ in range(6):
        row = torch.tensor([ids + expected])
        with torch.no_grad():
            each = [
                all_logits(bank.base.model, row, torch.ones_like(row), bank.rows([name]))[0, -1]
                for name in names
            ]
        expected.append(int(torch.stack(each).log_softmax(-1).mean(0).argmax()))
    answers = bank.ensemble(
        [text, "w2 w3"], names, by="average", max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert answers[0] == tokenizer.decode(expected, skip_special_tokens=True)


def banned(token: int):
    """A processor of the caller's own: `token` is never written."""

    def without(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.tensor([token]), float("-inf"))

    return without


def test_an_ensemble_of_an_adapter_with_itself_is_that_adapter(family: str) -> None:
    """Whatever else processes its scores: the caller's own processors, and settings."""
    bank, _ = prefix_bank(family, {"a": 3})
    texts = ["w4 w8 w15", "w2"]
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain = bank.generate(texts, ["a", "a"], **greedy)
    first = bank.base.tokenizer(plain[0])["input_ids"][0]
    without = greedy | {"logits_processor": [banned(first)], "repetition_penalty": 1.5}
    alone = bank.generate(texts, ["a", "a"], **without)
    assert alone != plain
    assert bank.ensemble(texts, ["a", "a"], by="average", **greedy) == plain
    assert bank.ensemble(texts, ["a", "a"], by="average", **without) == alone
    several = greedy | {"num_beams": 3, "num_return_sequences": 2}
    best = bank.generate(texts, ["a", "a"], **several)
    assert bank.ensemble(texts, ["a", "a"], **several) == best[::2]


def test_an_averaged_ensemble_groups_rows_whose_texts_are_read_at_different_lengths() -> None:
    """A text prompt begins with the begin-of-text token already, a prefix does not."""
    base = beginning_base("llama")
    bank = AdapterBank(base)
    bank.add("soft", make_adapter(base, {**LEARNT["prefix"], "num_virtual_tokens": 3}))
    text = ADAPTERS["text_prompt"]
    section = text.section_class(kind="text_prompt", instruction="w5 w6", separator=" ")
    bank.add("shots", text.create(section, base, Demonstrations((), 0)))
    greedy = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    texts = ["w4 w8 w15", "w2", "w7 w8"]
    names = ["soft", "shots"]
    prompts = bank._encoded(texts[:1] * 2, names)
    assert len(prompts[0]) != len(prompts[1])
    alone = [bank.ensemble(text, names, by="average", **greedy)[0] for text in texts]
    assert bank.ensemble(texts, names, by="average", **greedy) == alone
    assert alone[0] != bank.generate(texts[0], "shots", **greedy)[0]


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 2},
        {"do_sample": True},
        {"num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_beams=2)},
    ],
)
def test_an_averaged_ensemble_of_anything_but_greedy_rows_is_refused(option: dict) -> None:
    bank, _ = prefix_bank("llama", {"a": 3})
    with pytest.raises(UserError, match=r"`average` writes one greedy answer.*use `vote`"):
        bank.ensemble("w4", ["a", "a"], by="average", max_new_tokens=2, **option)


def test_votes_are_those_of_the_solo_runs(family: str) -> None:
    bank, _ = prefix_bank(family, {"a": 3, "b": 5, "c": 2})
    names = ["a", "b", "c", "a"]  # `a` twice: it has two votes
    texts = ["w4 w8 w15", "w2"]
    options = {"max_new_tokens": 3, "do_sample": False}
    solo = bank.generate(texts, ["a", "a"], **options)
    assert bank.ensemble(texts, names, **options) == solo
    labels = ["w3", "w5 w6", "w9"]
    words = bank.base.tokenizer(labels)["input_ids"]
    for text, decided in zip(texts, bank.classify(texts, labels, names[:3]), strict=True):
        context = bank.base.tokenizer([text])["input_ids"]
        scores = [
            continuation_scores(bank.base.model, context, words, bank.rows([name]), pad_token_id=0)[
                0
            ]
            for name in names[:3]
        ]
        each = [labels[int(s.argmax())] for s in scores]
        if len(set(each)) < 3:
            assert decided == max(each, key=each.count)
        else:
            assert decided == labels[int(torch.stack(scores).mean(0).argmax())]
        averaged = bank.classify([text], labels, names[:3], by="average")
        assert averaged == [labels[int(torch.stack(scores).mean(0).argmax())]]


@given(st.lists(st.sampled_from(["x", "y", " x ", "z"]), min_size=1, max_size=7))
def test_vote_picks_a_commonest_answer(answers: list[str]) -> None:
    stripped = [a.strip() for a in answers]
    winner = vote(answers).strip()
    assert stripped.count(winner) == max(stripped.count(a) for a in stripped)


def test_a_tied_vote_goes_to_the_likelier_label_among_the_tied() -> None:
    # Labels 0 and 1 have a vote each; label 2 has the best mean but no vote.
    scores = torch.tensor([[[-1.0, -9.0, -1.1], [-9.0, -1.0, -1.1]]])
    scores[0, 0, 0] = -0.5
    assert label_votes(scores, "vote").tolist() == [0]
    assert label_votes(scores, "average").tolist() == [2]
