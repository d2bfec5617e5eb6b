"""Prediction heads of AdapterHub's library `adapters`, and the heads of transformers' classifiers.

A head of two layers reads the first token: a linear layer, tanh, a linear layer. BERT's pooler and
classifier are the same, and so is the head of RoBERTa's classifier. Heads are read and written
where they are exactly one of transformers'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.hub.foreign.source import Source
from ptkit.runtime.architecture import HeadKind
from ptkit.runtime.heads import Labels

SETTINGS: Final = "head_config.json"
WEIGHTS: Final = ("model_head.safetensors", "pytorch_model_head.bin")
#: The library's types of head that transformers' classifiers have, too.
_KINDS: dict[str, HeadKind] = {"classification": "sequence", "tagging": "token"}
#: Family -> the layers before and after the tanh, in a classifier of whole texts.
_TWO_LAYERS = {
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
}
#: Of transformers' own classes with a head, which the library saves as they are.
_STATIC: dict[str, HeadKind] = {
    "ForSequenceClassification": "sequence",
    "ForTokenClassification": "token",
}


@dataclass(frozen=True)
class PredictionHead:
    """A head as the settings of `family` describe it.

    layers: of its own, with tanh between two; static: it is one of transformers' own classes
    """

    family: str
    labels: Labels
    layers: int
    name: str | None
    static: bool = False

    @property
    def places(self) -> tuple[str, ...]:
        """The modules of transformers' classifier that are its layers, in order."""
        if self.layers == 2:
            return _TWO_LAYERS[self.family]
        return ("classifier",)

    @property
    def modules(self) -> list[str]:
        """The modules that an adapter keeps whole for it."""
        return sorted({place.removesuffix(".dense").removesuffix(".out_proj")
                       for place in self.places})  # fmt: skip

    def tensors(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors `held` of the library's file by transformers' names. Raises AdapterError
        where they are others than the settings say."""
        if self.static:
            return dict(held)
        found = {}
        for place, number in zip(self.places, (1, 4), strict=False):
            for kind in ("weight", "bias"):
                key = f"heads.{self.name}.{number}.{kind}"
                if key in held:
                    found[f"{place}.{kind}"] = held[key]
            if f"{place}.weight" not in found:
                raise AdapterError(
                    f"the file of the head lacks `heads.{self.name}.{number}.weight`"
                )
            # A head that was made without a bias.
            found.setdefault(f"{place}.bias", torch.zeros(len(found[f"{place}.weight"])))
        others = sorted(held.keys() - {f"heads.{self.name}.{n}.{k}" for n in (1, 4)
                                       for k in ("weight", "bias")})  # fmt: skip
        if others:
            raise AdapterError(
                f"the file of the head holds `{others[0]}`, which ptkit does not know"
            )
        return found


def head_of(source: Source) -> PredictionHead | str:
    """The head that `source` brings; or why ptkit has no place for it, or for none."""
    settings = source.settings(SETTINGS)
    family = str(settings.get("model_type"))
    if not settings:
        return "it brings no head, and an encoder without one has no answer"
    own = settings.get("config")
    if not isinstance(own, dict):
        return _static(settings, family)
    kind = _KINDS.get(str(own.get("head_type")))
    if kind is None or family not in _TWO_LAYERS:
        return (
            f"its head is a `{own.get('head_type')}` of `{family}`; ptkit reads classification and "
            f"tagging heads of {', '.join(_TWO_LAYERS)}"
        )
    layers, pooled = own.get("layers"), bool(own.get("use_pooler"))
    two = layers == 2 and kind == "sequence" and not pooled and own["activation_function"] == "tanh"
    one = layers == 1 and (kind == "token" or (pooled and family == "bert"))
    if not (one or two):
        return (
            f"its head has {layers} layers, the activation `{own.get('activation_function')}` and "
            f"{'the' if pooled else 'no'} pooler before it, which no classifier of transformers has"
        )
    labels = _labels(own.get("label2id"), int(own["num_labels"]))
    return PredictionHead(family, Labels(kind, labels), 2 if two else 1, settings.get("name"))


def _static(settings: Mapping[str, Any], family: str) -> PredictionHead | str:
    name = str(settings.get("model_class"))
    kind = next((kind for end, kind in _STATIC.items() if name.endswith(end)), None)
    if kind is None:
        return f"it was saved from a {name}, which has no head that classifies"
    labels = _labels(settings.get("label2id"), int(settings.get("num_labels") or 0))
    return PredictionHead(family, Labels(kind, labels), 1, None, static=True)


def _labels(numbers: Any, count: int) -> tuple[str, ...]:
    """The labels in the order of the outputs; transformers' names where there are none."""
    if isinstance(numbers, dict) and sorted(numbers.values()) == [*range(count)]:
        return tuple(sorted(numbers, key=lambda label: numbers[label]))
    return tuple(f"LABEL_{number}" for number in range(count))


def written_head(
    model: torch.nn.Module, family: str, labels: Labels, name: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The head of `model`, a classifier of transformers, as the library's settings of it and the
    tensors by the library's names. Raises AdapterError for a family that has no such head."""
    if family not in _TWO_LAYERS:
        raise AdapterError(
            f"heads of `{family}` are not written; ptkit writes those of {', '.join(_TWO_LAYERS)}"
        )
    whole = labels.kind == "sequence"
    places = _TWO_LAYERS[family] if whole else ("classifier",)
    tensors = {
        f"heads.{name}.{number}.{kind}": model.get_submodule(place).get_parameter(kind)
        .detach().float().cpu().contiguous().clone()
        for place, number in zip(places, (1, 4), strict=False) for kind in ("weight", "bias")
    }  # fmt: skip
    config: dict[str, Any] = {
        "activation_function": "tanh",
        "dropout_prob": None,
        "head_type": "classification" if whole else "tagging",
        "label2id": {label: number for number, label in enumerate(labels.names)},
        "layers": len(places),
        "num_labels": len(labels.names),
    }
    return config | ({"bias": True, "use_pooler": False} if whole else {}), tensors
