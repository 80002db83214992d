"""How far a text is from the target's own greedy choice, token by token.

In float32 speculative and single-token decoding choose alike. In 16 bit a batched verification and
a single step round differently, so near-ties may fall either way: the regret of such a token is
within what the type's rounding leaves open, and anything beyond is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draft_opd.models.target import Target

PART = 1024  # tokens whose logits are held at a time
ROUNDINGS = 8  # bound: 8 eps of the largest logit, for the roundings of all layers, with a margin


@torch.no_grad()
def regret(target: Target, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(largest logit minus that of the token said, the bound for it), [len(response_ids)] each.

    One forward over the whole text, in the target's type.
    """
    ids = torch.tensor([[*prompt_ids, *response_ids]], device=target.device)
    at = len(prompt_ids) - 1
    gaps, bounds = [], []
    states = target.trajectories(ids).hidden[0, at:-1]
    for hidden, token_ids in zip(states.split(PART), ids[0, at + 1 :].split(PART), strict=True):
        logits = target.logits(hidden).float()
        token_logits = logits.gather(1, token_ids[:, None])[:, 0]
        gaps.append(logits.max(-1).values - token_logits)
        bounds.append(ROUNDINGS * torch.finfo(target.dtype).eps * logits.abs().max(-1).values)
    return torch.cat(gaps), torch.cat(bounds)
