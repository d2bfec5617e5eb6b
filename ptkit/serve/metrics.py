"""What a server counts, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from ptkit.bank import AdapterBank
from ptkit.extras import extra
from ptkit.serve.answer import Answer
from ptkit.serve.engine import Engine

with extra("serve", "`ptkit serve`"):
    from prometheus_client import (
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        disable_created_metrics,
        generate_latest,
    )
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector

disable_created_metrics()

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)


class Metrics:
    """Counters of one server; an engine's observer."""

    def __init__(self, bank: AdapterBank) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = Counter(
            "ptkit_answers", "Answers ended, by adapter and outcome.", ["adapter", "outcome"],
            registry=registry,
        )  # fmt: skip
        self._tokens = Counter(
            "ptkit_tokens", "Tokens, by adapter and kind (prompt, completion).",
            ["adapter", "kind"], registry=registry,
        )  # fmt: skip
        self._http = Counter(
            "ptkit_http_responses", "Responses, by status.", ["status"], registry=registry
        )
        self._occupancy = Histogram(
            "ptkit_batch_rows", "Rows of the batch at each step.", buckets=_ROWS, registry=registry
        )
        self._first = Histogram(
            "ptkit_time_to_first_token_seconds", "From request to first token.",
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._whole = Histogram(
            "ptkit_answer_seconds", "From request to last token.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._changes = Histogram(
            "ptkit_adapter_change_seconds", "Loading, swapping, unloading, uploading an adapter.",
            ["change", "outcome"], buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        registry.register(_BankCollector(bank))

    def watch(self, engine: Engine) -> None:
        """Report what `engine` runs, whenever it is asked."""
        for name, help, look in (
            ("ptkit_waiting_answers", "Answers waiting for a row.", lambda: engine.waiting),
            ("ptkit_running_rows", "Running rows.", lambda: engine.running),
        ):
            gauge = Gauge(name, help, registry=self.registry)
            gauge.set_function(look)

    def stepped(self, rows: int) -> None:
        """See `StatLogger`."""
        self._occupancy.observe(rows)

    def ended(self, answer: Answer, outcome: str) -> None:
        """See `StatLogger`."""
        self._requests.labels(answer.name, outcome).inc()
        self._tokens.labels(answer.name, "prompt").inc(len(answer.prompt))
        self._tokens.labels(answer.name, "completion").inc(answer.written)
        if answer.first_token is not None:
            self._first.observe(answer.first_token - answer.asked)
        if outcome in ("stop", "length"):
            self._whole.observe(time.monotonic() - answer.asked)

    def responded(self, status: int) -> None:
        """An HTTP response with `status` was begun."""
        self._http.labels(str(status)).inc()

    @contextmanager
    def change(self, kind: str) -> Iterator[None]:
        """Within this context an adapter is changed; `kind` is load, swap, unload or upload."""
        started, outcome = time.perf_counter(), "refused"
        try:
            yield
            outcome = "done"
        finally:
            self._changes.labels(kind, outcome).observe(time.perf_counter() - started)

    def exposition(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self.registry)


class _BankCollector(Collector):
    """The bank's own counts, read when asked for."""

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        counts = self._bank.counts
        uses = CounterMetricFamily(
            "ptkit_bank_uses", "Uses of a prefix, by where it was.", labels=["tier"]
        )
        uses.add_metric(["resident"], counts.hits)
        uses.add_metric(["host"], counts.from_host)
        uses.add_metric(["disk"], counts.from_disk)
        yield uses
        totals: tuple[tuple[str, str, Callable[[], int]], ...] = (
            ("ptkit_bank_evictions", "Prefixes that left the device.", lambda: counts.evictions),
            ("ptkit_bank_reloads", "Changed files taken over.", lambda: counts.reloads),
            ("ptkit_bank_refusals", "Changed files that were bad.", lambda: counts.refusals),
        )
        for name, help, look in totals:
            yield CounterMetricFamily(name, help, value=look())
        yield GaugeMetricFamily(
            "ptkit_bank_resident_bytes", "Prefixes on the device.", self._bank.resident_bytes
        )
        yield GaugeMetricFamily("ptkit_bank_adapters", "Adapters known.", len(self._bank.list()))
