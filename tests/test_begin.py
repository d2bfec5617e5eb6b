"""What stands before a text stands there once, for whoever reads the text: training, generation,
measurement, serving and export; and special tokens are words like any."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import VOCABULARY, beginning_base, beginning_tokenizer, random_base, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from ptkit.bank import AdapterBank
from ptkit.bank.conversation import Conversation
from ptkit.data.chat_template import ChatTemplate
from ptkit.data.encode import encode_examples
from ptkit.data.encoded import EncodedExample
from ptkit.data.examples import Example
from ptkit.data.tokens import (
    cut_left,
    lead_ids,
    part_ids,
    text_ids,
    whole_ids,
    without_lead,
)
from ptkit.errors import ModelError
from ptkit.evaluation.predict import predict
from ptkit.evaluation.retention import measure_retention, probe_base
from ptkit.formats.adapter_files import write_adapter
from ptkit.loaded_adapter import load_adapter
from ptkit.methods import ADAPTERS, Demonstrations, create_adapter
from ptkit.methods.catalogue import method_section
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.prefix_batch import PrefixBatch
from ptkit.recipe.schema import RetainSection
from ptkit.recipe.tasks import GenerationTask, SequenceClassificationTask
from ptkit.runtime.base_model import Base, frozen_base, load_base
from ptkit.runtime.compile import compile_tokens
from ptkit.runtime.forward import all_logits
from ptkit.runtime.model_names import TINY_EN
from ptkit.serve.answers import chat_prompt
from ptkit.serve.text import TextStream
from ptkit.training.gate import _features, fit_gate
from ptkit.training.retain import WINDOW, general_windows, written_by_base
from ptkit.training.search_prompt import search_prompt
from ptkit.training.self_study import longest_opening, read_in_chunks, study

DATA = {"builtin": "none"}
GREEDY = {"max_new_tokens": 6, "do_sample": False}
START = 95  # `<start>` in `beginning_tokenizer`


def writing(**settings: object) -> GenerationTask:
    return GenerationTask(kind="generation", data=DATA, input="{x}", target="{y}", **settings)  # type: ignore[arg-type]


def framed(single: str, **special: int) -> PreTrainedTokenizerFast:
    """`word_tokenizer` with a post-processor."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[*special.items()]
    )
    return tokenizer


words = st.lists(st.sampled_from([f"w{i}" for i in range(1, 90)]), max_size=6).map(" ".join)


# The owner


@settings(max_examples=60, deadline=None)
@given(text=words, lead=st.integers(0, 3), tail=st.integers(0, 2))
def test_a_text_begins_with_its_lead_once_and_ends_with_its_last_word(
    text: str, lead: int, tail: int
) -> None:
    before, after = [f"w{91 + i}" for i in range(lead)], ["<end>"] * tail
    tokenizer = framed(
        " ".join([*before, "$A", *after]), **{f"w{91 + i}": 91 + i for i in range(lead)},
        **({"<end>": 0} if tail else {}),
    )  # fmt: skip
    begin = [91 + i for i in range(lead)]
    assert lead_ids(tokenizer) == begin
    assert text_ids(tokenizer, text) == [*begin, *part_ids(tokenizer, text)]
    written = " ".join([*before, text])  # a rendered chat template writes it itself
    assert text_ids(tokenizer, written) == text_ids(tokenizer, text)
    assert whole_ids(tokenizer, [written, text]) == [tokenizer(text)["input_ids"]] * 2
    for limit in range(lead + tail + 1, 9):
        wanted = tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        assert whole_ids(tokenizer, [written, text], limit) == [wanted] * 2


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 12), st.integers(0, 3))
def test_what_is_cut_at_the_left_keeps_its_lead(ids: list[int], limit: int, length: int) -> None:
    lead = [100 + i for i in range(length)]
    for row in (ids, [*lead, *ids]):
        kept = cut_left(row, limit, lead)
        assert len(kept) == min(len(row), limit)
        begun = row[:length] == lead
        if begun:
            assert kept[:length] == lead[:limit]
        text = kept[length:] if begun else kept
        assert text == row[len(row) - len(text) :]
    assert without_lead([*lead, *ids], lead) == (ids or lead)
    assert without_lead(ids, [100]) == ids


