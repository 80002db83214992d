"""Draft vocabulary <-> target vocabulary, as EAGLE-3 files store it.

`d2t` [Vd] holds offsets (target id = draft id + d2t[draft id]); `t2d` [V] says which target ids are
in. Ids ascend (SafeAILab's cnets.py, vLLM's llama_eagle3.py, SGLang's hot_token_id).
"""

from __future__ import annotations

import torch
from torch import Tensor

from draft_opd.utils.errors import UserError


def most_frequent(counts: Tensor, size: int) -> Tensor:
    """The `size` most frequent of counts [V], as ascending ids (ties: the lower id)."""
    order = counts.double().argsort(descending=True, stable=True)
    return order[:size].sort().values


def as_buffers(ids: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """(d2t, t2d) of ascending target ids [Vd]."""
    d2t = ids - torch.arange(len(ids), device=ids.device)
    t2d = torch.zeros(vocab_size, dtype=torch.bool, device=ids.device)
    t2d[ids] = True
    return d2t, t2d


def target_ids(d2t: Tensor) -> Tensor:
    """Target ids [Vd]."""
    return d2t + torch.arange(len(d2t), device=d2t.device)


def checked_ids(d2t: Tensor, vocab_size: int) -> Tensor:
    """The same. Raises `UserError` for a table that leaves the target's vocabulary or names
    a token twice (a file that stores absolute ids does)."""
    ids = target_ids(d2t)
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size or len(ids.unique()) < len(ids)):
        raise UserError(
            f"d2t does not map the draft vocabulary of {len(ids)} into the target's {vocab_size} "
            "ids one to one: it must hold offsets (target id - draft id)"
        )
    return ids
