"""A task of conversations from its file to the answers: what was trained is what is asked."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import random_base
from test_cli import ptkit

from ptkit.api import Run, train
from ptkit.bank import AdapterBank
from ptkit.bank.conversation import Conversation
from ptkit.data.chat_rows import ChatEncoder
from ptkit.data.chat_template import ChatTemplate
from ptkit.data.task import load_task
from ptkit.errors import DataError, ModelError, UserError
from ptkit.evaluation.evaluate import asked_alike, evaluate_saved, fill_template
from ptkit.evaluation.predict import predict
from ptkit.formats.adapter_folder import INFO, RECIPE, read_info
from ptkit.loaded_adapter import load_adapter
from ptkit.methods import Demonstrations, create_adapter
from ptkit.methods import load_adapter as load_at
from ptkit.methods.catalogue import method_section
from ptkit.metrics.registry import metric
from ptkit.recipe.load import load_recipe
from ptkit.recipe.tasks import ChatTask
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import collate, supervised_losses
from ptkit.serve.answers import CompletionStream, RequestLimits
from ptkit.serve.protocol import ChatRequest, CompletionRequest
from ptkit.training.experiment import prepare

#: Roles as words; an answer ends with the model's end-of-text token.
WORDS = (
    "{% for m in messages %}{{ {'system': 'w90 ', 'user': 'w91 ', 'assistant': 'w92 '}[m.role] "
    "+ m.content + ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w92 ' }}{% endif %}"
)
RECIPE_TEXT = """
name: talk
model: {{id: random-llama-0}}
task:
  kind: chat
  data: {{files: {{train: talk.jsonl, validation: talk.jsonl}}}}
  chat_template: words.jinja
  system: w80 w81
  max_tokens: 100
  max_target_tokens: 6
  metrics: [chrf, perplexity, exact_match]
methods:
  - {{kind: {method}{more}}}