def test_a_tokenizer_that_makes_nothing_of_a_letter_has_its_lead_found() -> None:
    letters = Tokenizer(models.BPE({"<start>": 0, "<end>": 1, "x": 2, "y": 3}, []))
    letters.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<start>", eos_token="<end>"
    )
    assert part_ids(tokenizer, "a") == []
    assert lead_ids(tokenizer) == [0]


def test_a_base_without_a_lead_is_read_as_ever() -> None:
    base = load_base(TINY_EN, device="cpu")
    texts = ["The committee met", "", "kind[robot]\n"]
    assert base.lead == []
    assert base.encode(texts) == base.tokenizer(texts)["input_ids"]
    ids = base.tokenizer(texts[0])["input_ids"]
    tokens = [*ids, base.tokenizer.eos_token_id, base.tokenizer.pad_token_id]
    assert base.decode([tokens]) == [texts[0]]


# Training rows


def test_inputs_have_one_lead_in_training_whatever_is_cut_and_whoever_writes_it() -> None:
    tokenizer = beginning_tokenizer()
    rows = [Example(text, "w9", ()) for text in ("w1 w2 w3 w4 w5", "<start> w1 w2 w3 w4 w5", "w1")]
    encoded = encode_examples(rows, tokenizer, writing(max_input_tokens=3))
    assert [row.input_ids for row in encoded] == [[START, 4, 5], [START, 4, 5], [START, 1]]
    assert all(row.target_ids == [9, 0] for row in encoded)
    ended = framed("<end> $A <end>", **{"<end>": 0})
    (row,) = encode_examples(rows[:1], ended, writing())
    assert row.input_ids == [0, 1, 2, 3, 4, 5]
    choosing = SequenceClassificationTask(
        kind="sequence_classification", data=DATA, input="{x}", labels=["w9", "w8"],
        max_input_tokens=4,
    )  # fmt: skip
    encoded = encode_examples(rows[:2], tokenizer, choosing)
    assert [row.input_ids for row in encoded] == [[START, 1, 2, 3]] * 2


# Answers


CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


@pytest.mark.parametrize("template", [CHAT, "{{ bos_token }} " + CHAT, None])
def test_one_text_is_the_same_ids_in_training_chat_and_server(template: str | None) -> None:
    base = beginning_base("llama")
    base.tokenizer.chat_template = template
    messages = [{"role": "user", "content": "w1 w2"}]
    (row,) = encode_examples([Example("w1 w2", "w3", ())], base.tokenizer, writing())
    assert row.input_ids == [START, 1, 2]
    assert chat_prompt(ChatTemplate(base.tokenizer), messages) == row.input_ids
    talk = Conversation(AdapterBank(base))
    assert talk._prompt("w1 w2", [], None) == row.input_ids
    if template is not None:
        rendered = base.tokenizer.apply_chat_template(messages, tokenize=False)
        (row,) = encode_examples([Example(rendered, "w3", ())], base.tokenizer, writing())
        assert row.input_ids == ChatTemplate(base.tokenizer).ids(messages)
    talk.say("w1 w2", **GREEDY)
    assert talk._prompt("w4", talk.exchanges, None).count(START) == 1


def saved(base: Base, out: Path) -> Path:
    adapter = create_adapter(
        method_section({"kind": "prefix_tuning", "num_virtual_tokens": 3, "start": "examples"}),
        base, Demonstrations(["w5 w6 w7"], 0),
    )  # fmt: skip
    write_adapter(out, adapter.files(), replace=True)
    return out


