"""Counts for vLLM's `/metrics`: what the workers loaded, and what the server keeps for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)

from ptkit.vllm_connector.library import PrefixLibrary

#: Counts of a worker since they were last taken; `kept_bytes` may fall.
_COUNTS = {
    "loads": "Prefixes that workers wrote into a request's blocks.",
    "fetches": "Of those, prefixes that were read from the spool.",
    "fetch_seconds": "Seconds that this took.",
}
_KEPT = "kept_bytes"


class PrefixLoadStats(KVConnectorStats):
    """What a worker did: the counts of `_COUNTS`, and by how much the bytes that it keeps grew."""

    def __init__(self, data: Mapping[str, Any] | None = None) -> None:
        super().__init__({**_nothing(), **(data or {})})

    def reset(self) -> None:
        """See vLLM's."""
        self.data = _nothing()

    def aggregate(self, other: KVConnectorStats) -> PrefixLoadStats:
        """See vLLM's."""
        for name in self.data:
            self.data[name] += other.data.get(name, 0)
        return self

    def reduce(self) -> dict[str, int | float]:
        """See vLLM's."""
        return {f"ptkit {name}": value for name, value in self.data.items()}

    def is_empty(self) -> bool:
        """See vLLM's."""
        return not any(self.data.values())


def _nothing() -> dict[str, Any]:
    return dict.fromkeys((*_COUNTS, _KEPT), 0)


class PrefixLoadMetrics(KVConnectorPromMetrics):
    """The same for Prometheus: `ptkit:prefix_loads_total` and so on, `ptkit:prefix_kept_bytes`."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        kept = "Bytes of prefixes that workers keep in memory."
        made: dict[str, Any] = {
            name: metric_types[Counter](
                name=f"ptkit:prefix_{name}", documentation=told, labelnames=labelnames
            )
            for name, told in _COUNTS.items()
        }
        made[_KEPT] = metric_types[Gauge](
            name=f"ptkit:prefix_{_KEPT}", documentation=kept, labelnames=labelnames
        )
        self._kept = dict.fromkeys(per_engine_labelvalues, 0)
        self._metrics = {
            engine: {name: metric.labels(*values) for name, metric in made.items()}
            for engine, values in per_engine_labelvalues.items()
        }

    def observe(self, transfer_stats_data: Mapping[str, Any], engine_idx: int = 0) -> None:
        """See vLLM's."""
        metrics = self._metrics[engine_idx]
        for name in _COUNTS:
            metrics[name].inc(transfer_stats_data.get(name, 0))
        self._kept[engine_idx] += transfer_stats_data.get(_KEPT, 0)
        metrics[_KEPT].set(self._kept[engine_idx])  # Ray's gauges know nothing else


class LibraryMetrics(Collector):
    """What the API server knows of its adapters."""

    def __init__(self, library: PrefixLibrary) -> None:
        self._library = library

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client's."""
        library = self._library
        yield GaugeMetricFamily("ptkit:adapters", "Adapters that are served.", len(library.names()))
        yield GaugeMetricFamily(
            "ptkit:spool_bytes", "Bytes of versions that lie in the spool.", library.spool_bytes
        )
        yield CounterMetricFamily(
            "ptkit:adapter_reads", "Times that an adapter's files were read.", library.reads
        )
