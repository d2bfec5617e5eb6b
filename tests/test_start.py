"""Where prompt methods start, in what units they learn, and what a fold at export keeps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import random_base
from pydantic import ValidationError

from ptkit.errors import AdapterError, UserError
from ptkit.formats.adapter_files import AdapterFiles, write_adapter
from ptkit.methods import ADAPTERS, Adapter, Demonstrations, adapter_from_files, create_adapter
from ptkit.methods.catalogue import method_section
from ptkit.methods.p_tuning.adapter import PTuning
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.prefix import KVPrefix
from ptkit.recipe.load import load_recipe
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.compile import compile_embeddings, compile_tokens
from ptkit.training.cell import Cell
from ptkit.training.cell_folder import open_cell_folder
from ptkit.training.experiment import prepare

PROMPTS = ("prefix_tuning", "prompt_tuning", "p_tuning")


def make(base: Base, kind: str, folder: Path = Path(), **settings: object) -> Adapter:
    section = method_section({"kind": kind, "num_virtual_tokens": 4, **settings})
    torch.manual_seed(0)
    rows = Demonstrations(["w1 w2 w3", "w4 w5"], 0, [" w6", " w7"], " w9", folder)
    return create_adapter(section, base, rows)


def moved(adapter: Adapter, by: float = 0.1) -> Adapter:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(torch.randn_like(parameter) * by)
    return adapter


def assert_same(found: KVPrefix, expected: KVPrefix) -> None:
    for mine, theirs in zip(
        (*found.keys, *found.values), (*expected.keys, *expected.values), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("settings", [
    {"start": "text", "start_text": "w8 w9 w10 w11"}, {"start": "labels"}, {"start": "task"},
])  # fmt: skip
def test_a_start_of_words_is_what_the_base_makes_of_them(
    family: str, kind: str, settings: dict
) -> None:
    base = random_base(family)
    ids = {"text": [8, 9, 10, 11], "labels": [6, 7, 6, 7], "task": [9, 6, 9, 7]}[settings["start"]]
    extra: list[dict] = [{}]
    if kind == "prefix_tuning":
        mlps = [{"reparameterize": value} for value in (True, "residual")]
        extra += [*mlps, {"gates": "values"}]
    for own in extra:
        adapter = make(base, kind, **settings, **own)
        assert_same(adapter.prefix().detach(), compile_tokens(base.model, torch.tensor(ids)))


def test_labels_need_a_task_with_labels() -> None:
    section = method_section({"kind": "prompt_tuning", "start": "labels"})
    with pytest.raises(UserError, match="needs a classification task"):
        create_adapter(section, random_base("gpt2"), Demonstrations(["w1"], 0))


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize(("settings", "labels", "what"), [
    ({"start": "text", "start_text": ""}, (), r"`start_text` \(''\)"),
    ({"start": "text", "start_text": " \n"}, (), r"`start_text` \(' \\n'\)"),
    ({"start": "labels"}, ("", " "), "the labels' words"),
    ({"start": "examples"}, (), "the training rows"),
    ({"start": "task"}, (), "the training rows"),
])  # fmt: skip
def test_a_start_without_tokens_is_refused(
    kind: str, settings: dict, labels: tuple[str, ...], what: str
) -> None:
    """Random tokens in its place would be another start than the one that is named."""
    section = method_section({"kind": kind, **settings})
    with pytest.raises(UserError, match=f"finds no token in {what}.*; give a text"):
        create_adapter(section, random_base("gpt2"), Demonstrations(["", " "], 0, labels))


def test_a_run_goes_on_only_with_the_adapters_it_began_with(tmp_path: Path) -> None:
    base = load_base()
    for folder in ("first", "second"):
        torch.manual_seed(len(folder))
        tokens = torch.randn(4, base.embedding.embedding_dim)
        made = AdapterFiles({"peft_type": "PROMPT_TUNING"}, {"prompt_embeddings": tokens})
        write_adapter(tmp_path / folder, made)
    loaded = load_recipe(
        "message-routing",
        [
            "methods=[{kind: prefix_tuning, num_virtual_tokens: 4, start: adapter, "
            f"start_adapter: [{tmp_path / 'first'}]}}]",
            "retention=null",
        ],
    )
    experiment = prepare(loaded, base)
    cell = Cell(loaded.recipe.methods[0], 0, tmp_path / "cell")
    open_cell_folder(experiment, cell)
    open_cell_folder(experiment, cell)
    shutil.rmtree(tmp_path / "first")
    with pytest.raises(AdapterError, match="missing"):
        open_cell_folder(experiment, cell)
    (tmp_path / "second").rename(tmp_path / "first")
    with pytest.raises(UserError, match="`adapters`"):
        open_cell_folder(experiment, cell)


@pytest.mark.parametrize("kind", PROMPTS)
def test_start_of_an_adapter_is_that_adapter_and_of_two_their_mean(
    kind: str, tmp_path: Path
) -> None:
    base = random_base("llama")
    sources = []
    for name, text in (("one", "w1 w2 w3 w4"), ("two", "w5 w6 w7 w8")):
        sources.append(moved(make(base, kind, start="text", start_text=text)))
        write_adapter(tmp_path / name, sources[-1].files())
    copy = make(base, kind, tmp_path, start="adapter", start_adapter=["one"])
    assert_same(copy.prefix().detach(), sources[0].prefix().detach())
    mean = make(
        base, kind, tmp_path, start="adapter", start_adapter=["one", "two"],
        start_weights=[0.25, 0.75],
    )  # fmt: skip
    if kind == "prefix_tuning":
        expected = KVPrefix.averaged([s.prefix().detach() for s in sources], [0.25, 0.75])
    else:
        soft = [s.embeddings().detach() for s in sources]
        expected = compile_embeddings(base.model, 0.25 * soft[0] + 0.75 * soft[1]).detach()
    assert_same(mean.prefix().detach(), expected)


def test_a_prefix_starts_from_any_prompt_but_embeddings_not_from_a_prefix(tmp_path: Path) -> None:
    base = random_base("qwen3")
    prompt = moved(make(base, "prompt_tuning"))
    write_adapter(tmp_path / "prompt", prompt.files())
    write_adapter(tmp_path / "prefix", make(base, "prefix_tuning").files())
    copy = make(base, "prefix_tuning", tmp_path, start="adapter", start_adapter=["prompt"])
    assert_same(copy.prefix().detach(), prompt.prefix().detach())
    with pytest.raises(Exception, match=r"`prompt_embeddings` should have shape"):
        make(base, "prompt_tuning", tmp_path, start="adapter", start_adapter=["prefix"])
    with pytest.raises(UserError, match="has 4 virtual tokens, `prefix_tuning` has 7: set"):
        make(
            base, "prefix_tuning", tmp_path, start="adapter", start_adapter=["prompt"],
            num_virtual_tokens=7,
        )  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), [
    ({"start": "text"}, "`start_text` is needed with `start: text`"),
    ({"start_adapter": ["a"]}, "`start_adapter` is needed with `start: adapter`"),
    ({"start": "adapter", "start_adapter": ["a", "b"], "start_weights": [1.0]}, "one weight per"),
    ({"start": "adapter", "start_adapter": ["a"], "start_weights": [0.5]}, "must add up to 1"),
    ({"sink": True, "start": "random"}, "`sink` keeps a token of the start"),
    ({"sink": True, "num_virtual_tokens": 1}, "leaves none to train"),
    ({"sink": True, "position": "infix"}, "no `sink` to keep"),
    ({"gates": "attention"}, "cannot be folded into keys and values"),
])  # fmt: skip
def test_starts_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        method_section({"kind": "prefix_tuning", **settings})


@pytest.mark.parametrize("kind", PROMPTS)
def test_one_rate_fits_bases_of_any_scale(kind: str) -> None:
    """A step moves the compiled prompt by a share of its own size, whatever that is."""
    moves = []
    for scale in (0.01, 1.0, 100.0):
        base = random_base("gpt2")
        with torch.no_grad():
            base.embedding.weight.mul_(scale)
        if kind == "prefix_tuning":
            for block in base.model.transformer.h[1:]:  # one layer larger than the next
                block.attn.c_attn.weight.data.mul_(scale)
        own = {"learn_embeddings": False} if kind == "prefix_tuning" else {}
        adapter = make(base, kind, start="text", start_text="w1 w2 w3 w4", **own)
        learnt = adapter.flat if kind == "prefix_tuning" else adapter.embeddings
        before = learnt().detach().clone()
        last = [*adapter.trainable().values()][-1]
        with torch.no_grad():
            last.add_(0.1)
        change = (learnt() - before).detach()
        side = base.layout.widest.kv_heads * base.layout.widest.key_dim
        width = side if kind == "prefix_tuning" else before.shape[1]
        size = before.unflatten(1, (-1, width)).square().mean((0, 2)).sqrt()
        moved_by = change.unflatten(1, (-1, width)).square().mean((0, 2)).sqrt()
        moves.append(moved_by / size)
    for share in moves[1:]:
        torch.testing.assert_close(share, moves[0], rtol=1e-3, atol=1e-4)
    assert float(moves[0].min()) > 0.05


def test_layers_of_the_embedded_base_differ_in_size() -> None:
    """What the docs say of it, and why a prefix is learnt in units of its own size."""
    base = load_base("tiny-en")
    text = "The committee published its report on Monday, and nobody was surprised by it."
    prefix = compile_tokens(base.model, torch.tensor(base.tokenizer(text)["input_ids"]))
    sizes = [float(values.square().mean().sqrt()) for values in prefix.values]
    assert sizes[0] < 0.1
    assert 2 < sizes[-1] < 4


@pytest.mark.parametrize("gates", ["values", "keys_and_values"])
@pytest.mark.parametrize(
    "own",
    [
        {},
        {"trained_layers": 2},
        {"sink": True},
        {"reparameterize": True},
        {"reparameterize": "residual"},
    ],
)
def test_gates_scale_their_layer_and_fold_into_the_file(
    family: str, gates: str, own: dict, tmp_path: Path
) -> None:
    base = random_base(family)
    plain = moved(make(base, "prefix_tuning", **own))
    gated = make(base, "prefix_tuning", gates=gates, **own)
    gated.load_trainable({**plain.trainable(), "gates": gated.gates})
    assert_same(gated.prefix().detach(), plain.prefix().detach())  # they begin at 1
    factors = torch.linspace(0.5, 1.5, gated.gates.numel()).view_as(gated.gates)
    with torch.no_grad():
        gated.gates.copy_(factors)
    first = 1 if own.get("sink") else 0
    lower = 3 - len(factors)
    found, expected = gated.prefix().detach(), plain.prefix().detach()
    for layer in range(3):
        key = value = torch.tensor(1.0)
        if layer >= lower:
            value = factors[layer - lower, -1]
            key = factors[layer - lower, 0] if gates == "keys_and_values" else key
        for mine, theirs, gate in (
            (found.keys[layer], expected.keys[layer], key),
            (found.values[layer], expected.values[layer], value),
        ):
            torch.testing.assert_close(mine[:, first:], theirs[:, first:] * gate)
            torch.testing.assert_close(mine[:, :first], theirs[:, :first])
    write_adapter(tmp_path / "gated", gated.files())
    read = adapter_from_files(gated.files(), base)
    assert_same(read.prefix().detach(), found)
    assert "gates" not in gated.files().tensors


def test_the_sink_stays_what_the_base_reads_first(family: str) -> None:
    base = random_base(family)
    adapter = make(base, "prefix_tuning", sink=True, start="text", start_text="w1 w2 w3")
    real = compile_tokens(base.model, torch.tensor([base.first_token_id, 1, 2, 3]))
    assert_same(adapter.prefix().detach(), real)
    after = moved(adapter).prefix().detach()
    for mine, theirs in zip((*after.keys, *after.values), (*real.keys, *real.values), strict=True):
        torch.testing.assert_close(mine[:, 0], theirs[:, 0])
        assert not torch.allclose(mine[:, 1:], theirs[:, 1:])
    exported = adapter.files().tensors["prompt_embeddings"].numel()
    learnt = exported + 4 * base.embedding.embedding_dim  # of four tokens, three of them trained
    assert adapter.trainable_parameters * 4 == 3 * learnt


@pytest.mark.parametrize("sink", [False, True])
def test_a_prefix_learns_what_prompt_tuning_does_and_more(family: str, sink: bool) -> None:
    """At every layer, what the base makes of changed embeddings plus the layer's own change."""
    base = random_base(family)
    adapter = make(base, "prefix_tuning", sink=sink, start="text", start_text="w1 w2 w3 w4")
    assert isinstance(adapter, PrefixTuning)
    assert adapter.read is not None
    (own,) = adapter.own_rates()
    assert own.parameters == [adapter.read.change]
    assert own.learning_rate is None  # what is said of the method's rate is said of both
    words = [base.first_token_id, 1, 2, 3] if sink else [1, 2, 3, 4]
    embeddings = base.embedding(torch.tensor(words)).detach()
    frozen = int(sink)
    change = torch.randn(4 - frozen, embeddings.shape[1])
    with torch.no_grad():
        adapter.read.change.copy_(change)
    embeddings[frozen:] += embeddings.square().mean().sqrt() * change
    read = compile_embeddings(base.model, embeddings).detach()
    assert_same(adapter.prefix().detach(), read)
    with torch.no_grad():
        adapter.encoder.embedding.weight.fill_(0.5)
    difference = (adapter.flat() - read.flat()).detach()
    torch.testing.assert_close(difference[frozen:], (0.5 * adapter.unit).expand(4 - frozen, -1))
    torch.testing.assert_close(difference[:frozen], torch.zeros_like(difference[:frozen]))
    adapter.flat().square().sum().backward()
    assert adapter.read.change.grad is not None
    assert bool(adapter.read.change.grad.any())
    assert_same(adapter_from_files(adapter.files(), base).prefix(), adapter.prefix().detach())