def test_python_and_the_command_line_give_one_answer(tmp_path: Path) -> None:
    from test_cli import ptkit

    base = beginning_base("llama")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), device="cpu")
    adapter = saved(base, tmp_path / "adapter")
    texts = ["w11 w12", "w3", "w40 w41 w42"]
    done = ptkit("generate", *texts, "-a", adapter, "--model", tmp_path / "base",
                 "--max-new-tokens", "6", "--json", cwd=tmp_path)  # fmt: skip
    command = [json.loads(line)["output"] for line in done.stdout.splitlines()]
    python = load_adapter(adapter, base).generate(texts, **GREEDY)
    bank = AdapterBank(base)
    name = bank.load(adapter)
    assert python == bank.generate(texts, [name] * 3, **GREEDY)
    assert [answer.strip() for answer in python] == command
    # And it is what plain transformers does with what the tokenizer gives.
    loaded = load_adapter(adapter, base)
    encoding = base.tokenizer(texts[2], return_tensors="pt")
    inputs = loaded.inputs(encoding)
    answer = base.model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]  # type: ignore[operator]
    assert base.decode([answer.tolist()]) == python[2:]
    assert load_adapter(adapter, base).generate([], **GREEDY) == []


# A text prompt and its input are one text


def few_shot(base: Base, text: str = "w5 w6 w7 w8"):
    return create_adapter(
        method_section({"kind": "text_prompt", "instruction": text, "separator": " "}), base,
        Demonstrations((), 0),
    )  # fmt: skip


@pytest.mark.parametrize("make", [beginning_base, random_base])
def test_a_text_prompt_is_read_as_one_text_with_its_input(make: Callable[[str], Base]) -> None:
    base = make("llama")
    adapter = few_shot(base)
    rows = [Example(text, "w9 w10", ("w9 w10",)) for text in ("w1 w2", "w3", "w4 w1 w2 w3")]
    found = predict(adapter, rows, writing(max_target_tokens=6), 2)
    whole = base.encode([f"w5 w6 w7 w8 {row.input}" for row in rows])
    assert all(ids.count(START) == len(base.lead) for ids in whole)
    bank = AdapterBank(base)
    wanted = [text.strip() for text in base.decode(bank.generate_ids(whole, [None] * 3, **GREEDY))]
    separator = adapter.answer_end
    assert separator is not None
    assert [p.prediction for p in found] == [text.split(separator)[0] for text in wanted]
    bank.add("shots", adapter)
    bank.compose("twice", ["shots"])
    texts = [row.input for row in rows]
    for name in ("shots", "twice"):
        assert [a.strip() for a in bank.generate(texts, [name] * 3, **GREEDY)] == wanted
    assert bank.classify(texts, ["w20", "w30", "w40"], "shots") == bank.classify(
        [f"w5 w6 w7 w8 {text}" for text in texts], ["w20", "w30", "w40"], [None]
    )
    talk = Conversation(bank, adapter="shots")
    assert talk.say("w3", **GREEDY).strip() == wanted[1]


def test_a_searched_prompt_is_read_as_one_text_with_its_input() -> None:
    base = beginning_base("llama")
    task = writing()
    rows = encode_examples(
        [Example(f"w{i} w{i + 1}", f"w{i + 3} w7", ()) for i in range(1, 12)], base.tokenizer, task
    )
    found = search_prompt(base, rows, rows[:4], "w1 w2", rounds=1, candidates=4, rows=11)
    assert len(found.token_ids) == 2
    losses = []
    for row in rows[:4]:
        ids = [START, *found.token_ids, *row.input_ids[1:], *row.target_ids]
        logits = base.model(torch.tensor([ids])).logits[0, -len(row.target_ids) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(row.target_ids)))
    assert found.validation_loss == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)


# Forgetting


def sentences(count: int) -> str:
    return " ".join(f"w{(7 * i * i + 3 * i) % 90 + 1}" for i in range(count))


