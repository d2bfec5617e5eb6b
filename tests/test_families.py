"""Every family: the matrix of docs/models.md, and what it stands on."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from test_cli import ptkit, refused
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ptkit import AdapterBank, load_base
from ptkit.bank.conversation import Conversation
from ptkit.data.encoded import EncodedExample
from ptkit.errors import AdapterError, ModelError
from ptkit.families.candidate import METHODS, NOT_ASKED, PtkitCandidate
from ptkit.families.kinds import (
    DECODER,
    ENCODER_DECODER,
    KINDS,
    SEQUENCE_DECODER,
    SEQUENCE_ENCODER,
    TOKEN_ENCODER,
    ModelKind,
)
from ptkit.families.matrix import (
    Status,
    family_kinds,
    model_under_test,
    models_under_test,
    run_matrix,
)
from ptkit.families.model_under_test import ModelUnderTest, TokenRow, small_model
from ptkit.families.oracle import Labelled, Merged
from ptkit.families.prefix_oracle import Attended
from ptkit.families.properties import PROPERTIES
from ptkit.families.shapes import FAMILIES, WINDOW, small
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.methods import ADAPTERS, Demonstrations, adapter_from_files, create_adapter
from ptkit.methods.catalogue import all_sections
from ptkit.methods.prefix_tuning.settings import PrefixTuningSection
from ptkit.prefix_batch import PrefixBatch
from ptkit.recipe.schema import TrainSection
from ptkit.runtime.attention_choice import attention_of, take_prefixes
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import all_logits, collate, supervised_losses
from ptkit.runtime.paged_support import longest_sequence
from ptkit.runtime.scoring import continuation_scores
from ptkit.training.adapter_trainer import Job
from ptkit.training.loop import fit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

NAMES = list(FAMILIES)


def rotated(family: str, kind: ModelKind) -> tuple[str, list[str]]:
    """One method of the kind and a third of the questions: neighbours get the others, so that all
    are asked."""
    at = [name for name in NAMES if kind in family_kinds(name)].index(family)
    third = (at + at // len(kind.methods)) % 3
    return kind.methods[at % len(kind.methods)], list(PROPERTIES)[third::3]


@pytest.mark.parametrize("family", NAMES)
def test_matrix_is_as_documented(family: str) -> None:
    from make_models_reference import from_json

    results, _ = from_json((ROOT / "docs/models.json").read_text())
    for tested in models_under_test(family):
        method, asked = rotated(family, tested.kind)
        about = (family, tested.kind.name, method)
        said = {c.property: c.status for c in results["ptkit"]
                if (c.model, c.kind, c.method) == about and c.property in asked}  # fmt: skip
        found = {c.property: c.status for c in run_matrix(tested, [method], properties=asked)}
        assert found == said, "run scripts/make_models_reference.py"


@pytest.mark.parametrize("family", NAMES[::6])
def test_what_is_said_about_peft_is_what_peft_does(family: str) -> None:
    from make_models_reference import from_json
    from peft_candidate import Peft

    results, _ = from_json((ROOT / "docs/models.json").read_text())
    asked = ["exact", "padding", "generation", "checkpointing", "off"]
    for tested in models_under_test(family):
        about = (family, tested.kind.name, "prompt")
        said = {c.property: c.status for c in results["PEFT"]
                if (c.model, c.kind, c.method) == about and c.property in asked}  # fmt: skip
        cells = run_matrix(tested, ["prompt"], Peft.made, asked)
        assert {c.property: c.status for c in cells} == said


def test_page_is_made_from_the_cells_and_covers_everything() -> None:
    from make_models_reference import from_json, page

    results, versions = from_json((ROOT / "docs/models.json").read_text())
    assert (ROOT / "docs/models.md").read_text() == page(results, versions)
    asked = {(family, kind.name, method, name) for family in NAMES for kind in family_kinds(family)
             for method in kind.methods for name in PROPERTIES}  # fmt: skip
    for cells in results.values():
        assert {(c.model, c.kind, c.method, c.property) for c in cells} == asked


def test_every_method_is_asked_about_or_said_not_to_be() -> None:
    """What the page calls its methods is what there is, none left out without a word."""
    asked = {METHODS[name]["kind"] for kind in KINDS for name in kind.methods}
    assert {name for kind in KINDS for name in kind.methods} == {*METHODS}
    assert asked.isdisjoint(NOT_ASKED)
    assert asked | {*NOT_ASKED} == {*all_sections()} > {*ADAPTERS}
    page = (ROOT / "docs/models.md").read_text()
    assert "all methods" not in page
    assert "every method" not in page
    for name in NOT_ASKED:
        assert f"- `{name}`: " in page
    short = page.partition("## What is asked")[0]
    for name in METHODS:
        assert name in short


def test_nothing_is_silently_wrong_and_every_refusal_is_a_sentence() -> None:
    from make_models_reference import from_json

    results, _ = from_json((ROOT / "docs/models.json").read_text())
    cells = [c for c in results["ptkit"] if c.status is not Status.not_applicable]
    assert not [c for c in cells if c.status in (Status.wrong, Status.raises)]
    for cell in cells:
        assert cell.status is Status.works or len(cell.detail.split()) > 8
    assert sum(c.status is Status.works for c in cells) > 4000


# What the matrix says is only as good as what it would notice.


class _Broken(PtkitCandidate):
    """ptkit with a fault of its own."""

    def logits(self, rows: list[TokenRow], *, left: bool) -> list[Tensor]:
        return [t + 0.01 for t in super().logits(rows, left=left)]

    def loss(self, rows: list[TokenRow]) -> Tensor:
        total = super().loss(rows)
        return total + 0.1 * (total - total.detach())  # the value is right, the gradient is not

    def generate(self, inputs: list[list[int]], **options: object) -> list[list[int]]:
        return [[*row[:-1], row[-1] ^ 1] for row in super().generate(inputs, **options)]


def test_small_faults_are_found() -> None:
    asked = ["exact", "padding", "gradients", "generation", "beams", "lookup", "saved"]
    cells = run_matrix(model_under_test("llama"), ["prefix"], _Broken.made, asked)
    found = {c.property: c.status for c in cells}
    assert found.pop("saved") is Status.works, "what is read back is a sound one"
    assert set(found.values()) == {Status.wrong}


@pytest.mark.parametrize(("family", "kind", "method"), [
    ("bert", TOKEN_ENCODER, "prompt"),
    ("deberta_v2", SEQUENCE_ENCODER, "prefix"),
    ("bart", ENCODER_DECODER, "p-tuning"),
    ("llama", SEQUENCE_DECODER, "linear probe"),
])  # fmt: skip
def test_small_faults_of_every_kind_are_found(family: str, kind: ModelKind, method: str) -> None:
    asked = ["exact", "padding", "gradients"]
    cells = run_matrix(model_under_test(family, kind.name), [method], _Broken.made, asked)
    assert {c.status for c in cells} == {Status.wrong}


def test_oracle_tells_where_virtual_tokens_of_an_encoder_stand() -> None:
    tested = model_under_test("bert")
    candidate = PtkitCandidate.made(tested, "prompt")
    (row,) = tested.rows((9, 1))
    soft = candidate.adapter.embeddings().detach()
    model = tested.base().model
    own, text = (Labelled(model, soft, as_text=as_text).logits(row) for as_text in (False, True))
    assert not torch.allclose(own, text, atol=1e-3)


class _Forgetful(PtkitCandidate):
    """ptkit, but for a part of the head that is not saved."""

    def reloaded(self, folder: Path) -> PtkitCandidate:
        again = super().reloaded(folder)
        head = again.adapter.head
        fresh = again.adapter.base.model.get_submodule(head.names[-1])
        head.copies[-1].load_state_dict(fresh.state_dict())
        return again


@pytest.mark.parametrize("family", ["distilbert", "deberta_v2"])
def test_a_part_of_the_head_that_is_lost_is_missed(family: str) -> None:
    """The last of the modules, by name, is the one before the classifier."""
    (cell,) = run_matrix(model_under_test(family), ["prefix"], _Forgetful.made, ["saved"])
    assert (
        PtkitCandidate.made(model_under_test(family), "prefix").adapter.head.names[-1]
        != "classifier"
    )
    assert cell.status is Status.wrong


def test_oracle_knows_which_key_belongs_to_which_value() -> None:
    tested = model_under_test("mistral")
    candidate = PtkitCandidate.made(tested, "prefix")
    (row,) = tested.rows((14, 5))
    prefix = candidate.adapter.prefix().detach()
    turned = tuple(key.roll(1, dims=1) for key in prefix.keys)
    other = Attended(tested.base().model, turned, prefix.values).logits(row)
    assert not torch.allclose(other, candidate.oracle.logits(row), atol=1e-3)


@pytest.mark.parametrize(
    ("error", "status"),
    [(ModelError("it cannot, because"), Status.refused), (KeyError("x"), Status.raises)],
)
def test_what_is_raised_is_told_apart(error: Exception, status: Status) -> None:
    def make(tested: ModelUnderTest, method: str) -> PtkitCandidate:
        raise error

    (cell,) = run_matrix(model_under_test("gpt2"), ["prefix"], make, ["exact"])
    assert cell.status is status


# Rows of any lengths, padded on any side, in one batch with other methods.


@functools.cache
def adapters_of(family: str) -> tuple[ModelUnderTest, list[PtkitCandidate]]:
    tested = model_under_test(family)
    made = []
    for method in tested.kind.methods:
        if method not in ("lora", "infix", "linear probe"):
            try:
                made.append(PtkitCandidate.made(tested, method))
            except ModelError:
                continue
    if tested.kind.head is not None:  # rows of a batch share one
        head = made[0].adapter.head.copies.state_dict()
        for candidate in made:
            candidate.adapter.head.copies.load_state_dict(head)
    return tested, made


@pytest.mark.parametrize("family", NAMES)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_rows_of_a_mixed_batch_are_as_alone(family: str, data: st.DataObject) -> None:
    tested, made = adapters_of(family)
    host = made[0]
    lengths = data.draw(st.lists(st.tuples(st.integers(1, 20), st.integers(1, 6)), min_size=2,
                                 max_size=4))  # fmt: skip
    chosen = data.draw(st.lists(st.sampled_from([None, *made]), min_size=len(lengths),
                                max_size=len(lengths)))  # fmt: skip
    left = data.draw(st.booleans()) and tested.kind.padded_left
    require_as_alone(tested, host, lengths, chosen, left)


@pytest.mark.parametrize("family", NAMES)
def test_rows_of_all_methods_share_a_batch(family: str) -> None:
    tested, made = adapters_of(family)
    lengths = [(3 + 4 * i, 2) for i in range(len(made) + 1)]
    require_as_alone(tested, made[0], lengths, [*made, None], left=False)


def require_as_alone(
    tested: ModelUnderTest,
    host: PtkitCandidate,
    lengths: Sequence[tuple[int, int]],
    chosen: Sequence[PtkitCandidate | None],
    left: bool,
) -> None:
    """Rows of one batch, each with its own adapter or none, are what its oracle makes of each."""
    rows = tested.rows(*lengths)
    prefixes = [None if c is None else c.adapter.prefix().detach() for c in chosen]
    batch = PrefixBatch.gathered(prefixes, host.adapter.base.layout)
    with torch.no_grad():
        logits, _ = host._read(rows, batch, left)
    found = logits.split([len(row.answer) for row in rows])
    plain = Merged(host.model)
    for row, own, candidate in zip(rows, found, chosen, strict=True):
        expected = (plain if candidate is None else candidate.oracle).logits(row)
        torch.testing.assert_close(own, expected, atol=5e-4, rtol=1e-4)


# Making a config small keeps what makes it special.


def config(family: str) -> PretrainedConfig:
    return small(FAMILIES[family].config)


def test_small_shapes_keep_their_kind() -> None:
    assert config("gpt_bigcode").multi_query
    assert config("llama").num_attention_heads == 2 * config("llama").num_key_value_heads
    assert config("olmo2").num_attention_heads == config("olmo2").num_key_value_heads
    qwen3 = config("qwen3")
    assert qwen3.head_dim * qwen3.num_attention_heads != qwen3.hidden_size
    assert config("mistral").sliding_window == config("phi3").sliding_window == WINDOW
    assert config("gemma3").layer_types == ["sliding_attention", "full_attention"]
    assert config("smollm3").no_rope_layers == [1, 0]
    assert config("qwen3_next").layer_types == ["linear_attention", "full_attention"]
    assert config("lfm2").layer_types == ["conv", "full_attention"]
    assert config("t5 (v1.1)").d_kv * 4 != config("t5 (v1.1)").d_model
    assert config("t5").d_kv * 4 == config("t5").d_model
    unequal = config("bart (unequal)")
    assert unequal.encoder_layers > unequal.decoder_layers
    projected = config("opt (projected)")
    assert projected.word_embed_proj_dim != projected.hidden_size
    assert config("gemma2").tie_word_embeddings
    assert not config("llama").tie_word_embeddings
    assert config("falcon (alibi)").alibi
    assert config("falcon (new)").num_kv_heads == 2
    assert config("roberta").pad_token_id == config("bart").pad_token_id == 1
    assert config("electra").embedding_size != config("electra").hidden_size
    modernbert = config("modernbert (mean)")
    assert modernbert.layer_types == ["full_attention", "sliding_attention"]
    assert modernbert.local_attention == WINDOW
    assert modernbert.classifier_pooling == "mean"
    assert config("deberta_v2").position_buckets == WINDOW
    assert config("deberta_v2").relative_attention
    assert config("deberta_v2 (conv)").conv_kernel_size == 3
    assert config("distilbert").dim == config("bert").hidden_size


def test_rope_factors_of_long_context_models_are_cut_to_the_pairs_there_are() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0,
            "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
            "original_max_position_embeddings": 4096}  # fmt: skip
    long = AutoConfig.for_model("phi3", rope_parameters=rope, max_position_embeddings=131072)
    assert len(small(long).rope_parameters["long_factor"]) == 8


# The command.


def test_check_says_what_works_and_why_not(tmp_path: Path) -> None:
    done = ptkit("models", "check", "falcon", "-m", "infix", "-m", "lora", cwd=tmp_path)
    assert "everything asked" in done.stdout
    assert "use `position: prefix`" in done.stdout
    FAMILIES["mistral"].config.save_pretrained(tmp_path / "mistral")
    answer = ptkit("models", "check", str(tmp_path / "mistral"), "-m", "prompt", "--json",
                   cwd=tmp_path)  # fmt: skip
    cells = json.loads(answer.stdout)
    assert {c["kind"] for c in cells} == {DECODER.name, SEQUENCE_DECODER.name}
    assert {c["property"] for c in cells} == set(PROPERTIES)
    assert {c["status"] for c in cells} == {"works", "n/a"}


def test_check_of_the_real_weights(tmp_path: Path) -> None:
    done = ptkit("models", "check", "tiny-en", "--full", "-m", "prefix", "--json",
                 cwd=tmp_path)  # fmt: skip
    assert {c["status"] for c in json.loads(done.stdout)} == {"works", "n/a"}


def test_check_of_an_encoder(tmp_path: Path) -> None:
    """By its shape, as both kinds of classifiers; by its weights, as what its head is for."""
    config = small(FAMILIES["electra"].config)
    config.save_pretrained(tmp_path / "shape")
    shape = ptkit("models", "check", "shape", "-m", "prompt", "--json", cwd=tmp_path)
    cells = json.loads(shape.stdout)
    assert {c["kind"] for c in cells} == {SEQUENCE_ENCODER.name, TOKEN_ENCODER.name}
    assert {c["status"] for c in cells} == {"works", "n/a"}
    base = model_under_test("electra", TOKEN_ENCODER.name).base()
    base.model.save_pretrained(tmp_path / "real")
    base.tokenizer.save_pretrained(tmp_path / "real")
    real = ptkit("models", "check", "real", "--full", "-m", "prefix", "--json",
                 cwd=tmp_path)  # fmt: skip
    cells = json.loads(real.stdout)
    assert {c["kind"] for c in cells} == {TOKEN_ENCODER.name}
    assert {c["status"] for c in cells} == {"works", "n/a"}
    base.model.base_model.save_pretrained(tmp_path / "headless")
    base.tokenizer.save_pretrained(tmp_path / "headless")
    assert "is an encoder" in refused("models", "check", "headless", "--full", cwd=tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lama"], "did you mean `llama`?"),
        (["gpt2", "-m", "prefx"], "did you mean `prefix`?"),
        (["bart", "-m", "infix"], "`infix` is not asked of bart (encoder-decoder)"),
        (["bert", "-m", "text prompt"], "`text prompt` is not asked of bert"),
    ],
)
def test_unknown_models_and_methods_are_refused(
    words: list[str], said: str, tmp_path: Path
) -> None:
    assert said in refused("models", "check", *words, cwd=tmp_path)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("mamba", "no attention heads"),
        ("deepseek_v3", "cannot be made small"),
        ("clip_text_model", "neither a language model nor a classifier"),
    ],
)
def test_shapes_ptkit_does_not_know_are_refused(model_type: str, said: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        model_under_test(str(tmp_path))


@pytest.mark.parametrize("model_type", ["mpt", "gpt_neo"])
def test_attention_that_takes_no_prefix_is_refused(model_type: str) -> None:
    tested = small_model(model_type, small(AutoConfig.for_model(model_type)), DECODER)
    asked = ["exact", "gradients", "generation", "padded generation", "turns"]
    cells = run_matrix(tested, ["prefix", "prompt"], properties=asked)
    assert {(c.status, c.detail[-8:]) for c in cells} == {(Status.refused, "use lora")}


# What windows, states and attention of its own mean elsewhere in ptkit.

SPECIAL = ["mistral", "gemma3", "gemma4", "gemma4 (E2B)", "qwen3_next", "lfm2", "bloom", "falcon"]


def special(family: str) -> tuple[Base, PtkitCandidate]:
    candidate = PtkitCandidate.made(model_under_test(family), "prefix")
    return candidate.adapter.base, candidate


@pytest.mark.parametrize("family", SPECIAL)
def test_labels_are_scored_as_the_oracle_scores_them(family: str) -> None:
    base, candidate = special(family)
    contexts = [row.input for row in model_under_test(family).rows((14, 1), (5, 1))]
    words = [[5, 9], [7]]
    batch = PrefixBatch.shared(candidate.adapter.prefix().detach(), 2)
    found = continuation_scores(base.model, contexts, words, batch, pad_token_id=0)
    for i, context in enumerate(contexts):
        for j, word in enumerate(words):
            right = candidate.oracle.logits(TokenRow(context, word)).float().log_softmax(-1)
            expected = right.gather(-1, torch.tensor(word)[:, None]).sum()
            torch.testing.assert_close(found[i, j], expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", SPECIAL)
def test_a_bank_and_a_conversation_answer_as_the_oracle(family: str, tmp_path: Path) -> None:
    base, candidate = special(family)
    write_adapter(tmp_path / "a", candidate.adapter.files())
    bank = AdapterBank(base)
    bank.load(tmp_path / "a")
    texts = ["w5 w6 w7 w8 w9 w10 w11 w12 w13 w14 w15", "w20 w21"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    read = [base.tokenizer(t)["input_ids"] for t in texts]
    found = bank.generate_ids(read, ["a", "a"], **options)
    assert found == [candidate.oracle.greedy(ids, 5) for ids in read]
    talk = Conversation(bank, adapter="a")
    said: list[int] = []
    for text in texts:
        talk.say(text, **options)
        said += base.tokenizer(text)["input_ids"]
        answer = candidate.oracle.greedy(said, 5)
        assert talk.exchanges[-1].answer_ids == answer
        said += answer


def test_soft_prompts_leave_a_window_as_text_does_and_prefixes_do_not() -> None:
    base, candidate = special("mistral")
    prefix = candidate.adapter.prefix().detach()
    assert not prefix.as_text
    soft = PtkitCandidate.made(model_under_test("mistral"), "prompt").adapter.prefix().detach()
    assert soft.as_text
    assert soft.map(lambda t: t + 0).as_text
    rows = [EncodedExample([5] * 40, [6])]

    def loss(own: object) -> Tensor:
        with torch.no_grad():
            batch = PrefixBatch.gathered([own], base.layout)
            return supervised_losses(base.model, **collate(rows, base), batch=batch)

    seen = [loss(p).item() for p in (None, prefix, soft)]
    assert abs(seen[0] - seen[1]) > 1e-3
    # Two layers of 8 positions reach back 14 tokens: from there the prompt is out of sight, but
    # for positions, which the rotation makes relative.
    assert seen[0] == pytest.approx(seen[2], abs=1e-4)


def test_infix_learns_where_layers_have_a_window(tmp_path: Path) -> None:
    base = model_under_test("gemma3").base()
    section = PrefixTuningSection(
        kind="prefix_tuning", num_virtual_tokens=3, position="infix", start="random"
    )
    adapter = create_adapter(section, base, Demonstrations([], 0))
    rows = [EncodedExample(row.input, row.answer)
            for row in model_under_test("gemma3").rows(*[(14, 3)] * 8)]  # fmt: skip
    train = TrainSection(steps=12, batch_size=4, eval_every=6, save_every=12, warmup_steps=0)
    (progress,) = fit([Job(adapter, rows, rows, train, 0.3, 0, tmp_path)])
    assert progress.curve[-1]["validation_loss"] < progress.curve[0]["train_loss"]


def test_prefix_of_a_hybrid_is_not_taken_for_pefts(tmp_path: Path) -> None:
    base, candidate = special("qwen3_next")
    assert len(base.layout) == 1, "one of its two layers attends"
    write_adapter(tmp_path / "a", candidate.adapter.files())
    written = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert written["peft_type"] == "PTKIT_HYBRID_PREFIX"
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(model_under_test("qwen3_next").base().model, str(tmp_path / "a"))
    again = adapter_from_files(read_adapter(tmp_path / "a"), base)
    assert torch.equal(again.flat(), candidate.adapter.flat())


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2"])
def test_prompts_of_a_hybrid_are_read_with_every_input(family: str, tmp_path: Path) -> None:
    """Beside prefixes and the plain base, whatever the padding between them; in no cache of
    before."""
    tested = model_under_test(family)
    own = {name: PtkitCandidate.made(tested, name) for name in ("prompt", "prefix")}
    base = own["prompt"].adapter.base
    bank = AdapterBank(base)
    for name, candidate in own.items():
        write_adapter(tmp_path / name, candidate.adapter.files())
        bank.load(tmp_path / name)
    oracles = {name: candidate.oracle for name, candidate in own.items()}
    oracles[None] = Merged(tested.base().model)
    names = ["prompt", "prefix", None, "prompt"]
    rows = [row.input for row in tested.rows((9, 1), (4, 1), (6, 1), (2, 1))]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = [oracles[name].greedy(ids, 5) for name, ids in zip(names, rows, strict=True)]
    assert bank.generate_ids(rows, names, **options) == expected
    words = [[5, 9], [7]]
    found = continuation_scores(base.model, rows, words, bank.rows(names), pad_token_id=0)
    for i, (name, ids) in enumerate(zip(names, rows, strict=True)):
        for j, word in enumerate(words):
            right = oracles[name].logits(TokenRow(ids, word)).float().log_softmax(-1)
            total = right.gather(-1, torch.tensor(word)[:, None]).sum()
            torch.testing.assert_close(found[i, j], total, atol=1e-3, rtol=1e-3)
    with pytest.raises(ModelError, match="earlier turn has no place for"):
        Conversation(bank, adapter="prompt").say("w5 w6", **options)


def test_a_lora_of_fused_experts_is_not_for_mixed_batches(tmp_path: Path) -> None:
    candidate = PtkitCandidate.made(model_under_test("mixtral"), "lora")
    write_adapter(tmp_path / "a", candidate.adapter.files())
    candidate.adapter.close()
    with pytest.raises(AdapterError, match="fused experts"):
        AdapterBank(candidate.adapter.base).load(tmp_path / "a")


def test_attention_is_the_models_choice_unless_asked_for(tmp_path: Path) -> None:
    base = model_under_test("gemma2").base()
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    loaded = load_base(str(tmp_path))
    assert attention_of(loaded.model) == "eager"
    with pytest.raises(ModelError, match=r"has no `sdpa` attention; set `model.attention: auto`"):
        load_base(str(tmp_path), attention="sdpa")
    given = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    if transformers.__version__ < "5.21":  # its own choice is `sdpa`, which caps nothing
        with pytest.raises(ModelError, match="caps the logits of its attention"):
            take_prefixes(given)
    else:
        take_prefixes(given)
        assert attention_of(given) == "eager"


def test_every_kind_has_families() -> None:
    assert {kind for name in NAMES for kind in family_kinds(name)} == {*KINDS}


# Layers that differ in their heads, share keys, or look token ids up (Gemma 4).

UNLIKE = ["gemma4", "gemma4 (E2B)"]


def test_a_prefix_of_unlike_layers_is_pefts(tmp_path: Path) -> None:
    """In PEFT's file every layer has the room of the widest, and PEFT cuts it as ptkit does."""
    tested = model_under_test("gemma4 (E2B)")
    candidate = PtkitCandidate.made(tested, "prefix")
    assert len(set(candidate.adapter.base.layout)) > 1
    write_adapter(tmp_path / "adapter", candidate.adapter.files())
    # Shorter than the window: beyond it, PEFT's cache loses the prefix.
    (row,) = tested.rows((2, 2))
    (expected,) = candidate.logits([row], left=False)
    theirs = PeftModel.from_pretrained(tested.base().model, tmp_path / "adapter")
    ids = torch.tensor([row.whole])
    with torch.no_grad():
        found = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(found[0, -3:-1], expected, atol=1e-4, rtol=1e-4)


