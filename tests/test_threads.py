"""Several threads on one base model: a row never runs with another thread's adapter."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, random_base, word_tokenizer
from test_composition import save_lora
from test_encoder_decoder import learnt, random_pair
from test_peft_parity import LEARNT, make_adapter, rows_of
from test_running import random_prefix
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from ptkit import AdapterBank
from ptkit.api import LoadedAdapter
from ptkit.formats.adapter_files import write_adapter
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.forward import all_logits
from ptkit.runtime.turns import Turn, turn

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "sliding_window": 6,
}  # fmt: skip
WINDOWED: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8)),
}


def windowed(family: str) -> Base:
    torch.manual_seed(0)
    model = WINDOWED[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return frozen_base(model.eval(), word_tokenizer(), f"windowed-{family}")


#: Base, and the options of `generate`.
CASES: dict[str, tuple[Callable[[], Base], dict[str, object]]] = {
    "mistral": (lambda: windowed("mistral"), {}),
    "gemma2": (lambda: windowed("gemma2"), {}),
    "t5": (lambda: random_pair("t5"), {}),
    "bart": (lambda: random_pair("bart"), {}),
    "gpt2, nothing cached": (lambda: random_base("gpt2"), {"use_cache": False}),
    "qwen3": (lambda: random_base("qwen3"), {}),
}


def prefix_for(base: Base, length: int, seed: int):
    if base.encoder_decoder:
        return learnt(base, "prefix_tuning", length, seed).map(lambda t: t + seed)
    return random_prefix(base, length, seed)


@pytest.mark.parametrize("case", CASES)
def test_every_threads_rows_run_with_their_own_adapters(case: str) -> None:
    """Two banks and a `LoadedAdapter` on one base; half of the rows are the plain base."""
    make, options = CASES[case]
    base = make()
    banks = AdapterBank(base), AdapterBank(base)
    prefixes = [prefix_for(base, length, length) for length in (2, 3, 5)]
    for bank in banks:
        for number, prefix in enumerate(prefixes):
            bank.add(f"a{number}", prefix)
    loaded = LoadedAdapter(Path("a0"), base, prefixes[0], {})
    options = {"max_new_tokens": 6, "do_sample": False, **options}
    names = [None, "a0", "a1", "a2"]
    prompts = rows_of([5, 8], seed=3)
    texts = base.tokenizer.batch_decode(prompts)
    alone = {name: banks[0].generate(texts, [name] * 2, **options) for name in names}
    assert len({tuple(answer) for answer in alone.values()}) > 1
    labels = ["w3", "w5 w6"]
    decided = {name: banks[0].classify(texts, labels, [name]) for name in names}

    def work(number: int) -> list[str]:
        wrong = []
        for turn_ in range(3):
            name = names[(number + turn_) % 4]
            bank = banks[number % 2]
            if bank.generate(texts, [name] * 2, **options) != alone[name]:
                wrong.append(f"{name} generated")
            if bank.classify(texts, labels, [name]) != decided[name]:
                wrong.append(f"{name} classified")
            if loaded.generate(texts, **options) != alone["a0"]:
                wrong.append("loaded adapter")
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert [wrong for found in pool.map(work, range(4)) for wrong in found] == []
    ids = torch.tensor(prompts[:1])
    if not base.encoder_decoder:  # nothing of an adapter is left in the model
        with torch.no_grad():
            ours = all_logits(base.model, ids, torch.ones_like(ids), None)
        torch.testing.assert_close(ours, base.model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_swaps_reads_and_loras_among_threads_end_and_every_answer_is_of_one_version(
    tmp_path: Path,
) -> None:
    """Files are read and compiled while batches run and LoRA adapters come and go: nobody waits
    for a thread that waits for them."""
    base = random_base("llama")
    bank = AdapterBank(base, check_every=0)
    answers: dict[str, set[str]] = {}
    for name in ("x", "y"):
        torch.manual_seed(len(answers))
        adapter = make_adapter(base, {**LEARNT["prompt"], "num_virtual_tokens": 3})
        write_adapter(tmp_path / name, adapter.files())
    for number in range(2):
        save_lora("llama", tmp_path / f"lora{number}", seed=number)
    options = {"max_new_tokens": 5, "do_sample": False}
    bank.register(tmp_path / "x", "served")
    versions = []
    for name in ("x", "y"):
        bank.swap("served", tmp_path / name)
        versions += bank.generate(["w3 w4 w5"], ["served"], **options)
    plain = bank.generate(["w3 w4 w5"], [None], **options)
    stop, wrong = threading.Event(), []

    def generates() -> None:
        for _ in range(12):
            served, base_row = bank.generate(["w3 w4 w5"] * 2, ["served", None], **options)
            if served not in versions or [base_row] != plain:
                wrong.append((served, base_row))

    def swaps() -> None:
        while not stop.is_set():
            for name in ("x", "y"):
                bank.swap("served", tmp_path / name)
                bank.prefix("served")

    def loads() -> None:
        while not stop.is_set():
            bank.load(tmp_path / "lora0", "lora")
            bank.load(tmp_path / "lora1", "lora")
            bank.unload("lora")

    changing = [threading.Thread(target=work, daemon=True) for work in (swaps, swaps, loads)]
    asking = [threading.Thread(target=generates, daemon=True) for _ in range(3)]
    for thread in [*changing, *asking]:
        thread.start()
    for thread in asking:
        thread.join(60)
    stop.set()
    for thread in changing:
        thread.join(60)
    assert not any(thread.is_alive() for thread in [*asking, *changing])
    assert wrong == []


def test_a_soft_prompt_first_read_within_a_batch_is_compiled_by_the_base_alone(
    tmp_path: Path,
) -> None:
    """Its row runs with a LoRA as well: what is kept for all must not hold that."""
    base = random_base("llama")
    adapter = make_adapter(base, {**LEARNT["prompt"], "num_virtual_tokens": 3})
    write_adapter(tmp_path / "soft", adapter.files())
    save_lora("llama", tmp_path / "lora", seed=4)
    expected = adapter.compiled().detach()
    bank = AdapterBank(base)
    bank.register(tmp_path / "soft")
    bank.load(tmp_path / "lora")
    bank.generate(["w1 w2", "w3"], [("soft", "lora"), "lora"], max_new_tokens=2)
    for ours, theirs in zip(bank.prefix("soft").keys, expected.keys, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", WINDOWED)
def test_plain_rows_are_classified_beside_a_lora_on_a_base_with_windows(
    family: str, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    texts, labels = ["w4 w8 w15", "w2 w3", "w9"], ["w3", "w5 w6", "w9"]
    untouched = AdapterBank(windowed(family))
    untouched.add("p", random_prefix(untouched.base, 3, 5))
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(3)
    peft = get_peft_model(windowed(family).model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    peft.save_pretrained(tmp_path / "lora")
    merged = AdapterBank(
        frozen_base(copy.deepcopy(peft).merge_and_unload(), word_tokenizer(), "merged")
    )
    bank = AdapterBank(windowed(family))
    bank.add("p", random_prefix(bank.base, 3, 5))
    bank.load(tmp_path / "lora")
    assert bank.classify(texts, labels, [None]) == untouched.classify(texts, labels, [None])
    assert bank.classify(texts, labels, ["p"]) == untouched.classify(texts, labels, ["p"])
    assert bank.classify(texts, labels, ["lora"]) == merged.classify(texts, labels, [None])
    mixed = bank.classify(texts, labels, [None, "p", "lora"], by="average")
    assert len(mixed) == len(texts)


def test_a_turn_is_re_entrant_and_goes_to_who_asked_first() -> None:
    lock, order = Turn(), []

    def work(number: int) -> None:
        with lock, lock:
            order.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
    with lock:
        for number, thread in enumerate(threads):
            thread.start()
            while len(lock._queue) <= number:
                pass
        with lock:
            assert order == []
        assert lock.mine
    for _ in range(50):  # who asks again at once does not overtake
        with lock:
            order.append(-1)
    for thread in threads:
        thread.join(10)
    assert [n for n in order if n >= 0] == [*range(5)]
    assert order[0] == 0
    assert not lock.mine


def test_a_copied_model_has_a_turn_of_its_own() -> None:
    model = random_base("gpt2").model
    with turn(model):
        twin = copy.deepcopy(model)
        assert turn(twin) is not turn(model)
        assert not turn(twin).mine
    assert turn(model) is turn(model)
