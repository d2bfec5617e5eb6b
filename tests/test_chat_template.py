"""Which tokens of a conversation are learnt, beside what a template marks and what TRL learns."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ptkit.data.chat_rows import ChatEncoder, ChatRows
from ptkit.data.chat_template import NAMED, with_template_read
from ptkit.data.dialogue import dialogue_of
from ptkit.data.encoded import IGNORED, EncodedExample
from ptkit.data.examples import Example
from ptkit.data.tokens import lead_ids, text_ids
from ptkit.errors import DataError
from ptkit.recipe.tasks import ChatTask
from ptkit.runtime.model_names import TINY_EN
from ptkit.runtime.named_models import source_of

#: Marks of the families' templates, which `tiny-en` gets as tokens.
MARKS = (
    "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|begin_of_text|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
)  # fmt: skip
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2.5}}}
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
#: A template that marks its answers, without the token that ends them.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
#: A template that leaves an answer's reasoning out once another turn follows.
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.reasoning_content and loop.last %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
    "{% endfor %}"
)


#: How Llama 3 cuts a text before it joins bytes: line breaks stay together, whatever follows.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def tokenizer_of(begin: str = "<|endoftext|>", cut: str | None = None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(source_of(TINY_EN, None))
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKS]})
    tokenizer.bos_token = begin
    if cut is not None:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(cut), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])  # fmt: skip
    return tokenizer


def chat_task(template: str | None = "chatml", **settings: Any) -> ChatTask:
    return ChatTask.model_validate(
        {"kind": "chat", "data": {"builtin": "x"}, "chat_template": template, **settings}
    )


def example(messages: list[dict[str, Any]], tools: Any = None) -> Example:
    return Example("", "", ("",), dialogue=dialogue_of(messages, "data.jsonl:1", tools=tools))


def talk(*texts: str, system: str | None = None) -> list[dict[str, Any]]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for i, text in enumerate(texts):
        messages.append({"role": "assistant" if i % 2 else "user", "content": text})
    return messages


def rows_of(messages: list[dict[str, Any]], task: ChatTask, tools: Any = None) -> ChatRows:
    return ChatEncoder(tokenizer_of(), task).rows([example(messages, tools)])


def learnt_text(row: EncodedExample) -> list[str]:
    """The runs of learnt tokens, as text."""
    runs: list[list[int]] = []
    before = False
    for token, label in zip(row.target_ids, row.labels, strict=True):
        if label != IGNORED:
            if not before:
                runs.append([])
            runs[-1].append(token)
        before = label != IGNORED
    return [tokenizer_of().decode(run) for run in runs]


FOUR = talk("hello", "good day", "and now", "we go", system="be kind")


@pytest.mark.parametrize("template", ["chatml", MARKED])
def test_all_answers_are_learnt_with_the_token_that_ends_them(template: str) -> None:
    rows = rows_of(FOUR, chat_task(template))
    (row,) = rows.encoded
    ending = "" if template == MARKED else "\n"  # what a template writes after the end
    assert learnt_text(row) == [f"good day<|im_end|>{ending}", f"we go<|im_end|>{ending}"]
    whole = tokenizer_of().decode(row.input_ids + row.target_ids)
    assert whole.removeprefix("<|endoftext|>").startswith("<|im_start|>system\nbe kind<|im_end|>")
    assert rows.notes.endless == rows.notes.shortened == 0


@pytest.mark.parametrize("template", ["chatml", MARKED])
def test_weights_and_loss_choose_among_answers(template: str) -> None:
    messages = [dict(message) for message in FOUR]
    messages[2]["weight"] = 0
    (row,) = rows_of(messages, chat_task(template)).encoded
    assert [text.removesuffix("\n") for text in learnt_text(row)] == ["we go<|im_end|>"]
    (last,) = rows_of(FOUR, chat_task(template, loss="last")).encoded
    assert learnt_text(last) == learnt_text(row)
    (every,) = rows_of(FOUR, chat_task(template, loss="all")).encoded
    assert len(every.input_ids) == 1
    assert every.supervised == len(every) - 1
    with pytest.raises(DataError, match="last answer has the weight 0"):
        rows_of([*messages[:2], FOUR[4], *messages[1:3]], chat_task(template, loss="last"))


def test_training_reads_what_generation_will() -> None:
    encoder = ChatEncoder(tokenizer_of(), chat_task())
    (row,) = encoder.rows([example(FOUR)]).encoded
    asked = encoder.asked(example(FOUR))
    whole = row.input_ids + row.target_ids
    assert whole == asked.input_ids + asked.target_ids
    dialogue = example(FOUR).dialogue
    assert dialogue is not None
    assert encoder.question(dialogue, 2) == row.input_ids
    assert encoder.question(dialogue, 4) == asked.input_ids
    assert tokenizer_of().decode([*encoder.template.ends]) == "<|im_end|>"


#: A template that begins the reasoning of an answer in its question, as Qwen3.5's does.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{{ '<think>\\n' + m.reasoning_content|default('') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
#: Marks the line break that ends its question, too, as TRL's template of Qwen2.5 does.
HEADED = MARKED.replace("m.role + '\\n' }}{% if", "m.role }}{% if").replace(
    "generation %}{{ m", "generation %}{{ '\\n' + m"
).replace("{% else %}{{ m", "{% else %}{{ '\\n' + m")  # fmt: skip


def asked_ids(template: str, messages: list[dict[str, Any]]) -> list[int]:
    """What transformers asks, in the tokens of its own text."""
    text = tokenizer_of().apply_chat_template(
        messages, chat_template=NAMED.get(template, template), add_generation_prompt=True,
        tokenize=False,
    )  # fmt: skip
    return text_ids(tokenizer_of(), str(text))


@pytest.mark.parametrize("template", ["chatml", MARKED, HEADED, THINKING])
@pytest.mark.parametrize(
    "answer", ["good day", "\ngood", "\n\ngood", "\n\n\ngood", "  good day", "\tgood", ""]
)
def test_prompt_is_the_one_that_is_asked_whatever_its_answer_begins_with(
    template: str, answer: str
) -> None:
    encoder = ChatEncoder(tokenizer_of(), chat_task(template))
    messages = talk("hello", answer, "and now", "we go", "so", answer)
    for length in (2, 4, 6):
        own = example(messages[:length])
        asked = [asked_ids(template, messages[:i]) for i in range(1, length, 2)]
        assert encoder.asked(own).input_ids == asked[-1]
        assert own.dialogue is not None
        assert encoder.question(own.dialogue, length - 1) == asked[-1]
        rows = encoder.rows([own])
        found = []
        for row, read in zip(rows.encoded, rows.examples, strict=True):
            assert read.dialogue is not None
            ids = row.input_ids + row.target_ids
            text = encoder.template.render(read.dialogue.messages)
            assert tokenizer_of().decode(ids).removeprefix("<|endoftext|>") == text
            learnt = [False] * len(row.input_ids) + list(row.learnt or [True] * len(ids))
            for i in read.dialogue.answers:
                prompt = asked_ids(template, messages[:i])
                if read.dialogue.learnt[i]:
                    assert ids[: len(prompt)] == prompt
                    assert learnt[len(prompt) - 1 : len(prompt) + 1] == [False, True]
                    found.append(prompt)
            assert row.input_ids in asked
        assert found == asked
        assert rows.notes.unfolded == (len(rows.encoded) > 1)


def test_answers_that_join_their_questions_have_a_row_each() -> None:
    rows = rows_of(talk("hello", "\n\ngood", "and now", "we go"), chat_task())
    assert [learnt_text(row) for row in rows.encoded] == [
        ["\n\ngood<|im_end|>\n"], ["we go<|im_end|>\n"],
    ]  # fmt: skip
    assert rows.notes.unfolded == 1
    # The last answer alone takes one pass, and so does a text that is learnt whole.
    last = rows_of(talk("hello", "good", "and now", "\n\nwe go"), chat_task(loss="last"))
    assert learnt_text(last.encoded[0]) == ["\n\nwe go<|im_end|>\n"]
    messages = talk("hello", "\n\ngood", "and now", "\n\nwe go")
    (whole,) = rows_of(messages, chat_task(loss="all")).encoded
    asked = asked_ids("chatml", messages[:3])
    assert (whole.input_ids + whole.target_ids)[: len(asked)] == asked


def test_conversation_that_loses_turns_is_asked_as_it_is_read() -> None:
    messages = talk(*("word word word", "\n\nyes") * 6, system="be kind")
    rows = rows_of(messages, chat_task(max_tokens=60, max_target_tokens=8))
    assert len(rows.encoded) == 6
    assert rows.notes.unfolded == 1
    assert rows.notes.shortened > 0
    for row, read in zip(rows.encoded, rows.examples, strict=True):
        assert len(row) <= 60
        assert read.dialogue is not None
        assert row.input_ids == asked_ids("chatml", [*map(dict, read.dialogue.messages[:-1])])


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_answer_gets_no_space_of_its_own(scheme: str) -> None:
    """A vocabulary as Llama 2's: `▁` begins every text, and a question that ends with a space is
    one with the word after it in the text of both."""
    words = ["▁Ask:", "▁hi", "▁Say:", "▁", "yes", "▁yes", "▁no", "Ask:"]
    letters = {letter: i for i, letter in enumerate(dict.fromkeys("".join(words)))}
    vocab = dict(letters)
    merges: list[tuple[str, str]] = []
    for word in words:
        made = word[0]
        for letter in word[1:]:
            if (made, letter) not in merges:
                merges.append((made, letter))
            made += letter
            vocab.setdefault(made, len(vocab))
    vocab["<end>"] = len(vocab)
    bare = Tokenizer(models.BPE(vocab, merges))
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)  # type: ignore[arg-type]
    bare.decoder = decoders.Metaspace(prepend_scheme=scheme)  # type: ignore[arg-type]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>")
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'Ask: ' + m.content + ' ' }}"
        "{% else %}{{ 'Say: ' + m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Say: ' }}{% endif %}"
    )
    encoder = ChatEncoder(tokenizer, chat_task(template))
    own = example(talk("hi", "yes"))
    (row,) = encoder.rows([own]).encoded
    assert tokenizer.convert_ids_to_tokens(row.input_ids) == ["▁Ask:", "▁hi", "▁Say:", "▁"]
    assert tokenizer.convert_ids_to_tokens(row.target_ids) == ["yes", "<end>"]
    assert own.dialogue is not None
    assert encoder.question(own.dialogue, 1) == encoder.asked(own).input_ids == row.input_ids
    assert encoder.asked(own).target_ids == row.target_ids


def test_begin_of_text_stands_once_whoever_writes_it() -> None:
    task = chat_task("{{ bos_token }}" + NAMED["chatml"])
    tokenizer = tokenizer_of()
    lead = lead_ids(tokenizer)
    for template in (task, chat_task()):
        (row,) = ChatEncoder(tokenizer, template).rows([example(FOUR)]).encoded
        assert row.input_ids[: len(lead)] == lead
        assert (row.input_ids + row.target_ids).count(tokenizer.bos_token_id) in (0, 1)


def test_early_turns_are_dropped_whole_and_the_system_prompt_stays() -> None:
    long = talk(*(f"word number {i}" for i in range(12)), system="be kind")
    (whole,) = rows_of(long, chat_task()).encoded
    rows = rows_of(long, chat_task(max_tokens=len(whole) // 2, max_target_tokens=8))
    (row,) = rows.encoded
    text = tokenizer_of().decode(row.input_ids + row.target_ids)
    assert len(row) <= len(whole) // 2
    assert "be kind" in text
    assert text.endswith("assistant\nword number 11<|im_end|>\n")
    dialogue = rows.examples[0].dialogue
    assert dialogue is not None
    assert [m["role"] for m in dialogue.messages[:3]] == ["system", "user", "assistant"]
    assert rows.notes.shortened == 1
    assert rows.notes.dropped == len(long) - len(dialogue.messages)
    for settings in ({"too_long": "refuse", "max_tokens": 40}, {"max_tokens": 12}):
        with pytest.raises(DataError, match=r"data\.jsonl:1: the conversation has \d+ tokens"):
            rows_of(long, chat_task(max_target_tokens=8, **settings))


def test_template_that_forgets_reasoning_gets_a_row_for_each_answer() -> None:
    messages = [dict(message) for message in FOUR]
    for i in (2, 4):
        messages[i]["reasoning_content"] = "hm"
    rows = rows_of(messages, chat_task(FORGETFUL))
    assert [learnt_text(row) for row in rows.encoded] == [
        ["<think>hm</think>good day<|im_end|>\n"],
        ["<think>hm</think>we go<|im_end|>\n"],
    ]
    assert "<think>" not in tokenizer_of().decode(rows.encoded[1].input_ids)
    assert rows.notes.unfolded == 1
    assert len(rows.examples) == 2


#: A template, messages and tools -> what the refusal has.
REFUSED = {
    "raises": ("{{ raise_exception('no system here') }}", FOUR, None, "turn 5: no system here"),
    "is broken": ("{% for %}", FOUR, None, "the chat template refuses"),
    "marks, and asks otherwise": (
        MARKED.replace("assistant\\n' }}", "assistant\\n<think>' }}"),
        FOUR, None, "asks for an answer with '<think>'",
    ),
    "asks otherwise": (
        FORGETFUL.replace("assistant\\n' }}", "assistant\\n<think>' }}"),
        FOUR, None, "asks for an answer with '<think>'",
    ),
    "reads another field": (
        NAMED["chatml"].replace("message['content']", "(message['text'] or '')"), FOUR, None,
        "leaves out the system prompt `be kind`",
    ),
    "reads parts": (  # as templates of models of images do
        NAMED["chatml"].replace("message['content']", "(message['content'][0]['text'] or '')"),
        FOUR[1:], None, "leaves out the question `hello`",
    ),
    "has no place for a system prompt": (
        NAMED["chatml"].replace("message in messages", "message in messages if message['role'] != "
                                "'system'"),
        FOUR, None, "leaves out the system prompt `be kind`",
    ),
    "changes early answers, and has no place for a system prompt": (
        FORGETFUL.replace("m in messages", "m in messages if m.role != 'system'"),
        [*FOUR[:2], {**FOUR[2], "weight": 0, "reasoning_content": "hm"}, *FOUR[3:]],
        None, "leaves out the system prompt `be kind`",
    ),
    "leaves out answers beside calls": (
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.tool_calls %}{{ m.tool_calls|tojson }}"
        "{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        [*talk("hello"), {"role": "assistant", "content": "let me see", "tool_calls": [CALL]}],
        None, "leaves out the answer `let me see`",
    ),
    "leaves out arguments": (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }}{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        [*talk("hi"), {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "add", "arguments": {"left": 1}}}]}],
        None, "leaves out the argument `left`",
    ),
    "leaves out calls": (
        "chatml",
        [*talk("hello"), {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        None, "leaves out the tool call `add`",
    ),
    "leaves out tools": ("chatml", FOUR, [ADD], "leaves out the tool `add`"),
    "leaves out reasoning": (
        "chatml",
        [*talk("hello"), {"role": "assistant", "content": "a", "reasoning_content": "hm so"}],
        None, "leaves out the reasoning `hm so`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_template_that_cannot_write_a_conversation_is_refused_by_name(what: str) -> None:
    template, messages, tools, told = REFUSED[what]
    with pytest.raises(DataError) as error:
        rows_of(messages, chat_task(template), tools)
    assert told in str(error.value)
    assert str(error.value).startswith("data.jsonl:1")
    assert len(str(error.value).splitlines()) == 1


def test_template_may_write_what_is_said_in_another_way() -> None:
    """White space, early reasoning and JSON, as templates of known models treat them."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'tool' %}{{ m.content|tojson }}"
        "{% elif m.role == 'assistant' %}{{ m.content.split('</think>')[-1]|trim }}"
        "{% for c in m.tool_calls or [] %}{{ c.function|tojson }}{% endfor %}"
        "{% else %}{{ m.content|trim }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    messages = [
        {"role": "system", "content": "  be kind\n"}, *talk(" what \n"),
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"found": "3.5\u00e9"}\n{}'},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nit is 3.5 "},
    ]  # fmt: skip
    (row,) = rows_of(messages, chat_task(template)).encoded
    assert learnt_text(row)[-1] == "it is 3.5<|im_end|>\n"