def test_a_prefix_that_peft_has_no_room_for_is_not_taken_for_pefts(tmp_path: Path) -> None:
    tested = model_under_test("gemma4")
    base, candidate = special("gemma4")
    write_adapter(tmp_path / "a", candidate.adapter.files())
    written = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert written["peft_type"] == "PTKIT_UNLIKE_PREFIX"
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(tested.base().model, str(tmp_path / "a"))
    again = adapter_from_files(read_adapter(tmp_path / "a"), base)
    assert torch.equal(again.flat(), candidate.adapter.flat())


def test_pefts_own_prefix_of_a_base_whose_layers_share_keys_is_read(tmp_path: Path) -> None:
    """PEFT makes room for layers without keys of their own."""
    tested = model_under_test("gemma4 (E2B)")
    base = tested.base()
    made = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    torch.manual_seed(0)
    theirs = get_peft_model(tested.base().model, made).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.mul_(3)
    theirs.save_pretrained(tmp_path / "theirs")
    files = read_adapter(tmp_path / "theirs")
    assert files.config["num_layers"] == 2 * len(base.layout)
    adapter = adapter_from_files(files, base)
    (row,) = tested.rows((2, 2))
    ids = torch.tensor([row.whole])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        found = all_logits(
            base.model, ids, torch.ones_like(ids), PrefixBatch.shared(adapter.compiled(), 1)
        )
    torch.testing.assert_close(found, expected[:, -ids.shape[1] :], atol=1e-4, rtol=1e-4)


