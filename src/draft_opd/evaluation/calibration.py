"""How far a drafter means its confidence: the chance that a token passes, given that those before it did."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draft_opd.data.trajectory import Trajectory
from draft_opd.drafters.base import Drafter
from draft_opd.models.target import Target
from draft_opd.training.batches import BatchSource
from draft_opd.training.blocks import attach_drafts, pack_anchors, replay
from draft_opd.training.rollouts import hindsight_rollout

BINS = 10


@torch.no_grad()
def calibration(
    target: Target,
    drafter: Drafter,
    texts: Sequence[Trajectory],
    draft_length: int | None = None,
    batch: int = 8,
) -> dict | None:
    """Over the offsets that greedy rounds on these texts reached (up to the first rejection), or None for a
    drafter without a confidence.

    `bins`: {said, passed, tokens} by tenths of what was said. `error`: the expected calibration error,
    Σ_bins tokens |said - passed| / Σ tokens. `by_offset`: {said, passed, tokens} of offsets 1..K.
    """
    drafter.bind(target)
    if not drafter.has_confidence:
        return None
    count = drafter.checked_length(draft_length)
    source, said, passed, offsets = BatchSource(target, drafter.target_layers), [], [], []
    for start in range(0, len(texts), batch):
        rows = source.batch(list(texts[start : start + batch]))
        traces = hindsight_rollout(target, drafter, rows, count)
        blocks = attach_drafts(pack_anchors(rows, [[r.anchor for r in t] for t in traces], count), traces)
        r = replay(target, drafter, rows, blocks)
        offset = torch.arange(count, device=r.valid.device)
        reached = r.valid & (offset <= r.accepted[:, None]) & (r.weight > 0)[:, None]
        said.append(torch.sigmoid(r.confidence.float())[reached].cpu())
        passed.append((offset < r.accepted[:, None])[reached].float().cpu())
        offsets.append(offset.expand_as(reached)[reached].cpu())
    chance, truth, where = torch.cat(said), torch.cat(passed), torch.cat(offsets)
    bins = [_mean(chance, truth, (chance * BINS).long().clamp_max(BINS - 1) == i) for i in range(BINS)]
    error = sum(b["tokens"] * abs(b["said"] - b["passed"]) for b in bins if b["tokens"]) / max(1, len(chance))
    return {
        "error": error,
        "bins": bins,
        "by_offset": [_mean(chance, truth, where == k) for k in range(count)],
    }


def _mean(said: torch.Tensor, passed: torch.Tensor, where: torch.Tensor) -> dict:
    tokens = int(where.sum())
    if not tokens:
        return {"said": None, "passed": None, "tokens": 0}
    return {"said": float(said[where].mean()), "passed": float(passed[where].mean()), "tokens": tokens}
