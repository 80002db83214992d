"""What attention layers take to know who sees whom, by the kinds of layers that a target has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ATTENTION = {"full_attention", "sliding_attention"}


class Masks:
    """Masks of a target with full and sliding attention.

    booleans: whether its attention takes them; else masks are added to scores of type `dtype`.
    """

    def __init__(self, config: Any, dtype: torch.dtype, booleans: bool):
        self.dtype, self.booleans = dtype, booleans
        window = getattr(config, "sliding_window", None)
        self.window = window if getattr(config, "use_sliding_window", True) else None
        self.kinds = set(getattr(config, "layer_types", None) or ())

    def __call__(self, visible: Tensor, query: Tensor, key: Tensor) -> Tensor | dict[str, Tensor]:
        """[batch, 1, queries, keys] for who may see whom [batch, queries, keys] at positions query
        [batch, queries] and key [batch or 1, keys]; by kind of layer where kinds differ."""
        near = visible
        if self.window:
            near = visible & (query[:, :, None] - key[:, None, :] < self.window)
        if not self.kinds:  # models that say nothing by layer slide everywhere or nowhere
            return self._shaped(near)
        if self.kinds == {"full_attention"}:
            return self._shaped(visible)
        return {"full_attention": self._shaped(visible), "sliding_attention": self._shaped(near)}

    def _shaped(self, allowed: Tensor) -> Tensor:
        if self.booleans:
            return allowed[:, None]
        zero = torch.zeros((), dtype=self.dtype, device=allowed.device)
        return torch.where(allowed, zero, torch.finfo(self.dtype).min)[:, None]


def other_kinds(config: Any) -> list[str]:
    """Kinds of layers beside full and sliding attention: recurrent and convolutional ones, for instance.
    A target that has any keeps states which cannot be addressed by position."""
    return sorted(set(getattr(config, "layer_types", None) or ()) - ATTENTION)
