"""A decoder's layers, run one by one without its own forward.

transformers' decoders have the same loop: embed, rotate positions, run the layers, norm. Running it here
gives the outputs of single layers without hooks (which `torch.compile` refuses inside a forward), and
saves the wrappers around it. A decoder whose own forward gives anything else, to the last bit, is not
walked: it keeps hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn


class LayerWalk:
    """Only for decoders that `matches` has accepted."""

    def __init__(self, decoder: nn.Module, config: Any):
        self.embed = decoder.get_input_embeddings()
        self.layers, self.norm, self.rotary = decoder.layers, decoder.norm, decoder.rotary_emb
        # The kind of every layer, where masks or positions differ by it.
        self.kinds = getattr(config, "layer_types", None) or [""] * len(self.layers)
        self.rotary_by_kind = "layer_type" in inspect.signature(self.rotary.forward).parameters

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | dict[str, Tensor] | None,
        cache: Any,
        taps: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """ids, positions [batch, m] -> normed hidden states [batch, m, H], and the outputs of the
        0-based layers `taps`."""
        hidden, found = self.embed(ids), {}
        if self.rotary_by_kind:
            rotary = {kind: self.rotary(hidden, positions, kind) for kind in dict.fromkeys(self.kinds)}
        else:
            rotary = dict.fromkeys(self.kinds, self.rotary(hidden, positions))
        for i, (layer, kind) in enumerate(zip(self.layers, self.kinds, strict=True)):
            hidden = layer(
                hidden,
                attention_mask=mask[kind] if isinstance(mask, dict) else mask,
                position_embeddings=rotary[kind],
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
            if isinstance(hidden, tuple):
                hidden = hidden[0]
            if i in taps:
                found[i] = hidden
        return self.norm(hidden), found

    @classmethod
    def matches(cls, decoder: nn.Module, config: Any, forward: Callable[[Any], Tensor]) -> LayerWalk | None:
        """The walk of a decoder, if it computes what the decoder's forward does; None otherwise.

        forward(walk or None): hidden states of a few tokens behind a cached text, by the walk or by
        the decoder itself.
        """
        try:
            walk = cls(decoder, config)
            same = torch.equal(forward(walk), forward(None))
        except (AttributeError, TypeError, KeyError, ValueError, RuntimeError):
            return None
        return walk if same else None
