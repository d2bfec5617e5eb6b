"""What a pass hands to its attention modules in place of the prefixes of a rectangle of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class GroupedAttention:
    """What a pass hands to its attention modules when its rows are single tokens of sequences.

    It stands in place of a `Placed`: the tokens attend to what the pass finds for them.
    """

    def attended(
        self,
        module: nn.Module,
        query: Tensor,
        options: dict[str, Any],
        attention: Callable[..., tuple[Tensor, Any]],
    ) -> Tensor:
        """The output of `module` for `query` `[tokens, heads, 1, dim]`: `[tokens, 1, heads, dim]`.

        attention: the model's own attention function, which takes `options`, too
        """
        raise NotImplementedError


class RowAttention:
    """What a pass hands to its attention modules when its tokens stand in one line, and are of
    several rows: `[1, heads, tokens, dim]`. See `ptkit.runtime.unpadded`."""

    def attended(
        self,
        module: nn.Module,
        tensors: tuple[Tensor, Tensor, Tensor],
        mask: Tensor | None,
        options: dict[str, Any],
        attention: Callable[..., tuple[Tensor, Any]],
    ) -> Tensor:
        """The output of `module`: `[1, tokens, heads, dim]`.

        tensors: queries, keys and values
        attention: the attention function of rows, which takes `options`, too
        """
        raise NotImplementedError
