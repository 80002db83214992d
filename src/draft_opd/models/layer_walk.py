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

from draft_opd.models.fused_layers import FusedLayers, LayerSlots


class LayerWalk:
    """Only for decoders that `matches` has accepted."""

    def __init__(self, decoder: nn.Module, config: Any):
        self.embed = decoder.get_input_embeddings()
        self.layers, self.norm, self.rotary = decoder.layers, decoder.norm, decoder.rotary_emb
        # The kind of every layer, where masks or positions differ by it.
        self.kinds = getattr(config, "layer_types", None) or [""] * len(self.layers)
        self.rotary_by_kind = "layer_type" in inspect.signature(self.rotary.forward).parameters
        self.fused: FusedLayers | None = None

    def __call__(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor | dict[str, Tensor] | None,
        cache: Any,
        taps: Collection[int] = (),
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """ids, positions [batch, m] -> normed hidden states [batch, m, H], and the outputs of the
        0-based layers `taps`. A cache that says `fused` gets compiled layers."""
        hidden, found = self.embed(ids), {}
        if self.rotary_by_kind:
            rotary = {kind: self.rotary(hidden, positions, kind) for kind in dict.fromkeys(self.kinds)}
        else:
            rotary = dict.fromkeys(self.kinds, self.rotary(hidden, positions))
        if cache is not None and cache.fused and self.fused is None:
            self.fused = FusedLayers(self.layers, _over_slots)
        for i, (layer, kind) in enumerate(zip(self.layers, self.kinds, strict=True)):
            seen = mask[kind] if isinstance(mask, dict) else mask
            if cache is not None and cache.fused:
                storage = (cache.positions, cache.keys[i], cache.values[i])
                hidden = self.fused(i, hidden, *rotary[kind], positions, seen, *storage)
            else:
                hidden = _run(layer, hidden, rotary[kind], positions, seen, cache)
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
        except (AttributeError, TypeError, LookupError, ValueError, RuntimeError):
            return None
        return walk if same else None


def _run(layer: Callable, hidden: Tensor, rotary: Any, positions: Tensor, mask: Any, cache: Any) -> Tensor:
    """A layer as transformers' decoders call it."""
    out = layer(
        hidden,
        attention_mask=mask,
        position_embeddings=rotary,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return out[0] if isinstance(out, tuple) else out


def _over_slots(layer, hidden, cos, sin, positions, mask, slots, keys, values):
    """The same over one layer's part of a cache."""
    return _run(layer, hidden, (cos, sin), positions, mask, LayerSlots(keys, values, slots, mask.shape[-1]))
