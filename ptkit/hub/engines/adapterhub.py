"""A prefix for AdapterHub's library `adapters`, on Llama, Mistral, GPT-2, BERT and RoBERTa."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from ptkit.errors import AdapterError, UserError
from ptkit.formats import atomic
from ptkit.hub.engine_adapters import engine_adapters, engine_prefix
from ptkit.hub.engines import Written
from ptkit.hub.foreign.prediction_head import SETTINGS as HEAD_CONFIG
from ptkit.hub.foreign.prediction_head import WEIGHTS as HEAD_WEIGHTS
from ptkit.hub.foreign.prediction_head import written_head
from ptkit.hub.foreign.rotation import turned
from ptkit.methods import Adapter
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.heads import Labels

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter.safetensors"
_VERSION = "adapters.1.3.0"
#: Family -> where the library keeps a layer's prefix, and its class for models with heads.
_PLACES = {
    "llama": ("layers.{}.self_attn", "LlamaAdapterModel"),
    "mistral": ("layers.{}.self_attn", "MistralAdapterModel"),
    "gpt2": ("h.{}.attn", "GPT2AdapterModel"),
    "bert": ("encoder.layer.{}.attention.self", "BertAdapterModel"),
    "roberta": ("encoder.layer.{}.attention.self", "RobertaAdapterModel"),
}


def write(
    sources: Sequence[Path], out: Path, *, base: Base | None = None, replace_out: bool = False
) -> Written:
    """Write `out` as `model.load_adapter(out, use_safetensors=True)` of that library reads it.

    Its texts begin at position 0, so keys of a decoder are turned back by the number of virtual
    tokens, unless they take no positions. A classifier's head is written beside its prefix. Raises
    AdapterError for what a cache of keys and values cannot hold (see `engine_prefix`), and for
    bases whose positions cannot be turned. Raises UserError for several adapters.
    """
    if len(sources) != 1:
        raise UserError("a folder of AdapterHub's holds one adapter; export them one by one")
    with atomic.folder(out, replace=replace_out) as scratch:
        for source, adapter in engine_adapters(sources, base, classifiers=True):
            base = adapter.base
            prefix = engine_prefix(source, adapter, placeless=True)
            name = source.name
            save_file(_tensors(prefix, name, base), scratch / _WEIGHTS)
            tokens = prefix.virtual_tokens
            atomic.write_json(scratch / _CONFIG, _settings(base, name, tokens))
            if base.head is not None:
                _write_head(adapter, name, scratch)
            atomic.write_text(scratch / "README.md", _readme(base, name))
        size = sum(p.stat().st_size for p in scratch.iterdir())
    return Written(out, tokens, size)


def _write_head(adapter: Adapter, name: str, folder: Path) -> None:
    base = adapter.base
    assert base.head is not None
    labels = Labels(base.head.kind, base.head.labels)
    config, tensors = written_head(adapter.model, base.model.config.model_type, labels, name)
    save_file(tensors, folder / HEAD_WEIGHTS[0])
    atomic.write_json(folder / HEAD_CONFIG, {"config": config, **_about(base, name)})


def _tensors(prefix: KVPrefix, name: str, base: Base) -> dict[str, Tensor]:
    """One vector, token by token and layer by layer, once for each layer and once for the model:
    the library saves its shared pool as often as it is reached."""
    keys = prefix.keys
    if not (base.encoder or prefix.placeless):
        keys = tuple(turned(k.float().cpu(), base, -prefix.virtual_tokens) for k in keys)
    moved = KVPrefix(tuple(k.float().cpu() for k in keys),
                     tuple(v.float().cpu() for v in prefix.values))  # fmt: skip
    vector = moved.flat().flatten()
    family, stem = base.model.config.model_type, type(base.model).base_model_prefix
    if family not in _PLACES or not name or (base.head is not None and not base.encoder):
        raise AdapterError(
            f"{type(base.model).__name__} is no base that ptkit writes AdapterHub's prefixes for: "
            f"it knows decoders that write and encoders that classify of {', '.join(_PLACES)}"
        )
    part = f"prefix_tunings.{name}.self_prefix.control_trans"
    place, _ = _PLACES[family]
    places = [f"{stem}.{place.format(layer)}.prefix_tuning.pool."
              for layer in range(len(base.layout))]  # fmt: skip
    return {f"{at}{part}": vector.clone() for at in (*places, f"{stem}.prefix_tuning.")}


def _about(base: Base, name: str) -> dict[str, object]:
    """What all its settings say of the model."""
    family = base.model.config.model_type
    kind = type(base.model).__name__ if base.head is None else _PLACES[family][1]
    return {
        "hidden_size": base.embedding.embedding_dim,
        "model_class": kind,
        "model_name": base.id,
        "model_type": family,
        "name": name,
        "version": _VERSION,
    }


def _settings(base: Base, name: str, tokens: int) -> dict[str, object]:
    config = {
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
    }
    return {"config": config, **_about(base, name)}


def _readme(base: Base, name: str) -> str:
    if base.head is not None:
        return f"""# {name}, for AdapterHub's `adapters`

A prefix of {base.id} with a prediction head.

    from adapters import AutoAdapterModel

    model = AutoAdapterModel.from_pretrained("{base.id}")
    model.load_adapter("{name}", use_safetensors=True, set_active=True)

Written by `ptkit export --as adapterhub`.
"""
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
