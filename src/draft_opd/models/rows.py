"""Rows of token ids as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device, fill: int = 0) -> Tensor:
    """Right-pads lists of ids to a tensor [rows, longest]."""
    width = max(map(len, rows))
    return torch.tensor([[*r, *[fill] * (width - len(r))] for r in rows], device=device)
