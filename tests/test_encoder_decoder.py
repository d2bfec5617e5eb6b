"""Prefix tuning of encoder-decoders: encoder, decoder and cross-attention (Li & Liang 2021)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, word_tokenizer
from test_cli import ptkit, refused
from test_peft_parity import rows_of
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BartConfig,
    BartForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ptkit import AdapterBank
from ptkit.data.encoded import EncodedExample
from ptkit.errors import AdapterError, ModelError
from ptkit.formats.adapter_files import read_adapter, write_adapter
from ptkit.methods import ADAPTERS, Demonstrations, adapter_from_files, create_adapter
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.attention_choice import set_attention
from ptkit.runtime.attention_sites import attention_modules
from ptkit.runtime.base_model import Base, frozen_base
from ptkit.runtime.forward import collate, supervised_logits, token_losses
from ptkit.runtime.generation import generate
from ptkit.runtime.scoring import continuation_scores

SHAPE = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 64, "dropout": 0.0, "pad_token_id": 95,
    "eos_token_id": 0, "bos_token_id": 94, "decoder_start_token_id": 94,
    "forced_eos_token_id": None, "forced_bos_token_id": None,
}  # fmt: skip
MODELS = {
    "bart": lambda: BartForConditionalGeneration(BartConfig(**SHAPE)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**SHAPE)),
    "pegasus": lambda: PegasusForConditionalGeneration(PegasusConfig(**SHAPE)),
    "marian": lambda: MarianMTModel(MarianConfig(**{**SHAPE, "scale_embedding": True})),
    # d_kv * heads is not d_model, as in t5-v1_1
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=12, d_ff=48, num_layers=2,
                 num_decoder_layers=3, num_heads=4, dropout_rate=0.0, pad_token_id=95,
                 eos_token_id=0, decoder_start_token_id=95)
    ),
}  # fmt: skip


def random_pair(family: str, attention: str = "eager") -> Base:
    torch.manual_seed(1)
    model: PreTrainedModel = MODELS[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3 if family == "t5" else 8)
    set_attention(model, attention)
    tokenizer = word_tokenizer()
    tokenizer.pad_token = "w95"
    return frozen_base(model.eval(), tokenizer, f"random-{family}")


def prefix_tuning(base: Base, tokens: int = 4, **settings: object):
    cls = ADAPTERS["prefix_tuning"]
    section = cls.section_class(
        kind="prefix_tuning", num_virtual_tokens=tokens, **{"start": "random", **settings}
    )
    torch.manual_seed(2)
    return create_adapter(section, base, Demonstrations(["w1 w2 w3 w4"], 0))


def learnt(base: Base, kind: str, tokens: int = 4, seed: int = 2) -> KVPrefix:
    """What a random adapter of a method hands to the model."""
    if kind == "prefix_tuning":
        return prefix_tuning(base, tokens).prefix().detach()
    section = ADAPTERS[kind].section_class(kind=kind, num_virtual_tokens=tokens, start="random")
    torch.manual_seed(seed)
    return create_adapter(section, base, Demonstrations(["w1 w2"], 0)).prefix().detach()


def examples(inputs: list[int], targets: list[int]) -> list[EncodedExample]:
    return [EncodedExample(i, t) for i, t in
            zip(rows_of(inputs), rows_of(targets, seed=2), strict=True)]  # fmt: skip


def losses(base: Base, rows: list[EncodedExample], batch: PrefixBatch | None) -> list[float]:
    with torch.no_grad():
        found = token_losses(
            *supervised_logits(base.model, **collate(rows, base), batch=batch)
        ).split([len(row.target_ids) for row in rows])
    return [float(part.sum()) for part in found]


@pytest.fixture(params=sorted(MODELS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_loss_without_a_prefix_is_the_models_own(family: str) -> None:
    base = random_pair(family)
    rows = examples([7, 3], [4, 6])
    tensors = collate(rows, base)
    with torch.no_grad():
        own = float(base.model(**tensors).loss) * sum(len(r.target_ids) for r in rows)
    assert sum(losses(base, rows, None)) == pytest.approx(own, rel=1e-5)


def by_name(model: PreTrainedModel, prefix: KVPrefix) -> dict[str, tuple]:
    """Module name -> its keys and values, by what the paper says: encoder, decoder, cross."""
    names = [n for n, m in model.named_modules()
             if hasattr(m, "k_proj") or type(m).__name__ == "T5Attention"]  # fmt: skip
    cross = [n for n in names if "encoder_attn" in n or "EncDecAttention" in n]
    encoder = [n for n in names if ".encoder." in f".{n}"]
    decoder = [n for n in names if n not in cross and n not in encoder]
    pairs = zip(prefix.keys, prefix.values, strict=True)
    return dict(zip([*encoder, *decoder, *cross], pairs, strict=True))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_those_of_an_attention_written_out(family: str, attention: str) -> None:
    """Against softmax(q [p; k] + mask) [p; v], with the prefix looked up by the module's name."""
    base = random_pair(family, attention)
    prefix = prefix_tuning(base).prefix().detach()
    rows = examples([7, 3, 5], [4, 6, 2])
    tensors = collate(rows, base)
    with torch.no_grad():
        ours, _ = supervised_logits(base.model, **tensors, batch=PrefixBatch.shared(prefix, 3))
    model = base.model
    own = {id(m): n for n, m in model.named_modules()}
    parts = by_name(model, prefix)

    def written_out(module: nn.Module, query, key, value, mask, scaling, position_bias=None, **_):
        keys, values = (t.expand(len(query), *t.shape) for t in parts[own[id(module)]])
        scores = query @ torch.cat([keys, key], 2).transpose(-1, -2) * scaling
        added = 0 if mask is None else mask
        added = added if position_bias is None else added + position_bias
        if torch.is_tensor(added):
            scores[..., keys.shape[2] :] += added
        weights = scores.softmax(-1)
        return (weights @ torch.cat([values, value], 2)).transpose(1, 2).contiguous(), weights

    AttentionInterface.register("written_out", written_out)
    from transformers.masking_utils import eager_mask

    AttentionMaskInterface.register("written_out", eager_mask)
    set_attention(model, "written_out")
    with torch.no_grad():
        theirs, _ = supervised_logits(model, **tensors, batch=None)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("kinds", [
    ("prefix_tuning", "prefix_tuning"), ("prompt_tuning", "p_tuning"),
    ("prefix_tuning", "prompt_tuning"),
])  # fmt: skip
def test_padded_rows_are_as_alone_and_as_generated(family: str, kinds: tuple[str, str]) -> None:
    base = random_pair(family)
    first, second = (learnt(base, kind, n) for kind, n in zip(kinds, (4, 6), strict=True))
    own = [first, second, None, first]
    inputs = rows_of([6, 2, 4, 9])
    options = {"pad_token_id": base.pad_token_id, "max_new_tokens": 6, "do_sample": False}
    batch = PrefixBatch.gathered(own, base.layout)
    together = generate(base.model, inputs, batch, **options)
    for i, answer in enumerate(together):
        solo = PrefixBatch.gathered([own[i]], base.layout)
        assert answer == generate(base.model, [inputs[i]], solo, **options)[0]
        if answer:
            # mBART starts with the language that its targets end with.
            written = [*answer, 94] if family == "mbart" else answer
            row = [EncodedExample(inputs[i], written)]
            with torch.no_grad():
                logits, _ = supervised_logits(base.model, **collate(row, base), batch=solo)
            assert logits[: len(answer)].argmax(-1).tolist() == answer
    rows = [EncodedExample(i, t) for i, t in zip(inputs, rows_of([3, 5, 2, 4], 2), strict=True)]
    alone = [losses(base, [row], PrefixBatch.gathered([p], base.layout))[0]
             for row, p in zip(rows, own, strict=True)]  # fmt: skip
    assert losses(base, rows, batch) == pytest.approx(alone, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning"])
def test_beams_share_the_encoders_reading(family: str, kind: str) -> None:
    base = random_pair(family)
    prefixes = [learnt(base, kind), None]
    inputs = rows_of([6, 4])
    options = {"pad_token_id": base.pad_token_id, "max_new_tokens": 5, "num_beams": 3}
    batch = PrefixBatch.gathered(prefixes, base.layout)
    together = generate(base.model, inputs, batch, **options)
    for i in range(2):
        solo = PrefixBatch.gathered([prefixes[i]], base.layout)
        assert together[i] == generate(base.model, [inputs[i]], solo, **options)[0]


@pytest.mark.parametrize("kind", ["prefix_tuning", "prompt_tuning"])
def test_labels_are_scored_as_the_loss_scores_them(family: str, kind: str) -> None:
    base = random_pair(family)
    prefix = learnt(base, kind)
    inputs, words = rows_of([6, 3]), [[5, 9], [7], [1, 2, 3]]
    scores = continuation_scores(
        base.model, inputs, words, PrefixBatch.shared(prefix, 2), pad_token_id=base.pad_token_id
    )
    for i, context in enumerate(inputs):
        for j, word in enumerate(words):
            alone = losses(base, [EncodedExample(context, word)], PrefixBatch.shared(prefix, 1))
            assert float(scores[i, j]) == pytest.approx(-alone[0], rel=1e-4, abs=1e-4)


def test_gradients_reach_every_site_and_survive_checkpointing(family: str) -> None:
    def gradient(checkpointed: bool) -> torch.Tensor:
        base = random_pair(family)
        adapter = prefix_tuning(base)
        if checkpointed:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
            base.model.train()
        rows = examples([6, 4], [5, 3])
        batch = PrefixBatch.shared(adapter.prefix(), 2)
        token_losses(
            *supervised_logits(base.model, **collate(rows, base), batch=batch)
        ).mean().backward()
        assert all(p.grad is None for p in base.model.parameters())
        return adapter.encoder.embedding.weight.grad

    plain = gradient(False)
    parts = KVPrefix.from_flat(plain, random_pair(family).layout)
    assert len(parts.keys) == 2 + 3 + 3
    assert all(t.abs().max() > 0 for t in (*parts.keys, *parts.values))
    torch.testing.assert_close(gradient(True), plain, atol=1e-6, rtol=1e-3)


def test_start_is_what_the_model_makes_of_real_tokens(family: str) -> None:
    base = random_pair(family)
    adapter = prefix_tuning(base, 4, start="text", start_text="w1 w2 w3 w4")
    prefix = adapter.prefix().detach()
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        read = base.model.get_encoder()(input_ids=ids).last_hidden_state
        cache = base.model(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values
    modules = attention_modules(base.model)
    assert len(modules) == len(prefix.keys)
    for layer in range(3):
        torch.testing.assert_close(
            prefix.keys[2 + layer], cache.self_attention_cache.layers[layer].keys[0]
        )
        torch.testing.assert_close(
            prefix.values[5 + layer], cache.cross_attention_cache.layers[layer].values[0]
        )
    project = getattr(modules[5], "v_proj", None) or modules[5].v
    heads = prefix.values[5].shape[0]
    expected = project(read)[0].view(4, heads, -1).transpose(0, 1)
    torch.testing.assert_close(prefix.values[5], expected)


def test_saved_and_read_back_and_not_taken_by_others(family: str, tmp_path: Path) -> None:
    base = random_pair(family)
    adapter = prefix_tuning(base)
    write_adapter(tmp_path / "a", adapter.files())
    again = adapter_from_files(read_adapter(tmp_path / "a"), base)
    assert torch.equal(again.flat(), adapter.flat())
    bank = AdapterBank(base)
    bank.load(tmp_path / "a")
    texts = ["w1 w2 w3", "w7"]
    options = {"max_new_tokens": 5, "do_sample": False}
    assert bank.generate(texts, ["a", None], **options)[1] == bank.generate(
        texts[1:], [None], **options
    )[0]  # fmt: skip
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["peft_type"] == "PTKIT_ENCODER_DECODER_PREFIX"
    theirs = {**config, "peft_type": "PREFIX_TUNING"}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(theirs))
    with pytest.raises(AdapterError, match="the decoder's part only"):
        adapter_from_files(read_adapter(tmp_path / "a"), base)


@torch.no_grad()
def test_soft_prompt_is_read_by_the_encoder_written_out(family: str) -> None:
    """No row is dead, no position is taken, and the decoder reads what became of the prompt."""
    base = random_pair(family)
    soft = learnt(base, "prompt_tuning")
    (row,) = rows = examples([6], [4])
    (loss,) = losses(base, rows, PrefixBatch.shared(soft, 1))
    model, encoder = base.model, base.model.get_encoder()
    words = base.embedding(torch.tensor([row.input_ids]))
    scale = 32**0.5 if family == "marian" else 1.0  # its config says so; of d_model
    prompt, words = soft.embeddings[None] * scale, words * scale
    if family == "t5":  # relative positions: the same as a longer text
        read = encoder(inputs_embeds=torch.cat([prompt, words], 1))
        states = read.last_hidden_state
    else:
        shape = torch.zeros(1, 6, dtype=torch.long)
        at = encoder.embed_positions(shape if family in ("bart", "mbart") else shape.shape)
        states = torch.cat([prompt, words + at], 1)
        if hasattr(encoder, "layernorm_embedding"):
            states = encoder.layernorm_embedding(states)
        for layer in encoder.layers:
            states = layer(states, None)
        states = getattr(encoder, "layer_norm", nn.Identity())(states)
    labels = torch.tensor([row.target_ids])
    output = model(
        encoder_outputs=(states,), attention_mask=torch.ones(1, 10, dtype=torch.long),
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(labels=labels),
    )  # fmt: skip
    expected = token_losses(output.logits[0], labels[0]).sum()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert loss != pytest.approx(losses(base, rows, None)[0], rel=1e-4)


@pytest.mark.parametrize("kind", ["prompt_tuning", "p_tuning"])
def test_soft_prompts_train_checkpointed_and_are_saved(
    family: str, kind: str, tmp_path: Path
) -> None:
    def gradients(checkpointed: bool) -> list[torch.Tensor]:
        base = random_pair(family)
        section = ADAPTERS[kind].section_class(kind=kind, num_virtual_tokens=4, start="random")
        torch.manual_seed(2)
        adapter = create_adapter(section, base, Demonstrations(["w1 w2"], 0))
        if checkpointed:
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
            base.model.train()
        rows = examples([6, 4], [5, 3])
        batch = PrefixBatch.shared(adapter.prefix(), 2)
        token_losses(
            *supervised_logits(base.model, **collate(rows, base), batch=batch)
        ).mean().backward()
        assert all(p.grad is None for p in base.model.parameters())
        if not checkpointed:
            write_adapter(tmp_path / "a", adapter.files())
            again = adapter_from_files(read_adapter(tmp_path / "a"), base)
            torch.testing.assert_close(again.embeddings(), adapter.embeddings())
            bank = AdapterBank(base)
            bank.load(tmp_path / "a")
            own = prefix_tuning(base)
            bank.add("other", own)
            options = {"max_new_tokens": 5, "do_sample": False}
            texts, names = ["w1 w2 w3", "w7", "w8 w9"], ["a", "other", None]
            mixed = bank.generate(texts, names, **options)
            for text, name, answer in zip(texts, names, mixed, strict=True):
                assert bank.generate([text], [name], **options) == [answer]
        return [p.grad for p in adapter.trainable().values()]

    plain = gradients(False)
    assert any(g.abs().max() > 0 for g in plain)
    for a, b in zip(gradients(True), plain, strict=True):
        # Before transformers 5.20, T5 attends by another kernel where a mask has a gradient.
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-3)


