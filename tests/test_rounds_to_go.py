"""Rounds to go, where rounds begin, and what a token is worth: against loops, chains and autograd."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import draft_opd as d
from draft_opd.hindsight.trace import hindsight_traces
from draft_opd.losses import rounds_to_go as module
from draft_opd.losses.config import Objective
from draft_opd.losses.rounds_to_go import advantages, occupancy, rounds_to_go, survival_before
from draft_opd.training.batches import BatchSource
from draft_opd.training.blocks import pack_anchors
from draft_opd.training.values import rounds_ahead, without_cut_ends


def case(count: int, length: int, seed: int):
    """Random α [2, A, K]; the texts end behind the last anchor, the second one 3 positions earlier."""
    generator = torch.Generator().manual_seed(seed)
    alpha = torch.rand(2, count, length, generator=generator, dtype=torch.double)
    reach = torch.arange(count)[:, None] + torch.arange(1, length + 1)
    return alpha, torch.stack([reach <= count, reach <= max(1, count - 3)])


def by_loops(alpha, valid):
    """V and the occupancy of one text, as the equations are written."""
    count, length = alpha.shape
    values, begins = [0.0] * (count + length + 1), [0.0] * (count + length + 1)
    begins[0] = 1.0

    def moves(a):
        survived = 1.0
        for n in range(length + 1):
            more = float(alpha[a, n]) if n < length and valid[a, n] else 0.0
            yield a + n + 1, survived * (1 - more)
            survived *= more

    real = [bool(valid[a].any()) for a in range(count)]
    for a in reversed(range(count)):
        values[a] = (1 + sum(p * values[b] for b, p in moves(a))) if real[a] else 0.0
    for a in range(count):
        for b, p in moves(a):
            begins[b] += begins[a] * p
    return values, [x * r for x, r in zip(begins, real, strict=False)]


@settings(max_examples=40)
@given(
    count=st.integers(1, 40), length=st.integers(1, 9), piece=st.integers(1, 50), seed=st.integers(0, 10**6)
)
def test_they_solve_their_equations(count, length, piece, seed):
    alpha, valid = case(count, length, seed)
    before, module.PIECE = module.PIECE, piece
    try:
        values, begins = rounds_to_go(alpha, valid), occupancy(alpha, valid)
    finally:
        module.PIECE = before
    for row in range(2):
        wanted = by_loops(alpha[row], valid[row])
        assert values[row].tolist() == pytest.approx(wanted[0], abs=1e-9)
        assert begins[row].tolist() == pytest.approx(wanted[1], abs=1e-9)
    torch.testing.assert_close(begins.sum(-1), values[:, 0])  # as many rounds as begin


def test_they_are_the_means_of_simulated_chains():
    alpha, valid = case(30, 5, 1)
    rng, count = random.Random(0), 4000
    rounds, begins = 0, torch.zeros(30)
    for _ in range(count):
        at = 0
        while at < 30:
            begins[at] += 1
            rounds += 1
            n = 0
            while n < 5 and valid[0, at, n] and rng.random() < alpha[0, at, n]:
                n += 1
            at += n + 1
    assert rounds / count == pytest.approx(float(rounds_to_go(alpha, valid)[0, 0]), rel=0.02)
    wanted = occupancy(alpha, valid)[0]
    assert ((begins / count - wanted).abs() < 5 * (wanted * (1 - wanted) / count).sqrt() + 1e-3).all()


@settings(max_examples=20)
@given(count=st.integers(1, 25), length=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_the_gradient_is_autograd_s(count, length, seed):
    """∂V(first) / ∂α(a, k) = v(a) Π_{j<k} α(a, j) (C(a, k) - V(a + k))."""
    alpha, valid = case(count, length, seed)
    alpha.requires_grad_()
    (wanted,) = torch.autograd.grad(rounds_to_go(alpha, valid)[:, 0].sum(), alpha)
    with torch.no_grad():
        known = torch.where(valid, alpha, 0.0)
        where = torch.arange(count)[:, None] + torch.arange(1, length + 2)
        saved = advantages(known, rounds_to_go(alpha, valid)[:, where])
        found = -occupancy(alpha, valid)[..., None] * survival_before(known) * saved * valid
    torch.testing.assert_close(found, wanted)


def test_values_of_a_batch(target, trained, heldout):
    """They fall towards the end, and what was cut there counts nothing."""
    rows = [
        d.Trajectory(t.prompt_ids, t.response_ids[:n], t.id) for t, n in zip(heldout, (40, 25), strict=False)
    ]
    batch = BatchSource(target, trained.target_layers).batch(rows)
    traces = hindsight_traces(target, trained, rows)
    anchors = [[r.anchor for r in trace] for trace in traces]
    blocks = pack_anchors(batch, anchors, trained.draft_length)
    smooth = rounds_ahead(target, trained, batch, blocks, Objective(kind="rounds"))
    assert (smooth[:, :, :-1] >= 0).all() and smooth.isfinite().all()
    later = smooth[0, : len(anchors[0]), 0]
    assert later[0] > later[-1] and float(later[-1]) <= trained.draft_length
    cut = [d.Trajectory(t.prompt_ids, t.response_ids, t.id, "length") for t in rows]
    batch = BatchSource(target, trained.target_layers).batch(cut)
    kept = without_cut_ends(batch, blocks).weight > 0
    ends = batch.ends[:, None] - trained.draft_length - 1
    assert torch.equal(kept, blocks.present & (blocks.anchors <= ends))


def test_the_loss_s_gradient_is_that_of_the_rounds(target, trained, heldout):
    """One text, every anchor weighted with its occupancy: the loss's gradient through q is V's."""
    from draft_opd.losses.objectives import ReplayedBlocks, objective_loss

    torch.manual_seed(0)
    count, length, size = 12, 4, 9
    logits = torch.randn(count, length, size, dtype=torch.double, requires_grad=True)
    reach = torch.arange(count)[:, None] + torch.arange(1, length + 1)
    valid, labels = reach <= count, torch.randint(0, size, (count, length))
    alpha = logits.softmax(-1).gather(-1, labels[..., None])[..., 0] ** 2
    value = rounds_to_go(alpha, valid)
    (wanted,) = torch.autograd.grad(value[0] / occupancy(alpha, valid).sum().detach(), logits)
    where = torch.arange(count)[:, None] + torch.arange(1, length + 2)
    replayed = ReplayedBlocks(
        hidden=logits,
        states=None,
        labels=labels,
        drafted=labels,
        accepted=torch.zeros(count).long(),
        valid=valid,
        weight=occupancy(alpha, valid).detach(),
        head=torch.eye(size, dtype=torch.double),
        target_head=torch.eye(size, dtype=torch.double),
        decay=1.0,
        draftable=torch.ones_like(valid),
        ahead=value.detach()[where],
    )
    loss, _ = objective_loss(replayed, Objective(kind="rounds", value_sharpness=2.0))
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    # The weights of `advantage` are never negative, and 0 where nothing is saved.
    flat = replace(replayed, ahead=torch.ones(count, length + 1, dtype=torch.double))
    assert float(objective_loss(flat, Objective(kind="advantage"))[0]) == 0.0
