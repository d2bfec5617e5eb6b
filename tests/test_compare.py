"""A whole comparison on a tiny random base: outputs, resumption, figures equal the libraries'."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest
import sacrebleu
import torch
from conftest import random_base
from rich.console import Console

from ptkit.bank import AdapterBank
from ptkit.comparison.cells import cells
from ptkit.comparison.grid import run_grid
from ptkit.comparison.outputs import write_outputs
from ptkit.comparison.table import markdown_table, summary_table
from ptkit.errors import AdapterError, ModelError, UserError
from ptkit.evaluation.evaluate import evaluate_saved
from ptkit.evaluation.retention import measure_retention, probe_base
from ptkit.formats.adapter_files import read_adapter
from ptkit.hub.export import export_run
from ptkit.methods import ADAPTERS, Demonstrations, create_adapter
from ptkit.recipe.load import load_recipe
from ptkit.training.adapter_trainer import StepReport
from ptkit.training.cell import Cell
from ptkit.training.experiment import prepare
from ptkit.training.observer import RunObserver
from ptkit.training.run import run_cells

RECIPE = """
name: small
description: Repeat <b>two</b> words.
task:
  kind: generation
  data:
    files: {train: train.jsonl, validation: validation.jsonl, test: test.jsonl}
  input: "{words} w90 "
  target: "{answer}"
  references: references
  max_target_tokens: 6
methods:
  - {kind: base}
  - {kind: text_prompt, examples: 2, separator: " "}
  - {kind: prompt_tuning, num_virtual_tokens: 4}
  - {kind: p_tuning, num_virtual_tokens: 4, encoder_hidden_size: 16}
  - {kind: prefix_tuning, num_virtual_tokens: 4}
  - kind: prefix_tuning
    label: prefix-mlp
    num_virtual_tokens: 4
    reparameterize: true
    encoder_hidden_size: 16
  - {kind: lora, rank: 2}
  - {kind: full}
seeds: [0, 1]
train: {steps: 4, batch_size: 4, warmup_steps: 1, eval_every: 2, save_every: 2}
evaluate: {bootstrap: 100}
retention: {text: general.txt}
"""
TRAINED = ("prompt_tuning", "p_tuning", "prefix_tuning", "prefix-mlp", "lora")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 20), ("validation", 5), ("test", 7)):
        rows = []
        for i in range(count):
            words = [f"w{(7 * i + j * 3 + len(split)) % 80 + 1}" for j in range(2 + i % 4)]
            answer = " ".join(words[:2])
            references = [answer, " ".join(words)][: 1 + i % 2]
            rows.append({"words": " ".join(words), "answer": answer, "references": references})
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    generator = torch.Generator().manual_seed(0)
    general = torch.randint(1, 90, (300,), generator=generator).tolist()
    (folder / "general.txt").write_text(" ".join(f"w{i}" for i in general))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def comparison(recipe_file: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("comparison")
    loaded = load_recipe(recipe_file)
    records = run_grid(loaded, out, base=random_base("llama"))
    summaries = write_outputs(out, records, loaded.recipe)
    return loaded, out, records, summaries


def test_untrained_methods_have_one_cell_and_trained_ones_a_cell_per_seed(comparison) -> None:
    loaded, out, records, _ = comparison
    assert len(cells(loaded.recipe)) == len(records) == 2 + 6 * 2
    assert {r.cell for r in records} == {p.name for p in (out / "cells").iterdir()}


def test_every_cell_says_whether_off_is_exact(comparison) -> None:
    for record in comparison[2]:
        assert record.adapter_off_exact is (None if record.kind == "full" else True)


def test_base_forgets_nothing_and_costs_nothing(comparison) -> None:
    base = next(r for r in comparison[2] if r.kind == "base")
    assert base.retention.forgetting == 0.0
    assert base.retention.retention == 1.0
    assert base.trainable_parameters == base.bytes_on_disk == 0


def test_trained_parameters_are_what_is_on_disk(comparison) -> None:
    _, out, records, _ = comparison
    seen = set()
    for record in records:
        if record.method in TRAINED:
            tensors = read_adapter(out / "cells" / record.cell / "adapter").tensors
            values = sum(t.numel() for t in tensors.values())
            assert 4 * values <= record.bytes_on_disk <= 4 * values + 8000
            seen.add(record.method)
    assert seen == set(TRAINED)


def test_metrics_equal_sacrebleu_on_the_saved_predictions(comparison) -> None:
    _, out, records, _ = comparison
    for record in records:
        path = out / "cells" / record.cell / "predictions.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        most = max(len(r["references"]) for r in rows)
        streams = [
            [r["references"][i] if i < len(r["references"]) else None for r in rows]
            for i in range(most)
        ]
        hypotheses = [r["prediction"] for r in rows]
        assert record.metrics["bleu"] == sacrebleu.corpus_bleu(hypotheses, streams).score
        assert record.metrics["chrf"] == sacrebleu.corpus_chrf(hypotheses, streams).score
        assert record.n_test == len(rows) == 7


def test_finished_cells_are_not_run_again(comparison, monkeypatch) -> None:
    loaded, out, records, _ = comparison

    def fails(*args, **kwargs):
        raise AssertionError("a finished cell was trained again")

    monkeypatch.setattr("ptkit.training.run.fit", fails)
    monkeypatch.setattr("ptkit.training.measure.predict", fails)
    assert run_grid(loaded, out, base=random_base("llama")) == records


class Kill(RunObserver):
    """Stops the comparison in the middle of training a cell, as a kill would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def stepped(self, report: StepReport) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_interrupted_comparison_ends_with_the_same_results(comparison, tmp_path: Path) -> None:
    loaded, _, expected, _ = comparison
    for after in (3, 9):
        with pytest.raises(KeyboardInterrupt):
            run_grid(loaded, tmp_path, base=random_base("llama"), observer=Kill(after))
    records = run_grid(loaded, tmp_path, base=random_base("llama"))
    for ours, theirs in zip(records, expected, strict=True):
        assert ours.cell == theirs.cell
        assert ours.metrics == theirs.metrics
        assert ours.retention == theirs.retention
        assert ours.curve == theirs.curve
    assert not list(tmp_path.rglob("*.tmp"))
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_seeds_trained_in_one_batch_end_as_they_do_alone(comparison, tmp_path: Path) -> None:
    loaded, _, alone, _ = comparison
    together = load_recipe(loaded.path, ["train.together=2"])
    with pytest.raises(KeyboardInterrupt):
        run_grid(together, tmp_path, base=random_base("llama"), observer=Kill(7))
    records = run_grid(together, tmp_path, base=random_base("llama"))
    expected = {record.cell: record for record in alone}
    assert {r.cell for r in records} == expected.keys()
    for record in records:
        other = expected[record.cell]
        assert record.trained_together == (2 if record.method in TRAINED[:4] else 1)
        assert record.metrics == other.metrics
        assert record.best_step == other.best_step
        for ours, theirs in zip(record.curve, other.curve, strict=True):
            found = ours.model_dump(exclude_none=True)
            assert found == pytest.approx(theirs.model_dump(exclude_none=True), abs=1e-5)
    summaries = write_outputs(tmp_path, records, together.recipe)
    assert "were trained 2 in a batch" in markdown_table(summaries)
    assert "up to 2 in one batch" in (tmp_path / "report.html").read_text()


