"""A prefix for AdapterHub's library `adapters`, on Llama and Mistral."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ptkit.errors import AdapterError, UserError
from ptkit.formats import atomic
from ptkit.hub.engine_adapters import engine_adapters, engine_prefix
from ptkit.hub.engines import Written
from ptkit.hub.foreign.rotation import turned
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter.safetensors"


def write(
    sources: Sequence[Path], out: Path, *, base: Base | None = None, replace_out: bool = False
) -> Written:
    """Write `out` as `model.load_adapter(out, use_safetensors=True)` of that library reads it.

    Its texts begin at position 0, so keys are turned back by the number of virtual tokens. Raises
    AdapterError for what a cache of keys and values cannot hold (see `engine_prefix`), and for
    bases whose positions cannot be turned. Raises UserError for several adapters.
    """
    if len(sources) != 1:
        raise UserError("a folder of AdapterHub's holds one adapter; export them one by one")
    with atomic.folder(out, replace=replace_out) as scratch:
        for source, adapter in engine_adapters(sources, base):
            base = adapter.base
            prefix = engine_prefix(source, adapter)
            name = source.name
            save_file(_tensors(prefix, name, base), scratch / _WEIGHTS)
            tokens = prefix.virtual_tokens
            atomic.write_json(scratch / _CONFIG, _settings(base, name, tokens))
            atomic.write_text(scratch / "README.md", _readme(base, name))
        size = sum(p.stat().st_size for p in scratch.iterdir())
    return Written(out, tokens, size)


def _tensors(prefix: KVPrefix, name: str, base: Base) -> dict[str, Tensor]:
    """One vector, token by token and layer by layer, once for each layer and once for the model:
    the library saves its shared pool as often as it is reached."""
    back = -prefix.virtual_tokens
    moved = KVPrefix(tuple(turned(k.float().cpu(), base, back) for k in prefix.keys),
                     tuple(v.float().cpu() for v in prefix.values))  # fmt: skip
    vector = moved.flat().flatten()
    decoder = type(base.model).base_model_prefix
    if not hasattr(base.model, decoder) or not name:
        raise AdapterError(f"{type(base.model).__name__} is no base that AdapterHub's library has")
    part = f"prefix_tunings.{name}.self_prefix.control_trans"
    places = [f"{decoder}.layers.{layer}.self_attn.prefix_tuning.pool."
              for layer in range(len(base.layout))]  # fmt: skip
    return {f"{at}{part}": vector.clone() for at in (*places, f"{decoder}.prefix_tuning.")}


def _settings(base: Base, name: str, tokens: int) -> dict[str, object]:
    return {
        "config": {
            "architecture": "prefix_tuning",
            "bottleneck_size": 512,  # of the MLP, which a flat prefix has none of
            "cross_prefix": True,
            "dropout": 0.0,
            "encoder_prefix": True,
            "flat": True,
            "leave_out": [],
            "non_linearity": "tanh",
            "prefix_length": tokens,
            "shared_gating": True,
            "use_gating": False,
        },
        "hidden_size": base.embedding.embedding_dim,
        "model_class": type(base.model).__name__,
        "model_name": base.id,
        "model_type": base.model.config.model_type,
        "name": name,
        "version": "adapters.1.3.0",
    }


def _readme(base: Base, name: str) -> str:
    return f"""# {name}, for AdapterHub's `adapters`

A prefix of {base.id}.

    import adapters
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("{base.id}", attn_implementation="eager")
    adapters.init(model)
    model.load_adapter("{name}", use_safetensors=True, set_active=True)

Keep `attn_implementation="eager"`: with the default, `adapters` 1.3.0 computes a decoder's prefix
otherwise.

Written by `ptkit export --as adapterhub`.
"""
