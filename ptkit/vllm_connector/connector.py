"""The KV connector: writes an adapter's keys and values into the first blocks of a request.

An exception in a connector ends vLLM's engine, for every request. So nothing is raised here once
the engine runs: what cannot be loaded is reported as failed blocks, and vLLM fails that request.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
)
from vllm.logger import init_logger
from vllm.v1.outputs import LogprobsTensors

from ptkit.vllm_connector.library import spool_of
from ptkit.vllm_connector.loads import PrefixLoadMetrics, PrefixLoadStats
from ptkit.vllm_connector.memory import PrefixMemory
from ptkit.vllm_connector.requests import KEY
from ptkit.vllm_connector.running import require_runs

logger = init_logger("vllm.ptkit")

_DIGEST = re.compile("[0-9a-f]{64}")
#: Bytes of prefixes that a worker keeps in memory.
_BUDGET = 2**30


@dataclass(frozen=True)
class PrefixLoad:
    """Virtual tokens to write. digest: whose; None: nothing that could be read
    first, last: of the virtual tokens; blocks: of the request, from its first token on
    """

    digest: str | None
    first: int
    last: int
    blocks: list[int]


@dataclass
class PrefixLoads(KVConnectorMetadata):
    """Those of one step."""

    loads: list[PrefixLoad] = field(default_factory=list)


class PtkitConnector(KVConnectorBase_V1):
    """See the module. In the scheduler it counts, in the workers it writes."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        require_runs(vllm_config)
        groups = kv_cache_config.kv_cache_groups
        if len(groups) != 1:
            raise ValueError(f"ptkit: a cache of {len(groups)} groups of layers was not tried")
        self._block_size = groups[0].kv_cache_spec.block_size
        self._loads: list[PrefixLoad] = []
        self._failed: set[int] = set()
        self._stats = PrefixLoadStats()
        extra = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._layers: dict[int, Any] = {}  # of this worker
        self._prefixes = PrefixMemory(
            spool_of(vllm_config.kv_transfer_config),
            vllm_config.model_config.dtype,
            int(extra.get("worker_bytes", _BUDGET)),
            self._layers.keys(),
        )
        if role is KVConnectorRole.WORKER:
            # Rows of positions that were loaded, not computed, are left as the memory was found;
            # vLLM then looks up whatever token ids these are.
            LogprobsTensors.empty_cpu = staticmethod(_zeroed(LogprobsTensors.empty_cpu))

    # For vLLM's metrics

    def get_kv_connector_stats(self) -> PrefixLoadStats | None:
        """See vLLM's. What this worker loaded since the last call; None: nothing."""
        stats, self._stats = self._stats, PrefixLoadStats()
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> PrefixLoadStats:
        """See vLLM's."""
        return PrefixLoadStats(data)

    @classmethod
    def build_prom_metrics(cls, *args: Any) -> PrefixLoadMetrics:
        """See vLLM's."""
        return PrefixLoadMetrics(*args)

    # In the scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """See vLLM's. Placeholders that no block of an earlier request holds are loaded."""
        return max(_asked(request)[1] - num_computed_tokens, 0), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """See vLLM's. It is called for new requests and for those resumed after preemption."""
        if num_external_tokens > 0:
            digest, tokens = _asked(request)
            first = tokens - num_external_tokens
            try:
                ids = list(blocks.get_block_ids()[0])
                load = PrefixLoad(digest if first >= 0 else None, max(first, 0), tokens, ids)
                self._loads.append(load)
            except Exception:  # the engine must go on
                logger.exception("ptkit: a load was not understood")

    def build_connector_meta(self, scheduler_output: Any) -> PrefixLoads:
        """See vLLM's."""
        loads, self._loads = self._loads, []
        return PrefixLoads(loads)

    # In a worker

    def register_kv_caches(self, kv_caches: Mapping[str, Tensor]) -> None:
        """See vLLM's. Raises ValueError for attention whose cache cannot be written."""
        layers = self._vllm_config.compilation_config.static_forward_context
        for name in kv_caches:
            numbers = re.findall(r"\.(\d+)\.", name)
            if len(numbers) != 1 or int(numbers[0]) in self._layers:
                raise ValueError(f"ptkit: the number of the layer `{name}` is not known")
            if not hasattr(layers[name].impl, "do_kv_cache_update"):
                kind = type(layers[name].impl).__name__
                raise ValueError(f"ptkit: `{kind}` cannot write keys and values into its cache")
            self._layers[int(numbers[0])] = layers[name]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """See vLLM's. What fails is told by `get_block_ids_with_load_errors`."""
        if not self.has_connector_metadata():
            return
        for load in self._get_connector_metadata().loads:
            try:
                self._write(load)
            except Exception:  # the engine must go on
                logger.exception("ptkit: the adapter %s cannot be loaded", load.digest)
                size = self._block_size
                self._failed.update(load.blocks[load.first // size : -(-load.last // size)])

    def get_block_ids_with_load_errors(self) -> set[int]:
        """See vLLM's."""
        failed, self._failed = self._failed, set()
        return failed

    def wait_for_layer_load(self, layer_name: str) -> None:
        """See vLLM's: `start_load_kv` has written everything."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """See vLLM's: nothing is saved."""

    def wait_for_save(self) -> None:
        """See vLLM's: nothing is saved."""

    def _write(self, load: PrefixLoad) -> None:
        if load.digest is None:
            raise ValueError("the request asks for something else than an adapter")
        prefix = self._fetched(load.digest)
        slots: Tensor | None = None
        for number, layer in self._layers.items():
            keys, values = (_own_heads(t, layer.num_kv_heads) for t in prefix[number])
            cache = layer.kv_cache
            if slots is None:
                slots = _slots(load, self._block_size).to(cache.device)
            rows = slice(load.first, load.last)
            layer.impl.do_kv_cache_update(
                layer,
                keys[rows].to(cache.device, non_blocking=True).contiguous(),
                values[rows].to(cache.device, non_blocking=True).contiguous(),
                cache,
                slots,
            )

    def _fetched(self, digest: str) -> Mapping[int, tuple[Tensor, Tensor]]:
        """The prefix `digest` from memory, or from the spool, which is counted."""
        counts, memory = self._stats.data, self._prefixes
        counts["loads"] += 1
        if digest in memory:
            return memory[digest]
        before, started = memory.nbytes, time.perf_counter()
        prefix = memory[digest]
        counts["fetches"] += 1
        counts["fetch_seconds"] += time.perf_counter() - started
        counts["kept_bytes"] += memory.nbytes - before
        return prefix


def _asked(request: Any) -> tuple[str | None, int]:
    """The digest and the virtual tokens of the adapter that a request is for; None and 0 for the
    base. None and 1 for what is neither: its load fails, and the request with it."""
    params = getattr(request, "kv_transfer_params", None)
    if not isinstance(params, dict) or KEY not in params:
        return None, 0
    asked = params[KEY]
    if isinstance(asked, dict):
        digest, tokens = asked.get("digest"), asked.get("tokens")
        fits = isinstance(tokens, int) and 0 < tokens < request.num_prompt_tokens
        if fits and isinstance(digest, str) and _DIGEST.fullmatch(digest):
            return digest, int(tokens or 0)
    return None, min(1, request.num_prompt_tokens - 1)  # one token at least is computed


def _slots(load: PrefixLoad, block_size: int) -> Tensor:
    """Where the virtual tokens of `load` lie in the cache, `[last - first]`."""
    places = torch.arange(load.first, load.last)
    return torch.tensor(load.blocks)[places // block_size] * block_size + places % block_size


def _own_heads(states: Tensor, own: int) -> Tensor:
    """Of states `[tokens, kv_heads, head_dim]`, the `own` heads that this worker has. With more
    workers than heads, several have the same one."""
    total = states.shape[1]
    if own == total:
        return states
    first = min(own, total / get_tensor_model_parallel_world_size())
    start = int(get_tensor_model_parallel_rank() * first)
    return states[:, start : start + own]


def _zeroed(make: Any) -> Any:
    def empty_cpu(*args: Any, **kwargs: Any) -> LogprobsTensors:
        made = make(*args, **kwargs)
        for tensor in (made.logprob_token_ids, made.logprobs, made.selected_token_ranks):
            tensor.zero_()
        return made

    return empty_cpu