def test_answers_that_nothing_ends_are_counted() -> None:
    endless = NAMED["plain"].replace(" + eos_token", "").replace("eos_token + ", "")
    endless = "".join(endless.split("+ eos_token "))
    assert rows_of(talk("hello", "good day"), chat_task(endless)).notes.endless == 1
    plain = rows_of(talk("hello", "good day"), chat_task("plain"))
    assert plain.notes.endless == 0
    assert learnt_text(plain.encoded[0]) == [" good day<|endoftext|>\n"]


def test_template_is_read_from_a_file_once(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(MARKED)
    read = with_template_read(chat_task("own.jinja"), tmp_path)
    assert read.chat_template == MARKED
    assert with_template_read(read, tmp_path) == read
    (tmp_path / "own.jinja").write_text("no template")
    for name in ("own.jinja", "chatlm"):
        with pytest.raises(DataError, match=r"task\.chat_template"):
            with_template_read(chat_task(name), tmp_path)


# ---------------------------------------------------------------- TRL as oracle

#: Where `make setup-oracles` puts TRL, unless it is elsewhere.
TRL = Path(os.environ.get("PTKIT_TRL", Path(sys.prefix) / "trl"))
#: Family -> TRL's file of its template; the token that begins a text; whether it takes a system.
FAMILIES = {
    "llama3": ("<|begin_of_text|>", True),
    "gemma": ("<|endoftext|>", False),
    "gemma3": ("<|endoftext|>", True),
    "qwen2_5": ("<|endoftext|>", True),
    "qwen3": ("<|endoftext|>", True),
}


def generated(count: int, *, system: bool, seed: int = 0) -> Iterator[list[dict[str, Any]]]:
    """Conversations of 1 to 9 answers, with or without a system prompt, unicode, empty answers."""
    pick = random.Random(seed)
    words = ["yes", "no", "été", "数字", "😀", "don't", "3.14", "a  b", "x\ny", "Ω", "naïve."]

    def text() -> str:
        return " ".join(pick.choice(words) for _ in range(pick.randint(1, 6)))

    for number in range(count):
        said = [text() for _ in range(2 * pick.randint(1, 9))]
        if number % 7 == 0:
            said[1] = ""
        yield talk(*said, system=text() if system and number % 2 else None)


@pytest.fixture(scope="module")
def trl_templates() -> Path:
    found = TRL / "trl" / "chat_templates"
    if not found.is_dir():
        pytest.skip("TRL is not here: make setup-oracles")
    return found


def trl_row(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, Any]]
) -> tuple[list[int], list[int]]:
    """Token ids and learnt tokens, as TRL's SFTTrainer makes them with `assistant_only_loss`."""
    found: Any = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    return found["input_ids"], found["assistant_masks"]


