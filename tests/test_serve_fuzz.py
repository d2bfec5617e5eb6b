"""Requests made from the server's own OpenAPI document: no answer of 500, none undocumented."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from ptkit.bank import AdapterBank
from ptkit.runtime.base_model import load_base
from ptkit.runtime.model_names import TINY_EN
from ptkit.serve.answers import RequestLimits
from ptkit.serve.app import create_app
from ptkit.serve.engine import Engine
from ptkit.serve.library import Library
from ptkit.serve.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture  # for each test: its client ends the application, and the engine with it
def document(tmp_path_factory: pytest.TempPathFactory) -> schemathesis.BaseSchema:
    folder = tmp_path_factory.mktemp("served") / "adapters"
    shutil.copytree(ROOT / "adapters", folder)
    bank = AdapterBank(load_base(TINY_EN, device="cpu"))
    metrics = Metrics(bank)
    engine = Engine(bank, max_rows=4, logger=metrics)
    metrics.watch(engine)
    library = Library(engine, folder, base_name=TINY_EN)
    assert library.register_all() == []
    app = create_app(library, metrics, RequestLimits(max_tokens=8, timeout=20))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


#: What a request may be answered with, and what may be in it.
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
_SETTINGS = settings(
    max_examples=20, deadline=None, database=None, suppress_health_check=[*HealthCheck]
)


def modest(case: schemathesis.Case) -> None:
    """Let a good request ask for an adapter that is there, and for little."""
    if isinstance(case.body, dict) and "model" in case.body:
        case.body["model"] = "facts-prefix"
        case.body["max_tokens"] = 4


@pytest.mark.parametrize("mode", [POSITIVE, NEGATIVE])
def test_any_request_gets_a_documented_answer(
    document: schemathesis.BaseSchema, mode: schemathesis.GenerationMode
) -> None:
    answered: Counter[tuple[str, int]] = Counter()

    def ask(case: schemathesis.Case) -> None:
        if mode is POSITIVE:
            modest(case)
        response = case.call()
        answered[case.operation.label, response.status_code] += 1
        case.validate_response(response, checks=CHECKS)

    for result in document.get_all_operations():
        strategy = result.ok().as_strategy(generation_mode=mode)
        # Some operations take nothing that could be wrong.
        with contextlib.suppress(Unsatisfiable):
            _SETTINGS(given(case=strategy)(ask))()
    assert len({label for label, _ in answered}) >= 6
    if mode is POSITIVE:
        assert answered["POST /v1/completions", 200] > 0
        assert answered["POST /v1/chat/completions", 200] > 0
    else:
        assert answered["POST /v1/completions", 400] > 10
