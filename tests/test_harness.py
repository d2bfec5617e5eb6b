"""lm-evaluation-harness with an adapter: the same figures as its own model with PEFT's."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import beginning_base, random_base
from peft import PeftModel
from test_cli import ptkit, refused
from tokenizers.processors import TemplateProcessing

pytest.importorskip("lm_eval", reason="the harness is an optional extra")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from ptkit.errors import DataError
from ptkit.evaluation.harness import AdapterLM, evaluate_tasks, known_tasks
from ptkit.formats.adapter_files import write_adapter
from ptkit.methods import ADAPTERS, Demonstrations, create_adapter, load_adapter
from ptkit.methods.catalogue import method_section
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.model_names import TINY_EN_FOLDER

SHIPPED = Path(__file__).resolve().parents[1] / "adapters"
TASKS = {
    "pick": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "write": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "The",
        "generation_kwargs": {"until": ["."], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "filter_list": [{"name": "first", "filter": [
            {"function": "regex", "regex_pattern": "(\\w+)"}, {"function": "take_first"}]}],
    },
}  # fmt: skip
DOCS = [
    {"question": "kind[boat], name[Orwick], seats[six]\n", "choices": ["The boat", "A robot", "x"],
     "answer": 0},
    {"question": "kind[robot], name[Ferro]\n", "choices": ["The boat Orwick", "Ferro is"],
     "answer": 1},
    {"question": "The committee met on Monday and", "choices": [" nobody", " the the", " agreed"],
     "answer": 2},
    {"question": "Once", "choices": [" upon", " more than that"], "answer": 0},
] * 2  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.json").write_text("\n".join(json.dumps(doc) for doc in DOCS))
    for name, task in TASKS.items():
        files = {"data_files": {"test": str(folder / "docs.json")}}
        values = {"task": name, "dataset_path": "json", "test_split": "test", **task,
                  "dataset_kwargs": files}  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base("tiny-en")


@pytest.fixture
def only_own_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the harness's own thousands of tasks takes a quarter of a minute."""
    own = partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("ptkit.evaluation.harness.TaskManager", own)
    monkeypatch.setattr(f"{__name__}.TaskManager", own)


@pytest.mark.usefixtures("only_own_tasks")
@pytest.mark.parametrize("with_adapter", [False, True])
def test_figures_are_those_of_the_harness_own_model(
    base: Base, tasks: Path, with_adapter: bool
) -> None:
    model = load_base("tiny-en").model
    if with_adapter:
        adapter = load_adapter(SHIPPED / "facts-prefix", base)
        model = PeftModel.from_pretrained(model, str(SHIPPED / "facts-prefix")).eval()
        longest = base.max_positions - adapter.virtual_tokens
    else:
        section = ADAPTERS["base"].section_class(kind="base")
        adapter = create_adapter(section, base, Demonstrations((), 0))
        longest = base.max_positions
    # One row at a time: PEFT's own padding is not the oracle.
    peer = HFLM(model, tokenizer=str(TINY_EN_FOLDER), batch_size=1, device="cpu",
                max_length=longest)  # fmt: skip
    theirs = simple_evaluate(
        peer, tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks)),
        bootstrap_iters=0, verbosity="ERROR",
    )["results"]  # fmt: skip
    ours = evaluate_tasks(adapter, known_tasks(list(TASKS), tasks), batch_size=3)
    for task in TASKS:
        names = [n for n, v in theirs[task].items() if isinstance(v, float) and "stderr" not in n]
        assert names
        for name in names:
            assert ours[task][name] == pytest.approx(theirs[task][name], rel=1e-4), (task, name)
        assert ours[task]["n"] == len(DOCS)
    assert 0 < ours["pick"]["acc,none"] <= 1
    assert ours["read"]["bits_per_byte,none"] > 0.5


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_texts_longer_than_the_window_are_scored_as_the_harness_own_model_does(family: str) -> None:
    small = random_base(family)
    section = ADAPTERS["base"].section_class(kind="base")
    ours = AdapterLM(create_adapter(section, small, Demonstrations((), 0)), 3)
    peer = HFLM(small.model, tokenizer=small.tokenizer, batch_size=1, device="cpu")  # type: ignore[arg-type]
    assert peer.max_length == ours.max_length == 128
    texts = [
        " ".join(f"w{1 + (7 * i + n) % 90}" for i in range(n)) for n in (5, 127, 128, 129, 300)
    ]
    asked = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    theirs = [float(value) for value in peer.loglikelihood_rolling(asked, disable_tqdm=True)]
    assert ours.loglikelihood_rolling(asked) == pytest.approx(theirs, rel=1e-4)
    ids = [1 + (11 * i) % 90 for i in range(200)]
    shapes = ((1, 128), (150, 3), (127, 2), (128, 1), (60, 100))
    # Each begins elsewhere: the peer takes rows that read the same tokens for one row.
    pairs: list = [
        (("", ""), ids[k : k + context], ids[k + context : k + context + more])
        for k, (context, more) in enumerate(shapes)
    ]
    scored = ours._loglikelihood_tokens(pairs)
    for (value, greedy), (wanted, best) in zip(
        scored, peer._loglikelihood_tokens(pairs, disable_tqdm=True), strict=True
    ):
        assert (value, greedy) == (pytest.approx(wanted, rel=1e-4), best)
    with pytest.raises(DataError, match="a continuation has 129 tokens"):
        ours._loglikelihood_tokens([(("", ""), [1], ids[:129])])


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_base_with_a_begin_of_text_token_is_scored_as_the_harness_own_model_does(
    with_adapter: bool, tmp_path: Path
) -> None:
    small, model = beginning_base("llama"), beginning_base("llama").model
    section = ADAPTERS["base"].section_class(kind="base")
    adapter = create_adapter(section, small, Demonstrations((), 0))
    if with_adapter:
        section = method_section(
            {"kind": "prefix_tuning", "num_virtual_tokens": 4, "start": "examples"}
        )
        made = create_adapter(section, small, Demonstrations(["w5 w6 w7 w8"], 0))
        write_adapter(tmp_path / "a", made.files())
        adapter, model = made, PeftModel.from_pretrained(model, str(tmp_path / "a")).eval()
    ours = AdapterLM(adapter, 3)
    peer = HFLM(model, tokenizer=small.tokenizer, batch_size=1, device="cpu",
                max_length=ours.max_length)  # type: ignore[arg-type]  # fmt: skip
    texts = ["w1", "w3 w4 w5", "<start> w7 w8", ""]
    pairs = [(text, f"w{i + 20} w{i + 30}") for i, text in enumerate(texts)]
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    wanted = peer.loglikelihood(asked, disable_tqdm=True)
    for (value, best), (theirs, greedy) in zip(ours.loglikelihood(asked), wanted, strict=True):
        assert (value, best) == (pytest.approx(float(theirs), rel=1e-4), greedy)
    texts = [" ".join(f"w{1 + i % 90}" for i in range(n)) for n in (3, 126, 127, 128, 129, 300)]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        [float(value) for value in peer.loglikelihood_rolling(rolling, disable_tqdm=True)], rel=1e-4
    )
    # What is too long is cut behind the begin-of-text token, which the harness's own model loses.
    ids = [95, *(1 + (11 * i) % 90 for i in range(200))]
    ((cut, _),) = ours._loglikelihood_tokens([(("", ""), ids, [9])])
    kept = [95, *ids[-(ours.max_length - 1) :]]
    ((short, _),) = ours._loglikelihood_tokens([(("", ""), kept, [9])])
    assert cut == short


