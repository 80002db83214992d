"""Masks of tiles let every token see what the dense mask lets it see, and nothing else."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import flex_attention

import draft_opd as d
from draft_opd.models.block_sparse import TILE, branch_mask, branch_tiles

FAMILY = "dflash"


def branches(count: int, width: int, seed: int):
    """Branches of 1 to 9 tokens behind random prefixes; the second row has padding behind its own."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for row in range(2):
        branch, at, prefix = [], [], []
        while len(branch) < count - 20 * row:
            size = int(torch.randint(1, 10, (), generator=generator))
            begin = int(torch.randint(0, width + 1, (), generator=generator))
            branch += [len(prefix)] * size
            at += range(begin, begin + size)
            prefix += [begin] * size
        branch, at, prefix = (x[:count] for x in (branch, at, prefix))
        pad = count - len(branch)
        rows.append((branch + [-1] * pad, at + [0] * pad, prefix + [0] * pad))
    branch, at, prefix = (torch.tensor(x) for x in zip(*rows, strict=True))
    own = (branch[:, :, None] == branch[:, None, :]) & (at[:, None, :] <= at[:, :, None])
    return own, prefix, at


def dense(own, prefix, width):
    slots = torch.arange(width)
    return torch.cat([slots < prefix[:, :, None], own], -1)


@settings(max_examples=40)
@given(count=st.integers(21, 400), width=st.integers(1, 400), seed=st.integers(0, 10**6))
def test_tiles_of_branches(count, width, seed):
    own, prefix, _ = branches(count, width, seed)
    seen = dense(own, prefix, width)
    some, whole = branch_tiles(own, prefix, width)
    over = [(-x) % TILE for x in seen.shape[1:]]
    padded = torch.nn.functional.pad(seen, (0, over[1], 0, over[0]))
    tiles = padded.view(2, some.shape[1], TILE, some.shape[2], TILE)
    assert not (tiles.any(-1).any(2) & ~some).any()  # what is skipped holds nothing
    inside = tiles.all(-1)  # of each query
    queries = torch.arange(some.shape[1] * TILE).view(1, -1, TILE, 1) < count
    assert (inside | ~queries).all(2)[whole].all()  # and what is not masked is seen by all
    rule = branch_mask(own, prefix, width).mask_mod
    b, q, k = (torch.arange(n) for n in seen.shape)
    found = rule(b[:, None, None], None, q[None, :, None], k[None, None, :])
    assert torch.equal(found, seen)


def test_branches_of_a_target_by_tiles(target, heldout):
    """flex_attention's eager form, on any device."""
    assert target.skips_tiles
    text = torch.tensor([t.ids[:60] for t in heldout[:2]])
    cache = target.cache(64)
    target.trajectories(text, cache=cache)
    own, prefix, at = branches(90, 59, seed=4)
    prefix = prefix.clamp_min(1)
    ids = torch.randint(3, 200, prefix.shape, generator=torch.Generator().manual_seed(1))
    wanted = target.branches(ids, at, own, prefix, cache).hidden
    width = cache.reach(prefix - 1)
    cache.prepare(at, branch=True, visible=width)
    found = target._over_cache(ids, at, branch_mask(own, prefix, width), cache, ()).hidden
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_branches_of_a_target_on_cuda(heldout):
    """More than FLEX_MINIMUM tokens: the compiled kernel against the CPU."""
    found = []
    for device in ("cpu", "cuda"):
        target = d.Target.from_pretrained("embedded", device=device)
        text = torch.tensor([t.ids[:60] for t in heldout[:2]], device=device)
        cache = target.cache(64)
        target.trajectories(text, cache=cache)
        own, prefix, at = (x.to(device) for x in branches(1100, 59, seed=4))
        ids = (torch.arange(2200).view(2, 1100) * 7 % 200 + 3).to(device)
        found.append(target.branches(ids, at, own, prefix.clamp_min(1), cache).hidden.cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_branches_are_compiled_once_for_all_shapes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    flex = torch.compile(flex_attention, dynamic=True, backend=counter)
    for count, width in ((600, 300), (700, 330), (800, 431)):  # no number of tiles is that of rows or heads
        own, prefix, _ = branches(count, width, seed=2)
        q = torch.randn(2, 4, count, 16)
        k, v = torch.randn(2, 2, width + count, 16), torch.randn(2, 2, width + count, 16)
        found = flex(q, k, v, block_mask=branch_mask(own, prefix, width), enable_gqa=True)
        seen = dense(own, prefix, width)[:, None]
        wanted = torch.nn.functional.scaled_dot_product_attention(
            q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), attn_mask=seen
        )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
