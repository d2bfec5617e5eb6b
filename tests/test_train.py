"""One run: it resumes bit for bit, keeps its best, starts again from a saved adapter."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import random_base
from pydantic import ValidationError

from ptkit.data.encode import length_grouped_batches
from ptkit.data.encoded import EncodedExample
from ptkit.errors import AdapterError, PtkitError, UserError
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.methods import (
    ADAPTERS,
    Demonstrations,
    adapter_from_files,
    create_adapter,
    require_same_base,
)
from ptkit.methods.catalogue import method_section
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.fused import fused_activations
from ptkit.training import adapter_trainer, loop
from ptkit.training.adapter_trainer import Job, StepReport, _groups
from ptkit.training.checkpoint import (
    Progress,
    load_checkpoint,
    random_states,
    save_checkpoint,
    state_device,
)
from ptkit.training.loop import fit as fit_jobs

TRAINED = {
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prefix_mlp": {"num_virtual_tokens": 4, "reparameterize": True, "encoder_hidden_size": 16},
    "prefix_residual": {
        "num_virtual_tokens": 4,
        "reparameterize": "residual",
        "encoder_hidden_size": 16,
    },
    "prompt_tuning": {"num_virtual_tokens": 4},
    "p_tuning": {"num_virtual_tokens": 4, "encoder": "lstm", "encoder_hidden_size": 16},
    "lora": {"rank": 2, "dropout": 0.1},
    "prefix_lora": {"num_virtual_tokens": 4, "rank": 2, "dropout": 0.1},
    "prefix_mixture": {"num_virtual_tokens": 4, "prefixes": 3},
    "mixture_top": {"num_virtual_tokens": 4, "prefixes": 3, "top": 1},
    "full": {},
}
#: Entries above that are not called by their method's name.
KINDS = {
    "prefix_mlp": "prefix_tuning",
    "prefix_residual": "prefix_tuning",
    "mixture_top": "prefix_mixture",
}


def fit(adapter, train, validation, settings, learning_rate, **own):
    """One adapter by itself; returns its progress."""
    (progress,) = fit_jobs([Job(adapter, train, validation, settings, learning_rate, **own)])
    return progress


def rows(count: int, seed: int) -> list[EncodedExample]:
    """Inputs of random words; the target repeats the first two, then ends."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        length = int(torch.randint(3, 8, (1,), generator=generator))
        words = torch.randint(1, 95, (length,), generator=generator).tolist()
        made.append(EncodedExample(words, [*words[:2], 0]))
    return made


def fresh(name: str, base, seed: int = 0):
    settings = TRAINED[name]
    kind = KINDS.get(name, name)
    torch.manual_seed(seed)
    cls = ADAPTERS[kind]
    return cls.create(
        cls.section_class(kind=kind, **settings), base, Demonstrations(["w1 w2 w3 w4"], seed)
    )


class Killed(Exception):
    """Stands for a kill: raised from the step report."""


def train(
    name: str,
    run: Path,
    *,
    kill_at: int | None = None,
    seed: int = 0,
    seen: list[int] | None = None,
    **changes,
):
    def report(step: StepReport) -> None:
        if seen is not None:
            seen.append(step.step)
        if step.step == kill_at:
            raise Killed

    base = random_base("llama")
    adapter = fresh(name, base, seed)
    settings = TrainSection(
        **{
            "steps": 12,
            "batch_size": 4,
            "warmup_steps": 2,
            "eval_every": 4,
            "save_every": 5,
            **changes,
        }
    )
    torch.manual_seed(seed)
    try:
        progress = fit(
            adapter, rows(30, 1), rows(8, 2), settings, 1e-2, seed=seed, run=run, report=report
        )
    except Killed:
        return None
    return adapter, progress