def test_the_embeddings_that_p_tunings_encoder_adds_to_learn(family: str) -> None:
    base = random_base(family)
    plain = make(base, "p_tuning", learn_embeddings=False)
    adapter = make(base, "p_tuning")
    assert isinstance(plain, PTuning)
    assert isinstance(adapter, PTuning)
    assert plain.own_rates() == make(base, "p_tuning", start="random").own_rates() == []
    (own,) = adapter.own_rates()
    (change,) = own.parameters
    values = torch.randn_like(change)
    with torch.no_grad():
        for mine, other in zip(
            adapter.encoder.parameters(), plain.encoder.parameters(), strict=True
        ):
            mine.add_(0.01)
            other.copy_(mine)
        change.copy_(values)
    size = base.embedding(torch.tensor([9, 6, 9, 7])).square().mean().sqrt()
    expected = plain.embeddings() + size * values
    torch.testing.assert_close(adapter.embeddings(), expected)
    assert adapter.trainable_parameters == plain.trainable_parameters + values.numel()
    read = adapter_from_files(adapter.files(), base)
    assert_same(read.prefix().detach(), adapter.prefix().detach())


def test_embeddings_learn_where_they_can_and_are_refused_where_not(tmp_path: Path) -> None:
    base = random_base("gpt2")
    write_adapter(tmp_path / "a", make(base, "prompt_tuning").files())
    of_adapter = {"start": "adapter", "start_adapter": ["a"]}
    moot = ({"start": "random"}, of_adapter, {"trained_layers": 2}, {"reparameterize": True})
    for settings in moot:
        adapter = make(base, "prefix_tuning", tmp_path, **settings)
        assert isinstance(adapter, PrefixTuning)
        assert adapter.read is None
        assert adapter.own_rates() == []
        with pytest.raises(ValidationError, match="`learn_embeddings` needs"):
            make(base, "prefix_tuning", tmp_path, learn_embeddings=True, **settings)
    for settings in ({}, {"start": "vocabulary"}, {"position": "infix"}, {"gates": "values"}):
        adapter = make(base, "prefix_tuning", **settings)
        assert adapter.own_rates()
        assert not make(base, "prefix_tuning", learn_embeddings=False, **settings).own_rates()
    for kind in ("prefix_mixture", "prefix_lora"):  # beside other prefixes, on changing weights
        beside = make(random_base("gpt2"), kind)
        assert not any(name.endswith("read.change") for name in beside.trainable())