def trained_with_a_lead() -> Base:
    """A base that knows what comes next behind its begin-of-text token, and nothing without."""
    base = beginning_base("llama")
    torch.manual_seed(0)
    model = LlamaForCausalLM(base.model.config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for step in range(120):
        begins = step % 3  # as in packed documents, there may be several
        text = torch.randint(1, 91, (16, 24), generator=generator)
        if begins:
            text = (text[:, :1] + 3 * torch.arange(24)) % 90 + 1
        ids = torch.cat([torch.full((16, begins), START), text], dim=1)
        labels = ids.clone()
        labels[:, : begins + 1] = -100
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return frozen_base(model.eval(), base.tokenizer, "trained-with-a-lead")


def test_forgetting_of_a_begin_of_text_token_is_none() -> None:
    """An adapter that is nothing but its keys and values learnt nothing and forgot nothing."""
    base = trained_with_a_lead()
    text = " ".join(f"w{(5 + 3 * i) % 90 + 1}" for i in range(400))
    probe = probe_base(base, {"text": text}, 400)
    ids = probe.windows["text"]
    assert (ids[:, 0] == START).all()

    def nats(read: torch.Tensor) -> float:
        """Of all tokens of the text but the first, by plain transformers."""
        length = ids.shape[1] - 2
        with torch.no_grad():
            logits = base.model(read).logits[:, -length - 1 : -1].transpose(1, 2)
        return float(torch.nn.functional.cross_entropy(logits, read[:, -length:]))

    missed = nats(ids[:, 1:]) - nats(ids)
    assert missed > 2
    only = PrefixTuning.from_prefix(compile_tokens(base.model, torch.tensor([START])), base)
    found = measure_retention(only, probe).overall
    assert found.base_nats == pytest.approx(nats(ids), abs=1e-4)
    assert found.tokens == ids[:, 2:].numel()
    assert abs(found.forgetting) < 0.05 * missed


@pytest.mark.parametrize("make", [beginning_base, random_base])
def test_forgetting_is_measured_on_the_same_tokens_with_and_without_a_lead(
    make: Callable[[str], Base],
) -> None:
    base = make("llama")
    probe = probe_base(base, {"text": sentences(200)}, 200)
    windows = probe.windows["text"]
    assert windows.shape[1] == len(base.lead) + 32
    assert torch.equal(windows[:, len(base.lead) :].flatten()[:9], torch.tensor(
        part_ids(base.tokenizer, sentences(9))
    ))  # fmt: skip
    adapter = few_shot(base)
    found = measure_retention(adapter, probe).overall
    assert found.tokens == len(windows) * 31
    # One text: the prompt, then the window.
    (prompt,) = base.encode(["w5 w6 w7 w8 "])
    losses = []
    for row in windows.tolist():
        text = row[len(base.lead) :]
        ids = torch.tensor([[*prompt, *text]])
        logits = base.model(ids).logits[0, len(prompt) : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(text[1:])))
    assert found.adapter_nats == pytest.approx(float(torch.stack(losses).mean()), abs=1e-4)


