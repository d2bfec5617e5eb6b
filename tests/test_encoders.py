"""Encoders, and decoders with a classification head: deep prompts, soft prompts, trained heads."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import forked
import pytest
import torch
from conftest import random_base
from encoders import DECODERS, ENCODERS, LABELS, random_classifier
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from test_cli import ptkit, refused
from test_peft_parity import rows_of
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from ptkit import AdapterBank, load_adapter
from ptkit.data.encoded import IGNORED, EncodedExample
from ptkit.errors import AdapterError, ModelError
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.methods import ADAPTERS, Adapter, Demonstrations, adapter_from_files, create_adapter
from ptkit.metrics.registry import metric
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.attention import Call, Repeats
from ptkit.runtime.attention_choice import set_attention
from ptkit.runtime.attention_sites import attention_modules
from ptkit.runtime.backends import backend_of
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.forward import collate, head_logits, supervised_losses
from ptkit.runtime.views import viewed

METHODS = ("prefix_tuning", "prompt_tuning", "p_tuning", "lora", "full", "linear_probe")
FAMILIES = [*ENCODERS, *DECODERS]
KINDS = ("sequence", "token")


def adapter_on(base: Base, kind: str, *, seed: int = 3, **options: object) -> Adapter:
    cls = ADAPTERS[kind]
    if "num_virtual_tokens" in cls.section_class.model_fields:
        options = {"num_virtual_tokens": 4, "start": "random", **options}
    torch.manual_seed(seed)
    return create_adapter(
        cls.section_class(kind=kind, **options), base, Demonstrations(["w3 w4 w5"], 0)
    )


def batch_of(adapter: Adapter, rows: int) -> PrefixBatch | None:
    prefix = adapter.prefix()
    return None if prefix is None else PrefixBatch.shared(prefix, rows)


def examples(lengths: list[int], kind: str, seed: int = 1) -> list[EncodedExample]:
    # Ids from 3: those below are padding or frame a text in some family.
    rows = [[3 + i % 93 for i in row] for row in rows_of(lengths, seed)]
    labels = torch.Generator().manual_seed(seed)

    def drawn(count: int) -> list[int]:
        return torch.randint(0, len(LABELS), (count,), generator=labels).tolist()

    return [EncodedExample(r, drawn(1 if kind == "sequence" else len(r))) for r in rows]


def logits_of(adapter: Adapter, rows: list[EncodedExample]) -> list[torch.Tensor]:
    """The logits of each row, padding cut off."""
    tensors = collate(rows, adapter.base)
    found = head_logits(
        adapter.model, tensors["input_ids"], tensors["attention_mask"],
        batch_of(adapter, len(rows)),
    )  # fmt: skip
    if found.ndim == 2:
        return list(found)
    return [row[: len(e.input_ids)] for row, e in zip(found, rows, strict=True)]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=sorted(ENCODERS))
def encoder(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_a_model_is_is_found_by_asking_it(family: str) -> None:
    base = random_classifier(family)
    assert base.encoder is (family in ENCODERS)
    assert len(attention_modules(base.model)) == 3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_padded_is_unpadded_and_a_step_trains_what_it_should(
    family: str, method: str, kind: str
) -> None:
    base = random_classifier(family, kind)
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    adapter = adapter_on(base, method)
    rows = examples([7, 3, 5], kind)
    with torch.no_grad():
        together = logits_of(adapter, rows)
        alone = [logits_of(adapter, [row])[0] for row in rows]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    loss = supervised_losses(
        adapter.model, **collate(rows, base), batch=batch_of(adapter, 3)
    ).mean()
    loss.backward()
    assert all(p.grad is not None for p in adapter.trainable().values())
    assert any(p.grad.abs().max() > 0 for p in adapter.trainable().values())
    torch.optim.SGD(adapter.trainable().values(), lr=0.1).step()
    adapter.close()
    for name, parameter in base.model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_prefix_is_that_of_an_attention_written_out(
    encoder: str, kind: str, attention: str
) -> None:
    """Against softmax(q [p; k] + mask) [p; v], with the prefix looked up by the module."""
    if encoder == "deberta_v2":
        pytest.skip("not on transformers' AttentionInterface; has a test of its own")
    base = random_classifier(encoder, kind, attention)
    adapter = adapter_on(base, "prefix_tuning")
    rows = examples([7, 3], kind)
    with torch.no_grad():
        ours = logits_of(adapter, rows)
    prefix = adapter.prefix().detach()
    layer_of = {id(m): i for i, m in enumerate(attention_modules(base.model))}

    def written_out(module: nn.Module, query, key, value, mask, scaling, **_):
        layer = layer_of[id(module)]
        keys, values = (t[layer].expand(len(query), -1, -1, -1)
                        for t in (prefix.keys, prefix.values))  # fmt: skip
        scores = query @ torch.cat([keys, key], 2).transpose(-1, -2) * scaling
        if mask is not None:
            scores[..., keys.shape[2] :] += mask
        weights = scores.softmax(-1)
        return (weights @ torch.cat([values, value], 2)).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("written_out", written_out)
    AttentionMaskInterface.register("written_out", eager_mask)
    set_attention(base.model, "written_out")
    tensors = collate(rows, base)
    with torch.no_grad():
        theirs = adapter.model(
            input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]
        ).logits
    for row, (mine, example) in enumerate(zip(ours, rows, strict=True)):
        expected = theirs[row] if kind == "sequence" else theirs[row, : len(example.input_ids)]
        torch.testing.assert_close(mine, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_disentangled_attention_with_a_prefix() -> None:
    """Without a prefix, DeBERTa's own; with one, that of its parts: what the rows give each other
    and what the prefix gives, weighed by the sums of their exponentials."""
    base = random_classifier("deberta_v2", "token")
    rows = collate(examples([7, 3], "token"), base)
    ids, mask = rows["input_ids"], rows["attention_mask"]
    own = base.model(input_ids=ids, attention_mask=mask).logits
    call = Call({"input_ids": ids, "attention_mask": mask})
    backend_of(base.model).put(base.model, None, call)
    assert call.replaced
    written_out = viewed(base.model, call.replaced)(**call.arguments).logits
    torch.testing.assert_close(written_out, own)
    assert torch.equal(base.model(input_ids=ids, attention_mask=mask).logits, own)

    module = attention_modules(base.model)[0]
    torch.manual_seed(5)
    hidden, size = torch.randn(1, 6, 32), module.attention_head_size
    seen = torch.ones(1, 1, 6, 6, dtype=torch.long)
    distances = base.model.deberta.encoder.get_rel_pos(hidden)
    table = base.model.deberta.encoder.get_rel_embedding()
    arguments = {"relative_pos": distances, "rel_embeddings": table, "output_attentions": True}
    context, shares = module(hidden, seen, **arguments)
    prefix = adapter_on(base, "prefix_tuning").prefix().detach().map(lambda t: t * 3)
    backend_of(base.model).put(base.model, Repeats(PrefixBatch.shared(prefix, 1)), call)
    found, _ = viewed(base.model, call.replaced).get_submodule(
        next(name for name, part in base.model.named_modules() if part is module)
    )(hidden, seen, **arguments)

    def split(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(1, 6, 4, size).transpose(1, 2)

    query, key = split(module.query_proj(hidden)), split(module.key_proj(hidden))
    scale = (3 * size) ** 0.5  # contents, and two kinds of distances
    to_prefix = query @ prefix.keys[0].transpose(-1, -2) / scale
    # Any score of a row tells how much all of them weigh, given its share.
    content = query @ key.transpose(-1, -2) / scale
    q, k = (t.reshape(4, 6, size) for t in (query, key))
    bias = module.disentangled_attention_bias(q, k, distances, table, 3).view(1, 4, 6, 6)
    rows_weigh = (content + bias)[..., :1].exp() / shares[..., :1]
    weigh = to_prefix.exp()
    total = rows_weigh + weigh.sum(-1, keepdim=True)
    expected = (split(context) * rows_weigh + weigh @ prefix.values[0]) / total
    torch.testing.assert_close(split(found), expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(found, context, atol=1e-2)


def soft_oracle(base: Base, soft: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The last hidden states of an unpadded row after `soft`, by the family's own backbone."""
    backbone = base.model.base_model
    tokens = torch.arange(ids.shape[1])
    first = 2 if base.id == "random-roberta" else 0  # RoBERTa counts from padding's id on
    positions = torch.cat([torch.zeros(len(soft), dtype=torch.long), tokens])[None] + first
    embeds = torch.cat([soft[None], base.embedding(ids)], dim=1)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    states = backbone(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)[0]
    return states[:, len(soft) :]