@pytest.mark.parametrize("name", TRAINED)
def test_killed_run_resumes_to_the_same_weights_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, expected = train(name, tmp_path / "whole")
    for at in (3, 7, 11):  # before the first save, and between later ones
        assert train(name, tmp_path / "cut", kill_at=at) is None
    resumed, progress = train(name, tmp_path / "cut")
    assert progress.curve == expected.curve
    assert whole.trainable().keys() == resumed.trainable().keys()
    for key, value in whole.trainable().items():
        assert torch.equal(value, resumed.trainable()[key]), key


@pytest.mark.parametrize("kill_at", [1, 4])
def test_a_run_is_saved_after_a_while_whatever_its_steps(
    kill_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow steps, few of them: a stopped run goes on where it was, before any `save_every`."""
    whole, expected = train("prefix_tuning", tmp_path / "whole", save_every=50)
    monkeypatch.setattr(adapter_trainer, "SAVED_AFTER", 0.0)
    monkeypatch.setattr(adapter_trainer, "_SAVING_SHARE", 0.0)
    assert train("prefix_tuning", tmp_path / "cut", kill_at=kill_at, save_every=50) is None
    seen: list[int] = []
    resumed, progress = train("prefix_tuning", tmp_path / "cut", save_every=50, seen=seen)
    assert seen[0] == kill_at + 1
    assert progress.curve == expected.curve
    for key, value in whole.trainable().items():
        assert torch.equal(value, resumed.trainable()[key]), key


def test_the_mean_of_steps_is_what_is_kept_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    changes = {"average": 3, "schedule": "constant", "eval_every": 12}
    whole, expected = train("prefix_tuning", tmp_path / "whole", **changes)
    for at in (3, 7, 11):
        assert train("prefix_tuning", tmp_path / "cut", kill_at=at, **changes) is None
    resumed, progress = train("prefix_tuning", tmp_path / "cut", **changes)
    assert progress.curve == expected.curve
    for key, value in whole.trainable().items():
        assert torch.equal(value, resumed.trainable()[key]), key
    # The mean itself, from the values after every step of a run without it.
    without = {**changes, "average": None}
    mean: dict[str, torch.Tensor] = {}
    for step in range(1, 13):
        # The run is validated, and its values kept, after its last step only.
        ended, _ = train("prefix_tuning", tmp_path / f"{step}", **without, steps=step)
        now = {n: p.detach() for n, p in ended.trainable().items()}
        share = 1 / min(step, 3)
        mean = {n: (1 - share) * mean.get(n, 0.0) + share * value for n, value in now.items()}
    for key, value in whole.trainable().items():
        assert value.detach() == pytest.approx(mean[key], abs=1e-6)


def test_a_run_without_a_mean_is_written_as_it_was_before_there_was_one() -> None:
    assert "average" not in TrainSection().model_dump()
    assert TrainSection(average=5).model_dump()["average"] == 5
    assert {*TrainSection().model_dump(exclude=TrainSection.NOT_OF_RESULT)} == {
        *TrainSection.model_fields
    } - TrainSection.NOT_OF_RESULT - {"average"}
    with pytest.raises(ValidationError, match="greater than 1"):
        TrainSection(average=1)


def test_parts_of_checkpoints_do_not_pile_up_over_many_kills(tmp_path: Path) -> None:
    for cut_off in ("a", "b"):  # what is left where a process dies while it writes
        part = tmp_path / f".checkpoint-0000005.{cut_off}.tmp"
        part.mkdir()
        (part / "best.safetensors").write_bytes(b"half")
    assert train("prefix_tuning", tmp_path, kill_at=6) is None
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-0000005"]


def test_interrupted_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch) -> None:
    from ptkit.training import checkpoint

    assert train("prefix_tuning", tmp_path, kill_at=6) is None
    before = sorted(p.name for p in tmp_path.iterdir())

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.atomic, "write_json", full_disk)
    with pytest.raises(OSError, match="No space"):
        train("prefix_tuning", tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", TRAINED)
def test_only_the_adapter_moves_and_the_base_stays_bit_identical(name, tmp_path) -> None:
    base = random_base("qwen3")
    before = {n: p.clone() for n, p in base.model.state_dict().items()}
    adapter = fresh(name, base)
    started = {n: p.detach().clone() for n, p in adapter.trainable().items()}
    torch.manual_seed(0)
    fit(
        adapter, rows(16, 1), rows(4, 2),
        TrainSection(steps=3, batch_size=4, warmup_steps=1, eval_every=3), 1e-2,
        seed=0, run=tmp_path,
    )  # fmt: skip
    moved = [n for n, p in adapter.trainable().items() if not torch.equal(p, started[n])]
    assert moved
    adapter.close()
    after = base.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize("change", [{"gradient_accumulation": 2, "batch_size": 2}])
def test_gradient_accumulation_equals_one_large_batch(change, tmp_path: Path) -> None:
    rows_ = [EncodedExample([5, 6, 7], [8, 0]) for _ in range(8)]

    def run(folder: str, **settings):
        adapter = fresh("prefix_tuning", random_base("gpt2"))
        fit(
            adapter, rows_, rows_, TrainSection(steps=3, warmup_steps=1, eval_every=3, **settings),
            1e-3, seed=0, run=tmp_path / folder,
        )  # fmt: skip
        return adapter.flat()

    torch.testing.assert_close(
        run("large", batch_size=4), run("small", **change), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    "name", ["prefix_mlp", "prompt_tuning", "p_tuning", "prefix_lora", "prefix_mixture", "full"]
)
def test_gradient_checkpointing_trains_to_the_same_weights(
    name: str, tmp_path: Path, monkeypatch
) -> None:
    if "dropout" in TRAINED[name]:
        # The last block is run at all positions, not at those that are read: other draws.
        monkeypatch.setitem(TRAINED, name, {**TRAINED[name], "dropout": 0.0})
    plain, expected = train(name, tmp_path / "plain")
    checkpointed, progress = train(name, tmp_path / "checkpointed", gradient_checkpointing=True)
    assert len(progress.curve) == len(expected.curve) == 3
    for found, wanted in zip(progress.curve, expected.curve, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    for key, value in plain.trainable().items():
        torch.testing.assert_close(value, checkpointed.trainable()[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["prefix_tuning", "lora", "full"])
def test_long_rows_train_to_the_same_weights(name: str, tmp_path: Path, monkeypatch) -> None:
    plain, expected = train(name, tmp_path / "plain")
    monkeypatch.setattr(loop, "LONG_ROWS", 8)
    asked: list[bool] = []

    def noted(model, *, long_rows: bool):
        asked.append(long_rows)
        return fused_activations(model, long_rows=long_rows)

    monkeypatch.setattr(loop, "fused_activations", noted)
    monkeypatch.setattr(loop, "give_back_what_is_freed", lambda: asked.append(True))
    long, progress = train(name, tmp_path / "long")
    assert asked == [True, True]
    assert progress.curve == expected.curve
    for key, value in plain.trainable().items():
        assert torch.equal(value, long.trainable()[key])


@pytest.mark.filterwarnings("ignore:.*without bfloat16 instructions")
def test_bfloat16_autocast_trains_to_nearly_the_same_loss(tmp_path: Path) -> None:
    _, plain = train("prefix_tuning", tmp_path / "plain")
    _, mixed = train("prefix_tuning", tmp_path / "mixed", autocast="bf16")
    assert mixed.best_loss == pytest.approx(plain.best_loss, rel=0.02)
    assert mixed.curve != plain.curve, "autocast must have had an effect"


def test_auto_is_bfloat16_where_the_machine_has_it(tmp_path: Path, monkeypatch) -> None:
    ends = {}
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        for autocast in ("auto", "bf16", "no"):
            expected = pytest.warns(UserWarning, match="without bfloat16 instructions")
            with nullcontext() if has or autocast != "bf16" else expected:
                adapter, _ = train("prefix_tuning", tmp_path / f"{has}-{autocast}",
                                   autocast=autocast)  # fmt: skip
            ends[has, autocast] = adapter.flat().detach()
    assert torch.equal(ends[True, "auto"], ends[True, "bf16"])
    assert torch.equal(ends[False, "auto"], ends[False, "no"])
    assert not torch.equal(ends[True, "auto"], ends[False, "auto"])


def test_loss_that_is_not_finite_stops_the_run_with_the_fix(tmp_path: Path) -> None:
    adapter = fresh("prompt_tuning", random_base("llama"))
    with torch.no_grad():
        adapter.encoder.embedding.weight[0, 0] = float("nan")
    settings = TrainSection(steps=2, batch_size=4, warmup_steps=0)
    with pytest.raises(PtkitError, match="the loss became nan: lower the method's `learning_rate`"):
        fit(adapter, rows(8, 1), rows(4, 2), settings, 1e-2, seed=0, run=tmp_path)


@pytest.mark.parametrize(("kind", "factor"), [("prefix_tuning", 60.0), ("p_tuning", 200.0)])
def test_embeddings_learn_at_a_multiple_of_the_methods_rate(kind, factor, tmp_path: Path) -> None:
    section = method_section({"kind": kind, "num_virtual_tokens": 4, "start": "vocabulary"})
    adapter = create_adapter(section, random_base("llama"), Demonstrations((), 0))
    settings = TrainSection(steps=1)
    rest, own = _groups(
        Job(adapter, rows(4, 1), rows(2, 2), settings, 0.02, 0, tmp_path, beta2=0.9)
    )
    assert "lr" not in rest
    assert own["lr"] == pytest.approx(factor * 0.02)
    assert own["betas"] == (0.9, 0.9)
    assert {id(p) for g in (rest, own) for p in g["params"]} == {
        id(p) for p in adapter.trainable().values()
    }


def test_early_stopping_keeps_the_best_parameters(tmp_path: Path) -> None:
    # What is trained contradicts what is validated, so the validation loss must turn upwards.
    adapter = fresh("prefix_tuning", random_base("llama"))
    contrary = [EncodedExample(row.input_ids, [90, 91, 0]) for row in rows(8, 2)]
    settings = TrainSection(
        steps=200, batch_size=4, warmup_steps=1, eval_every=2, patience=3, schedule="constant"
    )
    progress = fit(adapter, rows(30, 1), contrary, settings, 0.3, seed=0, run=tmp_path)
    losses = {e["step"]: e["validation_loss"] for e in progress.curve}
    assert progress.step < 200
    assert progress.best_loss == min(losses.values()) == losses[progress.best_step]
    assert progress.best_step < progress.step


@pytest.mark.parametrize(
    ("train_rows", "validation_rows", "accumulation", "validated_at"),
    [
        (30, 8, 1, [8, 16, 24, 32, 40, 48, 52]),
        (8, 30, 1, [8, 16, 24, 32, 40, 48, 52]),
        (30, 8, 2, [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52]),
        (300, 8, 1, [50, 52]),
    ],
)
def test_few_rows_are_validated_on_as_often_as_they_are_read(
    train_rows: int,
    validation_rows: int,
    accumulation: int,
    validated_at: list[int],
    tmp_path: Path,
) -> None:
    settings = TrainSection(
        steps=52, batch_size=4, warmup_steps=1, gradient_accumulation=accumulation
    )
    adapter = fresh("prompt_tuning", random_base("llama"))
    progress = fit(
        adapter, rows(train_rows, 1), rows(validation_rows, 2), settings, 0.01, seed=0, run=tmp_path
    )
    assert [entry["step"] for entry in progress.curve] == validated_at


def test_training_goes_on_from_a_saved_adapter(tmp_path: Path) -> None:
    for name in ("prefix_tuning", "prompt_tuning", "p_tuning", "lora"):
        first, progress = train(name, tmp_path / name)
        files = first.files()
        write_adapter(tmp_path / f"{name}-saved", files)
        first.close()
        base = random_base("llama")
        again = adapter_from_files(read_adapter(tmp_path / f"{name}-saved"), base)
        further = fit(
            again, rows(30, 1), rows(8, 2), TrainSection(steps=1, warmup_steps=0, eval_every=1),
            1e-9, seed=0, run=tmp_path / f"{name}-more",
        )  # fmt: skip
        # A step of next to nothing: the loss is the one the first run ended with.
        assert further.curve[0]["validation_loss"] == pytest.approx(progress.best_loss, abs=2e-4)


def test_adapter_of_another_base_is_refused_with_both_named(tmp_path: Path) -> None:
    trained, _ = train("prompt_tuning", tmp_path / "run")
    files = trained.files()
    with pytest.raises(AdapterError, match=r"random-llama-0.*random-gpt2-0"):
        require_same_base(files, random_base("gpt2"), "it")


def test_batches_hold_every_row_once_an_epoch_and_group_lengths() -> None:
    lengths = [i % 17 + 1 for i in range(103)]
    batches = length_grouped_batches(lengths, 8, seed=3)
    epoch = [next(batches) for _ in range(13)]
    assert sorted(i for batch in epoch for i in batch) == list(range(103))
    padded = sum(max(lengths[i] for i in b) * len(b) for b in epoch)
    assert padded <= 1.15 * sum(lengths)
    second = [next(batches) for _ in range(13)]
    assert sorted(i for batch in second for i in batch) == list(range(103))
    assert second != epoch


@pytest.mark.parametrize("group", [{"fused": True}, {"capturable": True}, {"fused": None}])
def test_restored_state_is_where_the_optimiser_looks_for_it(group: dict[str, object]) -> None:
    """The meta device stands for one that is not the CPU; torch's own AdamW says where `step` is:
    beside the parameter for one kernel, on the CPU otherwise."""
    parameter = torch.zeros(3, device="meta")
    moment, step = torch.zeros(3), torch.tensor(5.0)
    assert state_device(moment, parameter, group).type == "meta"
    assert state_device(step, parameter, group).type == ("meta" if any(group.values()) else "cpu")


def test_restored_state_is_no_view_of_the_file(tmp_path: Path) -> None:
    """A view of a mapped file starts at any byte; with threads, sums over it round otherwise."""
    adapter, _ = train("prefix_tuning", tmp_path / "run", steps=4, save_every=2)
    optimizer = torch.optim.AdamW(adapter.trainable().values(), fused=True)
    for parameter in adapter.trainable().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(tmp_path, Progress(step=1), adapter, {}, optimizer, [random_states()])
    again = torch.optim.AdamW(adapter.trainable().values(), fused=True)
    load_checkpoint(tmp_path, 1, adapter, again)
    values = [v for state in again.state.values() for v in state.values()]
    assert len(values) == 3 * len(adapter.trainable())
    assert all(v.untyped_storage().nbytes() == v.nbytes for v in values)
    assert all(v.data_ptr() % 64 == 0 for v in values if v.ndim)


def test_checkpoint_of_other_processes_is_refused_and_each_has_its_own_state(
    tmp_path: Path,
) -> None:
    adapter, _ = train("prefix_tuning", tmp_path / "run", steps=1)
    optimizer = torch.optim.AdamW(adapter.trainable().values(), fused=True)
    states, drawn = [], []
    for seed in (5, 6):
        torch.manual_seed(seed)
        states.append(random_states())
        drawn.append(torch.rand(3))
    save_checkpoint(tmp_path, Progress(step=1), adapter, {}, optimizer, states)
    for process, expected in enumerate(drawn):
        load_checkpoint(tmp_path, 1, adapter, optimizer, process, 2)
        assert torch.equal(torch.rand(3), expected)
    with pytest.raises(UserError, match=r"written by 2 processes, and this run has one process"):
        load_checkpoint(tmp_path, 1, adapter, optimizer)
    save_checkpoint(tmp_path, Progress(step=1), adapter, {}, optimizer, states[:1])
    with pytest.raises(UserError, match=r"written by one process, and this run has 3 processes"):
        load_checkpoint(tmp_path, 1, adapter, optimizer, 2, 3)
