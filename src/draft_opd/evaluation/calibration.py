"""How far a drafter means its confidence: the chance that a token passes, given that those before it did."""

from __future__ import annotations

import torch
from torch import Tensor

from draft_opd.losses.objectives import ReplayedBlocks

BINS = 10


class Calibration:
    """What a drafter said of the offsets that its rounds reached (up to the first rejection), and what came
    of them. Rounds are given replayed, with the tokens that they drafted."""

    def __init__(self):
        self._said: list[Tensor] = []
        self._passed: list[Tensor] = []
        self._offset: list[Tensor] = []

    @torch.no_grad()
    def add(self, rounds: ReplayedBlocks) -> None:
        """Nothing for a drafter without a confidence."""
        if rounds.confidence is None:
            return
        offset = torch.arange(rounds.valid.shape[1], device=rounds.valid.device)
        reached = rounds.valid & (offset <= rounds.accepted[:, None]) & (rounds.weight > 0)[:, None]
        self._said.append(torch.sigmoid(rounds.confidence.float())[reached].cpu())
        self._passed.append((offset < rounds.accepted[:, None])[reached].float().cpu())
        self._offset.append(offset.expand_as(reached)[reached].cpu())

    def result(self, draft_length: int) -> dict | None:
        """None for a drafter without a confidence.

        `bins`: {said, passed, tokens} by tenths of what was said. `error`: the expected calibration error,
        Σ_bins tokens |said - passed| / Σ tokens. `by_offset`: {said, passed, tokens} of offsets 1..K.
        """
        if not self._said:
            return None
        said, passed, offset = map(torch.cat, (self._said, self._passed, self._offset))
        tenth = (said * BINS).long().clamp_max(BINS - 1)
        bins = [_mean(said, passed, tenth == i) for i in range(BINS)]
        error = sum(b["tokens"] * abs(b["said"] - b["passed"]) for b in bins if b["tokens"])
        return {
            "error": error / max(1, len(said)),
            "bins": bins,
            "by_offset": [_mean(said, passed, offset == k) for k in range(draft_length)],
        }


def _mean(said: Tensor, passed: Tensor, where: Tensor) -> dict:
    tokens = int(where.sum())
    if not tokens:
        return {"said": None, "passed": None, "tokens": 0}
    return {"said": float(said[where].mean()), "passed": float(passed[where].mean()), "tokens": tokens}
