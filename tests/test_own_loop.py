"""An adapter as a model of transformers: in pipelines, transformers' `Trainer` and TRL's."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, VOCABULARY, beginning_base, random_base, random_model, word_tokenizer
from peft import PeftModel
from safetensors.torch import load_file
from test_encoder_decoder import random_pair
from transformers import Trainer, TrainingArguments, pipeline

from ptkit import AdapterBank, load_adapter, parameter_groups, trainable_model
from ptkit.errors import ModelError, UserError
from ptkit.runtime.adapted_model import adapted_model
from ptkit.runtime.forward import supervised_losses

METHODS = ("prefix_tuning", "prompt_tuning", "p_tuning")
TEXTS = ["w1 w2 w3 w4", "w5 w6 w7"]
TRL = Path(os.environ.get("PTKIT_TRL", Path(sys.prefix) / "trl"))


def batch(left: bool = False) -> dict[str, torch.Tensor]:
    """Two rows of unequal length, the shorter one padded."""
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14]]
    learnt = [[-100, -100, 7, 8, 9, 10], [-100, -100, -100, 14]]
    width = 6
    made: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ids, labels in zip(rows, learnt, strict=True):
        gap = width - len(ids)
        for name, row, empty in (
            ("input_ids", ids, 0),
            ("attention_mask", [1] * len(ids), 0),
            ("labels", labels, -100),
        ):
            made[name].append([empty] * gap + row if left else row + [empty] * gap)
    return {name: torch.tensor(values) for name, values in made.items()}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_and_gradients_are_those_of_the_logits(family: str, method: str, left: bool) -> None:
    model = trainable_model(random_base(family), method=method, texts=TEXTS, num_virtual_tokens=4)
    rows = batch(left)
    loss = model(**rows).loss
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in trained]
    model.zero_grad()
    logits = model(rows["input_ids"], rows["attention_mask"]).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss, expected)
    expected.backward()
    for own, parameter in zip(found, trained, strict=True):
        torch.testing.assert_close(own, parameter.grad, rtol=1e-4, atol=1e-6)
    assert all(not p.requires_grad for n, p in model.named_parameters() if "adapter." not in n)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_is_the_same_model_in_peft(method: str, tmp_path: Path) -> None:
    model = trainable_model(random_base("llama"), method=method, texts=TEXTS, num_virtual_tokens=4)
    (tmp_path / "kept.txt").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "kept.txt").read_text() == "mine"
    ids = torch.tensor([[5, 6, 7, 8]])
    peft = PeftModel.from_pretrained(random_model("llama"), tmp_path).eval()
    with torch.no_grad():
        own, theirs = model.eval()(ids).logits, peft(ids).logits[:, -4:]
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    read = load_adapter(tmp_path, random_base("llama"))
    with torch.no_grad():
        torch.testing.assert_close(read.model(ids).logits, own, rtol=1e-5, atol=1e-5)


def test_the_base_stays_the_plain_base() -> None:
    base = random_base("llama")
    ids = torch.tensor([[5, 6, 7]])
    before, own = base.model(ids).logits, base.model.__dict__.copy()
    model = trainable_model(base, texts=TEXTS)
    model.train()
    model(ids, labels=ids).loss.backward()
    model.eval()
    assert torch.equal(base.model(ids).logits, before)
    assert base.model.__dict__ == own
    assert not any("adapter." in name for name, _ in base.model.named_parameters())


class _Rows(torch.utils.data.Dataset):
    """Rows that all say the same thing, which is quickly learnt."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        ids = torch.tensor([1 + row % 8, 20, 30, 40, 50])
        labels = ids.masked_fill(torch.arange(5) < 2, -100)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trainer(folder: Path, steps: int, texts: Sequence[str] = TEXTS, **arguments: Any) -> Trainer:
    """transformers' own loop on a fresh adapter."""
    model = trainable_model(random_base("llama"), texts=texts, num_virtual_tokens=4)
    settings = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, save_steps=4,
        report_to=[], use_cpu=True, logging_steps=1, disable_tqdm=True, seed=1,
        lr_scheduler_type="constant", **arguments,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameter_groups(model))
    return Trainer(model, settings, train_dataset=_Rows(), eval_dataset=_Rows(),
                   optimizers=(optimizer, None))  # fmt: skip


def trained_values(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_transformers_trainer_trains_saves_and_resumes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trainer(tmp_path / "whole", 8)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    whole.save_model()
    assert whole.evaluate()["eval_loss"] < before - 0.5
    trainer(tmp_path / "cut", 4).train()
    again = trainer(tmp_path / "cut", 8, texts=[])  # what it starts from is in the checkpoint
    again.train(resume_from_checkpoint=True)
    again.save_model()
    expected = trained_values(tmp_path / "whole")
    for name, values in trained_values(tmp_path / "cut").items():
        torch.testing.assert_close(values, expected[name])
    assert not any(name in caplog.text for name in ("missing keys", "unexpected keys"))
    ids = torch.tensor([[3, 20, 30]])
    read = load_adapter(tmp_path / "whole", random_base("llama")).model
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, whole.model(ids).logits)


