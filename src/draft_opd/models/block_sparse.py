"""Attention that skips whole tiles of a mask: flex_attention, compiled once for all shapes."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask as TileMask
from torch.nn.attention.flex_attention import flex_attention

# Below this many queries the dense mask is small and flex_attention's overhead does not pay.
FLEX_MINIMUM = 1024
VARIANTS = 64  # kernels: with and without gradient, kinds of layers, drafter and branches, types
TILE = 128  # queries and keys of a tile that is computed or skipped


@cache
def _compiled():
    return torch.compile(flex_attention, dynamic=True)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: TileMask, scale: float | None = None) -> Tensor:
    """q [batch, heads, m, d], k and v [batch, kv_heads, n, d] -> like q."""
    # Norms leave q and k float32 under autocast, and the kernel wants one type.
    q, k = q.to(v.dtype), k.to(v.dtype)
    usual = q.shape[-1] ** -0.5
    if scale is not None and abs(scale - usual) > 1e-6:
        q = q * (scale / usual)  # not an argument: a compiler would make a kernel for every number
    attend = _compiled() if q.is_cuda else flex_attention
    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
        return attend(q, k, v, block_mask=mask, enable_gqa=True)


def tile_mask(some: Tensor, whole: Tensor, rule, queries: int, keys: int) -> TileMask:
    """some, whole [batch, query tiles, key tiles]: tiles in which some query may see some key, and in which
    every one sees every one; rule: mask_mod(batch, head, query, key)."""
    return TileMask.from_kv_blocks(
        *_ordered(some & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=TILE,
        mask_mod=rule,
        seq_lengths=(queries, keys),
    )


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Booleans [batch, queries, keys] -> how many are set [batch, 1, queries], and which, these first
    [batch, 1, queries, keys]."""
    order = tiles.logical_not().to(torch.int8).argsort(dim=-1, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]


def branch_mask(own: Tensor, prefix: Tensor, width: int) -> TileMask:
    """Of `Target.branches`: own [batch, m, m] says which of the branches' tokens each sees, and it sees the
    first `prefix` [batch, m] of `width` context slots, which lie in front of them."""
    some, whole = branch_tiles(own, prefix, width)
    edge = torch.full((), width, device=own.device)  # not a constant: a compiler would make many kernels

    def visible(b, h, q, k):
        inside = own[b, q, (k - edge).clamp_min(0)]
        return torch.where(k < edge, k < prefix[b, q], inside)

    return tile_mask(some, whole, visible, own.shape[1], width + own.shape[1])


def branch_tiles(own: Tensor, prefix: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """`tile_mask`'s tiles for `branch_mask`'s arguments."""
    batch, count = prefix.shape
    queries, keys = -(-count // TILE), -(-(width + count) // TILE)
    over = queries * TILE - count
    prefix = prefix.clamp_max(width)
    furthest = F.pad(prefix, (0, over)).view(batch, queries, TILE).amax(-1)
    nearest = F.pad(prefix, (0, over), value=width).view(batch, queries, TILE).amin(-1)
    start = torch.arange(keys, device=prefix.device) * TILE
    some = start < furthest[:, :, None]
    whole = start + TILE <= nearest[:, :, None]
    first = width // TILE  # the tile in which the branches' own keys begin
    left = width - first * TILE
    padded = F.pad(own, (left, (keys - first) * TILE - left - count, 0, over))
    inside = padded.view(batch, queries, TILE, keys - first, TILE).any(-1).any(2)
    some[:, :, first:] |= inside
    return some, whole
