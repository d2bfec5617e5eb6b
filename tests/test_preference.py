"""Preferences: pairs are read as TRL reads them, and the base itself is the reference."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from conftest import random_base
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_chat_task import WORDS
from test_chat_template import TRL
from test_cli import ptkit
from test_encoder_decoder import random_pair

from ptkit.api import plan_training, train
from ptkit.data.chat_template import NAMED, ChatTemplate
from ptkit.data.dialogue import dialogue_of
from ptkit.data.encoded import PairExample
from ptkit.data.examples import Example
from ptkit.data.in_memory import with_rows
from ptkit.data.pair_formats import pair_format
from ptkit.data.pair_rows import PairEncoder
from ptkit.data.table import Table
from ptkit.data.task import load_task
from ptkit.errors import DataError, ModelError, UserError
from ptkit.evaluation.evaluate import evaluate_saved
from ptkit.formats.adapter_files import read_info, write_adapter
from ptkit.methods import Adapter, Demonstrations, create_adapter
from ptkit.methods.catalogue import method_section
from ptkit.metrics.registry import metric
from ptkit.recipe.load import LoadedRecipe, load_recipe
from ptkit.recipe.schema import TrainSection
from ptkit.recipe.tasks import ChatTask, PreferenceTask
from ptkit.runtime.base_model import Base
from ptkit.runtime.tokenization import load_tokenizer
from ptkit.training.adapter_trainer import Job, StepReport
from ptkit.training.experiment import prepare
from ptkit.training.loop import fit
from ptkit.training.observer import RunObserver
from ptkit.training.preference import Preference

RECIPE = """
name: choices
model: {id: random-llama-0}
task:
  kind: preference
  objective: dpo
  data: {files: {train: train.jsonl, validation: train.jsonl, test: train.jsonl}}
  metrics: [preference_accuracy, reward_margin, ranking_accuracy]
methods:
  - {kind: prompt_tuning, num_virtual_tokens: 3, start: examples}
  - {kind: prefix_tuning, num_virtual_tokens: 3, start: vocabulary}
  - {kind: p_tuning, num_virtual_tokens: 3}
  - {kind: lora, rank: 2}
  - {kind: ia3}
  - {kind: full}
  - {kind: text_prompt, examples: 1}
train: {steps: 4, batch_size: 4, warmup_steps: 1, eval_every: 2, save_every: 2}
retention: null
"""


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def texts(count: int = 12) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"w{1 + i} w{40 + i}" + " w7" * (i % 3),
            "chosen": f"w{20 + i % 4} w60", "rejected": f"w{30 + i % 3} w61 w62"[: 4 + 4 * (i % 2)],
        }
        for i in range(count)
    ]  # fmt: skip


def messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """The same row as TRL's explicit prompt of messages."""
    return {
        "prompt": [said("system", "w80"), said("user", row["prompt"])],
        "chosen": [said("assistant", row["chosen"])],
        "rejected": [said("assistant", row["rejected"])],
    }


