"""Multi-task prompts: one for several tasks, PEFT's MULTITASK_PROMPT_TUNING as the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_base, random_model
from peft import PeftModel
from test_adapter_files import IDS
from test_cli import ptkit, refused
from test_encoder_decoder import random_pair

from ptkit import AdapterBank
from ptkit.data.encoded import IGNORED, EncodedExample
from ptkit.errors import AdapterError, ModelError, UserError
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.methods import Demonstrations, adapter_from_files, create_adapter
from ptkit.methods.multitask_prompt.adapter import MultitaskPrompt
from ptkit.methods.multitask_prompt.settings import MultitaskSection
from ptkit.methods.prompt_tuning.settings import PromptTuningSection
from ptkit.methods.start import start_embeddings
from ptkit.recipe.load import LoadedRecipe, load_recipe
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.forward import all_logits, collate, supervised_losses
from ptkit.training.adapter_trainer import StepReport
from ptkit.training.multitask import Multitask, multitask
from ptkit.training.objective import Objective
from ptkit.training.observer import RunObserver
from ptkit.training.task_rows import TaskRows

QUICK = [
    "train.steps=4", "train.eval_every=2", "train.save_every=2", "train.batch_size=4",
    "task.data.limits={train: 16, validation: 4, test: 6}", "retention=null",
    "evaluate.bootstrap=100", "seeds=[3]",
    "methods=[{kind: prompt_tuning, num_virtual_tokens: 5}]",
]  # fmt: skip
NAMES = ["message-routing", "passage-question-tiny"]


class Killed(Exception):
    """Stands for a kill."""


class Killer(RunObserver):
    """Raises after a step."""

    def stepped(self, report: StepReport) -> None:
        if report.step == 3:
            raise Killed


def loaded(*changes: str) -> list[LoadedRecipe]:
    return [load_recipe(name, [*QUICK, *changes]) for name in NAMES]


def tiny() -> Base:
    return load_base("tiny-en", device="cpu")


def random_prompt(base: Base, rank: int = 2, tasks: int = 3) -> MultitaskPrompt:
    torch.manual_seed(5)
    section = MultitaskSection(num_virtual_tokens=4, rank=rank)
    start = start_embeddings(base, torch.tensor([5, 9, 33, 2]))
    prompt = MultitaskPrompt(section, base, tasks, start)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.normal_(std=0.6)
    return prompt


def test_every_task_starts_from_the_shared_prompt() -> None:
    base = random_base("gpt2")
    start = start_embeddings(base, torch.tensor([5, 9, 33, 2]))
    prompt = MultitaskPrompt(MultitaskSection(num_virtual_tokens=4, rank=3), base, 2, start)
    for task in range(2):
        assert torch.equal(prompt.of_task(task), start)
    assert prompt.trainable_parameters == start.numel() + 2 * 3 * sum(start.shape)


def test_peft_reads_all_tasks_from_one_file(family: str, tmp_path: Path) -> None:
    base = random_base(family)
    prompt = random_prompt(base)
    write_adapter(tmp_path / "all", prompt.files())
    theirs = PeftModel.from_pretrained(random_model(family), str(tmp_path / "all")).eval()
    tasks = torch.arange(len(IDS)) % 3
    with torch.no_grad():
        expected = theirs(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), task_ids=tasks
        ).logits[:, -IDS.shape[1] :]
        batch = prompt.for_tasks(tasks.tolist())
        found = all_logits(base.model, IDS, torch.ones_like(IDS), batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(AdapterError, match="3 tasks"):
        adapter_from_files(read_adapter(tmp_path / "all"), base)


def test_loss_and_gradients_are_those_of_the_tasks_one_by_one(family: str) -> None:
    base = random_base(family)
    rows = TaskRows([
        [EncodedExample([4, 8, 2], [7]), EncodedExample([3, 6, 9, 11, 40], [5])],
        [EncodedExample([12, 3], [9, 33, 2, 71, 5, 6])],
    ])  # fmt: skip
    prompt = random_prompt(base, tasks=2)
    tensors = collate(rows, base)
    assert [*rows] == [rows[i] for i in range(len(rows))]
    weights = torch.tensor([row.weight for row in rows])
    together = Objective([prompt])(
        [0], [len(rows)], **tensors, tasks=[row.task for row in rows], weights=weights
    )
    together.sum().backward()
    gradients = {name: p.grad for name, p in prompt.named_parameters()}
    prompt.zero_grad()
    total = torch.tensor(0.0)
    for row in rows:
        alone = collate([row], base)
        own = supervised_losses(base.model, *(alone[k] for k in (
            "input_ids", "attention_mask", "labels")), prompt.for_tasks([row.task]))  # fmt: skip
        total = total + row.weight * own.sum()
    total.backward()
    torch.testing.assert_close(together[0], total, atol=1e-5, rtol=1e-5)
    for name, parameter in prompt.named_parameters():
        assert gradients[name] is not None
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_tasks_count_by_their_rows() -> None:
    short = [EncodedExample([1, 2], [3])] * 6
    long = [EncodedExample([1], [5, 6, 7, IGNORED, 8])] * 2
    rows = TaskRows([short, long])
    shares = [sum(r.weight * r.supervised for r in rows if r.task == t) for t in (0, 1)]
    assert shares[0] / shares[1] == pytest.approx(3)
    assert sum(shares) == pytest.approx(sum(r.supervised for r in rows))


def test_killed_run_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    base = tiny()
    whole = multitask(loaded(), tmp_path / "whole", base=base)
    with pytest.raises(Killed):
        multitask(loaded(), tmp_path / "killed", base=base, observer=Killer())
    again = multitask(loaded(), tmp_path / "killed", base=base)
    for path in (
        Path("adapter"),
        Path("mean/adapter"),
        *(Path("tasks", n, "adapter") for n in NAMES),
    ):
        a, b = (read_adapter(d / path).tensors for d in (whole.folder, again.folder))
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert {n: t.metrics for n, t in again.tasks.items()} == {
        n: t.metrics for n, t in whole.tasks.items()
    }
    assert Multitask.read(again.folder) == again
    assert multitask(loaded(), again.folder, base=base) == again  # read back
    with pytest.raises(UserError, match=r"differs in `method`.*--fresh"):
        multitask(loaded(), again.folder, base=base, rank=2)


def test_each_tasks_prompt_is_used_like_any_other(tmp_path: Path) -> None:
    base = tiny()
    done = multitask(loaded(), tmp_path, base=base, rank=2)
    assert done.virtual_tokens == 5
    hidden = base.embedding.embedding_dim
    assert done.trainable_parameters == 5 * hidden + 2 * 2 * (5 + hidden)
    whole = read_adapter(done.adapter()).tensors
    bank = AdapterBank(base)
    for number, (name, task) in enumerate(done.tasks.items()):
        files = read_adapter(done.adapter(name))
        factors = whole["prefix_task_cols"][number] @ whole["prefix_task_rows"][number]
        expected = whole["prompt_embeddings"] * factors
        torch.testing.assert_close(files.tensors["prompt_embeddings"], expected)
        assert files.info.multitask.tasks == NAMES
        assert files.info.metrics.keys() == task.metrics.keys()
        bank.load(done.adapter(name), name=name)
        lines = (done.adapter(name).parent / "predictions.jsonl").read_text().splitlines()
        assert len(lines) == task.n_test == 6
    texts = bank.generate(["Where is my parcel?"] * 3, [*NAMES, None], max_new_tokens=3)
    assert len(texts) == 3
    # The mean is a start for another task.
    section = PromptTuningSection(
        kind="prompt_tuning", num_virtual_tokens=5, start="adapter", start_adapter=[str(done.mean)]
    )
    started = create_adapter(section, base, Demonstrations([], 0))
    parts = [read_adapter(done.adapter(n)).tensors["prompt_embeddings"] for n in NAMES]
    torch.testing.assert_close(started.embeddings(), sum(parts) / 2)  # type: ignore[operator]


def test_training_separates_the_tasks(tmp_path: Path) -> None:
    done = multitask(loaded("train.steps=30", "train.eval_every=10"), tmp_path, base=tiny())
    assert done.curve[-1].validation_loss < done.curve[0].validation_loss
    a, b = (read_adapter(done.adapter(n)).tensors["prompt_embeddings"] for n in NAMES)
    assert not torch.allclose(a, b, rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["methods=[{kind: prefix_tuning}]"], "0 methods of `kind: prompt_tuning`"),
        (["methods.0.learning_rate=auto"], "`learning_rate` in figures"),
        (["methods.0.start=random"], "starts from tokens"),
        (["train.retain={text: general-en}"], "for single tasks"),
    ],
)
def test_recipes_that_cannot_be_learnt_together(
    changes: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        multitask(loaded(*changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipes_that_do_not_agree(tmp_path: Path) -> None:
    one, other = loaded()
    with pytest.raises(UserError, match="at least two"):
        multitask([one], tmp_path / "out")
    with pytest.raises(UserError, match="two recipes are called `message-routing`"):
        multitask([one, one], tmp_path / "out")
    longer = load_recipe(NAMES[1], [*QUICK, "train.steps=6"])
    with pytest.raises(UserError, match=r"`steps: 4` in its `train`, .* has `6`.*--set"):
        multitask([one, longer], tmp_path / "out")
    wider = load_recipe(NAMES[1], [*QUICK, "methods.0.num_virtual_tokens=6"])
    with pytest.raises(UserError, match="`num_virtual_tokens: 5` in its `prompt_tuning`"):
        multitask([one, wider], tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        multitask([one, other], tmp_path / "full", base=tiny())


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="encoder-decoder"):
        multitask(loaded(), tmp_path / "out", base=random_pair("bart"))


def test_command(tmp_path: Path) -> None:
    settings = [part for value in QUICK for part in ("--set", value)]
    common = ("multitask", *NAMES, *settings, "--out", "both")
    said = json.loads(ptkit(*common, "--json", cwd=tmp_path).stdout)
    assert [*said["tasks"]] == NAMES
    shown = ptkit(*common, cwd=tmp_path).stdout
    for name in NAMES:
        assert name in shown
        assert str(Path("both", "tasks", name, "adapter")) in shown
    assert "at least two" in refused("multitask", NAMES[0], "--out", "no", *settings, cwd=tmp_path)
    told = refused("multitask", *NAMES, "--out", ".", "--fresh", *settings, cwd=tmp_path)
    assert "is not a multi-task prompt" in told
