"""The Ray Serve example, as it stands in the docs, with two replicas."""

from __future__ import annotations

import importlib.util
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from serving import free_port

from ptkit.bank import AdapterBank
from ptkit.runtime.base_model import load_base
from ptkit.runtime.model_names import TINY_EN

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_two_replicas_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    serve = pytest.importorskip("ray.serve")
    monkeypatch.setenv("PTKIT_ADAPTERS", str(ROOT / "adapters"))
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    spec = importlib.util.spec_from_file_location("ray_serve", ROOT / "docs" / "ray_serve.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    port = free_port()
    environment = {"env_vars": {"PTKIT_ADAPTERS": str(ROOT / "adapters"), "OMP_NUM_THREADS": "1"}}
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        runtime_env=environment,
        log_to_driver=False,
    )
    try:
        serve.start(http_options={"port": port, "host": "127.0.0.1"})
        serve.run(example.deployment)
        (application,) = serve.status().applications.values()
        assert application.deployments["Ptkit"].replica_states == {"RUNNING": 2}
        names = ["facts-prefix", "facts-prompt", "routing-prefix", TINY_EN]

        def ask(number: int) -> str:
            body = {
                "model": names[number % 4], "prompt": f"The boat {number % 3}", "max_tokens": 8,
                "temperature": 0, "template": False,
            }  # fmt: skip
            answer = httpx2.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(28)))
        bank = AdapterBank(load_base(TINY_EN, device="cpu"))
        bank.register_all(ROOT / "adapters")
        expected = [
            bank.generate(
                [f"The boat {i % 3}"], [None if i % 4 == 3 else names[i % 4]],
                max_new_tokens=8, do_sample=False,
            )[0]
            for i in range(28)
        ]  # fmt: skip
        assert answers == expected
        counted = set()
        end = time.monotonic() + 30
        while len(counted) < 2 and time.monotonic() < end:
            exposition = httpx2.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
            counted |= {
                line
                for line in exposition.splitlines()
                if line.startswith('ptkit_answers_total{adapter="tiny-en"')
            }
        assert len(counted) == 2, "both replicas answered"
        assert sum(float(line.split()[-1]) for line in counted) == 7
    finally:
        serve.shutdown()
        ray.shutdown()