def test_folder_of_another_recipe_is_refused(comparison) -> None:
    loaded, out, _, _ = comparison
    changed = load_recipe(loaded.path, ["train.steps=5"])
    with pytest.raises(UserError, match="another recipe"):
        run_grid(changed, out, base=random_base("llama"))


def test_results_files_hold_every_cell(comparison) -> None:
    _, out, records, _ = comparison
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert lines == [r.as_dict() for r in records]
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["cell"] for r in rows] == [r.cell for r in records]
    assert [float(r["metric_bleu"]) for r in rows] == [r.metrics["bleu"] for r in records]


def test_tables_show_every_method_with_interval_and_n(comparison) -> None:
    summaries = comparison[3]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(summary_table(summaries))
    for text in (console.export_text(), markdown_table(summaries)):
        for summary in summaries:
            assert summary.title in text
            assert f"[{summary.leading.low:.1f}, {summary.leading.high:.1f}]" in text
        assert "n = 7" in text


def test_report_is_self_contained_and_escapes_untrusted_text(comparison) -> None:
    _, out, _, summaries = comparison
    page = (out / "report.html").read_text()
    assert len(page) < 1_500_000
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!data:|#)", page)
    assert "url(" not in page
    assert "@import" not in page
    assert "Repeat &lt;b&gt;two&lt;/b&gt; words." in page
    assert "<b>two</b>" not in page
    for summary in summaries:
        assert summary.title in page
    assert page.count("<svg") == 3


def test_saved_adapter_evaluates_to_its_record(comparison) -> None:
    loaded, out, records, _ = comparison
    experiment = prepare(loaded, random_base("llama"))
    checked = 0
    for record in records:
        if record.method in TRAINED and record.seed == 0:
            result = evaluate_saved(experiment, out / "cells" / record.cell)
            assert {n: i.mean for n, i in result.metrics.items()} == pytest.approx(record.metrics)
            assert result.retention.overall.forgetting == pytest.approx(
                record.retention.forgetting, abs=1e-5
            )
            checked += 1
    assert checked == len(TRAINED)


