"""Several threads on one base model: a row never runs with another thread's adapter."""

from __future__ import annotations

import copy
import gc
import inspect
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, random_base, word_tokenizer
from test_composition import save_lora
from test_encoder_decoder import learnt, random_pair
from test_paged_batch import random_prefix
from test_peft_parity import LEARNT, make_adapter, rows_of
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from ptkit import AdapterBank
from ptkit.families.kinds import DECODER, ENCODER_DECODER, SEQUENCE_ENCODER
from ptkit.families.model_under_test import small_model
from ptkit.families.shapes import FAMILIES, small
from ptkit.formats.adapter_files import write_adapter
from ptkit.loaded_adapter import LoadedAdapter
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.forward import all_logits, head_logits, pad_rows, supervised_losses
from ptkit.runtime.generation import generate
from ptkit.runtime.locks import ReadWriteLock, lock_of
from ptkit.runtime.scoring import continuation_scores

SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "sliding_window": 6,
}  # fmt: skip
WINDOWED: dict[str, Callable[[], PreTrainedModel]] = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE)),
    "gemma2": lambda: AutoModelForCausalLM.from_config(
        Gemma2Config(**SHAPE, head_dim=8), attn_implementation="eager"
    ),
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


ENCODERS = {"bert", "roberta", "electra", "distilbert", "modernbert", "deberta-v2"}
THREADS, ANSWERS = 4, 7


def asked_of(name: str) -> Callable[[int], object]:
    """What a tiny model of a family answers behind prefix number `n`, 0 being the plain base."""
    config = small(FAMILIES[name].config)
    encoder = config.model_type in ENCODERS
    kind = (
        SEQUENCE_ENCODER if encoder else ENCODER_DECODER if config.is_encoder_decoder else DECODER
    )
    base = small_model(name, config, kind).base()
    model, layout = base.model, base.layout
    draw = torch.Generator().manual_seed(4)

    def drawn(length: int) -> KVPrefix:
        def tensors(widths: list[int]) -> tuple[torch.Tensor, ...]:
            return tuple(
                torch.randn(shape.kv_heads, length, width, generator=draw)
                for shape, width in zip(layout, widths, strict=True)
            )

        return KVPrefix(
            tensors([s.key_dim for s in layout]), tensors([s.value_dim for s in layout])
        )

    prefixes = [None, drawn(3), drawn(5), replace(drawn(4), as_text=True)]
    if encoder or config.is_encoder_decoder:  # the input is read with a soft prompt before it
        width = base.embedding.weight.shape[1]
        prefixes[3] = KVPrefix.of_embeddings(torch.randn(4, width, generator=draw), layout)
    prompts = [[i % 80 + 3 for i in row] for row in rows_of([5, 11])]

    def asked(number: int) -> object:
        prefix = prefixes[number % len(prefixes)]
        batch = None if prefix is None else PrefixBatch.shared(prefix, 2)
        if not encoder:
            pad = {"pad_token_id": base.pad_token_id}
            scores = continuation_scores(model, prompts, [[7], [9, 4]], batch, **pad)
            return scores.tolist(), generate(
                model, prompts, batch, **pad, do_sample=False, max_new_tokens=3, eos_token_id=None
            )
        ids, mask = pad_rows(prompts, base.pad_token_id, left=False)
        with torch.no_grad():
            return head_logits(model, ids, mask, batch).tolist()

    return asked


@pytest.mark.parametrize("name", FAMILIES)
def test_a_thousand_answers_of_all_families_in_threads_are_those_one_gets_alone(name: str) -> None:
    assert len(FAMILIES) * THREADS * ANSWERS >= 1000
    asked = asked_of(name)
    alone = [asked(number) for number in range(4)]
    assert any(answer != alone[0] for answer in alone)

    def work(thread: int) -> list[int]:
        return [n for i in range(ANSWERS) if asked(n := thread + i) != alone[n % 4]]

    with ThreadPoolExecutor(THREADS) as pool:
        assert [wrong for found in pool.map(work, range(THREADS)) for wrong in found] == []