def test_every_start_is_made(tmp_path: Path) -> None:
    """The names in the schema and the code that reads them agree."""
    base = random_base("gpt2")
    write_adapter(tmp_path / "a", make(base, "prompt_tuning").files())
    needs = {"text": {"start_text": "w1"}, "adapter": {"start_adapter": ["a"]}}
    names = ADAPTERS["prompt_tuning"].section_class.model_fields["start"].annotation.__args__
    assert len(names) >= 8
    for start in names:
        made = make(base, "prompt_tuning", tmp_path, start=start, **needs.get(start, {}))
        assert made.prefix().virtual_tokens == 4


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning", "p_tuning"])
def test_outside_a_run_what_is_left_open_is_the_tasks_own_start(kind: str) -> None:
    base = random_base("gpt2")
    left, own, other = (
        make(base, kind, start=start).prefix().flat() for start in ("auto", "task", "labels")
    )
    assert torch.equal(left, own)
    assert not torch.equal(left, other)


def test_a_residual_prefix_is_its_values_and_its_mlps_together(family: str) -> None:
    base = random_base(family)
    own = {"reparameterize": "residual", "encoder_hidden_size": 8}
    whole = moved(make(base, "prefix_tuning", **own))
    mlp = make(base, "prefix_tuning", **{**own, "reparameterize": True})
    mlp.load_trainable({n: t for n, t in whole.trainable().items() if n != "beside"})
    expected = mlp.flat() + whole.unit * whole.beside
    assert torch.allclose(whole.flat(), expected, atol=1e-6)
    assert whole.trainable_parameters > mlp.trainable_parameters
    (rate,) = whole.own_rates()
    assert {*map(id, rate.parameters)} == {*map(id, whole.encoder.parameters())}
    assert rate.factor < 1
