"""`start: auto` and `learning_rate: auto`: what a run finds for itself before it begins."""

from __future__ import annotations

from html import escape
from pathlib import Path

import pytest
import torch
from conftest import random_base
from test_compare import recipe_file as recipe_file
from test_encoder_decoder import random_pair
from test_peft_parity import LEARNT
from test_train import Killed, rows

from ptkit.comparison.autotuned import autotuned
from ptkit.comparison.grid import run_grid
from ptkit.comparison.outputs import write_outputs
from ptkit.data.encoded import EncodedExample
from ptkit.data.examples import Example
from ptkit.errors import PtkitError, UserError
from ptkit.formats.cell_record import ChosenSettings
from ptkit.methods import Demonstrations, create_adapter
from ptkit.methods.catalogue import method_section
from ptkit.prefix_batch import PrefixBatch
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import TrainSection
from ptkit.recipe.tasks import ClassificationTask, SequenceClassificationTask
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import collate, supervised_losses
from ptkit.section import MethodSection
from ptkit.training import autotune as choosing
from ptkit.training.adapter_trainer import Job
from ptkit.training.autotune import Autotuned, autotune
from ptkit.training.checkpoint import Progress
from ptkit.training.loop import fit

TASK = ClassificationTask(
    kind="classification", data={"builtin": "message-routing"}, input="w1 {text} w2",
    verbalizer={"yes": " w3", "no": " w4 w5"},
)  # fmt: skip
EXAMPLES = [Example(f"w{i} w{i + 1} w2", " w3", ("yes",), "yes") for i in range(10, 40)]
STEPS = TrainSection(steps=400, batch_size=8, warmup_steps=20, eval_every=50, save_every=50)


def demonstrations(seed: int = 0) -> Demonstrations:
    texts = [example.input + example.target for example in EXAMPLES]
    return Demonstrations(texts, seed, [" w3", " w4 w5"], "w1  w2")


def run(
    base: Base, folder: Path, steps: TrainSection = STEPS, seed: int = 0, **settings: object
) -> tuple[Autotuned, list[Job]]:
    """What is chosen, and the jobs that were made for it."""
    kind = settings.pop("kind", "prefix_tuning")
    section = method_section({"kind": kind, "num_virtual_tokens": 4, **settings})
    made: list[Job] = []

    def make(settled: MethodSection) -> Job:
        torch.manual_seed(seed)
        adapter = create_adapter(settled, base, demonstrations(seed))
        rate: float = settled.learning_rate  # type: ignore[attr-defined]
        made.append(Job(adapter, rows(30, 1), rows(12, 2), steps, rate, seed, folder))
        return made[-1]

    return autotune(section, make, TASK, EXAMPLES, folder), made


def test_what_is_given_stays_as_it_is(tmp_path: Path) -> None:
    choice, made = run(random_base("gpt2"), tmp_path, start="labels", learning_rate=0.5)
    assert (choice.record, made, list(tmp_path.iterdir())) == (None, [], [])
    assert choice.section.learning_rate == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning", "p_tuning"])
def test_a_start_that_is_clearly_lower_is_kept(family: str, kind: str, tmp_path: Path) -> None:
    base = random_base(family)
    choice, _ = run(base, tmp_path, kind=kind, start="auto")
    assert choice.record is not None
    tried = choice.record.starts
    texts = [t.start_text for t in tried]
    assert "w1  w2" in texts, "the template's own words"
    assert {"task", "labels", "examples", "vocabulary"} < {t.start for t in tried}
    own = next(t for t in tried if t.start == "task")
    best = min(tried, key=lambda t: t.loss)
    kept = best if best.loss <= 0.9 * own.loss else own
    assert (choice.section.start, choice.section.start_text) == (  # type: ignore[attr-defined]
        kept.start, kept.start_text,
    )  # fmt: skip
    # Scored together as each is alone.
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [rows(30, 1)[i] for i in order[: choice.record.start_rows]]
    for t in [t for t in tried if t.start == "text"][:3]:
        section = method_section(
            {"kind": kind, "num_virtual_tokens": 4, "start": "text", "start_text": t.start_text}
        )
        adapter = create_adapter(section, base, Demonstrations((), 0))
        with torch.no_grad():
            batch = PrefixBatch.shared(adapter.prefix(), len(drawn))
            alone = supervised_losses(base.model, **collate(drawn, base), batch=batch)
        assert t.loss == pytest.approx(float(alone.mean()), abs=1e-4)
    assert len({round(t.loss, 4) for t in tried}) > 3, "equal losses would prove nothing"


