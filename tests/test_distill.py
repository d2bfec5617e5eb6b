"""`ptkit distill`: a text in a prefix; the base with the text in view is the oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import random_base, random_model
from peft import PeftModel
from test_cli import ptkit, refused
from test_encoder_decoder import random_pair

from ptkit import AdapterBank
from ptkit.data.encoded import EncodedExample, StudiedText
from ptkit.data.general_text import read_text
from ptkit.errors import DataError, ModelError, UserError
from ptkit.evaluation.divergence import measure_divergence
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.prefix_batch import PrefixBatch
from ptkit.recipe.load import load_recipe
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.base_model import Base
from ptkit.runtime.compile import compile_tokens
from ptkit.runtime.forward import all_logits, collate, supervised_divergences, supervised_logits
from ptkit.training.adapter_trainer import Job, StepReport
from ptkit.training.distill import DISTILLED, FIRST_TOKENS, NOTHING, Distilled, distill
from ptkit.training.observer import RunObserver
from ptkit.training.self_study import GENERIC, read_in_chunks, study
from ptkit.training.teacher import Teacher

DOCUMENT = " ".join(f"w{(7 * i * i + 3 * i) % 90 + 1}" for i in range(30))
SMALL = {"texts": 16, "text_tokens": 8, "steps": 12, "batch_size": 4, "learning_rate": 0.02}


class Killed(Exception):
    """Stands for a kill."""


class Killer(RunObserver):
    """Raises at a step, or once so many texts are written."""

    def __init__(self, step: int | None = None, texts: int | None = None) -> None:
        self.step, self.texts = step, texts

    def stepped(self, report: StepReport) -> None:
        if report.step == self.step:
            raise Killed

    def writing(self, done: int, texts: int) -> None:
        if self.texts is not None and done >= self.texts:
            raise Killed


def small(base: Base, out: Path, **changes: object) -> Distilled:
    settings = {"tokens": 6, **SMALL, **changes}
    return distill(settings.pop("document", DOCUMENT), out=out, base=base, **settings)


def texts_of(base: Base, ids: list[int], chunk: int = 0) -> list[StudiedText]:
    return [StudiedText(ids[i : i + 3], ids[i + 3 : i + 3 + n], chunk=chunk)
            for i, n in ((0, 5), (4, 9), (11, 3))]  # fmt: skip


def test_teacher_is_the_base_reading_the_document_as_text(family: str) -> None:
    base = random_base(family)
    read = read_in_chunks(base, DOCUMENT, sink=True, room=20, chunk_tokens=None)
    assert len(read.chunks) == 1
    assert read.ids[0] == base.first_token_id
    assert base.tokenizer.decode(read.ids[1:]) == DOCUMENT
    (teacher,) = read.compiled(base)
    text = torch.tensor([[5, 9, 33, 2, 71]])
    whole = torch.cat([torch.tensor([read.ids]), text], dim=1)
    with torch.no_grad():
        plain = base.model(input_ids=whole).logits[:, len(read.ids) :]
        seen = all_logits(base.model, text, torch.ones_like(text), PrefixBatch.shared(teacher, 1))
    torch.testing.assert_close(seen, plain, atol=1e-5, rtol=1e-5)


def test_divergence_is_torchs_with_its_gradient(family: str) -> None:
    base = random_base(family)
    read = read_in_chunks(base, DOCUMENT, sink=False, room=20, chunk_tokens=15)
    teachers = read.compiled(base)
    assert len(teachers) == 2
    rows = [*texts_of(base, read.ids, 0), *texts_of(base, read.ids, 1)]
    tensors = collate(rows, base)
    seen = PrefixBatch.of_rows([teachers[row.chunk] for row in rows], base.layout)
    start = compile_tokens(base.model, torch.tensor(read.ids[:4]))
    adapter = PrefixTuning.from_prefix(start, base)

    def gradient(total: torch.Tensor) -> torch.Tensor:
        (parameter,) = adapter.trainable().values()
        (found,) = torch.autograd.grad(total, parameter)
        return found

    kept, alone = Teacher(base, teachers, budget=10**9), Teacher(base, teachers, budget=2000)
    for teacher in (kept, alone):
        teacher.study(rows)
        assert teacher.nbytes <= teacher.budget
    assert 0 < alone.nbytes < kept.nbytes
    torch.testing.assert_close(kept.outputs(rows), alone.outputs(rows), atol=1e-5, rtol=1e-5)
    ours = supervised_divergences(
        base.model, **tensors, batch=PrefixBatch.shared(adapter.prefix(), 6),
        wanted=kept.outputs(rows),
    )  # fmt: skip
    mine = gradient(ours.sum())
    logits, _ = supervised_logits(
        base.model, **tensors, batch=PrefixBatch.shared(adapter.prefix(), 6)
    )
    with torch.no_grad():
        wanted, _ = supervised_logits(base.model, **tensors, batch=seen)
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=wanted),
        torch.distributions.Categorical(logits=logits),
    )
    assert float(theirs.detach().min()) > 1e-4
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mine, gradient(theirs.sum()), atol=1e-5, rtol=1e-3)
    measured = measure_divergence(base, rows, teachers, adapter.prefix().detach())
    assert measured.tokens == len(theirs) == 34
    assert measured.kl.mean == pytest.approx(float(theirs.detach().mean()), abs=1e-5)
    same = (logits.argmax(-1) == wanted.argmax(-1)).float().mean()
    assert measured.agreement.mean == pytest.approx(float(same), abs=1e-6)
    assert measured.kl.low < measured.kl.mean < measured.kl.high


def test_a_prefix_as_long_as_the_document_starts_with_no_divergence(
    family: str, tmp_path: Path
) -> None:
    base = random_base(family)
    done = small(base, tmp_path, tokens=31, steps=1, learning_rate=1e-9)
    assert done.figures[FIRST_TOKENS].kl.mean == pytest.approx(0, abs=1e-6)
    assert done.figures[FIRST_TOKENS].agreement.mean == 1
    assert done.curve[0].train_loss == pytest.approx(0, abs=1e-6)
    assert done.figures[NOTHING].kl.mean > 0.01
    assert done.ratio == 1


def test_divergence_falls_and_the_first_token_stays(tmp_path: Path) -> None:
    base = random_base("llama")
    done = small(base, tmp_path, steps=60, texts=32)
    kl = {name: found.kl.mean for name, found in done.figures.items()}
    assert kl[DISTILLED] < 0.7 * min(kl[NOTHING], kl[FIRST_TOKENS])
    assert done.texts["train"] <= 32
    assert done.document_tokens == 31
    assert done.document_bytes == compile_tokens(base.model, torch.arange(31)).nbytes
    bank = AdapterBank(base)
    bank.load(done.adapter, name="document")
    assert len(bank.generate(["w1 w2"] * 2, ["document", None], max_new_tokens=4)) == 2
    prefix = bank.prefix("document")
    start = compile_tokens(base.model, torch.tensor([base.first_token_id, 4]))
    for found, kept in zip(prefix.keys, start.keys, strict=True):
        torch.testing.assert_close(found[:, 0], kept[:, 0], atol=1e-6, rtol=1e-6)


def test_a_killed_distillation_ends_with_the_same_weights(tmp_path: Path) -> None:
    base = random_base("qwen3")
    # Six chunks of the document, so that it can be killed between two of them.
    whole = small(base, tmp_path / "whole", chunk_tokens=6)
    assert whole.chunks == 6
    for killer in (Killer(texts=20), Killer(step=2), Killer(step=8)):
        with pytest.raises(Killed):
            small(base, tmp_path / "cut", chunk_tokens=6, observer=killer)
    again = small(base, tmp_path / "cut", chunk_tokens=6)
    assert again.curve == whole.curve
    first, second = ((d.adapter / "adapter_model.safetensors").read_bytes() for d in (whole, again))
    assert first == second
    assert again.as_dict() == {**whole.as_dict(), "seconds": again.seconds}
    read_back = small(base, tmp_path / "cut", chunk_tokens=6, observer=Killer(step=1))
    assert read_back == again
    assert not list((tmp_path / "cut").glob("checkpoint-*"))


def test_peft_loads_the_result(family: str, tmp_path: Path) -> None:
    base = random_base(family)
    done = small(base, tmp_path)
    ids = torch.tensor([[5, 9, 33, 2, 71]])
    theirs = PeftModel.from_pretrained(random_model(family), str(done.adapter)).eval()
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -5:]
        bank = AdapterBank(base)
        bank.load(done.adapter, name="document")
        ours = all_logits(
            base.model, ids, torch.ones_like(ids), PrefixBatch.shared(bank.prefix("document"), 1)
        )
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    info = json.loads((done.adapter / "ptkit.json").read_text())
    assert info["base"]["fingerprint"] == base.fingerprint
    assert info["distilled"]["document"]["tokens"] == 31
    assert "w" not in json.dumps(info["distilled"]["document"]).replace("chunks", "")
    assert info["distilled"]["figures"][DISTILLED]["kl"]["value"] == done.figures[DISTILLED].kl.mean


def test_texts_are_of_their_chunk_and_no_two_alike(tmp_path: Path) -> None:
    base = random_base("gpt2")
    read = read_in_chunks(base, DOCUMENT, sink=True, room=20, chunk_tokens=11)
    assert [len(chunk) for chunk in read.chunks] == [11, 11, 11]
    assert [t for chunk in read.chunks for t in chunk[1:]] == read.ids[1:]
    state = torch.get_rng_state()
    made = study(base, read, read.compiled(base), tmp_path, texts=30, tokens=8, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    splits = (made.train, made.validation, made.test)
    everything = [(*t.input_ids, *t.target_ids) for split in splits for t in split]
    assert len(set(everything)) == len(everything)
    generic = {tuple(base.tokenizer(text)["input_ids"]) for text in GENERIC}
    for split in splits:
        assert {text.chunk for text in split} == {0, 1, 2}
        for text in split:
            piece = read.chunks[text.chunk]
            n = len(text.input_ids)
            inside = any(piece[i : i + n] == text.input_ids for i in range(1, len(piece)))
            assert inside or tuple(text.input_ids) in generic
            assert 1 <= len(text.target_ids) <= 8


def test_inputs_of_a_file_or_a_recipe_are_what_the_texts_begin_with(tmp_path: Path) -> None:
    base = random_base("llama")
    lines = [f"w{i} w{i + 1}" for i in range(20, 40)]
    small(base, tmp_path / "lines", inputs=lines)
    rows = [
        json.loads(line)
        for path in (tmp_path / "lines" / "texts").iterdir()
        for line in path.read_text().splitlines()
    ]
    begins = {split: {base.tokenizer.decode(r["input_ids"]) for r in rows if r["split"] == split}
              for split in ("train", "validation", "test")}  # fmt: skip
    assert set().union(*begins.values()) <= set(lines)
    assert not begins["test"] & (begins["train"] | begins["validation"])
    assert not begins["train"] & begins["validation"]


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    base = random_base("llama")
    with pytest.raises(UserError, match="31 tokens, a prefix of 40 would be longer"):
        small(base, tmp_path / "a", tokens=40)
    with pytest.raises(UserError, match="`sink` takes one virtual token and leaves none"):
        small(base, tmp_path / "a", tokens=1)
    with pytest.raises(ModelError, match=r"has 128, and the texts it writes take up to 150"):
        small(base, tmp_path / "a", text_tokens=142)
    with pytest.raises(ModelError, match="a prefix of 120 tokens leaves 8"):
        small(base, tmp_path / "a", tokens=120, document=" ".join([DOCUMENT] * 5))
    with pytest.raises(UserError, match="training: `steps`: Input should be greater than 0"):
        small(base, tmp_path / "a", steps=0)
    with pytest.raises(UserError, match="has no tokens"):
        small(base, tmp_path / "a", document="  ")
    with pytest.raises(UserError, match="found 2 inputs; at least three"):
        small(base, tmp_path / "a", inputs=["w1", "w2"])
    with pytest.raises(ModelError, match="no causal language model"):
        small(random_pair("bart"), tmp_path / "a")
    with pytest.raises(UserError, match="kind: sequence_classification"):
        small(base, tmp_path / "a", recipe=load_recipe("message-routing-minilm"))
    assert not (tmp_path / "a").exists()
    small(base, tmp_path / "b", steps=1)
    with pytest.raises(UserError, match="differs in `document`, `seed`"):
        small(base, tmp_path / "b", steps=1, document=DOCUMENT + " w1", seed=1)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        small(base, tmp_path / "c")
    with pytest.raises(UserError, match="nothing is checkpointed"):
        Job(
            PrefixTuning.from_prefix(compile_tokens(base.model, torch.arange(3)), base),
            [EncodedExample([1], [2])], [EncodedExample([1], [2])],
            TrainSection(gradient_checkpointing=True), 0.1, 0, tmp_path,
            teacher=Teacher(base, [], 0),
        )  # fmt: skip
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="is empty"):
        read_text(tmp_path / "empty.txt", "the text to distill")


def test_from_the_command_line(tmp_path: Path) -> None:
    text = "The harbour of Orwick has three quays. Monks built the oldest. Boats pay at noon."
    (tmp_path / "harbour.txt").write_text(text)
    options = ("--tokens", "4", "--texts", "8", "--text-tokens", "8", "--steps", "2",
               "--batch-size", "4", "--out", "harbour")  # fmt: skip
    shown = ptkit("distill", "harbour.txt", *options, cwd=tmp_path).stdout
    assert "nothing (the base)" in shown
    assert "held-out texts" in shown
    found = json.loads(ptkit("distill", "harbour.txt", *options, "--json", cwd=tmp_path).stdout)
    assert found["tokens"] == 4
    assert found["figures"][DISTILLED]["kl"]["n_examples"] == found["texts"]["test"]
    ptkit("generate", "The", "--adapter", "harbour", "--max-new-tokens", "4", cwd=tmp_path)
    ptkit("export", "harbour", "--out", "exported", cwd=tmp_path)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "Distilled from a text of" in card
    assert "KL" in card
    ptkit("verify", "exported", "--score", cwd=tmp_path)
    ptkit("distill", "harbour.txt", *options, "--recipe", "quickstart", "--fresh", "--set",
          "task.data.limits={train: 8, validation: 4, test: 4}", cwd=tmp_path)  # fmt: skip
    info = json.loads((tmp_path / "harbour" / "adapter" / "ptkit.json").read_text())
    assert info["task"]["kind"] == "generation"
    assert "no such file" in refused("distill", "nothing.txt", *options, cwd=tmp_path)
    assert "give it with --recipe" in refused(
        "distill", "harbour.txt", *options, "--set", "seeds=[1]", cwd=tmp_path
    )
    assert "differs in" in refused("distill", "harbour.txt", *options, "--seed", "2", cwd=tmp_path)
    (tmp_path / "lines.txt").write_text("one\ntwo\nthree\n")
    assert "or with those of a recipe" in refused(
        "distill", "harbour.txt", *options, "--inputs", "lines.txt", "--recipe", "quickstart",
        cwd=tmp_path,
    )  # fmt: skip