def test_methods_that_do_not_fit_say_so() -> None:
    section = ADAPTERS["text_prompt"].section_class(kind="text_prompt")
    with pytest.raises(ModelError, match=r"does not work on encoder-decoders.*prefix_tuning"):
        create_adapter(section, random_pair("bart"), Demonstrations(["w1 w2"], 0))


def test_settings_that_do_not_fit_say_so() -> None:
    with pytest.raises(ModelError, match="position: prefix"):
        prefix_tuning(random_pair("bart"), position="infix")
    with pytest.raises(ModelError, match="layers of one stack"):
        prefix_tuning(random_pair("bart"), trained_layers=2, start="examples")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison on a tiny random BART: say the first two words of the input."""
    folder = tmp_path_factory.mktemp("pairs")
    base = random_pair("bart")
    base.model.save_pretrained(folder / "bart")
    base.tokenizer.save_pretrained(folder / "bart")
    rows = rows_of([6] * 64, seed=5)
    for split, part in (("train", rows[:48]), ("validation", rows[48:56]), ("test", rows[56:])):
        lines = [json.dumps({"text": " ".join(f"w{i % 90 + 1}" for i in row),
                             "summary": " ".join(f"w{i % 90 + 1}" for i in row[:2])})
                 for row in part]  # fmt: skip
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    (folder / "general.txt").write_text(" ".join(f"w{i % 90 + 1}" for i in range(400)))
    (folder / "sum.yaml").write_text(
        "name: sum\n"
        f"model: {{id: {folder / 'bart'}}}\n"
        "task:\n"
        "  kind: generation\n"
        "  data: {files: {train: train.jsonl, validation: validation.jsonl, test: test.jsonl}}\n"
        "  input: '{text}'\n"
        "  target: '{summary}'\n"
        "  max_input_tokens: 32\n"
        "  max_target_tokens: 8\n"
        "  num_beams: 2\n"
        "  metrics: [rouge1, rougeL, perplexity]\n"
        "methods:\n"
        "  - kind: base\n"
        "  - {kind: prefix_tuning, num_virtual_tokens: 4, learning_rate: 0.1}\n"
        "  - {kind: prefix_tuning, label: mlp, reparameterize: true, learning_rate: 3e-3}\n"
        "  - {kind: prompt_tuning, num_virtual_tokens: 4}\n"
        "  - {kind: lora, rank: 4}\n"
        "  - {kind: full}\n"
        "seeds: [0, 1]\n"
        "retention: {text: general.txt}\n"
        "train: {steps: 12, eval_every: 6, save_every: 6, batch_size: 8, together: 2}\n"
    )
    return folder


def test_comparison_on_an_encoder_decoder(recipe: Path) -> None:
    done = ptkit("compare", "sum.yaml", "--quiet", "--out", "out", cwd=recipe)
    assert "prefix_tuning" in done.stdout
    records = [json.loads(line) for line in (recipe / "out/results.jsonl").read_text().splitlines()]
    assert len(records) == 1 + 2 * 5
    base = next(r for r in records if r["method"] == "base")
    assert base["retention"]["forgetting"] == 0
    for record in records:
        if record["method"] != "full":
            assert record["adapter_off_exact"] is True
        if record["curve"]:
            first, last = record["curve"][0], record["curve"][-1]
            assert min(e["validation_loss"] for e in record["curve"]) <= first["validation_loss"]
            assert last["step"] == 12
            assert record["metrics"]["perplexity"] < base["metrics"]["perplexity"]
    ptkit("export", "out/cells/prefix_tuning-seed0", "--out", "mine", cwd=recipe)
    assert "PEFT cannot read this file" in (recipe / "mine/README.md").read_text()
    checks = json.loads(
        ptkit("verify", "mine", "--score", "--recipe", "sum.yaml", "--json",
              cwd=recipe).stdout
    )  # fmt: skip
    assert checks["passed"], checks
    said = ptkit("generate", "w1 w2 w3", "--model", "bart", "-a", "mine", "--max-new-tokens", "4",
                 cwd=recipe)  # fmt: skip
    assert said.returncode == 0


def test_what_does_not_fit_is_refused_before_anything_is_trained(recipe: Path) -> None:
    said = refused("compare", "sum.yaml", "--quiet", "--out", "no", "--set",
                   "methods.3={kind: text_prompt}", cwd=recipe)  # fmt: skip
    assert "does not work on encoder-decoders" in said