def test_values_that_no_layer_reads_are_not_counted_as_trained() -> None:
    for family in UNLIKE:
        adapter = PtkitCandidate.made(model_under_test(family), "prefix").adapter
        own = sum(s.kv_heads * (s.key_dim + s.value_dim) for s in adapter.base.layout)
        assert adapter.trainable_parameters == adapter.virtual_tokens * own


def test_check_of_gemma_4_ends_with_answers_and_soft_prompts_with_a_reason(tmp_path: Path) -> None:
    AutoConfig.for_model(
        "gemma4_text", vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_kv_shared_layers=3,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        vocab_size_per_layer_input=512, hidden_size_per_layer_input=16, sliding_window=32,
        max_position_embeddings=512, pad_token_id=1, eos_token_id=0, bos_token_id=0,
    ).save_pretrained(tmp_path / "g")  # fmt: skip
    done = ptkit("models", "check", "g", "-m", "prefix", "-m", "prompt", "--json",
                 cwd=tmp_path)  # fmt: skip
    cells = json.loads(done.stdout)
    assert {c["status"] for c in cells if c["method"] == "prefix"} == {"works", "n/a"}
    reasons = {c["detail"] for c in cells if c["status"] == "refused"}
    assert len(reasons) == 1
    assert "soft prompt's virtual tokens have no id; use prefix_tuning or lora" in reasons.pop()
    base = model_under_test("gemma4 (E2B)").base()
    section = PrefixTuningSection(kind="prefix_tuning", learn_embeddings=True)
    with pytest.raises(ModelError, match="look up token ids"):
        create_adapter(section, base, Demonstrations(["w3 w4"], 0))
    with pytest.raises(ModelError, match="read the keys and values of others"):
        longest_sequence(base.model)
