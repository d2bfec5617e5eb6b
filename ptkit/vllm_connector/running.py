"""The base that vLLM runs, and whether a prefix was made for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptkit.errors import AdapterError, UserError
from ptkit.formats.checkpoint import of_files
from ptkit.formats.fingerprint import Identity, is_same_model
from ptkit.vllm_connector.files import PrefixRecord

#: vLLM's `CompilationMode.NONE`; these modules are tested without vLLM.
_NO_COMPILATION = 0
#: What an engine whose settings are not given must have; the fix for each is in the message.
CONNECTOR, MODULE = "PtkitConnector", "ptkit.vllm_connector.connector"


@dataclass(frozen=True)
class RunningBase:
    """What is known of the running base.

    identity: of its checkpoint; None where that is not safetensors on this machine
    precision: what its values are rounded to; longest: positions of a sequence
    rope: its rotary settings; None where it has none
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    precision: str
    longest: int
    rope: dict[str, Any] | None = None
    identity: Identity | None = None

    @classmethod
    def of(cls, vllm_config: Any, name: str) -> RunningBase:
        """The base of a vLLM engine, which requests call `name`."""
        model = vllm_config.model_config
        sampled = of_files(model.model, model.revision)
        return cls(
            name=name,
            layers=model.get_total_num_hidden_layers(),
            kv_heads=model.get_total_num_kv_heads(),
            head_dim=model.get_head_size(),
            precision=str(model.dtype).removeprefix("torch."),
            longest=model.max_model_len,
            rope=getattr(model.hf_text_config, "rope_parameters", None),
            identity=None if sampled is None else Identity.of(sampled),
        )

    def require_made_for(self, record: PrefixRecord) -> None:
        """Raise AdapterError unless `record` is of a prefix for this base."""
        made_for = record.base
        ours = (self.layers, self.kv_heads, self.head_dim)
        theirs = (record.layers, record.kv_heads, record.head_dim)
        if ours != theirs:
            raise AdapterError(
                f"it was made for a base of {theirs[0]} layers with {theirs[1]} key-value heads of "
                f"{theirs[2]} values (`{made_for.get('id')}`); this one has {ours[0]}, {ours[1]} "
                f"and {ours[2]}"
            )
        if self.identity is not None and not self._is_same(made_for, self.identity):
            raise AdapterError(
                f"it was made for the base `{made_for.get('id')}` (weights "
                f"{made_for.get('fingerprint')}), the weights here are {self.identity.fingerprint}"
            )
        if odd := _other_rope(record.rope, self.rope):
            raise AdapterError(
                f"its keys were turned with other rotary positions: `{odd}` is "
                f"{(record.rope or {}).get(odd)!r}, here {(self.rope or {}).get(odd)!r}"
            )
        if record.virtual_tokens + 2 > self.longest:
            raise AdapterError(
                f"its {record.virtual_tokens} virtual tokens leave no room in the "
                f"{self.longest} positions of this server (--max-model-len)"
            )

    def _is_same(self, made_for: dict[str, Any], identity: Identity) -> bool:
        if made_for.get("fingerprint") == identity.fingerprint:
            return True
        sketch, precision = made_for.get("sketch"), made_for.get("precision")
        if not isinstance(sketch, str) or not isinstance(precision, str):
            return False
        try:
            return is_same_model(sketch, precision, identity.sketch, self.precision)
        except (ValueError, RuntimeError):  # not a sketch
            return False


def _other_rope(theirs: dict[str, Any] | None, ours: dict[str, Any] | None) -> str | None:
    """The first rotary setting that both have and that differs."""
    shared = sorted((theirs or {}).keys() & (ours or {}).keys())
    return next((key for key in shared if (theirs or {})[key] != (ours or {})[key]), None)


def require_runs(vllm_config: Any) -> None:
    """Raise UserError, with the fix, for an engine whose answers with a prefix would be wrong or
    were never tried."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        raise UserError(
            "ptkit's adapters need its connector: --kv-transfer-config "
            f'\'{{"kv_connector": "{CONNECTOR}", "kv_connector_module_path": "{MODULE}", '
            '"kv_role": "kv_consumer", "kv_connector_extra_config": {"adapters": "FOLDER"}}\''
        )
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    cache = vllm_config.cache_config.cache_dtype
    eager = vllm_config.compilation_config.mode == _NO_COMPILATION
    refused = {
        "`kv_role` must be kv_consumer": transfer.kv_role != "kv_consumer",
        "`kv_load_failure_policy` must be fail": transfer.kv_load_failure_policy != "fail",
        "`kv_connector_extra_config` must name a folder, `adapters`": not isinstance(
            transfer.kv_connector_extra_config.get("adapters"), str
        ),
        f"a cache of `{cache}` was not tried; no --kv-cache-dtype, or `auto`": cache != "auto",
        "stages of a pipeline on CPUs end vLLM at the first request with --enforce-eager": (
            parallel.pipeline_parallel_size > 1
            and vllm_config.device_config.device_type == "cpu"
            and eager
        ),
        "speculative decoding was not tried": vllm_config.speculative_config is not None,
        "a context that is split over devices was not tried": max(
            getattr(parallel, "decode_context_parallel_size", 1),
            getattr(parallel, "prefill_context_parallel_size", 1),
        )
        > 1,
        "several data-parallel engines were not tried": parallel.data_parallel_size > 1,
        "a cache of latent vectors (MLA) holds no keys and values": model.use_mla,
        "encoder-decoders have no KV prefix": model.is_encoder_decoder,
        "images and sound beside a prefix were not tried": bool(model.is_multimodal_model),
    }
    if found := [why for why, wrong in refused.items() if wrong]:
        raise UserError(f"ptkit's adapters cannot be served so: {'; '.join(found)}")