@pytest.mark.parametrize("name", ["mistral", "bloom", "bart", "deberta_v2"])
def test_passes_of_two_threads_run_at_the_same_time_and_leave_no_trace(name: str) -> None:
    """Each waits in the model's last module until the other one is there, too."""
    asked = asked_of(name)
    alone = [asked(number) for number in range(4)]
    model = known_model(asked)
    before = {part: {*module.__dict__} for part, module in model.named_modules()}
    met, traces = threading.Barrier(2, timeout=60), []

    def meet(*_: object) -> None:
        met.wait()
        traces.append({part: {*module.__dict__} for part, module in model.named_modules()})

    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    hook = last.register_forward_hook(meet)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = [*pool.map(asked, (1, 3))]
    finally:
        hook.remove()
    assert found == [alone[1], alone[3]]
    assert traces
    assert all(trace == before for trace in traces)


def known_model(asked: Callable[[int], object]) -> PreTrainedModel:
    return inspect.getclosurevars(asked).nonlocals["model"]


def test_frequencies_that_follow_the_longest_text_are_those_of_each_threads_own() -> None:
    """transformers keeps them in the model, so such a model reads for one thread at a time."""
    config = Phi3Config(
        **{**SHAPE, "num_key_value_heads": 4, "sliding_window": None},
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
            "long_factor": [8.0] * 4, "original_max_position_embeddings": 16,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    base = frozen_base(Phi3ForCausalLM(config).eval(), word_tokenizer(), "long")

    @torch.no_grad()
    def read(tokens: int) -> torch.Tensor:
        ids = torch.tensor(rows_of([tokens]))
        return all_logits(base.model, ids, torch.ones_like(ids), None)

    alone = {tokens: read(tokens) for tokens in (9, 40)}

    def work(thread: int) -> list[int]:
        asked = [(9, 40)[(thread + i) % 2] for i in range(20)]
        return [tokens for tokens in asked if not torch.equal(read(tokens), alone[tokens])]

    with ThreadPoolExecutor(4) as pool:
        assert [wrong for found in pool.map(work, range(4)) for wrong in found] == []


def test_a_model_that_was_asked_is_freed_when_nobody_has_it() -> None:
    base = random_base("gpt2")
    ids, mask = pad_rows(rows_of([5, 7]), 0, left=False)
    batch = PrefixBatch.shared(random_prefix(base, 3, 1), 2)
    supervised_losses(base.model, ids, mask, ids, batch)
    generate(base.model, rows_of([5]), None, pad_token_id=0, max_new_tokens=1)
    gone = weakref.ref(base.model)
    del base, batch
    gc.collect()
    assert gone() is None


def test_who_changes_a_model_waits_for_all_who_read_and_they_for_it() -> None:
    lock, seen = ReadWriteLock(), []
    reading, leave = threading.Barrier(3, timeout=30), threading.Event()

    def read() -> None:
        with lock.shared(), lock.shared():
            assert lock.mine
            reading.wait()
            leave.wait(30)
            seen.append("read")

    def change() -> None:
        with lock, lock.shared():
            seen.append("changed")

    readers = [threading.Thread(target=read) for _ in range(2)]
    for thread in readers:
        thread.start()
    reading.wait()
    changing = threading.Thread(target=change)
    changing.start()
    leave.set()
    for thread in [*readers, changing]:
        thread.join(30)
    assert seen == ["read", "read", "changed"]
    assert not lock.mine
    with lock.shared(), pytest.raises(RuntimeError, match="cannot change a model while it reads"):
        lock.__enter__()


def test_a_turn_is_re_entrant_and_goes_to_who_asked_first() -> None:
    lock, order = ReadWriteLock(), []

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
    with lock_of(model):
        twin = copy.deepcopy(model)
        assert lock_of(twin) is not lock_of(model)
        assert not lock_of(twin).mine
    assert lock_of(model) is lock_of(model)
