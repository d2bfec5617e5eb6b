"""What vLLM's server answers where a request's `model` is the name of nothing here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ptkit.errors import no_such_model


def tell_known_names(models: Any, refusal: Callable[[str], Exception]) -> None:
    """Let vLLM's server refuse an unknown name with the names that are near, as `ptkit serve` does.
    vLLM's own refusal names the base only.

    models: vLLM's `OpenAIServingModels`, which every route asks; refusal: makes what is raised
    """
    is_base = models.is_base_model

    def is_base_model(name: str) -> bool:
        if is_base(name):
            return True
        if name in models.lora_requests:
            return False
        bases = [path.name for path in models.base_model_paths]
        raise refusal(no_such_model(name, [*bases, *models.lora_requests]))

    models.is_base_model = is_base_model
