"""Random numbers by counter: uniform, a row's own, and picked by them as the distribution says."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import draft_opd as d
from draft_opd.decoding.noise import BONUS, COIN, DRAFT, pick, round_noise, row_keys, uniforms
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.verification import verify_with_noise


def test_they_are_uniform_and_independent():
    """Moments, correlations between neighbours, roles and keys, and every bit of 16; 5 sigma."""
    keys = torch.tensor(row_keys([0] * 50, [[3, i] for i in range(50)]))
    positions = torch.arange(2000).expand(50, -1)
    made = {role: uniforms(keys, positions, role) for role in (DRAFT, COIN, BONUS)}
    u = made[DRAFT]
    n = u.numel()
    assert u.min() >= 0 and u.max() < 1 and len(u.unique()) == n
    assert abs(u.mean() - 0.5) < 5 / (12 * n) ** 0.5
    assert abs(u.var() - 1 / 12) < 5 * (1 / 180 / n) ** 0.5
    pairs = [
        (u[:, 1:], u[:, :-1]),
        (u[1:], u[:-1]),
        (u, made[COIN]),
        (u, made[BONUS]),
        (made[COIN], made[BONUS]),
    ]
    for a, b in pairs:
        assert abs(((a - 0.5) * (b - 0.5)).mean()) * 12 < 5 / a.numel() ** 0.5
    bits = (u * 2**16).long()
    for k in range(16):
        assert abs((bits >> k & 1).double().mean() - 0.5) < 2.5 / n**0.5


def test_rows_have_keys_of_their_own():
    prompts = [[1, 2], [1, 2], [2, 1], [1, 2]]
    keys = row_keys([0, 0, 0, 1], prompts)
    assert len(set(keys)) == 4 and all(0 <= k < 2**63 for k in keys)
    assert keys[2:3] == row_keys([0], [[2, 1]]) and keys[:2] == row_keys([0, 0], prompts[:2])


@given(st.integers(0, 10**6), st.floats(0, 1, exclude_max=True))
def test_a_pick_is_the_inverse_of_the_distribution(seed, u):
    g = torch.Generator().manual_seed(seed)
    probs = torch.rand(7, generator=g)
    probs[torch.randperm(7, generator=g)[:3]] = 0.0
    found = int(pick(probs, torch.tensor(u, dtype=torch.float64)))
    mass = probs.double().cumsum(0)
    assert probs[found] > 0
    before = float(mass[found - 1]) if found else 0.0
    assert before <= u * float(mass[-1]) * (1 + 1e-12) and u * float(mass[-1]) <= float(mass[found])


def test_the_committed_distribution_is_the_targets():
    """Two offsets and a bonus by counter numbers: committed pairs follow p exactly (5 sigma)."""
    n, size = 200_000, 4
    g = torch.Generator().manual_seed(1)
    p = torch.rand(3, size, generator=g).softmax(-1)
    q = (3 * torch.rand(2, size, generator=g)).softmax(-1)
    keys = torch.tensor(row_keys([0] * n, [[5]] * n))
    noise = round_noise(keys, torch.zeros(n, dtype=torch.long), 2)
    drafted = pick(q.expand(n, -1, -1), noise.draft)
    accepted, bonus = verify_with_noise(
        drafted, q.expand(n, -1, -1), p.expand(n, -1, -1), noise.coin, noise.bonus
    )
    first = torch.where(accepted > 0, drafted[:, 0], bonus)
    share = torch.bincount(first, minlength=size) / n
    assert ((share - p[0]).abs() < 5 * (p[0] * (1 - p[0]) / n).sqrt()).all()
    rows = accepted > 0
    second = torch.where(accepted == 2, drafted[:, 1], bonus)[rows]
    share = torch.bincount(second, minlength=size) / rows.sum()
    assert ((share - p[1]).abs() < 5 * (p[1] * (1 - p[1]) / rows.sum()).sqrt()).all()


@pytest.mark.parametrize("draft", ["sample", "argmax"])
def test_a_row_draws_the_same_alone_and_in_a_batch(target, trained, heldout, draft):
    sampling = Sampling(temperature=0.9, top_p=0.95, draft=draft)
    prompts = [t.prompt_ids for t in heldout[:3]]
    options = {"max_new_tokens": 25, "sampling": sampling, "seed": 3}
    together = d.speculate(target, trained, prompts, **options)
    assert len({tuple(g.token_ids) for g in together}) == 3
    for prompt, g in zip(prompts, together, strict=True):
        (alone,) = d.speculate(target, trained, [prompt], **options)
        assert alone.token_ids == g.token_ids and alone.rounds == g.rounds
    copies = d.speculate(target, trained, [prompts[0]] * 3, **options)
    assert copies[0].token_ids == together[0].token_ids
    assert len({tuple(g.token_ids) for g in copies}) > 1