def without_headers(mask: list[bool]) -> list[bool]:
    """`mask` without the first token of each run: TRL's template for Qwen2.5 marks the line break
    that the question for an answer already ends with."""
    return [own and before for before, own in zip([False, *mask], mask, strict=False)]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_labels_are_trls(family: str, trl_templates: Path) -> None:
    begin, system = FAMILIES[family]
    tokenizer = tokenizer_of(begin, LLAMA3 if family == "llama3" else None)
    own = (trl_templates / f"{family}.jinja").read_text()
    marked = (trl_templates / f"{family}_training.jinja").read_text()
    encoder = ChatEncoder(tokenizer, chat_task(own, max_tokens=100_000))
    checked = 0
    for messages in generated(40, system=system):
        if family == "qwen3":  # it writes reasoning before the last answer only: see below
            messages = messages[: 2 + (messages[0]["role"] == "system")]
        (row,) = encoder.rows([example(messages)]).encoded
        ids, mask = trl_row(tokenizer, marked, messages)
        lead = len(row) - len(ids)
        assert (row.input_ids + row.target_ids)[lead:] == ids
        learnt = [False] * len(row.input_ids) + list(row.learnt or [True] * len(row.target_ids))
        wanted = list(map(bool, mask))
        assert learnt[lead:] == (without_headers(wanted) if family == "qwen2_5" else wanted)
        checked += 1
    assert checked == 40


