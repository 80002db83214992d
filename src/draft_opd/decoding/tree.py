"""Draft trees: several continuations a round, verified in one target forward.

The tree's shape is static: `widths[k - 1]` nodes at depth k, the most probable ones under the
drafter among all children of the depth before (EAGLE-2's expansion, without its second ranking).
Verification draws the target's token at every node and follows the child that is this token, so
the committed text is the target's own, greedy or sampled, whatever the tree holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.verification import follow_path
from draft_opd.models.kv_cache import PositionCache
from draft_opd.models.target import Target
from draft_opd.utils.errors import UserError

MAX_NODES = 256


def check_widths(widths: Sequence[int], longest: int) -> tuple[int, ...]:
    """Nodes at each depth, within what the drafter was trained for. Raises `UserError`."""
    if not widths or min(widths) < 1 or sum(widths) > MAX_NODES:
        raise UserError(
            f"tree {','.join(map(str, widths))}: give 1 or more nodes at each depth, "
            f"at most {MAX_NODES} in all"
        )
    if len(widths) > longest:
        raise UserError(f"a tree of depth {len(widths)} is too deep: this drafter goes to {longest}")
    return tuple(widths)


def ancestry(parents: Tensor) -> Tensor:
    """[batch, N] parents (index in the tree, root 0 has -1) -> [batch, N, N], who sees whom: a node
    its ancestors and itself. Parents come before their children."""
    batch, count = parents.shape
    seen = torch.eye(count, dtype=torch.bool, device=parents.device).repeat(batch, 1, 1)
    rows = torch.arange(batch, device=parents.device)
    for i in range(1, count):
        seen[:, i] |= seen[rows, parents[:, i]]
    return seen


def verify_tree(
    target: Target,
    cache: PositionCache,
    layers: Sequence[int],
    tokens: Tensor,
    parents: Tensor,
    depths: Tensor,
    deepest: int,
    anchors: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
):
    """Runs the target over a tree, whose node 0 is the anchor's token, and keeps the best path.

    tokens, parents, depths [batch, N] (`deepest` at most); anchors [batch]. Returns the path's
    tokens [batch, D + 1] (anchor first), their positions and features, the accepted lengths and
    bonus tokens [batch].
    """
    positions = anchors[:, None] + depths
    prefix = anchors[:, None].expand_as(tokens)
    out = target.branches(tokens, positions, ancestry(parents), prefix, cache, layers)
    logits = target.logits(out.hidden)
    if sampling.greedy:
        chosen = logits.argmax(-1)
    else:
        probs = sampling.probabilities(logits).flatten(0, 1)
        chosen = torch.multinomial(probs, 1, generator=generator).view(tokens.shape)
    path, accepted = follow_path(tokens, parents, chosen, deepest)
    where = anchors[:, None] + torch.arange(deepest + 1, device=tokens.device)
    cache.keep(path, where)
    features = out.features.gather(1, path[..., None].expand(-1, -1, out.features.shape[-1]))
    bonus = chosen.gather(1, path.gather(1, accepted[:, None]))[:, 0]
    return tokens.gather(1, path), where, features, accepted, bonus