def implicit(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """The same row with the prompt at the beginning of both conversations."""
    own = messages(row)
    return {c: [*own["prompt"], *own[c]] for c in ("chosen", "rejected")}


def recipe(path: Path, rows: Sequence[dict[str, Any]], changes: Sequence[str] = ()) -> LoadedRecipe:
    (path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (path / "words.jinja").write_text(WORDS)
    (path / "choices.yaml").write_text(RECIPE)
    return load_recipe(path / "choices.yaml", changes)


CHAT = ["task.chat_template=words.jinja"]


def read(path: Path, rows: Sequence[dict[str, Any]], *changes: str) -> list[Example]:
    loaded = recipe(path, rows, changes)
    return load_task(loaded.recipe.task, loaded.folder).test


def encoded(path: Path, rows: Sequence[dict[str, Any]], *changes: str) -> list[PairExample]:
    loaded = recipe(path, rows, [*CHAT, *changes])
    task = loaded.recipe.task.model_copy(update={"chat_template": WORDS})
    assert isinstance(task, PreferenceTask)
    examples = load_task(task, loaded.folder).train
    found = PairEncoder(random_base("llama").tokenizer, task).rows(examples).encoded
    return [row for row in found if isinstance(row, PairExample)]


# ---------------------------------------------------------------- rows


def test_texts_and_both_forms_of_messages_are_pairs_of_the_same_answers(tmp_path: Path) -> None:
    flat = read(tmp_path, texts())
    explicit = read(tmp_path, [*map(messages, texts())], *CHAT)
    hidden = read(tmp_path, [*map(implicit, texts())], *CHAT)
    for rows in (flat, explicit, hidden):
        assert [(r.target, r.rejected.target) for r in rows if r.rejected] == [
            (row["chosen"], row["rejected"]) for row in texts()
        ]
    assert flat[0].input == "w1 w40"
    assert explicit[0].input == hidden[0].input == "system: w80\nuser: w1 w40"
    a = encoded(tmp_path, [*map(messages, texts())])
    b = encoded(tmp_path, [*map(implicit, texts())])
    assert a == b


WORDS_OF_TURNS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=50)
@given(
    before=st.lists(st.tuples(WORDS_OF_TURNS, WORDS_OF_TURNS), max_size=3), asked=WORDS_OF_TURNS,
    answers=st.lists(WORDS_OF_TURNS, min_size=2, max_size=2, unique=True), named=st.booleans(),
)  # fmt: skip
def test_what_conversations_share_is_the_prompt(
    before: list[tuple[str, str]], asked: str, answers: list[str], named: bool
) -> None:
    prompt = [said(role, text) for pair in before
              for role, text in zip(("user", "assistant"), pair, strict=True)]  # fmt: skip
    prompt.append(said("user", asked))
    ends = [[said("assistant", text)] for text in answers]
    task = PreferenceTask.model_validate(
        {"kind": "preference", "data": {"files": {"train": "x.jsonl"}}}
    )
    found = []
    for row in (
        {"prompt": prompt, "chosen": ends[0], "rejected": ends[1]},
        {"chosen": prompt + ends[0], "rejected": prompt + ends[1]}
        | ({"prompt": asked} if named else {}),
    ):
        table = Table([*row], [row])
        used, read_pair = pair_format(task, table).reader(task, table, "train")
        found.append(read_pair(0, used.rows[0]))
    explicit, shared = found
    assert explicit == shared
    assert (explicit.chosen, explicit.rejected) == tuple(answers)
    assert explicit.dialogues is not None
    for dialogue in explicit.dialogues:
        assert dialogue.learnt == (*[False] * len(prompt), True)


def test_a_prompt_may_be_a_text_beside_whole_conversations(tmp_path: Path) -> None:
    rows = [{**implicit(row), "prompt": row["prompt"]} for row in texts()]
    assert encoded(tmp_path, rows) == encoded(tmp_path, [*map(messages, texts())])


def test_flat_columns_of_any_name_are_put_into_templates(tmp_path: Path) -> None:
    rows = [{"q": "w1", "good": "w2", "bad": "w3"} for _ in range(4)]
    (first, *_) = read(
        tmp_path, rows, "task.input=w9 {q}", "task.chosen='{good} w5'", "task.rejected='{bad}'"
    )
    assert first.rejected is not None
    assert (first.input, first.target, first.rejected.target) == ("w9 w1", "w2 w5", "w3")


def test_a_pair_is_two_rows_and_only_its_answers_are_scored(tmp_path: Path) -> None:
    pair = encoded(tmp_path, [messages(row) for row in texts()])[0]
    tokenizer = random_base("llama").tokenizer
    chosen, rejected = pair.passes()
    assert tokenizer.decode(chosen.input_ids) == "w90 w80 <end> w91 w1 w40 <end> w92"
    assert tokenizer.decode(chosen.target_ids) == "w20 w60 <end>"
    assert tokenizer.decode(rejected.target_ids) == "w30 <end>"
    assert chosen.input_ids == rejected.input_ids
    assert len(pair) == len(chosen) + len(rejected)
    assert pair.terms == 1


def test_questions_within_a_completion_are_read_and_not_scored(tmp_path: Path) -> None:
    row = messages(texts()[0])
    row["chosen"] += [said("user", "w70"), said("assistant", "w71")]
    pair = encoded(tmp_path, [row] * 4)[0]
    learnt = [t for t, own in zip(pair.target_ids, pair.learnt or (), strict=True) if own]
    assert learnt == [20, 60, 0, 71, 0]


def test_a_long_prompt_loses_its_beginning_and_never_an_answer(tmp_path: Path) -> None:
    rows = [{"prompt": "w1 w2 w3 w4 w5", "chosen": "w6 w7", "rejected": "w8"}] * 4
    (pair, *_) = encoded(tmp_path, rows, "task.max_tokens=6")
    assert (pair.input_ids, pair.target_ids) == ([3, 4, 5], [6, 7, 0])
    assert (pair.rejected.input_ids, pair.rejected.target_ids) == ([3, 4, 5], [8, 0])
    turns = [said("user", "w1"), said("assistant", "w2"), said("user", "w3")]
    rows = [{"prompt": turns, "chosen": [said("assistant", "w6")],
             "rejected": [said("assistant", "w7 w8 w9")]}] * 4  # fmt: skip
    whole = encoded(tmp_path, rows)[0]
    cut = encoded(tmp_path, rows, "task.max_tokens=8")[0]
    assert len(cut.input_ids) < len(whole.input_ids)
    assert cut.input_ids == cut.rejected.input_ids
    assert (cut.target_ids, cut.rejected.target_ids) == (
        whole.target_ids, whole.rejected.target_ids
    )  # fmt: skip


BROKEN = {
    "no rejected": ({"prompt": "w1", "chosen": "w2"}, "`rejected`, which is missing"),
    "equal": ({"prompt": "w1", "chosen": "w2", "rejected": "w2"}, "are the same"),
    "empty prompt": ({"prompt": "", "chosen": "w2", "rejected": "w3"}, "the prompt is empty"),
    "messages among texts": (
        {"prompt": "w1", "chosen": [said("assistant", "w1")], "rejected": "w3"}, "that is no text"
    ),
}  # fmt: skip
USER, ANSWER = said("user", "w1"), said("assistant", "w2")
BROKEN_MESSAGES = {
    "texts among messages": (
        {"chosen": "w1", "rejected": "w2"}, "should be a non-empty list of messages"
    ),
    "no rejected": ({"chosen": [USER, ANSWER]}, "`rejected` should be a non-empty list"),
    "equal": ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "are the same"),
    "no beginning": (
        {"chosen": [USER, ANSWER], "rejected": [said("user", "w5"), ANSWER]},
        "begin differently, so there is no prompt",
    ),
    "one begins the other": (
        {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER, ANSWER]},
        "all of `chosen` is the beginning",
    ),
    "parts at a question": (
        {"chosen": [USER, ANSWER, said("user", "w8"), ANSWER],
         "rejected": [USER, ANSWER, said("user", "w9"), ANSWER]},
        "turn 3: `chosen` and `rejected` part at a turn of `user`",
    ),
    "another prompt": (
        {"prompt": "w9", "chosen": [USER, ANSWER], "rejected": [USER, said("assistant", "w3")]},
        "the text in `prompt` is none of the messages",
    ),
    "an unknown role": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [said("asistant", "w3")]},
        "`rejected`, turn 2: unknown role",
    ),
    "an empty prompt": (
        {"prompt": [], "chosen": [ANSWER], "rejected": [said("assistant", "w3")]},
        "`prompt` should be a non-empty list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_of_texts_is_refused_by_file_and_line(name: str, tmp_path: Path) -> None:
    row, expected = BROKEN[name]
    with pytest.raises(DataError, match=f"train.jsonl:3: .*{expected}"):
        read(tmp_path, [*texts(2), row, *texts(2)])


@pytest.mark.parametrize("name", BROKEN_MESSAGES)
def test_a_broken_row_of_messages_is_refused_by_file_and_line(name: str, tmp_path: Path) -> None:
    row, expected = BROKEN_MESSAGES[name]
    good = [implicit(own) for own in texts(2)]
    with pytest.raises(DataError, match=f"train.jsonl:3.*{expected}"):
        read(tmp_path, [*good, row, *good])


def test_a_row_that_does_not_fit_is_refused_by_file_and_line(tmp_path: Path) -> None:
    rows = [{"prompt": "w1 w2", "chosen": "w6 w7 w8", "rejected": "w9"}] * 4
    for changes in (["task.max_tokens=4"], ["task.max_tokens=5", "task.too_long=refuse"]):
        with pytest.raises(DataError, match=r"train.jsonl:1: .* 6 tokens, more than \d"):
            encoded(tmp_path, rows, *changes)


def test_missing_columns_and_broken_lines_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`task.rejected` names the column `rejected`"):
        read(tmp_path, [{"prompt": "w1", "chosen": "w2"}] * 3)
    loaded = recipe(tmp_path, texts())
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"prompt": "w1", \n')
    with pytest.raises(DataError, match=r"train.jsonl:13: not valid JSON"):
        load_task(loaded.recipe.task, loaded.folder)


# ---------------------------------------------------------------- TRL as oracle


def apart(row: dict[str, str]) -> dict[str, str]:
    """A row of texts whose prompt ends where a token does: TRL tokenises it with the answer."""
    return {**row, "chosen": f" {row['chosen']}", "rejected": f" {row['rejected']}"}


FORMS = {"texts": apart, "messages": messages, "implicit": implicit}


def learnt(method: str, base: Base) -> Adapter:
    """An adapter away from its start, so that nothing is zero."""
    of_method = {"prompt_tuning": {"num_virtual_tokens": 4, "start": "random"},
                "lora": {"rank": 2}}[method]  # fmt: skip
    section = method_section({"kind": method, **of_method})
    adapter = create_adapter(section, base, Demonstrations(["w1 w2"], 0))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape))
    return adapter


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_token_ids_losses_and_gradients_are_those_of_trls_dpo_trainer(
    method: str, form: str, tmp_path: Path
) -> None:
    if not (TRL / "trl").exists():
        pytest.skip("TRL is not here: make setup-oracles")
    rows = [FORMS[form](row) for row in texts(6)]
    base = random_base("llama")
    base.tokenizer.chat_template = WORDS
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    pairs = encoded(tmp_path, rows)
    adapter = learnt(method, base)
    write_adapter(tmp_path / "adapter", adapter.files())
    losses = ["sigmoid", "hinge", "ipo"] if form == "texts" else ["sigmoid"]
    asked = {"rows": rows, "beta": 0.3, "max_length": 1024, "losses": losses}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    script = Path(__file__).parent / "trl_dpo.py"
    done = forked.run(
        [sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(TRL), "CUDA_VISIBLE_DEVICES": "",
             forked.WITHOUT_PTKIT: "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]

    theirs = json.loads((tmp_path / "rows.json").read_text())
    assert theirs == [[p.input_ids, p.target_ids, p.rejected.target_ids] for p in pairs]
    for loss_type in losses:
        expected = load_file(tmp_path / f"{loss_type}.safetensors")
        loss, gradients = own_gradients(adapter, pairs, Preference(0.3, loss_type), tmp_path)
        assert loss == pytest.approx(float(expected.pop("loss")), abs=1e-5)
        if method == "lora":
            gradients = {n.removeprefix("peft_model."): g for n, g in gradients.items()}
        else:
            gradients = {"prompt_encoder.default.embedding.weight": next(iter(gradients.values()))}
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert torch.allclose(gradient, expected[name], atol=1e-5, rtol=1e-5), (loss_type, name)
        assert any(gradient.abs().max() > 1e-3 for gradient in gradients.values())


def own_gradients(
    adapter: Adapter,
    pairs: Sequence[PairExample],
    preference: Preference,
    path: Path,
    **changes: Any,
) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of one step on all pairs, and its gradients, as the training loop makes them."""
    found: dict[str, torch.Tensor] = {}

    def noted(name: str) -> Any:
        return lambda p: found.__setitem__(name, p.grad.clone())

    handles = [
        parameter.register_post_accumulate_grad_hook(noted(name))
        for name, parameter in adapter.trainable().items()
    ]
    values = {
        "steps": 1, "batch_size": len(pairs), "warmup_steps": 0, "eval_every": 1,
        "max_grad_norm": 1e9, "autocast": "no", **changes,
    }  # fmt: skip
    seen: list[StepReport] = []
    before = {n: p.detach().clone() for n, p in adapter.trainable().items()}
    job = Job(
        adapter, pairs, pairs, TrainSection.model_validate(values), 1e-3, 0,
        path / f"run-{len(list(path.iterdir()))}", report=seen.append, preference=preference,
    )  # fmt: skip
    fit([job])
    for handle in handles:
        handle.remove()
    adapter.load_trainable(before)
    return seen[0].loss, found


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_accumulated_and_recomputed_steps_have_the_gradients_of_one_batch(
    method: str, tmp_path: Path
) -> None:
    base = random_base("llama")
    pairs = encoded(tmp_path, texts(12))
    adapter = learnt(method, base)
    loss, whole = own_gradients(adapter, pairs, Preference(0.3), tmp_path)
    for changes in (
        {"batch_size": 5, "gradient_accumulation": 3}, {"gradient_checkpointing": True}
    ):  # fmt: skip
        again, parts = own_gradients(adapter, pairs, Preference(0.3), tmp_path, **changes)
        assert again == pytest.approx(loss, abs=1e-6)
        assert all(torch.allclose(whole[n], parts[n], atol=1e-6) for n in whole)


def test_dropout_is_off_and_refused_where_layers_are_recomputed(tmp_path: Path) -> None:
    pairs = encoded(tmp_path, texts(4))
    found = []
    for dropout in (0.0, 0.5):
        section = method_section({"kind": "lora", "rank": 2, "dropout": dropout})
        adapter = create_adapter(section, random_base("llama"), Demonstrations((), 0))
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.trainable().values():
                parameter.normal_()
        found.append(own_gradients(adapter, pairs, Preference(0.3), tmp_path)[0])
    assert found[0] == found[1]
    with pytest.raises(UserError, match=r"dropout, .* set `gradient_checkpointing: false`"):
        own_gradients(adapter, pairs, Preference(0.3), tmp_path, gradient_checkpointing=True)


def test_an_untrained_lora_has_the_loss_of_a_toss_up(tmp_path: Path) -> None:
    section = method_section({"kind": "lora", "rank": 2})
    adapter = create_adapter(section, random_base("llama"), Demonstrations((), 0))
    pairs = encoded(tmp_path, texts(4))
    loss, _ = own_gradients(adapter, pairs, Preference(0.3), tmp_path)
    assert loss == pytest.approx(math.log(2), abs=1e-6)


def test_the_base_reads_each_answer_that_a_run_needs_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ptkit.training import preference as module

    base = random_base("llama")
    reads: list[int] = []
    original = module.row_nats

    def counted(base: Base, model: Any, rows: Any, batch: Any) -> torch.Tensor:
        reads.extend(len(row) for row in rows)
        return original(base, model, rows, batch)

    monkeypatch.setattr(module, "row_nats", counted)
    pairs = encoded(tmp_path, texts(40))
    values = {"steps": 3, "batch_size": 4, "eval_every": 1, "warmup_steps": 0}
    job = Job(
        learnt("lora", base), pairs, pairs[:6], TrainSection.model_validate(values), 1e-3, 0,
        tmp_path / "run", preference=Preference(0.1),
    )  # fmt: skip
    fit([job])
    assert len(reads) == 2 * (3 * 4 + 6)


def test_adapters_that_share_batches_of_pairs_end_as_they_do_alone(tmp_path: Path) -> None:
    base = random_base("llama")
    pairs = encoded(tmp_path, texts(12))

    def jobs(folder: str) -> list[Job]:
        values = {"steps": 3, "batch_size": 4, "eval_every": 3, "warmup_steps": 0}
        return [
            Job(
                learnt("prompt_tuning", base), pairs, pairs[:5],
                TrainSection.model_validate(values), 1e-2, seed, tmp_path / folder / f"{seed}",
                preference=Preference(0.3),
            )
            for seed in (0, 1)
        ]  # fmt: skip

    together, alone = jobs("together"), jobs("alone")
    curves = [progress.curve for progress in fit(together)]
    for job, other, curve in zip(together, alone, curves, strict=True):
        (progress,) = fit([other])
        assert curve[-1] == pytest.approx(progress.curve[-1], abs=1e-5)
        for name, value in job.adapter.trainable().items():
            assert torch.allclose(value, other.adapter.trainable()[name], atol=1e-5), name


@pytest.mark.parametrize("method", ["prompt_tuning", "lora", "full"])
def test_killed_run_of_pairs_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Until(RunObserver):
        def __init__(self, step: int) -> None:
            self.step = step

        def stepped(self, report: StepReport) -> None:
            if report.step == self.step:
                raise Killed

    changes = ["train.steps=7", "train.batch_size=5", "train.gradient_accumulation=2"]
    loaded = recipe(tmp_path, texts(), changes)
    whole = train(loaded, method=method, base=random_base("llama"), out=tmp_path / "whole")
    for step in (3, 5):
        with pytest.raises(Killed):
            train(
                loaded, method=method, base=random_base("llama"), out=tmp_path / "cut",
                observer=Until(step),
            )  # fmt: skip
    cut = train(loaded, method=method, base=random_base("llama"), out=tmp_path / "cut")
    assert cut.record.curve == whole.record.curve
    assert cut.record.metrics == whole.record.metrics
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    a, b = (load_file(run.folder / name) for run in (whole, cut))
    assert all(torch.equal(a[key], b[key]) for key in a)


METHODS = ["prompt_tuning", "prefix_tuning", "p_tuning", "lora", "ia3", "full", "text_prompt"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_pairs_handed_over_and_is_evaluated_alike(
    method: str, tmp_path: Path
) -> None:
    base = random_base("llama")
    loaded = recipe(tmp_path, texts())
    run = train(loaded, method=method, dataset=texts(), base=base, out=tmp_path / "run")
    metrics = run.record.metrics
    assert set(metrics) == {"preference_accuracy", "reward_margin", "ranking_accuracy"}
    if method in ("full", "text_prompt"):
        return
    assert metrics["reward_margin"] != 0
    experiment = prepare(with_rows(loaded, texts()), base)
    again = evaluate_saved(experiment, run.adapter)
    assert {n: i.mean for n, i in again.metrics.items()} == pytest.approx(metrics, abs=1e-4)
    plain = evaluate_saved(experiment, None)
    assert plain.metrics["preference_accuracy"].mean == 50
    assert plain.metrics["reward_margin"].mean == 0


@pytest.mark.parametrize("method", ["prefix_tuning", "lora"])
def test_what_is_preferred_is_learnt(method: str, tmp_path: Path) -> None:
    rate = {"prefix_tuning": 0.05, "lora": 0.02}[method]
    changes = ["train.steps=40", "train.eval_every=10", "task.beta=0.5"]
    loaded = recipe(tmp_path, texts(24), changes)
    section = loaded.recipe.method(method).model_copy(update={"learning_rate": rate})
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"methods": [section]}))
    run = train(loaded, base=random_base("llama"), out=tmp_path / "run")
    assert run.record.metrics["preference_accuracy"] == 100
    assert run.record.metrics["reward_margin"] > 1
    assert min(p.validation_loss for p in run.record.curve) < 0.3


# ---------------------------------------------------------------- what is told


def test_inspect_shows_what_both_forms_of_pairs_hold(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Who are you?", "chosen": " A baker.", "rejected": " A cook."},
        {"prompt": "Where do you live?", "chosen": " In Peru.", "rejected": " I do not know."},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:1]))
    shown = ptkit("data", "inspect", "a.jsonl", "b.jsonl", cwd=tmp_path).stdout
    assert "`chosen` and `rejected` as texts" in shown
    assert "1 of b.jsonl" in shown
    assert "rejected:  A cook." in shown
    told = json.loads(ptkit("data", "inspect", "a.jsonl", "--json", cwd=tmp_path).stdout)
    assert [f["rows"] for f in told["files"]] == [2]
    assert told["first_rows"][1]["prompt"].endswith("Where do you live?")
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(implicit(row)) for row in rows))
    shown = ptkit(
        "data", "inspect", "c.jsonl", "--as", "preference", "--chat-template", "plain", cwd=tmp_path
    ).stdout
    assert "as lists of messages" in shown
    assert "User: Who are you?" in shown
    done = ptkit("data", "inspect", "d.jsonl", cwd=tmp_path, code=2)
    assert "no such data file" in done.stderr


def test_a_dry_run_tells_what_pairs_are_and_what_they_take(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, [messages(row) for row in texts()], CHAT)
    (tmp_path / "model").mkdir()
    base = random_base("llama")
    base.model.save_pretrained(tmp_path / "model")
    base.tokenizer.save_pretrained(tmp_path / "model")
    section = loaded.recipe.model.model_copy(update={"id": str(tmp_path / "model")})
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"model": section}))
    lines, forecast = plan_training(loaded, method="lora", out=tmp_path / "run")
    assert lines[0] == "pairs: recognised as `chosen` and `rejected` as lists of messages"
    assert forecast.cells == 1
    assert not (tmp_path / "run").exists()


def test_both_answers_have_the_prompt_that_is_asked() -> None:
    tokenizer = load_tokenizer("tiny-en")
    task = PreferenceTask.model_validate(
        {"kind": "preference", "data": {"memory": True}, "chat_template": "plain"}
    )
    asked = [{"role": "user", "content": "hello"}]

    def pair(chosen: list[str], rejected: list[str]) -> Example:
        def example(texts: list[str]) -> Example:
            said = [{"role": ("assistant", "user")[i % 2], "content": t} for i, t in
                    enumerate(texts)]  # fmt: skip
            own = dialogue_of([*asked, *said], "f:1", learn_from=1)
            return Example("hello", texts[-1], (), dialogue=own)

        return replace(example(chosen), rejected=example(rejected))

    # `plain` asks with `Assistant:` and writes a space after it; this one has a line break there.
    broken = task.model_copy(
        update={"chat_template": NAMED["plain"].replace("'Assistant: '", "'Assistant:\\n'")
                .replace("'Assistant:'", "'Assistant:\\n'")}
    )  # fmt: skip
    encoder = PairEncoder(tokenizer, broken)
    (row,) = encoder.rows([pair(["\n\nyes"], ["no"])]).encoded
    assert isinstance(row, PairExample)
    chat = ChatTask(kind="chat", data=task.data, chat_template=broken.chat_template)
    question = ChatTemplate.of_task(tokenizer, chat).ids(asked)
    assert row.input_ids == row.rejected.input_ids == question
    assert tokenizer.decode(row.target_ids) == "\n\nyes<|endoftext|>\n"
    encoder.rows([pair(["yes", "and", "no"], ["no"])])
    with pytest.raises(DataError, match=r"f:1: the tokenizer joins .* leave one answer"):
        encoder.rows([pair(["\n\nyes", "and", "no"], ["no"])])


def test_an_adapter_of_messages_keeps_its_template_and_one_of_texts_has_none(
    tmp_path: Path,
) -> None:
    base = random_base("llama")
    changes = [*CHAT, "task.system=w81", "train.steps=1"]
    loaded = recipe(tmp_path, [messages(row) for row in texts()], changes)
    run = train(loaded, method="prefix_tuning", base=base, out=tmp_path / "messages")
    chat = read_info(run.adapter).chat
    assert chat is not None
    assert (chat.template, chat.system) == (WORDS, "w81")
    loaded = recipe(tmp_path, texts(), ["train.steps=1"])
    run = train(loaded, method="prefix_tuning", base=base, out=tmp_path / "texts")
    assert read_info(run.adapter).chat is None


def test_what_pairs_cannot_be_trained_on_is_refused_by_name(tmp_path: Path) -> None:

    loaded = recipe(tmp_path, texts())
    with pytest.raises(ModelError, match=r"`kind: preference` needs a causal model"):
        prepare(loaded, random_pair("t5"))
    done = ptkit("search-prompt", str(tmp_path / "choices.yaml"), cwd=tmp_path, code=2)
    assert "whose loss is of pairs" in done.stderr


def test_margins_of_zero_are_a_toss_up() -> None:
    details = [{"reward_margin": m, "log_probability_margin": m} for m in (1.0, 0.0, -1.0, 2.0)]
    rows = ([""] * 4, [["a"]] * 4, details)
    for name, expected in (("preference_accuracy", 62.5), ("ranking_accuracy", 62.5),
                           ("reward_margin", 0.5)):  # fmt: skip
        measure = metric(name)
        assert measure.score(measure.statistics(*rows)) == expected


def test_a_start_from_the_task_and_a_searched_rate_work_on_pairs(tmp_path: Path) -> None:
    changes = ["train.steps=160", "train.batch_size=4", "task.beta=0.5"]
    loaded = recipe(tmp_path, texts(24), changes)
    method = method_section({"kind": "prefix_tuning", "num_virtual_tokens": 3, "start": "text",
                             "start_text": "w1 w2 w3", "learning_rate": "auto"})  # fmt: skip
    loaded = replace(loaded, recipe=loaded.recipe.model_copy(update={"methods": [method]}))
    run = train(loaded, base=random_base("llama"), out=tmp_path / "run")
    chosen = run.record.chosen
    assert chosen is not None
    # The loss before is that of pairs, so what each rate has learnt is told in the same unit.
    assert chosen.rate_loss_before < 20
    assert min(rate.loss for rate in chosen.rates) < chosen.rate_loss_before
