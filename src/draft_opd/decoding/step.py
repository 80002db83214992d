"""One round as tensors: draft, verify, and let target and drafter know what was committed.

A round never reads a tensor's value on the host, so it does not wait for the device. The caller knows
where the round begins and how far it reaches, and reads the result in one transfer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from draft_opd.decoding.noise import Noise
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.tree import verify_tree
from draft_opd.decoding.verification import verify
from draft_opd.drafters.base import DraftCache, Drafter
from draft_opd.models.kv_cache import PositionCache
from draft_opd.models.target import Target


@dataclass
class DecodeStep:
    """What all rounds of a batch share."""

    target: Target
    drafter: Drafter | None
    cache: PositionCache
    context: DraftCache | None
    sampling: Sampling
    tree: tuple[int, ...] | None = None
    generator: torch.Generator | None = None  # trees draw their tokens with it

    def __post_init__(self):
        self.layers = self.drafter.target_layers if self.drafter else ()

    def set_bound(self, slots: int, filled: bool = False, static: bool = False, fused: bool = False) -> None:
        """How many slots the next round may look at; see `DraftCache.set_bound`."""
        for cache in (self.cache, self.context):
            if cache is not None:
                cache.set_bound(slots, filled, static, fused)

    def select(self, rows: Tensor) -> None:
        """Keeps only the given batch rows."""
        for cache in (self.cache, self.context):
            if cache is not None:
                cache.select(rows)

    def __call__(
        self,
        anchors: Tensor,
        last: Tensor,
        count: int,
        noise: Noise | None = None,
        drafted_now: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """anchors, last [batch]: where the last committed token stands, and which it is; `count`
        tokens are drafted; noise: the round's random numbers, where the target samples.

        Returns [batch, 2 + count]: how many were accepted, the bonus token, the drafted ones (of a
        tree: the path that was accepted, -1 behind it).
        """
        device, tree = last.device, self.tree[:count] if self.tree else None
        drafted, probs = last.new_empty(len(last), 0), None
        if self.drafter and tree:
            nodes = self.drafter.propose_tree(self.target, self.context, anchors, last, tree)
        elif self.drafter and count:
            choose = self.sampling.chooser(None if noise is None else noise.draft)
            drafted, probs = self.drafter.propose(
                self.target, self.context, anchors[:, None], last[:, None], count, choose
            )
            drafted, probs = drafted[:, 0], None if probs is None else probs[:, 0]
        drafted_now()
        if self.drafter and tree:
            block, positions, features, accepted, bonus = verify_tree(
                self.target,
                self.cache,
                self.layers,
                *nodes,
                count,
                anchors,
                self.sampling,
                self.generator,
            )
            behind = torch.arange(1, count + 1, device=device) > accepted[:, None]
            drafted = block[:, 1:].masked_fill(behind, -1)
        else:
            block = torch.cat([last[:, None], drafted], 1)
            positions = anchors[:, None] + torch.arange(block.shape[1], device=device)
            features, accepted, bonus = self._verify(block, positions, drafted, probs, noise)
        if self.drafter:
            self.drafter.extend_cache(self.context, self.target, block, features, positions)
        return torch.cat([accepted[:, None], bonus[:, None], drafted], 1)

    def _verify(self, block: Tensor, positions: Tensor, drafted: Tensor, draft_probs, noise):
        out = self.target.extend(block, positions, self.cache, self.layers)
        logits = self.target.logits(out.hidden)
        return out.features, *verify(drafted, draft_probs, logits, self.sampling, noise)