def test_what_is_written_after_a_begin_of_text_token_is_what_the_harness_own_model_writes() -> None:
    begun = load_base("tiny-en", device="cpu")
    first = str(begun.tokenizer.bos_token)
    begun.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, int(begun.tokenizer.bos_token_id))]
    )
    peer = HFLM(begun.model, tokenizer=begun.tokenizer, batch_size=1, device="cpu")  # type: ignore[arg-type]
    plain = ADAPTERS["base"].section_class(kind="base")
    ours = AdapterLM(create_adapter(plain, begun, Demonstrations((), 0)), 3)
    options = {"until": ["."], "max_gen_toks": 8, "do_sample": False}
    texts = ["The committee", f"{first}kind[robot]\n", "Once upon a time there was a"]
    writes = [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(texts)]
    assert ours.tok_encode(texts[1]) == begun.tokenizer("kind[robot]\n")["input_ids"]
    assert ours.generate_until(writes) == peer.generate_until(writes, disable_tqdm=True)


def test_a_few_shot_prompt_is_one_text_with_what_the_harness_asks() -> None:
    small = beginning_base("llama")
    shots = method_section({"kind": "text_prompt", "instruction": "w5 w6 w7", "separator": " "})
    ours = AdapterLM(create_adapter(shots, small, Demonstrations((), 0)), 2)
    plain = AdapterLM(
        create_adapter(ADAPTERS["base"].section_class(kind="base"), small, Demonstrations((), 0)), 2
    )
    asked, whole = (
        [Instance("loglikelihood", {}, (f"{before}{text}", "w20 w21"), i)
         for i, text in enumerate(("w1 w2", "w3"))]
        for before in ("", "w5 w6 w7 ")
    )  # fmt: skip
    for (value, _), (wanted, _) in zip(
        ours.loglikelihood(asked), plain.loglikelihood(whole), strict=True
    ):
        assert value == pytest.approx(wanted, rel=1e-4)


@pytest.mark.usefixtures("only_own_tasks")
def test_command(tasks: Path, tmp_path: Path) -> None:
    done = ptkit("evaluate", "--harness", "pick,read", "--include", tasks, "-a",
                 SHIPPED / "facts-prefix", "-a", SHIPPED / "facts-prompt", "--limit", "4", "--json",
                 cwd=tmp_path)  # fmt: skip
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(row["adapter"]).name for row in rows] == ["facts-prefix", "facts-prompt"]
    assert rows[0]["tasks"]["pick"]["n"] == 4
    assert rows[0]["tasks"] != rows[1]["tasks"]
    shown = ptkit("evaluate", "--harness", "pick", "--include", tasks, "--model", "tiny-en",
                  cwd=tmp_path)  # fmt: skip
    assert "acc" in shown.stdout
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("only_own_tasks")
def test_what_cannot_be_evaluated_is_told(tmp_path: Path) -> None:
    assert "knows no task `nothing`" in refused(
        "evaluate", "--harness", "nothing", "--model", "tiny-en", cwd=tmp_path
    )
    assert "give an adapter (-a), a recipe, or --harness TASKS" in refused("evaluate", cwd=tmp_path)
    assert "--harness has tasks of its own" in refused(
        "evaluate", "quickstart", "--harness", "pick", cwd=tmp_path
    )