def test_general_text_to_stay_near_begins_as_texts_do(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text(sentences(400))
    for base in (beginning_base("gpt2"), random_base("gpt2")):
        for pieces in (
            general_windows(RetainSection(text="own.txt"), None, base, tmp_path),
            written_by_base(base, count=3),
        ):
            assert pieces.shape[1] == len(base.lead) + WINDOW
            assert pieces[:, : len(base.lead)].tolist() == [base.lead] * len(pieces)
            assert not (pieces[:, len(base.lead) :] == START).all(0).any()


def test_a_gate_is_not_given_away_by_the_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    base = beginning_base("llama")
    rows = [EncodedExample([START, 1 + i % 5, 6 + i % 4], [9]) for i in range(60)]
    general = torch.tensor([base.lead + [20 + (i * k) % 60 for i in range(32)] for k in (1, 3, 7)])
    fitted: list[list[int]] = []
    monkeypatch.setattr(
        "ptkit.training.gate._features",
        lambda base, ids: fitted.extend(ids) or _features(base, ids),
    )
    gate = fit_gate(base, rows, general, 0)
    assert len(fitted) > len(rows)
    assert all(ids[0] == START and START not in ids[1:] for ids in fitted)
    tasks = torch.tensor([row.input_ids for row in rows])
    assert gate.opens(tasks, torch.ones_like(tasks).bool()).float().mean() > 0.9
    assert not gate.opens(general, torch.ones_like(general).bool()).any()


# Distilling


def test_texts_of_a_distillation_begin_as_they_will_and_the_teacher_reads_one_text(
    tmp_path: Path,
) -> None:
    base = beginning_base("llama")
    read = read_in_chunks(base, sentences(30), sink=True, room=20, chunk_tokens=20)
    assert read.lead == base.lead == read.begun(base) == [START]
    assert all(chunk[0] == START for chunk in read.chunks)
    teachers = read.compiled(base)
    found = study(base, read, teachers, tmp_path, texts=8, tokens=5, seed=0)
    for text in (*found.train, *found.validation, *found.test):
        assert text.input_ids[0] == START
        assert text.input_ids.count(START) == 1
        assert len(text.input_ids) <= longest_opening(base, None)
        seen = text.behind(read.begun(base))
        assert START not in seen.input_ids
    text = found.test[0].behind(read.begun(base)).input_ids
    behind = all_logits(
        base.model, torch.tensor([text]), torch.ones(1, len(text), dtype=torch.long),
        PrefixBatch.shared(teachers[found.test[0].chunk], 1),
    )  # fmt: skip
    whole = [*read.chunks[found.test[0].chunk], *text]
    plain = base.model(torch.tensor([whole])).logits[:, -len(text) :]
    torch.testing.assert_close(behind, plain, atol=1e-5, rtol=1e-5)
    apart = read_in_chunks(base, sentences(30), sink=False, room=20, chunk_tokens=20)
    assert apart.lead == apart.begun(base) == []


# Special tokens are no decoration


def separating(family: str = "llama") -> Base:
    base = random_base(family)
    base.tokenizer.add_special_tokens({"additional_special_tokens": ["w33"]})
    assert 33 in base.tokenizer.all_special_ids
    return base


def test_what_the_model_wrote_is_shown_but_for_padding_begin_and_end() -> None:
    base = separating()
    ids = [1, 33, 2]
    assert base.decode([ids, [*ids, 0], []]) == ["w1 w33 w2", "w1 w33 w2", ""]
    stream = TextStream(base.tokenizer)
    assert "".join(stream.push(i).text for i in [*ids, 0]) + stream.finish() == "w1 w33 w2"
    started = beginning_base("llama")
    assert started.decode([[START, 1, START, 2, 0]]) == ["w1 w2"]


def test_a_special_token_of_the_target_is_right_when_it_is_written() -> None:
    base = separating()
    target = [1, 33, 2, 0]
    head = base.model.get_output_embeddings()
    assert head is not None

    calls = [0]

    def next_of_target(_module: object, _args: object, logits: torch.Tensor) -> torch.Tensor:
        wanted = torch.full_like(logits, -1e4)
        wanted[..., target[min(calls[0], 3)]] = 0.0
        calls[0] += 1
        return wanted

    hook = head.register_forward_hook(next_of_target)
    plain = create_adapter(ADAPTERS["base"].section_class(kind="base"), base, Demonstrations((), 0))
    told: list[str] = []
    try:
        rows = [Example("w5", "w1 w33 w2", ("w1 w33 w2",))]
        (row,) = predict(plain, rows, writing(max_target_tokens=6), 1)
        calls[0] = 0
        said = Conversation(AdapterBank(base)).say("w5", on_text=told.append, **GREEDY)
    finally:
        hook.remove()
    assert row.prediction == "w1 w33 w2" == said == "".join(told)


def test_a_word_that_a_decoder_is_forced_to_begin_with_is_not_the_answer() -> None:
    from test_encoder_decoder import random_pair

    base = random_pair("bart")
    bank = AdapterBank(base)
    read = torch.tensor(base.encode(["w1 w2 w3"]))
    base.model.generation_config.forced_bos_token_id = 7  # a language's name, say
    output = base.model.generate(input_ids=read, **GREEDY)[0].tolist()  # type: ignore[operator]
    assert output[1] == 7
    (found,) = bank.generate_ids(read.tolist(), [None], **GREEDY)
    assert found == [token for token in output[2:] if token not in base.frame]
    assert bank.generate(["w1 w2 w3"], [None], **GREEDY) == base.decode([found])


# Tokens the model has no row for


def wider() -> Base:
    """A tokenizer with one more token than its model has rows."""
    base = random_base("llama")
    base.tokenizer.add_tokens(["<slot>"])
    assert len(base.tokenizer) == VOCABULARY + 1
    return base


def test_a_token_without_a_row_is_refused_only_where_it_is_used(tmp_path: Path) -> None:
    base = wider()
    bank = AdapterBank(base)
    assert len(bank.generate(["w1 w2"], [None], **GREEDY)) == 1
    said = r"`<slot>` \(number 97\).*98 tokens, the model 97 rows.*resize_token_embeddings\(98\)"
    adapter = saved(base, tmp_path / "a")
    plain = create_adapter(ADAPTERS["base"].section_class(kind="base"), base, Demonstrations((), 0))
    uses: list[Callable[[], object]] = [
        lambda: bank.generate(["w1 <slot>"], [None], **GREEDY),
        lambda: bank.classify(["w1"], ["w2", "<slot>"], [None]),
        lambda: Conversation(bank).say("<slot>"),
        lambda: load_adapter(adapter, base).generate("w1 <slot>", **GREEDY),
        lambda: few_shot(base, "w1 <slot>"),
        lambda: predict(plain, [Example("w1", "<slot>", ("x",))], writing(max_target_tokens=9), 1),
        lambda: predict(plain, [Example("<slot>", "w1", ("x",))], writing(), 1),
        lambda: probe_base(base, {"text": sentences(100) + " <slot>"}, 200),
    ]
    for use in uses:
        with pytest.raises(ModelError, match=said):
            use()
    # Neither random tokens nor padding are taken from beyond the rows.
    section = method_section(
        {"kind": "prompt_tuning", "num_virtual_tokens": 400, "start": "vocabulary"}
    )
    create_adapter(section, base, Demonstrations((), 0))
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    padded = frozen_base(random_base("llama").model, tokenizer, "padded")
    answers = AdapterBank(padded).generate(["w1", "w1 w2 w3"], [None] * 2, **GREEDY)
    assert answers == AdapterBank(random_base("llama")).generate(["w1", "w1 w2 w3"], [None] * 2,
                                                                 **GREEDY)  # fmt: skip


def test_a_run_is_refused_before_it_trains_on_a_token_without_a_row(tmp_path: Path) -> None:
    from ptkit.recipe.load import load_recipe
    from ptkit.training.experiment import prepare

    rows = [{"x": f"w{i}", "y": "w3"} for i in range(1, 60)]
    for split in ("train", "validation", "test"):
        changed = [*rows, {"x": "<slot>", "y": "w2"}] if split == "test" else rows
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in changed))
    (tmp_path / "r.yaml").write_text(
        "name: r\ntask: {kind: generation, data: {files: {train: train.jsonl, "
        "validation: validation.jsonl, test: test.jsonl}}, input: '{x}', target: '{y}', "
        "metrics: [exact_match]}\nmethods: [{kind: lora, rank: 2}]\nretention: null\n"
    )
    with pytest.raises(ModelError, match="`<slot>`"):
        prepare(load_recipe(tmp_path / "r.yaml"), wider())
    assert prepare(load_recipe(tmp_path / "r.yaml"), random_base("llama")).validation


# Export


def test_the_client_of_prompt_embeds_sends_one_lead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64
    import importlib.util
    import io

    from ptkit.hub.engines.prompt_embeds import CLIENT
    from ptkit.hub.engines.prompt_embeds import write as export_prompt_embeds

    base = beginning_base("llama")
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    adapter = create_adapter(
        method_section({"kind": "prompt_tuning", "num_virtual_tokens": 3, "start": "examples"}),
        base, Demonstrations(["w5 w6 w7"], 0),
    )  # fmt: skip
    write_adapter(tmp_path / "soft", adapter.files(), replace=True)
    out = export_prompt_embeds([tmp_path / "soft"], tmp_path / "out", base=base).path
    spec = importlib.util.spec_from_file_location("client", out / CLIENT)
    assert spec is not None
    assert spec.loader is not None
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    for text in ("w1 w2", "<start> w1 w2"):
        sent = base64.b64decode(client.prompt_embeds("soft", text, tmp_path / "base"))
        rows = torch.load(io.BytesIO(sent), weights_only=True)
        wanted = base.embedding.weight[torch.tensor([START, 1, 2])]
        torch.testing.assert_close(rows[3:], wanted.float())
    assert SimpleNamespace(**client.ABOUT).lead == [START]
