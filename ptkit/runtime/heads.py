"""Classification heads: what one is asked for, and the class that loads a model with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from ptkit.runtime.architecture import HeadKind


class Labels(NamedTuple):
    """What a classification head is asked for: what it labels, and the labels in order."""

    kind: HeadKind
    names: tuple[str, ...]


@dataclass(frozen=True)
class Head:
    """A classification head: what it labels, its labels in order, and the modules it is made of.

    modules: names within the model of everything that is not the pretrained backbone, and of what
        the checkpoint had no weights for. Every adapter trains a copy of its own
    fresh: of those, the modules without weights in the checkpoint
    told: what was decided about the checkpoint's own labels, in a sentence; empty for nothing
    """

    kind: HeadKind
    labels: tuple[str, ...]
    modules: tuple[str, ...]
    fresh: frozenset[str] = frozenset()
    told: str = ""


def label_names(config: Any) -> list[str]:
    """The names of a checkpoint's labels, in the order of its outputs."""
    return [str(config.id2label[number]) for number in sorted(config.id2label)]


def class_for(config: Any, labels: Labels | None) -> tuple[Any, dict[str, Any]]:
    """The class that loads a model with these labels (None: a language model), and its options."""
    if labels is None:
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        return kind, {}
    numbered = dict(enumerate(labels.names))
    return (
        AutoModelForTokenClassification
        if labels.kind == "token"
        else AutoModelForSequenceClassification,
        {
            "id2label": numbered,
            "label2id": {label: number for number, label in numbered.items()},
            # A checkpoint of a classifier with other labels: its head is replaced.
            "ignore_mismatched_sizes": True,
        },
    )