def test_export_verifies_and_halves_the_size_in_bfloat16(comparison, tmp_path: Path) -> None:
    _, out, _, _ = comparison
    cell = out / "cells" / "prefix-mlp-seed1"
    full = export_run(cell, tmp_path / "full", base=random_base("llama"))
    half = export_run(cell, tmp_path / "half", dtype="bfloat16", base=random_base("llama"))
    assert full.largest_rounding == 0
    assert half.bytes < 0.6 * full.bytes
    with pytest.raises(UserError, match="exists"):
        export_run(cell, tmp_path / "full", base=random_base("llama"))
    with pytest.raises(AdapterError, match=r"random-llama-0.*random-gpt2-0"):
        export_run(cell, tmp_path / "other", base=random_base("gpt2"))
    with pytest.raises(AdapterError, match="whole model"):
        export_run(out / "cells" / "full-seed0", tmp_path / "f", base=random_base("llama"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "half"]


def test_lora_prefix_and_base_share_a_batch_and_leave_the_base(comparison) -> None:
    _, out, _, _ = comparison
    base = random_base("llama")
    ids = torch.tensor([[5, 6, 7, 8]])
    before = base.model(input_ids=ids).logits
    bank = AdapterBank(base)
    for method in TRAINED:
        bank.load(out / "cells" / f"{method}-seed0" / "adapter", method)
    names = [None, *TRAINED] * 2
    texts = ["w1 w2 w3"] * 6 + ["w9"] * 6
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    together = bank.generate(texts, names, **options)
    alone = [bank.generate([t], [n], **options)[0] for t, n in zip(texts, names, strict=True)]
    assert together == alone
    assert all(len(answer.split()) == 5 for answer in together)
    assert torch.equal(base.model(input_ids=ids).logits, before)


def test_cell_of_another_seed_or_method_is_refused(comparison, tmp_path: Path) -> None:
    loaded, out, _, _ = comparison
    experiment = prepare(loaded, random_base("llama"))
    method = loaded.recipe.method("prompt_tuning")
    with pytest.raises(UserError, match="`seed`"):
        run_cells(experiment, [Cell(method, 7, out / "cells" / "prompt_tuning-seed0")])
    with pytest.raises(UserError, match="`method`"):
        run_cells(experiment, [Cell(method, 0, out / "cells" / "prefix_tuning-seed0")])


def test_too_few_positions_are_refused_before_training(recipe_file: Path, tmp_path: Path) -> None:
    loaded = load_recipe(recipe_file, ["methods=[{kind: prompt_tuning, num_virtual_tokens: 120}]"])
    with pytest.raises(ModelError, match=r"128.*120 virtual tokens"):
        run_grid(loaded, tmp_path, base=random_base("llama"))
    assert not list(tmp_path.rglob("record.json"))


def test_forgetting_of_a_known_change_is_exact() -> None:
    """Losses and divergence are what transformers' own forward says, window by window."""
    base = random_base("qwen3")
    texts = {
        "count": " ".join(f"w{i % 90 + 1}" for i in range(400)),
        "back": " ".join(f"w{90 - i % 90}" for i in range(200)),
    }
    probe = probe_base(base, texts, 256)
    windows = probe.windows["count"]
    before = probe.untouched["count"]
    assert [len(w) for w in probe.windows.values()] == [8, 6]  # of 32 tokens
    with torch.no_grad():
        expected = base.model(input_ids=windows, labels=windows).loss
    assert before.nats == pytest.approx(float(expected), abs=1e-5)
    section = ADAPTERS["base"].section_class(kind="base")
    none = create_adapter(section, base, Demonstrations((), 0))
    untouched = measure_retention(none, probe).as_dict()
    assert untouched["forgetting"] == untouched["drift"] == 0.0
    assert untouched["retention"] == 1.0
    text = ADAPTERS["text_prompt"]
    prompt = text.create(
        text.section_class(kind="text_prompt", separator=" "), base, Demonstrations(["w5 w6 w7"], 0)
    )

    def with_prompt(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([prompt.token_ids.expand(len(rows), -1), rows], dim=1)

    measured = measure_retention(prompt, probe).as_dict()
    own = prompt.virtual_tokens
    lost, tokens = 0.0, 0
    for name, rows in probe.windows.items():
        labels = with_prompt(rows).clone()
        labels[:, : own + 1] = -100
        with torch.no_grad():
            after = float(base.model(input_ids=with_prompt(rows), labels=labels).loss)
            plain = float(base.model(input_ids=rows, labels=rows).loss)
        assert measured["domains"][name]["forgetting"] == pytest.approx(after - plain, abs=1e-5)
        count = rows.shape[0] * (rows.shape[1] - 1)
        lost, tokens = lost + (after - plain) * count, tokens + count
    assert measured["tokens"] == measured["drift_tokens"] == tokens
    assert measured["forgetting"] == pytest.approx(lost / tokens, abs=1e-5)
    rows = probe.drift_windows
    with torch.no_grad():
        p = base.model(input_ids=rows).logits[:, :-1].double().log_softmax(-1)
        q = base.model(input_ids=with_prompt(rows)).logits[:, own:-1].double().log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    assert measured["drift"] == pytest.approx(float(divergence), abs=1e-4)