#: Family -> what its sequence head makes of last hidden states, as its paper's code does.
HEADS = {
    "bert": lambda m, h: m.classifier(torch.tanh(m.bert.pooler.dense(h[:, 0]))),
    "roberta": lambda m, h: m.classifier.out_proj(torch.tanh(m.classifier.dense(h[:, 0]))),
    "electra": lambda m, h: m.classifier.out_proj(nn.functional.gelu(m.classifier.dense(h[:, 0]))),
    "distilbert": lambda m, h: m.classifier(torch.relu(m.pre_classifier(h[:, 0]))),
    "modernbert": lambda m, h: m.classifier(m.head(h.mean(1))),
    "deberta_v2": lambda m, h: m.classifier(nn.functional.gelu(m.pooler.dense(h[:, 0]))),
}


@torch.no_grad()
@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_soft_prompts_leave_positions_and_pooling_where_they_are(encoder: str, method: str) -> None:
    for kind in KINDS:
        base = random_classifier(encoder, kind)
        adapter = adapter_on(base, method)
        rows = examples([6], kind)
        states = soft_oracle(base, adapter.embeddings(), torch.tensor([rows[0].input_ids]))
        model = adapter.model
        expected = HEADS[encoder](model, states) if kind == "sequence" else (
            model.classifier(model.head(states)) if encoder == "modernbert"
            else model.classifier(states)
        )  # fmt: skip
        torch.testing.assert_close(logits_of(adapter, rows)[0], expected[0], atol=1e-5, rtol=1e-4)