@pytest.mark.parametrize(
    ("base", "settings"),
    [
        (random_pair("t5"), {}),
        (random_pair("bart"), {"reparameterize": True}),
        (random_base("llama"), {"position": "infix"}),
        (random_base("gpt2"), {"sink": True}),
        (random_base("qwen3"), {"trained_layers": 1}),
    ],
    ids=["t5", "mlp on bart", "infix", "sink", "upper layers"],
)
def test_whatever_shape_a_prefix_has_its_starts_are_scored_as_each_is_alone(
    base: Base, settings: dict, tmp_path: Path
) -> None:
    choice, made = run(base, tmp_path, **settings)
    assert choice.record is not None
    tried = choice.record.starts
    assert len(tried) > 5
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    drawn = [rows(30, 1)[i] for i in order[: choice.record.start_rows]]
    for start, job in zip(tried, made[1:], strict=True):
        with torch.no_grad():
            batch = PrefixBatch.shared(job.adapter.prefix(), len(drawn))
            alone = supervised_losses(base.model, **collate(drawn, base), batch=batch)
        assert start.loss == pytest.approx(float(alone.mean()), abs=1e-4)


def test_a_text_that_gives_the_answer_away_is_the_start(tmp_path: Path, monkeypatch) -> None:
    base = random_base("llama")
    answers = [{"start": "task"}, {"start": "text", "start_text": "w20 w21 w22 w23"}]
    monkeypatch.setattr(choosing, "starts", lambda *_: answers)
    losses = iter([[3.0, 2.8], [3.0, 2.6]])
    monkeypatch.setattr(choosing, "_losses", lambda *_: next(losses))
    near, _ = run(base, tmp_path / "near", start="auto")
    clear, _ = run(base, tmp_path / "clear", start="auto")
    assert near.section.start == "task"  # type: ignore[attr-defined]
    assert clear.section.start_text == "w20 w21 w22 w23"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("learnt", "chosen"),
    [
        ([1.0, 2.0, 2.1, 2.2], 0.1),  # enough at the default, whatever else does better
        ([1.0, 2.0, 1.0, -5.0], 0.03),  # the default is too high here
        ([0.1, 0.2, 0.5, 2.0], 0.3),  # and here too low
        ([2.0, 1.0, 0.5, 0.1], 0.01),
        ([1.8, 1.81, 1.58, 1.73], 0.1),  # no more than noise
        ([1.8, 1.81, 1.2, 1.73], 0.03),  # too high, though a still higher one had luck
        ([-0.5, -0.1, -1.0, -9.0], 0.03),  # nothing learns: what harms least
        ([0.0, 0.0, 0.0, 0.0], 0.1),
    ],
)
def test_the_rate_nearest_the_default_that_learns_enough(learnt: list, chosen: float) -> None:
    assert choosing.nearest_good([0.01, 0.03, 0.1, 0.3], learnt, 0.1) == chosen


def test_rates_are_judged_by_miniature_runs(tmp_path: Path) -> None:
    base = random_base("llama")
    choice, made = run(base, tmp_path / "a", start="task", learning_rate="auto")
    autotuned = choice.record
    assert autotuned is not None
    tried = {t.rate: t.loss for t in autotuned.rates}
    assert sorted(tried) == [0.01, 0.03, 0.1, 0.3]
    learnt = [autotuned.rate_loss_before - loss for loss in tried.values()]
    assert choice.section.learning_rate == choosing.nearest_good(  # type: ignore[attr-defined]
        [*tried], learnt, 0.1
    )
    # A rate's miniature run by itself ends at the same loss.
    job = choosing._miniature(made[1], 4, tmp_path / "alone")
    torch.manual_seed(0)
    fresh = create_adapter(job.adapter.section, base, demonstrations())
    (alone,) = fit([Job(**{**vars(job), "adapter": fresh})])
    assert alone.best_loss == pytest.approx(tried[made[1].learning_rate], abs=1e-4)
    assert alone.step == autotuned.rate_steps


def test_a_rate_that_blows_up_is_given_up(tmp_path: Path, monkeypatch) -> None:
    def fragile(jobs: list[Job]) -> list[Progress]:
        if any(job.learning_rate > 0.05 for job in jobs):
            raise PtkitError("the loss became nan")
        return fit(jobs)

    monkeypatch.setattr(choosing, "fit", fragile)
    choice, _ = run(random_base("llama"), tmp_path, learning_rate="auto")
    assert choice.record is not None
    assert [t.rate for t in choice.record.rates] == [0.01, 0.03]