def test_qwen3_learns_each_answer_as_it_is_asked_for_it(trl_templates: Path) -> None:
    own = (trl_templates / "qwen3.jinja").read_text()
    tokenizer = tokenizer_of()
    encoder = ChatEncoder(tokenizer, chat_task(own))
    messages = talk("hello", "good day", "and now", "we go")
    messages[1]["reasoning_content"] = messages[3]["reasoning_content"] = "hm"
    rows = encoder.rows([example(messages)]).encoded
    assert [row.supervised for row in rows] == [len(row.target_ids) for row in rows]
    for row, upto in zip(rows, (1, 3), strict=True):
        asked: Any = tokenizer.apply_chat_template(
            messages[:upto], chat_template=own, add_generation_prompt=True, return_dict=False
        )
        assert row.input_ids == asked
        assert learnt_text(row)[0].startswith("<think>\nhm\n</think>\n\n")


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_tool_calls_and_results_are_read_as_trl_reads_them(
    family: str, trl_templates: Path
) -> None:
    tokenizer = tokenizer_of()
    own = (trl_templates / f"{family}.jinja").read_text()
    messages = [
        *talk("what is it"), {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3.5"}, {"role": "assistant", "content": "it is 3.5"},
    ]  # fmt: skip
    rows = ChatEncoder(tokenizer, chat_task(own)).rows([example(messages, [ADD])]).encoded
    ids: Any = tokenizer.apply_chat_template(
        messages, chat_template=own, tools=[ADD], return_dict=False
    )
    last = rows[-1]
    assert last.input_ids + last.target_ids == ids
    assert "it is 3.5<|im_end|>\n" in learnt_text(last)[-1]
    assert '"arguments": {"a": 1, "b": 2.5}' in learnt_text(rows[0])[0]


def test_mistral_learns_answers_with_the_end_of_text() -> None:
    tokenizer = tokenizer_of()
    encoder = ChatEncoder(tokenizer, chat_task(MISTRAL, max_tokens=100_000))
    for messages in generated(20, system=False):
        (row,) = encoder.rows([example(messages)]).encoded
        ids: Any = tokenizer.apply_chat_template(messages, chat_template=MISTRAL, return_dict=False)
        assert row.input_ids + row.target_ids == ids
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        assert learnt_text(row) == [f"{answer}<|endoftext|>" for answer in said]


def test_smollm2_reads_conversations_as_transformers_writes_them(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source_of("smollm2-135m", None))
    encoder = ChatEncoder(tokenizer, chat_task(None, max_tokens=100_000))
    for messages in generated(20, system=True):
        (row,) = encoder.rows([example(messages)]).encoded
        ids: Any = tokenizer.apply_chat_template(messages, return_dict=False)
        assert row.input_ids + row.target_ids == ids
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        pairs = zip(row.target_ids, row.labels, strict=True)
        text = tokenizer.decode([token for token, label in pairs if label != IGNORED])
        assert text == "".join(f"{answer}<|im_end|>\n" for answer in said)
