"""Every objective of the league against its equation, written out slowly in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draft_opd.losses.config import Objective
from draft_opd.losses.divergences import dpace_weights, sampled, stream_weights, top_k
from draft_opd.losses.objectives import OBJECTIVES, STREAMS, ReplayedBlocks, objective_loss

V, H = 6, 5


def make(seed: int, blocks: int = 3, length: int = 4) -> ReplayedBlocks:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    ends = torch.randint(1, length + 1, (blocks,), generator=g)
    valid = torch.arange(length) < ends[:, None]
    accepted = (torch.rand(blocks, generator=g) * (ends + 1)).long().clamp_max(length)
    return ReplayedBlocks(
        hidden=normal(blocks, length, H).requires_grad_(),
        states=normal(blocks, length, H),
        labels=torch.randint(0, V, (blocks, length), generator=g),
        drafted=torch.randint(0, V, (blocks, length), generator=g),
        accepted=torch.minimum(accepted, ends),
        valid=valid,
        weight=torch.rand(blocks, generator=g, dtype=torch.float64) + 0.1,
        head=normal(V, H),
        target_head=normal(V, H),
        decay=4.3,
        supervision_temperature=0.7,
        ahead=torch.rand(blocks, length + 1, generator=g, dtype=torch.float64),
    )


def distributions(r: ReplayedBlocks, n: int, k: int) -> tuple[list[float], list[float]]:
    """p and q as lists of V numbers."""
    q = (r.hidden[n, k] @ r.head.T / r.draft_temperature).softmax(-1)
    p = (r.states[n, k] @ r.target_head.T / r.supervision_temperature).softmax(-1)
    return p.tolist(), q.tolist()


def forward(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def reverse(p, q):
    return forward(q, p)


def shared(p, q):
    return sum(map(min, p, q))


SLOW = {
    "acceptance_aware": (forward, reverse),
    "forward_kl": (forward, forward),
    "reverse_kl": (reverse, reverse),
    "total_variation": (lambda p, q: 1 - shared(p, q),) * 2,
    "log_overlap": (lambda p, q: -math.log(shared(p, q)),) * 2,
}


def slow_streams(r: ReplayedBlocks, o: Objective) -> float:
    sums, masses = [0.0, 0.0], [0.0, 0.0]
    for n in range(len(r.valid)):
        limit = int(r.accepted[n]) + (1 if o.supervise_correction else 0)
        for k in range(1, r.valid.shape[1] + 1):
            if not r.valid[n, k - 1]:
                continue
            p, q = distributions(r, n, k - 1)
            member = (k <= limit, k == r.accepted[n] + 1 or (o.suffix and k > r.accepted[n]))
            for i, gamma in enumerate((o.accepted_gamma, o.gamma)):
                if member[i]:
                    weight = gamma ** (k - 1) * float(r.weight[n])
                    sums[i] += weight * SLOW[o.kind][i](p, q)
                    masses[i] += weight
    means = [s / m if m else 0.0 for s, m in zip(sums, masses, strict=True)]
    a, b = o.accepted_weight, o.rejected_weight
    if o.normalization == "streams":
        return (a * means[0] + b * means[1]) / (a + b)
    return (a * sums[0] + b * sums[1]) / (a * masses[0] + b * masses[1])


def accepted_value(a: list[float], ahead: list[float], k: int) -> float:
    """The expected value behind offset k (0-based) once it is accepted: it stops at some m >= k."""
    a = [*a, *[0.0] * (len(ahead) - 1 - len(a))]
    stops = [1 - x for x in a[1:]] + [1.0]
    return sum(math.prod(a[k + 1 : m + 1]) * stops[m] * ahead[m + 1] for m in range(k, len(a)))


def slow_blocks(r: ReplayedBlocks, o: Objective) -> float:
    """The objectives that see blocks along the text."""
    top = bottom = 0.0
    decay = r.decay
    for n in range(len(r.valid)):
        w, length = float(r.weight[n]), int(r.valid[n].sum())
        within = min(length, int(r.accepted[n]) + 1)
        pairs = [distributions(r, n, k) for k in range(length)]
        says = [q[int(r.labels[n, k])] for k, (_, q) in enumerate(pairs)]
        if o.kind == "cross_entropy":
            for k, x in enumerate(says):
                top -= w * math.exp(-k / decay) * math.log(x)
                bottom += w * math.exp(-k / decay)
        elif o.kind == "auf":
            top -= w * sum(math.log(x) for x in says[:within])
            bottom += w * within
        elif o.kind == "dpace":
            smooth = [(1 - o.dpace_alpha) * x + o.dpace_alpha for x in says]
            for j, x in enumerate(says):
                weight = sum(math.prod(smooth[: m + 1]) for m in range(j, length))
                top -= w * weight * math.log(x)
            bottom += w
        elif o.kind in ("rounds", "advantage"):
            smooth = [(1 - o.dpace_alpha) * x + o.dpace_alpha for x in says]
            a = [x**o.value_sharpness for x in says] if o.kind == "rounds" else smooth
            for k in range(length):
                gain = math.prod(a[:k]) * (float(r.ahead[n, k]) - accepted_value(a, r.ahead[n].tolist(), k))
                top -= w * (a[k] * gain if o.kind == "rounds" else max(gain, 0.0) * math.log(says[k]))
            bottom += w
        elif o.kind == "chain_tv":
            a = [shared(*pair) for pair in pairs[:within]]
            top += w * (1 - sum(math.prod(a[: k + 1]) for k in range(within)) / within)
            bottom += w
        else:
            a = says if o.kind == "expected_length" else [shared(*pair) for pair in pairs]
            top += w * (length - sum(math.prod(a[: k + 1]) for k in range(length)))
            bottom += w * length
    return top / bottom


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.sampled_from(sorted(STREAMS)),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["streams", "tokens"]),
    st.sampled_from([(1.0, 1.0), (1.0, 0.3), (0.5, 2.0)]),
    st.sampled_from([(0.8, 1.0), (1.0, 0.7)]),
)
def test_two_stream_objectives(seed, kind, correction, suffix, normalization, weights, gammas):
    r = make(seed)
    o = Objective(
        kind=kind,
        supervise_correction=correction,
        suffix=suffix,
        normalization=normalization,
        accepted_weight=weights[0],
        rejected_weight=weights[1],
        gamma=gammas[0],
        accepted_gamma=gammas[1],
    )
    assert objective_loss(r, o)[0].item() == pytest.approx(slow_streams(r, o), abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.sampled_from(sorted(set(OBJECTIVES) - set(STREAMS))),
    st.sampled_from([1.0, 0.5]),
)
def test_objectives_along_the_block(seed, kind, temperature):
    r = make(seed)
    if kind != "cross_entropy":  # the SFT term always looks at q as it is
        r.draft_temperature = temperature
    o = Objective(kind=kind)
    assert objective_loss(r, o)[0].item() == pytest.approx(slow_blocks(r, o), abs=1e-9)


@pytest.mark.parametrize("kind", sorted(set(OBJECTIVES) - {"rounds", "advantage"}))
def test_gradients_are_those_of_the_value(kind):
    """Against central differences; D-PACE's weights carry none by definition. (Those of `rounds` and
    `advantage`: test_rounds_to_go.py.)"""
    r, o = make(4), Objective(kind=kind, trajectory_weight=0.3)
    weights = dpace_weights((-r.label_nll).exp(), r.valid)

    def value(hidden: torch.Tensor) -> torch.Tensor:
        fresh = ReplayedBlocks(
            **{f: getattr(r, f) for f in ReplayedBlocks.__dataclass_fields__} | {"hidden": hidden}
        )
        if kind == "dpace":
            plain = objective_loss(fresh, Objective(kind="cross_entropy"))[0]
            return fresh.block_mean((fresh.label_nll * weights).sum(1), r.valid) + 0.3 * plain
        return objective_loss(fresh, o)[0]

    objective_loss(r, o)[0].backward()
    direction, step = torch.randn_like(r.hidden), 1e-6
    with torch.no_grad():
        there, back = (value(r.hidden + sign * step * direction) for sign in (1, -1))
    slope = float((r.hidden.grad * direction).sum())
    assert slope == pytest.approx(float(there - back) / (2 * step), rel=1e-4, abs=1e-8)
    assert not r.hidden.grad[~r.valid].any()


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_top_k_keeps_the_mass_of_the_rest(seed, k):
    g = torch.Generator().manual_seed(seed)
    q, p = (torch.randn(V, generator=g, dtype=torch.float64) for _ in range(2))
    for slow, score in ((forward, "forward_kl"), (reverse, "reverse_kl")):
        a, b = p.softmax(-1), q.softmax(-1)
        kept = a.topk(min(k, V - 1)).indices
        coarse = [[*x[kept].tolist(), 1 - float(x[kept].sum())] for x in (a, b)]
        exact = STREAMS[score][0][0]
        assert float(top_k(exact, k)(q, p)) == pytest.approx(slow(*coarse), abs=1e-9)
        # Merging outcomes never raises a divergence.
        assert float(top_k(exact, k)(q, p)) <= float(exact(q, p)) + 1e-12


@given(st.integers(0, 10**6), st.sampled_from(["forward", "reverse"]))
def test_single_token_estimates_have_the_right_mean(seed, direction):
    """k1 and k3 are unbiased under the first argument's distribution; k2 and bernoulli are not
    negative; Bernoulli is the exact divergence of two outcomes."""
    g = torch.Generator().manual_seed(seed)
    q, p = (torch.randn(V, generator=g, dtype=torch.float64) for _ in range(2))
    tokens = torch.arange(V)
    each = {
        form: sampled(form, direction, 1e3)(q.expand(V, V), p.expand(V, V), tokens)
        for form in ("k1", "k2", "k3", "bernoulli")
    }
    a, b = p.softmax(-1), q.softmax(-1)
    under, over = (a, b) if direction == "forward" else (b, a)
    exact = forward(under.tolist(), over.tolist())
    for form in ("k1", "k3"):
        assert float((under * each[form]).sum()) == pytest.approx(exact, abs=1e-9)
    for form in ("k2", "k3", "bernoulli"):
        assert (each[form] >= -1e-12).all()
    for v in range(V):
        two = [float(under[v]), 1 - float(under[v])], [float(over[v]), 1 - float(over[v])]
        assert float(each["bernoulli"][v]) == pytest.approx(forward(*two), abs=1e-9)


def test_estimates_are_clamped():
    q, p = torch.tensor([[50.0, 0.0]]), torch.tensor([[0.0, 50.0]])
    for form in ("k1", "k2", "k3", "bernoulli"):
        for direction in ("forward", "reverse"):
            value = sampled(form, direction)(q, p, torch.tensor([0]))
            assert value.abs() <= 10 and torch.isfinite(value)
    with pytest.raises(ValueError, match="k1, k2, k3"):
        sampled("k4", "forward")


@pytest.mark.parametrize("estimator", ["top_k", "k1", "k2", "k3", "bernoulli"])
def test_estimators_can_be_chosen(estimator):
    r = make(1)
    exact = objective_loss(r, Objective())[0]
    other = objective_loss(r, Objective(estimator=estimator, top_k=V - 1))[0]
    assert torch.isfinite(other)
    if estimator == "top_k":  # V - 1 tokens and the rest are all V
        assert other.item() == pytest.approx(exact.item(), rel=1e-9)


def test_streams_partition_what_is_valid():
    accepted, valid = torch.tensor([0, 2, 4]), torch.ones(3, 4, dtype=torch.bool)
    a, b = stream_weights(accepted, 4, valid, 1.0)
    assert torch.equal(a + b, valid.double())
    a, b = stream_weights(accepted, 4, valid, 1.0, correction=True, suffix=False)
    assert a.sum(1).tolist() == [1, 3, 4] and b.sum(1).tolist() == [1, 1, 0]
