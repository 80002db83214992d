"""Whether a drafter's weights were meant to be read otherwise than its config says."""

from __future__ import annotations

from collections.abc import Sequence

from draft_opd.data.trajectory import Trajectory, drawn
from draft_opd.decoding.rounds import tau
from draft_opd.drafters.base import Drafter
from draft_opd.evaluation.statistics import difference
from draft_opd.hindsight.trace import hindsight_traces
from draft_opd.models.target import Target

MOST = 128  # texts that are looked at
ENOUGH = 32  # texts, below which nothing is concluded


def better_misreadings(target: Target, drafter: Drafter, texts: Sequence[Trajectory]) -> list[str]:
    """Readings of the same weights whose τ on these texts is higher, by an interval above 0."""
    if len(texts) < ENOUGH:
        return []
    found, texts = [], drawn(list(texts), MOST)
    for name, change in drafter.misreadings().items():
        twin = drafter.with_fault(change)
        if twin is None:
            continue
        twin.bind(target)
        length = min(drafter.draft_length, twin.draft_length)
        own, other = (hindsight_traces(target, x, texts, draft_length=length) for x in (drafter, twin))
        apart = difference(other, own)
        if apart is not None and apart[0] > 0:
            taus = [tau(r for trace in traces for r in trace) for traces in (own, other)]
            found.append(f"{name}: τ would be {taus[1]:.2f} instead of {taus[0]:.2f} on these texts")
    return found