def test_the_whole_position_budget_is_left(encoder: str) -> None:
    """Rows as long as the model was made for, beside virtual tokens: PEFT fails here."""
    base = random_classifier(encoder)
    longest = 64 - (2 if encoder == "roberta" else 0)
    rows = examples([longest], "sequence")
    for method in ("prefix_tuning", "prompt_tuning"):
        base.require_positions(4, longest, method)
        with pytest.raises(ModelError, match=f"has {longest}"):
            base.require_positions(4, longest + 1, method)
        assert logits_of(adapter_on(base, method), rows)[0].isfinite().all()


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "p_tuning"])
def test_checkpointing_changes_nothing(family: str, method: str) -> None:
    def gradient(checkpointed: bool) -> list[torch.Tensor]:
        base = random_classifier(family)
        adapter = adapter_on(base, method)
        if checkpointed:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
            adapter.model.train()
        rows = examples([6, 4], "sequence")
        supervised_losses(
            adapter.model, **collate(rows, base), batch=batch_of(adapter, 2)
        ).mean().backward()
        return [p.grad for p in adapter.trainable().values()]

    for plain, checkpointed in zip(gradient(False), gradient(True), strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-3)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    virtual=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    family=st.sampled_from(sorted(ENCODERS)),
    soft=st.booleans(),
)
def test_rows_with_different_adapters_are_as_alone(
    lengths: list[int], virtual: list[int], family: str, soft: bool
) -> None:
    base = random_classifier(family, "token")
    kind = "prompt_tuning" if soft else "prefix_tuning"
    own = [
        adapter_on(base, kind, seed=i, num_virtual_tokens=n).prefix().detach() if n else None
        for i, n in enumerate(virtual[: len(lengths)])
    ]
    rows = examples(lengths, "token")

    @torch.no_grad()
    def read(at: list[int]) -> torch.Tensor:
        tensors = collate([rows[i] for i in at], base)
        batch = PrefixBatch.gathered([own[i] for i in at], base.layout)
        return head_logits(base.model, tensors["input_ids"], tensors["attention_mask"], batch)

    together = read([*range(len(rows))])
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        torch.testing.assert_close(together[i, :n], read([i])[0, :n], atol=1e-4, rtol=1e-3)