def test_accumulated_steps_weigh_every_token_alike(tmp_path: Path) -> None:
    at_once = trainer(tmp_path / "a", 1)
    at_once.train()
    in_two = trainer(tmp_path / "b", 1, gradient_accumulation_steps=1)
    in_two.args.per_device_train_batch_size, in_two.args.gradient_accumulation_steps = 2, 2
    in_two._train_batch_size = 2
    in_two.train()
    for one, two in zip(at_once.model.parameters(), in_two.model.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointed_layers_give_the_same_gradients(checkpointing: bool) -> None:
    model = trainable_model(random_base("llama"), texts=TEXTS, num_virtual_tokens=4)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch()).loss.backward()
    plain = trainable_model(random_base("llama"), texts=TEXTS, num_virtual_tokens=4)
    plain(**batch()).loss.backward()
    for one, two in zip(model.parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def test_an_encoder_decoder_trains_and_writes() -> None:
    model = trainable_model(random_pair("bart"), texts=TEXTS, num_virtual_tokens=3)
    ids, labels = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 0]])
    optimizer = torch.optim.AdamW(parameter_groups(model))
    first = model(ids, labels=labels).loss.item()
    for _ in range(5):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(ids, labels=labels).loss.item() < first
    assert model.generate(ids, max_new_tokens=3).shape[0] == 1
    with pytest.raises(ModelError, match="decoder_input_ids"):
        model(ids)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_pipeline_answers_as_the_bank_does(family: str, tmp_path: Path) -> None:
    base = beginning_base(family)
    trainable_model(base, texts=TEXTS, num_virtual_tokens=4).save_pretrained(tmp_path / "mine")
    adapter = load_adapter(tmp_path / "mine", base)
    bank = AdapterBank(base)
    bank.load(tmp_path / "mine")
    texts = ["w1 w2 w3", "w4", "w5 w6"]
    expected = bank.generate(texts, ["mine"] * 3, max_new_tokens=6)
    writer = pipeline("text-generation", model=adapter.model, tokenizer=adapter.tokenizer)
    for size in (1, 3):
        found = writer(
            texts, max_new_tokens=6, do_sample=False, return_full_text=False, batch_size=size,
            add_special_tokens=True,
        )  # fmt: skip
        assert [answer[0]["generated_text"].strip() for answer in found] == expected
    several = writer(texts, max_new_tokens=6, num_return_sequences=2, do_sample=True)
    assert [len(answers) for answers in several] == [2, 2, 2]


def test_the_chat_of_a_pipeline_is_in_the_adapters_template(tmp_path: Path) -> None:
    base = random_base("llama")
    model = trainable_model(base, texts=TEXTS)
    model.save_pretrained(tmp_path / "mine")
    adapter = load_adapter(tmp_path / "mine", base)
    template = "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}"
    object.__setattr__(adapter, "info", adapter.info.updated(chat={"template": template}))
    assert adapter.tokenizer.chat_template == template
    assert base.tokenizer.chat_template is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "lora"}, "get_peft_model"),
        ({"method": "full"}, "get_peft_model"),
        ({"method": "base"}, "get_peft_model"),
        ({"method": "prefix_tunning"}, "prefix_tuning"),
        ({"learning_rate": 0.1}, "optimiser"),
        ({"start": "auto"}, "name a start"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ({"virtual_tokens": 5}, "virtual_tokens"),
        ({"start": "text"}, "start_text"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        trainable_model(random_base("llama"), **settings)


def test_what_would_be_computed_wrongly_is_refused() -> None:
    base = random_base("llama")
    model = trainable_model(base, texts=TEXTS)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ModelError, match="position_ids"):
        model(ids, position_ids=torch.tensor([[0, 1, 0]]))
    with pytest.raises(ModelError, match="past_key_values"):
        model(ids, past_key_values=object())
    with pytest.raises(ModelError, match="inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 2, 32))
    with pytest.raises(ModelError, match="input_ids"):
        model()
    with pytest.raises(ModelError, match="return_dict_in_generate"):
        model.generate(ids, return_dict_in_generate=True)
    for batching in ("generate_batch", "init_continuous_batching"):
        with pytest.raises(ModelError, match="continuous batching reads no prefix"):
            getattr(model, batching)([[5, 6, 7]])
    with pytest.raises(UserError, match="tokenizer"):
        trainable_model(random_model("llama"))
    with pytest.raises(UserError, match="trainable_model"):
        parameter_groups(base.model)
    fixed = adapted_model(base.model, model._compile, base.pad_token_id)
    with pytest.raises(UserError, match="copy"):
        fixed.save_pretrained("nowhere")


def test_trls_output_head_reads_the_adapters_hidden_states() -> None:
    if not (TRL / "trl").is_dir():
        pytest.skip("TRL is not here: make setup-oracles")
    sys.path.append(str(TRL))
    try:
        utils = pytest.importorskip("trl.trainer.utils")
    finally:
        sys.path.remove(str(TRL))
    base = random_base("llama")
    model = trainable_model(base, texts=TEXTS, num_virtual_tokens=4)
    rows = batch()
    losses = supervised_losses(
        base.model, rows["input_ids"], rows["attention_mask"], rows["labels"],
        model._compile().for_rows(rows["input_ids"], rows["attention_mask"].bool()),
    )  # fmt: skip
    utils.add_fused_lm_head(model)
    output = model(**rows, fused_lm_head=True)
    found = -output.log_probs[output.label_mask.bool()]
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_starts_are_the_same_for_the_same_seed() -> None:
    ids = torch.tensor([[5, 6, 7]])
    first, again, other = (
        trainable_model(random_base("gpt2"), seed=seed)(ids).logits for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape[-1] == VOCABULARY
    assert word_tokenizer().vocab_size == VOCABULARY


def test_a_notebook_shows_an_adapter_and_escapes_its_name(tmp_path: Path) -> None:
    base = random_base("llama")
    folder = tmp_path / "a<b"
    trainable_model(base, texts=TEXTS, num_virtual_tokens=4).save_pretrained(folder)
    shown = load_adapter(folder, base)._repr_html_()
    assert "a&lt;b" in shown
    assert "a<b" not in shown
    assert "<td>prefix_tuning</td>" in shown
    assert "<td>4</td>" in shown