def test_both_cost_at_most_fifteen_percent_of_the_rows(tmp_path: Path) -> None:
    for steps in (
        STEPS, STEPS.model_copy(update={"steps": 900, "batch_size": 16}),
        STEPS.model_copy(update={"steps": 500, "batch_size": 4, "gradient_accumulation": 3}),
    ):  # fmt: skip
        folder = tmp_path / f"{steps.steps}"
        choice, _ = run(random_base("gpt2"), folder, steps, start="auto", learning_rate="auto")
        autotuned = choice.record
        assert autotuned is not None
        scored = len(autotuned.starts) * autotuned.start_rows
        judged = (1 + len(autotuned.rates)) * autotuned.rate_judged
        stepped = len(autotuned.rates) * autotuned.rate_steps * autotuned.rate_batch
        whole = steps.steps * steps.batch_size * steps.gradient_accumulation
        assert stepped + (scored + judged) / 2 <= 0.15 * whole
        assert stepped > 0.03 * whole


def test_a_run_too_short_to_find_a_rate_in_is_refused(tmp_path: Path) -> None:
    short = STEPS.model_copy(update={"steps": 40})
    with pytest.raises(UserError, match=r"steps each with `train\.steps: 40`.*give a rate"):
        run(random_base("gpt2"), tmp_path, short, learning_rate="auto")


def test_a_run_too_short_to_tell_starts_apart_takes_its_own(tmp_path: Path) -> None:
    untried = ChosenSettings(start="task", starts=[], start_rows=0)
    for name, changed, tries in (
        ("short", {"steps": 10}, False),
        ("long enough", {"steps": 400}, True),
        ("few rows", {"batch_size": 3}, False),  # no batch that would tell them apart
    ):
        steps = STEPS.model_copy(update=changed)
        choice, _ = run(random_base("gpt2"), tmp_path / name, steps)
        assert choice.record is not None
        assert (choice.record != untried) == tries
        assert tries or choice.section.start == "task"  # type: ignore[attr-defined]


def test_starts_are_scored_on_rows_they_are_not_made_of(tmp_path: Path, monkeypatch) -> None:
    """In batches no larger than a validation's."""
    made_of: list[Example] = []
    scored: list[tuple[int, ...]] = []
    sizes = []

    def starts(task: ClassificationTask, examples: list[Example], seed: int) -> list[dict]:
        made_of.extend(examples)
        return [*real(task, examples, seed), {"start": "text", "start_text": " "}]

    def collated(part: list[EncodedExample], base: Base) -> dict[str, torch.Tensor]:
        sizes.append(len(part))
        scored.extend(tuple(row.input_ids) for row in part)
        return collate(part, base)

    real = choosing.starts
    monkeypatch.setattr(choosing, "starts", starts)
    monkeypatch.setattr(choosing, "collate", collated)
    choice, made = run(random_base("gpt2"), tmp_path)
    assert choice.record is not None
    tried, rows = choice.record.starts, choice.record.start_rows
    assert " " not in [start.start_text for start in tried]  # no token to start from
    assert len(scored) == len(tried) * rows
    assert max(sizes) == 2 * STEPS.batch_size
    of = {EXAMPLES.index(example) for example in made_of}
    trained = [tuple(row.input_ids) for row in made[0].train]
    assert len(of) + len(set(scored)) == len(EXAMPLES) == len(trained)
    assert not of & {trained.index(ids) for ids in scored}


def test_rates_that_cannot_share_a_batch_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU: a CPU is refused float16 earlier.
    for module in ("autotune", "loop"):
        monkeypatch.setattr(f"ptkit.training.{module}.mixed_precision", lambda *_: "no")
    half = STEPS.model_copy(update={"autocast": "fp16"})
    with pytest.raises(UserError, match="takes one process and another `autocast` than `fp16`"):
        run(random_base("gpt2"), tmp_path, half, learning_rate="auto")


def test_with_a_head_the_start_is_its_own_and_no_rate_is_found(tmp_path: Path) -> None:
    task = SequenceClassificationTask(
        kind="sequence_classification", data={"builtin": "message-routing"}, input="{message}",
        labels=["a", "b"],
    )  # fmt: skip

    def make(_: MethodSection) -> Job:
        pytest.fail("nothing is made")

    section = method_section({"kind": "prefix_tuning", "learning_rate": "auto"})
    with pytest.raises(UserError, match="classification head of its own; give a rate"):
        autotune(section, make, task, EXAMPLES, tmp_path)
    choice = autotune(method_section({"kind": "prefix_tuning"}), make, task, EXAMPLES, tmp_path)
    assert choice.section.start == "task"  # type: ignore[attr-defined]