train: {{steps: 4, batch_size: 2, warmup_steps: 1, eval_every: 2, save_every: 4}}
retention: null
"""


def turns(*texts: str) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "assistant" if i % 2 else "user", "content": text}
            for i, text in enumerate(texts)
        ]
    }


ROWS = [
    turns("w1 w2", "w3 w4", "w5", "w6 w7 w8"), turns("w9", "w10"),
    turns("w11 w12 w13", "w14", "w15", "w16", "w17", "w18 w19"), turns("w20", "w21 w22"),
]  # fmt: skip


def folder(path: Path, method: str = "prefix_tuning", more: str = "") -> Path:
    (path / "talk.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    (path / "words.jinja").write_text(WORDS)
    recipe = path / "talk.yaml"
    recipe.write_text(RECIPE_TEXT.format(method=method, more=more))
    return recipe


@pytest.fixture(scope="module")
def base() -> Base:
    return random_base("llama")


@pytest.fixture(scope="module")
def run(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = tmp_path_factory.mktemp("talk")
    recipe = folder(path, more=", num_virtual_tokens: 3, start: examples")
    return train(recipe, base=base, out=path / "run")


def test_adapter_records_its_template_and_system_prompt(run: Run) -> None:
    chat = read_info(run.adapter).chat
    assert chat is not None
    assert (chat.template, chat.system) == (WORDS, "w80 w81")
    # The recipe beside it is complete without the file of the template.
    kept = load_recipe(run.adapter / RECIPE).recipe.task
    assert isinstance(kept, ChatTask)
    assert kept.chat_template == WORDS
    assert set(run.record.metrics) == {"chrf", "perplexity", "exact_match"}


def test_chat_server_and_generate_ask_as_training_did(run: Run, base: Base) -> None:
    task = load_recipe(run.adapter / RECIPE).recipe.task
    assert isinstance(task, ChatTask)
    recipe = load_recipe(run.folder.parent / "talk.yaml")
    data = load_task(recipe.recipe.task, recipe.folder)
    encoder = ChatEncoder(base.tokenizer, task)
    trained = encoder.asked(data.train[1]).input_ids
    assert base.tokenizer.decode(trained) == "w90 w80 w81 <end> w91 w9 <end> w92"

    assert base.tokenizer.chat_template is None  # it is the adapter that has one
    bank = AdapterBank(base)
    bank.load(run.adapter, "talk")
    conversation = Conversation(bank, adapter="talk")
    assert conversation._prompt("w9", [], "talk") == trained
    assert bank.chat_template(None).exists is False

    text = fill_template("w9", run.adapter, base.tokenizer)
    assert base.encode([text]) == [trained]

    library: Any = SimpleNamespace(
        bank=bank, engine=SimpleNamespace(longest=None), adapters=lambda _: (
            SimpleNamespace(positions=3),), chat_template=lambda _: bank.chat_template("talk"),
        template=lambda _: None,
    )  # fmt: skip
    loop = asyncio.new_event_loop()
    for request in (
        ChatRequest(model="talk", messages=[{"role": "user", "content": "w9"}]),
        CompletionRequest(model="talk", prompt="w9", template=True),
    ):
        stream = CompletionStream(library, RequestLimits(), request, loop)
        assert stream.answers[0].prompt == trained
    loop.close()

    own = load_adapter(run.adapter, base)
    said = conversation.say("w9", max_new_tokens=5, do_sample=False)
    assert own.chat([{"role": "user", "content": "w9"}], max_new_tokens=5) == said


def test_later_turns_are_asked_as_they_were_trained(run: Run, base: Base) -> None:
    bank = AdapterBank(base)
    bank.load(run.adapter, "talk")
    conversation = Conversation(bank, adapter="talk")
    said = conversation.say("w5", max_new_tokens=3, do_sample=False)
    prompt = base.tokenizer.decode(conversation._prompt("w6", conversation.exchanges, "talk"))
    assert prompt == f"w90 w80 w81 <end> w91 w5 <end> w92 {said} <end> w91 w6 <end> w92"
    other = Conversation(bank, adapter="talk", system="w70")
    assert base.tokenizer.decode(other._prompt("w6", [], "talk")).startswith("w90 w70 <end> w91")


def test_generate_asks_the_rows_of_a_file_as_training_did(
    run: Run, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ptkit.runtime.base_model.load_base", lambda *_, **__: base)
    file = tmp_path / "asked.jsonl"
    rows = [turns("w9"), turns("w1 w2", "w3 w4", "w5"), ROWS[0]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ("--model", base.id, "-a", run.adapter, "--max-new-tokens", "5", "--json")
    done = ptkit("generate", "-i", file, *options, cwd=tmp_path)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert "the last answer of 1 conversations is left out" in done.stderr
    own = load_adapter(run.adapter, base)
    asked = [rows[0]["messages"], rows[1]["messages"], ROWS[0]["messages"][:-1]]
    wanted = [own.chat(messages, max_new_tokens=5).strip() for messages in asked]
    assert [row["output"] for row in found] == wanted
    assert found[0]["input"] == "w9"
    by_hand = ptkit("generate", "w9", *options, cwd=tmp_path)
    assert json.loads(by_hand.stdout)["output"] == wanted[0]
    both = ptkit("generate", "-i", file, "--base", *options, cwd=tmp_path).stdout.splitlines()
    assert [json.loads(line)["output"] for line in both][1::2] == wanted


def test_the_harness_asks_in_the_adapters_own_template(run: Run, base: Base) -> None:
    harness = pytest.importorskip("ptkit.evaluation.harness")
    adapter = load_at(run.adapter, base)
    own = ChatTemplate.of_record(base.tokenizer, read_info(run.adapter).chat)
    model = harness.AdapterLM(adapter, 2, own)
    asked = model.apply_chat_template([{"role": "user", "content": "w9"}])
    assert asked == "w90 w80 w81 <end> w91 w9 <end> w92 "
    begun = [{"role": "user", "content": "w9"}, {"role": "assistant", "content": "w5"}]
    gone_on = model.apply_chat_template(begun, add_generation_prompt=False)
    assert gone_on == "w90 w80 w81 <end> w91 w9 <end> w92 w5"
    assert model.chat_template(True) == WORDS
    plain = ChatTemplate.of_record(base.tokenizer, None)
    with pytest.raises(UserError, match="has no chat template"):
        harness.evaluate_tasks(adapter, harness.KnownTasks((), None), chat=plain)
    adapter.close()


def test_evaluation_asks_in_the_adapters_own_template(run: Run, base: Base) -> None:
    loaded = load_recipe(run.folder.parent / "talk.yaml")
    experiment = prepare(loaded, base)
    found = evaluate_saved(experiment, run.folder)
    assert found.metrics["chrf"].mean == run.record.metrics["chrf"]
    changed = ["task.chat_template=plain", "task.system=null"]
    plain = replace(loaded, recipe=load_recipe(loaded.path, changed).recipe)
    again = evaluate_saved(prepare(plain, base), run.folder)
    assert [p.prediction for p in again.predictions] == [p.prediction for p in found.predictions]
    assert again.metrics["perplexity"].mean == pytest.approx(found.metrics["perplexity"].mean)
    assert again.test_repeats == found.test_repeats == {"train": len(ROWS)}
    # The base beside it is asked as it is.
    chat = asked_alike([run.folder])
    beside = evaluate_saved(prepare(plain, base), None, chat=chat)
    own = evaluate_saved(experiment, None)
    assert [p.prediction for p in beside.predictions] == [p.prediction for p in own.predictions]
    assert beside.metrics["perplexity"].mean == pytest.approx(own.metrics["perplexity"].mean)
    assert beside.test_repeats == found.test_repeats
    other = replace(loaded, recipe=load_recipe(loaded.path, ["task.system=w1"]).recipe)
    with pytest.raises(UserError, match=r"trained with the system prompt 'w80 w81'"):
        evaluate_saved(prepare(other, base), run.folder)


def test_no_base_stands_beside_adapters_that_are_asked_in_different_ways(
    run: Run, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(run.adapter, tmp_path / "other"))
    info = json.loads((other / INFO).read_text())
    info["chat"]["system"] = "w1"
    (other / INFO).write_text(json.dumps(info))
    assert asked_alike([run.adapter, run.adapter]) == read_info(run.adapter).chat
    with pytest.raises(UserError, match=r"other were trained in different .*--no-base"):
        asked_alike([run.adapter, other])


def test_losses_of_one_pass_are_those_of_every_answer_alone(base: Base, tmp_path: Path) -> None:
    loaded = load_recipe(folder(tmp_path))
    task = loaded.recipe.task.model_copy(update={"chat_template": WORDS})
    assert isinstance(task, ChatTask)
    (example, *_) = load_task(task, tmp_path).train[2:]
    assert example.dialogue is not None
    encoder = ChatEncoder(base.tokenizer, task)

    def losses(examples: list[Any]) -> torch.Tensor:
        rows = encoder.rows(examples).encoded
        return supervised_losses(base.model, **collate(rows, base), batch=None)

    each = [replace(example, dialogue=example.dialogue.upto(i)) for i in example.dialogue.answers]
    alone = torch.cat([losses([one]) for one in each])
    torch.testing.assert_close(losses([example]), alone, atol=1e-5, rtol=1e-4)
    (row,) = encoder.rows([example]).encoded
    assert row.supervised == len(alone) == 2 + 2 + 3


def test_perplexity_is_of_all_answers_and_predictions_of_the_last(
    base: Base, tmp_path: Path
) -> None:
    loaded = load_recipe(folder(tmp_path))
    task = loaded.recipe.task.model_copy(update={"chat_template": WORDS})
    assert isinstance(task, ChatTask)
    rows = load_task(task, tmp_path).test
    plain = create_adapter(method_section({"kind": "base"}), base, Demonstrations((), 0))
    found = predict(plain, rows, task, batch_size=3)
    assert [p.references for p in found] == [(e.target,) for e in rows]
    nats, tokens = (sum(p.details[key] for p in found) for key in ("nats", "tokens"))
    encoded = ChatEncoder(base.tokenizer, task).rows(rows).encoded
    losses = supervised_losses(base.model, **collate(encoded, base), batch=None)
    assert tokens == len(losses)
    assert nats == pytest.approx(float(losses.sum()), rel=1e-5)
    own = predict(plain, rows, task.model_copy(update={"history": "own"}), batch_size=3)
    # Where there is one answer only, there is no history.
    assert [p.prediction for p in own][1::2] == [p.prediction for p in found][1::2]
    bank = AdapterBank(base)
    bank.chat_template = lambda _: ChatTemplate(base.tokenizer, WORDS, "w80 w81")  # type: ignore[method-assign]
    conversation = Conversation(bank)
    for text in ("w11 w12 w13", "w15", "w17"):
        said = conversation.say(text, max_new_tokens=6, do_sample=False)
    assert own[2].prediction == said.strip()


@pytest.mark.parametrize(
    "more", [", position: infix, num_virtual_tokens: 3, start: examples"]
)  # fmt: skip
def test_adapter_of_one_input_is_refused_for_several_answers(
    base: Base, tmp_path: Path, more: str
) -> None:
    recipe = folder(tmp_path, more=more)
    with pytest.raises(UserError, match=r"use `task\.loss: last`"):
        train(recipe, base=base, out=tmp_path / "run")


def test_conversation_longer_than_the_model_is_refused(base: Base, tmp_path: Path) -> None:
    recipe = folder(tmp_path, more=", num_virtual_tokens: 3, start: examples")
    (tmp_path / "talk.jsonl").write_text(json.dumps(turns(" ".join(["w1"] * 200), "w2")) + "\n")
    with pytest.raises(DataError, match=r"talk\.jsonl:1: the conversation has \d+ tokens"):
        train(recipe, base=base, out=tmp_path / "run")
    with pytest.raises(ModelError, match=r"too few positions.*`max_tokens` of a chat"):
        train(recipe, base=base, out=tmp_path / "run", overrides=["task.max_tokens=500"])


# ---------------------------------------------------------------- metrics of tool calls

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


@pytest.mark.parametrize(
    ("answer", "valid", "equal"),
    [
        (CALL, 100, 100),
        ('<tool_call>{"arguments": {"b": 2.0, "a": 1}, "name": "add"}</tool_call> done', 100, 100),
        ('[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}}]', 100, 100),
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}', 100, 100),
        (CALL.replace("2", "true"), 100, 0),
        (CALL * 2, 100, 0),
        ("it is three", 100, 0),
        ("<tool_call>{add}</tool_call>", 0, 0),
        ('<tool_call>{"name": "add"}</tool_call>', 0, 0),
    ],
)
def test_tool_calls_are_compared_as_json(answer: str, valid: int, equal: int) -> None:
    assert metric("tool_calls_valid")([answer], [[CALL]]) == valid
    assert metric("tool_calls_equal")([answer], [[CALL]]) == equal
    assert metric("tool_calls_equal")(["yes"], [["no"]]) == 100


# ---------------------------------------------------------------- `ptkit data inspect`


def test_inspect_shows_what_was_recognised_and_what_is_learnt(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    options = ("--model", "tiny-en", "--chat-template", "plain")
    shown = ptkit("data", "inspect", "a.jsonl", "b.jsonl", *options, cwd=tmp_path).stdout
    assert "recognised: messages, as OpenAI's and TRL's (column `messages`)" in shown
    assert "1 of b.jsonl" in shown
    assert "User: w1 w2" in shown
    assert "[learnt:  w3 w4<|endoftext|>" in shown
    told = json.loads(ptkit("data", "inspect", "a.jsonl", *options, "--json", cwd=tmp_path).stdout)
    (split,) = told["files"]
    assert (split["rows"], split["turns_most"]) == (4, 6)
    assert split["roles"] == {"user": 7, "assistant": 7}
    assert 0 < split["supervised"] < 1
    assert math.isclose(split["tokens_longest"], 60, abs_tol=40)
    assert [p["learnt"] for p in told["first_rows"][0]] == [False, True, False, True]


#: What a file holds -> what the one line of the refusal has.
BAD = {
    "empty": ("", "is empty"),
    "JSON that breaks": ('{"messages": []}\n{"messages"', "bad.jsonl:2: not valid JSON"),
    "an unknown role": ('{"messages": [{"role": "bot", "content": "a"}]}', "unknown role"),
    "no answer": (json.dumps(turns("a")), "no assistant turn"),
    "another order": (
        json.dumps({"messages": [*turns("a")["messages"], *turns("b", "c")["messages"]]}),
        "turn 2: found `user`, expected assistant",
    ),
    "too long": (json.dumps(turns("a " * 2000, "b")), "more than 1,024"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_file_is_one_line_with_exit_code_2(tmp_path: Path, what: str) -> None:
    text, told = BAD[what]
    (tmp_path / "bad.jsonl").write_text(text)
    found = ptkit("data", "inspect", "bad.jsonl", "--chat-template", "plain", cwd=tmp_path, code=2)
    assert told in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert not found.stdout


def test_template_that_raises_is_one_line_with_exit_code_2(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(turns("a", "b")) + "\n")
    (tmp_path / "t.jinja").write_text("{{ raise_exception('not so') }}")
    found = ptkit("data", "inspect", "a.jsonl", "--chat-template", "t.jinja", cwd=tmp_path, code=2)
    assert "a.jsonl:1: the chat template refuses the conversation at turn 2: not so" in found.stderr
    assert len(found.stderr.splitlines()) == 1
