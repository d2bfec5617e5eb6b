"""Which way prefixes take into the attention of a model."""

from __future__ import annotations

from transformers import PreTrainedModel

from ptkit.runtime.attention import Backend, WithTheCall, layers_read
from ptkit.runtime.attention_sites import is_disentangled
from ptkit.runtime.disentangled import Disentangled
from ptkit.runtime.facts import known
from ptkit.runtime.handed_cache import HandedCache


def backend_of(model: PreTrainedModel) -> Backend:
    """The one of `model`, chosen once.

    Raises ModelError for models whose attention can neither be replaced nor be handed a cache.
    """
    return known(model, _chosen)


def _chosen(model: PreTrainedModel) -> Backend:
    if is_disentangled([*layers_read(model)]):
        return Disentangled()
    return WithTheCall() if model._can_set_attn_implementation() else HandedCache()