def test_killed_while_choosing_the_same_is_chosen(tmp_path: Path, monkeypatch) -> None:
    settings = {
        "start": "auto", "learning_rate": "auto", "steps": STEPS.model_copy(update={"steps": 200}),
    }  # fmt: skip
    whole, _ = run(random_base("llama"), tmp_path / "whole", **settings)

    def killed(*_: object) -> None:
        raise Killed

    for place in ("training.autotune.fit", "formats.atomic.write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(f"ptkit.{place}", killed)
            with pytest.raises(Killed):
                run(random_base("llama"), tmp_path / "cut", **settings)
    resumed, _ = run(random_base("llama"), tmp_path / "cut", **settings)
    assert resumed == whole
    files = [(tmp_path / name / "chosen.json").read_text() for name in ("whole", "cut")]
    assert files[0] == files[1]
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["chosen.json"]
    again, made = run(random_base("llama"), tmp_path / "cut", **settings)
    assert again == whole
    assert not made, "what was found is read back"
    other, _ = run(random_base("llama"), tmp_path / "other", seed=1, **settings)
    assert other.record != whole.record


def test_every_prompt_method_can_be_left_open() -> None:
    kinds = {LEARNT[name]["kind"] for name in LEARNT}
    assert len(kinds) == 3
    for kind in kinds:
        assert choosing.is_open(method_section({"kind": kind, "learning_rate": "auto"}))
        assert choosing.is_open(method_section({"kind": kind, "start": "auto"}))
        assert choosing.is_open(method_section({"kind": kind})), "the default"
        assert not choosing.is_open(method_section({"kind": kind, "start": "task"}))
    for kind in ("prefix_lora", "prefix_mixture"):
        assert not choosing.is_open(method_section({"kind": kind})), "they cannot share a batch"
    assert not choosing.is_open(method_section({"kind": "lora"}))


def test_what_was_found_is_told_with_how_many_runs_it_holds_for(
    recipe_file: Path, tmp_path
) -> None:
    loaded = load_recipe(recipe_file, ["methods=[{kind: base}, {kind: prompt_tuning}]"])
    base, *runs = run_grid(loaded, tmp_path, base=random_base("llama"))
    assert autotuned([base]) is None
    text = ChosenSettings(start="text", start_text="w1 " * 20, learning_rate=0.3, rates=[])
    records = [run.updated(chosen=text) for run in runs for _ in range(2)]
    records.append(runs[0].updated(chosen=ChosenSettings(start="task", starts=[])))
    shown = repr(("w1 " * 20)[:31] + "…")
    of = len(records)
    assert autotuned(records) == f"{shown}, rate 0.3 ({of - 1} of {of} runs); task (1 of {of} runs)"
    assert autotuned(records[:1]) == f"{shown}, rate 0.3"


def test_a_comparison_records_what_each_cell_chose_and_resumes_with_it(
    recipe_file: Path, tmp_path: Path, monkeypatch
) -> None:
    # What it finds in so short a run is no good, and kept like any other.
    monkeypatch.setattr(choosing, "FEWEST_STEPS", 4)
    monkeypatch.setattr(choosing, "FEWEST_ROWS", 4)
    loaded = load_recipe(recipe_file, [
        "methods=[{kind: prefix_tuning, num_virtual_tokens: 3, start: auto, learning_rate: auto}]",
        "seeds=[0, 1]", "train={steps: 60, batch_size: 8, warmup_steps: 5, together: 2}",
    ])  # fmt: skip
    whole = run_grid(loaded, tmp_path / "whole", base=random_base("llama"))
    assert [record.settings["learning_rate"] for record in whole] == ["auto", "auto"]
    for record in whole:
        assert record.chosen is not None
        assert record.chosen.learning_rate in (0.01, 0.03, 0.1, 0.3)
        assert record.chosen.start in ("task", "text", "vocabulary")
    (summary,) = write_outputs(tmp_path / "whole", whole, loaded.recipe)
    report = (tmp_path / "whole" / "report.html").read_text()
    assert "What <code>auto</code> found before training" in report
    assert f"<b>prefix_tuning</b>: {escape(autotuned(summary.records) or '')}</li>" in report
    assert f"Up to {len(whole[0].chosen.starts)} starts" in report  # type: ignore[index]

    with monkeypatch.context() as patch:

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("ptkit.training.run.fit", killed)  # the choice is made, the run is not
        with pytest.raises(KeyboardInterrupt):
            run_grid(loaded, tmp_path / "cut", base=random_base("llama"))
    resumed = run_grid(loaded, tmp_path / "cut", base=random_base("llama"))
    assert [r.chosen for r in resumed] == [r.chosen for r in whole]
    assert [r.curve for r in resumed] == [r.curve for r in whole]
    assert [r.metrics for r in resumed] == [r.metrics for r in whole]