def test_bf16_is_near_fp32(encoder: str) -> None:
    base = random_classifier(encoder)
    adapter = adapter_on(base, "prefix_tuning")
    rows = examples([6, 4], "sequence")
    with torch.no_grad():
        full = torch.stack(logits_of(adapter, rows))
        base.model.to(torch.bfloat16)
        adapter.to(torch.bfloat16)
        half = torch.stack(logits_of(adapter, rows)).float()
    torch.testing.assert_close(half, full, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
def test_heads_are_trained_in_float32_on_a_backbone_in_bfloat16(encoder: str, method: str) -> None:
    base = random_classifier(encoder)
    base.model.to(torch.bfloat16)
    adapter = adapter_on(base, method)
    loss = supervised_losses(
        adapter.model, **collate(examples([6, 4], "sequence"), base), batch=batch_of(adapter, 2)
    ).mean()
    loss.backward()
    assert all(p.dtype == torch.float32 for p in adapter.head.parameters())
    assert any(p.grad.abs().max() > 0 for p in adapter.head.parameters())


# Heads


def test_heads_start_anew_with_every_seed_unless_the_checkpoint_has_one(
    encoder: str, tmp_path: Path
) -> None:
    from ptkit.runtime.base_model import load_base
    from ptkit.runtime.heads import Labels

    source = random_classifier(encoder)
    source.model.base_model.save_pretrained(tmp_path / "backbone")
    source.tokenizer.save_pretrained(tmp_path / "backbone")
    source.model.save_pretrained(tmp_path / "classifier")
    source.tokenizer.save_pretrained(tmp_path / "classifier")
    labels = Labels("sequence", LABELS)
    new = load_base(str(tmp_path / "backbone"), attention="eager", labels=labels)
    again = load_base(str(tmp_path / "backbone"), attention="eager", labels=labels)
    assert new.head.fresh
    assert new.fingerprint == again.fingerprint
    inside = [n for n in new.head.modules if n.startswith(new.model.base_model_prefix + ".")]
    assert not inside, "the checkpoint has the whole backbone"

    def head_of(base: Base, seed: int) -> list[torch.Tensor]:
        return [*adapter_on(base, "linear_probe", seed=seed).trainable().values()]

    assert all(torch.equal(a, b) for a, b in zip(head_of(new, 1), head_of(again, 1), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(head_of(new, 1), head_of(new, 2), strict=True))
    trained = load_base(str(tmp_path / "classifier"), attention="eager", labels=labels)
    assert not trained.head.fresh
    state = trained.model.state_dict()
    for name, value in source.model.state_dict().items():
        torch.testing.assert_close(state[name], value)
    assert all(
        torch.equal(a, b) for a, b in zip(head_of(trained, 1), head_of(trained, 2), strict=True)
    )
    two = Labels("sequence", ("a", "b"))
    other = load_base(str(tmp_path / "classifier"), attention="eager", labels=two)
    assert other.head.fresh, "two labels instead of three: the head is a new one"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
def test_saved_is_loaded(family: str, method: str, kind: str, tmp_path: Path) -> None:
    base = random_classifier(family, kind)
    adapter = adapter_on(base, method)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    rows = examples([7, 3], kind)
    with torch.no_grad():
        trained = logits_of(adapter, rows)
        write_adapter(tmp_path / "a", adapter.files())
        adapter.close()
        again = adapter_from_files(read_adapter(tmp_path / "a"), base)
        loaded = logits_of(again, rows)
        again.close()
    for a, b in zip(loaded, trained, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning", "p_tuning", "lora"])
def test_what_peft_can_run_it_runs_alike(
    family: str, method: str, kind: str, tmp_path: Path
) -> None:
    """Decoders, and LoRA on encoders. PEFT cannot load the rest, and is told so by the type."""
    base = random_classifier(family, kind)
    adapter = adapter_on(base, method)
    with torch.no_grad():
        for parameter in adapter.trainable().values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        rows = examples([6], kind)
        ours = logits_of(adapter, rows)[0]
        write_adapter(tmp_path / "a", adapter.files())
        adapter.close()
        fresh = random_classifier(family, kind).model
        if family in ENCODERS and method != "lora":
            config = json.loads((tmp_path / "a/adapter_config.json").read_text())
            assert config["peft_type"].startswith("PTKIT_ENCODER")
            with pytest.raises(KeyError):
                PeftModel.from_pretrained(fresh, tmp_path / "a")
            return
        peft_model = PeftModel.from_pretrained(fresh, tmp_path / "a").eval()
        ids = torch.tensor([rows[0].input_ids])
        theirs = peft_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    if kind == "token" and method in ("prompt_tuning", "p_tuning"):
        theirs = theirs[-len(ours) :]  # PEFT returns logits of virtual tokens, too
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_peft_classifiers_are_read(tmp_path: Path) -> None:
    """A decoder's classifier trained with plain PEFT, loaded here."""
    from peft import PrefixTuningConfig, get_peft_model

    base = random_classifier("llama")
    torch.manual_seed(4)
    theirs = get_peft_model(
        random_classifier("llama").model,
        PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    ).eval()
    theirs.save_pretrained(tmp_path)
    adapter = adapter_from_files(read_adapter(tmp_path), base)
    rows = examples([6], "sequence")
    ids = torch.tensor([rows[0].input_ids])
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        torch.testing.assert_close(logits_of(adapter, rows)[0], expected, atol=1e-5, rtol=1e-4)


# Refusals


def test_what_does_not_fit_says_so(tmp_path: Path) -> None:
    base = random_classifier("bert")
    with pytest.raises(ModelError, match="reads the input from both sides"):
        adapter_on(base, "prefix_tuning", position="infix", start="examples")
    with pytest.raises(ModelError, match="answers in words"):
        adapter_on(base, "text_prompt")
    with pytest.raises(ModelError, match="trains a classification head"):
        adapter_on(random_base("gpt2"), "linear_probe")
    from transformers import BertLMHeadModel

    with pytest.raises(ModelError, match=r"is an encoder \(bert\): it writes no text"):
        frozen_base(BertLMHeadModel(base.model.config), base.tokenizer, "some-bert")
    write_adapter(tmp_path / "a", adapter_on(base, "prefix_tuning").files())
    files = read_adapter(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"made for a sequence classifier.*token classifier"):
        adapter_from_files(files, random_classifier("bert", "token"))
    with pytest.raises(AdapterError, match="loaded as a language model"):
        adapter_from_files(files, random_base("gpt2"))


def test_a_prefix_of_embeddings_is_not_composed() -> None:
    base = random_classifier("bert")
    prefix = adapter_on(base, "prompt_tuning").prefix().detach()
    assert prefix.virtual_tokens == 4
    assert prefix.nbytes == 4 * 32 * 4
    with pytest.raises(AdapterError, match="no keys and values to compose"):
        KVPrefix.concatenated([prefix, prefix])


def test_labels_of_padding_and_of_later_tokens_are_not_learnt() -> None:
    base = random_classifier("bert", "token")
    row = EncodedExample([5, 6, 7], [1, IGNORED, 2])
    assert row.supervised == 2
    adapter = adapter_on(base, "linear_probe")
    losses = supervised_losses(
        adapter.model, **collate([row, EncodedExample([5], [0])], base), batch=None
    )
    assert losses.shape == (3,)


# From the recipe to the label

VERDICTS = {"yes": [3, 40], "no": [41, 70], "maybe": [71, 95]}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT without a head, texts whose words say their label, and two recipes."""
    folder = tmp_path_factory.mktemp("heads")
    base = random_classifier("bert")
    base.model.base_model.save_pretrained(folder / "bert")
    base.tokenizer.save_pretrained(folder / "bert")
    draw = random.Random(0)
    rows = []
    for i in range(96):
        label = [*VERDICTS][i % 3]
        words = [f"w{draw.randint(*VERDICTS[label])}" for _ in range(draw.randint(2, 7))]
        tags = ["B-X" if int(w[1:]) > 60 else "O" for w in words]
        rows.append({"text": " ".join(words), "label": label, "tokens": words, "tags": tags})
    for split, part in (("train", rows[:60]), ("validation", rows[60:72]), ("test", rows[72:])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    files = "{files: {train: train.jsonl, validation: validation.jsonl, test: test.jsonl}}"
    for name, task in (
        ("texts", "kind: sequence_classification, input: 'w1 {text}', "
                  "labels: ['yes', 'no', maybe]"),
        ("words", "kind: token_classification, labels: [O, B-X], "
                  "metrics: [word_accuracy, word_macro_f1, entity_f1]"),
    ):  # fmt: skip
        (folder / f"{name}.yaml").write_text(
            f"name: {name}\n"
            f"model: {{id: {folder / 'bert'}, attention: eager}}\n"
            f"task: {{{task}, data: {files}}}\n"
            "methods:\n"
            "  - {kind: base}\n"
            "  - {kind: linear_probe}\n"
            "  - {kind: prompt_tuning, num_virtual_tokens: 4}\n"
            "  - {kind: prefix_tuning, num_virtual_tokens: 4}\n"
            "  - {kind: lora, rank: 4}\n"
            "  - {kind: full, learning_rate: 5e-3}\n"
            "train: {steps: 40, eval_every: 20, save_every: 20, batch_size: 12,\n"
            "        head_learning_rate: 0.03}\n"
        )
    return folder


@pytest.mark.parametrize("name", ["texts", "words"])
def test_comparison_and_what_one_does_with_its_adapters(home: Path, name: str) -> None:
    done = ptkit("compare", f"{name}.yaml", "--quiet", "--out", f"out-{name}", cwd=home)
    assert "linear_probe" in done.stdout
    lines = (home / f"out-{name}/results.jsonl").read_text().splitlines()
    records = {r["method"]: r for r in map(json.loads, lines)}
    assert set(records) == {
        "base",
        "linear_probe",
        "prompt_tuning",
        "prefix_tuning",
        "lora",
        "full",
    }
    score = records["base"]["score"]
    for method, record in records.items():
        assert record["retention"] is None
        assert record["decode_ms"] is None
        if method != "full":
            assert record["adapter_off_exact"] is True
        if method != "base":
            assert record["metrics"][score] > records["base"]["metrics"][score]
    report = (home / f"out-{name}/report.html").read_text()
    assert "prefix_tuning" in report
    for method in ("prefix_tuning", "lora" if name == "texts" else "linear_probe"):
        cell, out = f"out-{name}/cells/{method}-seed0", f"mine-{name}-{method}"
        ptkit("export", cell, "--out", out, cwd=home)
        card = (home / out / "README.md").read_text()
        assert ("PEFT cannot read this file" in card) is (method != "lora")
        checks = json.loads(
            ptkit("verify", out, "--score", "--recipe", f"{name}.yaml", "--json",
                  cwd=home).stdout
        )  # fmt: skip
        assert checks["passed"], checks
        assert "1 virtual" not in ptkit("inspect", out, cwd=home).stdout
    test = [json.loads(line) for line in (home / "test.jsonl").read_text().splitlines()]
    predictions = [
        json.loads(line)["prediction"]
        for line in (home / f"out-{name}/cells/prefix_tuning-seed0/predictions.jsonl")
        .read_text().splitlines()
    ]  # fmt: skip
    (home / "lines.txt").write_text("\n".join(row["text"] for row in test))
    said = ptkit("classify", "-i", "lines.txt", "-a", f"mine-{name}-prefix_tuning", "--json",
                 cwd=home).stdout.splitlines()  # fmt: skip
    answers = [json.loads(line) for line in said]
    if name == "texts":
        assert [a["label"] for a in answers] == predictions
        assert all(abs(sum(a["probabilities"].values()) - 1) < 1e-5 for a in answers)
    else:
        assert [" ".join(a["labels"]) for a in answers] == predictions


def test_a_killed_run_of_a_classifier_resumes(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Head and prefix end as those of a run that was not stopped."""
    # As in this process (conftest): with two, sums depend on where memory happens to lie.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ("texts.yaml", "--method", "prefix_tuning", "--quiet")
    ptkit("train", *options, "--out", "whole", cwd=home)
    stopped = forked.run(
        [sys.executable, "-c", KILLED_AT_STEP_25, "train", *options, "--out", "half"],
        cwd=home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert stopped.returncode == -9, stopped.stderr
    assert (home / "half/checkpoint-0000020").is_dir()
    ptkit("train", *options, "--out", "half", cwd=home)
    whole, half = (read_adapter(home / name / "adapter").tensors for name in ("whole", "half"))
    assert whole.keys() == half.keys()
    assert all(torch.equal(whole[name], half[name]) for name in whole)


KILLED_AT_STEP_25 = """
import os, signal
from ptkit.training.adapter_trainer import AdapterTrainer
step = AdapterTrainer.step
def stepped(self, *args):
    step(self, *args)
    if self.progress.step == 25:
        os.kill(os.getpid(), signal.SIGKILL)
AdapterTrainer.step = stepped
from ptkit.cli.main import run
run()
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("retention={text: general-en}", "a classification head writes none"),
        ("train.together=2", "rows of a batch share one"),
        ("train.retain={weight: 1}", "has none"),
        ("task.labels=['yes', 'yes']", "listed twice"),
        ("task.labels=['yes', 'no']", "label `maybe` is not in `task.labels`"),
        ("task.label=verdict", "names the column `verdict`"),
        ("methods.2={kind: text_prompt}", "answers in words"),
        ("task.metrics=[entity_f1]", "no metric `entity_f1`"),
    ],
)
def test_a_wrong_recipe_says_what_is_wrong(home: Path, change: str, said: str) -> None:
    assert said in refused("compare", "texts.yaml", "--quiet", "--out", "no", "--set", change,
                           cwd=home)  # fmt: skip


def test_commands_for_language_models_say_what_else_to_use(home: Path) -> None:
    ptkit("train", "texts.yaml", "--method", "lora", "--quiet", "--out", "lora", cwd=home)
    said = refused("generate", "w1", "--model", "bert", "-a", "lora", cwd=home)
    assert "is an encoder" in said
    said = refused("export", "lora", "--as", "kv", "--out", "no", cwd=home)
    assert "only adapters of causal language models" in said
    with pytest.raises(ModelError, match="a head of its own"):
        AdapterBank(random_classifier("bert"))
    with pytest.raises(AdapterError, match=r"open it with `ptkit.classifier"):
        load_adapter(home / "lora")


def test_word_metrics_are_the_libraries_own() -> None:
    from seqeval.metrics import f1_score as entities
    from sklearn.metrics import accuracy_score, f1_score

    draw = random.Random(3)
    tags = ["O", "B-A", "I-A", "B-B", "I-B"]
    gold = [[draw.choice(tags) for _ in range(draw.randint(1, 9))] for _ in range(40)]
    found = [[g if draw.random() < 0.6 else draw.choice(tags) for g in row] for row in gold]
    texts, references = [" ".join(r) for r in found], [(" ".join(r),) for r in gold]
    flat = [[tag for row in side for tag in row] for side in (gold, found)]
    assert metric("word_accuracy")(texts, references) == pytest.approx(100 * accuracy_score(*flat))
    assert metric("word_macro_f1")(texts, references) == pytest.approx(
        100 * f1_score(*flat, average="macro")
    )
    assert metric("entity_f1")(texts, references) == pytest.approx(100 * entities(gold, found))


def test_words_that_were_not_read_count_as_wrong() -> None:
    from ptkit.data.encode import encode_examples
    from ptkit.data.examples import Example
    from ptkit.evaluation.predict import predict
    from ptkit.recipe.tasks import TokenClassificationTask

    base = random_classifier("bert", "token")
    task = TokenClassificationTask(
        kind="token_classification", data={"builtin": "none"}, labels=list(LABELS),
        max_input_tokens=3,
    )  # fmt: skip
    words = ("w5", "w6", "w7", "w8")
    example = Example("w5 w6 w7 w8", "yes no yes no", ("yes no yes no",), words=words)
    (row,) = encode_examples([example], base.tokenizer, task)
    assert row.target_ids == [0, 1, 0]
    (answer,) = predict(adapter_on(base, "linear_probe"), [example], task, 4)
    assert answer.prediction.split()[3] == "?"
    assert len(answer.prediction.split()) == 4
