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
    confidence: float | None = None  # drafts end before an offset that is less sure, see `Drafter.propose`
    trim: bool = False  # then the target runs no further than some row's draft goes

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
            more = {} if self.confidence is None else {"confidence": self.confidence}
            drafted, probs = self.drafter.propose(
                self.target, self.context, anchors[:, None], last[:, None], count, choose, **more
            )
            drafted, probs = drafted[:, 0], None if probs is None else probs[:, 0]
            if self.confidence is not None:
                drafted, probs, noise = self._cut(drafted, probs, noise)
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
            block = torch.cat([last[:, None], drafted.clamp_min(0)], 1)
            positions = anchors[:, None] + torch.arange(block.shape[1], device=device)
            features, accepted, bonus = self._verify(block, positions, drafted, probs, noise)
        if self.drafter:
            self.drafter.extend_cache(self.context, self.target, block, features, positions)
        return torch.cat([accepted[:, None], bonus[:, None], drafted], 1)

    def _cut(self, drafted: Tensor, probs: Tensor | None, noise: Noise | None):
        """Drafts that end early. q is 0 behind the end: verification then accepts nothing there, and draws
        the bonus token from p, as it does behind a draft that was accepted whole."""
        if probs is not None:
            probs = probs * (drafted >= 0)[..., None]
        if self.trim:
            longest = int((drafted >= 0).sum(1).max())
            drafted, probs = drafted[:, :longest], None if probs is None else probs[:, :longest]
            if noise is not None:
                noise = Noise(
                    noise.draft[:, :longest], noise.coin[:, :longest], noise.bonus[:, : longest + 1]
                )
        return drafted, probs, noise

    def _verify(self, block: Tensor, positions: Tensor, drafted: Tensor, draft_probs, noise):
        out = self.target.extend(block, positions, self.cache, self.layers)
        logits = self.target.logits(out.hidden)
        if self.confidence is not None and draft_probs is not None:
            drafted = drafted.clamp_min(0)  # where q is 0
        return out.features, *verify(drafted, draft_probs, logits, self.sampling, noise)
