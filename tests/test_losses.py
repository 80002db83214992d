"""Losses: against slow, obvious versions in float64, and the LM head in chunks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import draft_opd as d
from draft_opd.drafters.base import over_target
from draft_opd.losses.chunked import chunked_score
from draft_opd.losses.closed_form import CLOSED
from draft_opd.losses.divergences import (
    cross_entropy,
    expected_length,
    forward_kl,
    overlap,
    reverse_kl,
    total_variation,
)


def slow_loss(q_logits, p_logits, accepted, valid, gamma, weights, normalization):
    """method.md §4, one number at a time."""
    sums, masses = [0.0, 0.0], [0.0, 0.0]
    for n in range(q_logits.shape[0]):
        for k in range(1, q_logits.shape[1] + 1):
            if not valid[n, k - 1]:
                continue
            q = [math.exp(x) for x in q_logits[n, k - 1].log_softmax(-1).tolist()]
            p = [math.exp(x) for x in p_logits[n, k - 1].log_softmax(-1).tolist()]
            if k <= accepted[n]:
                sums[0] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
                masses[0] += 1.0
            else:
                w = gamma ** (k - 1)
                sums[1] += w * sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
                masses[1] += w
    if normalization == "streams":
        means = [s / m if m else 0.0 for s, m in zip(sums, masses, strict=True)]
        return (weights[0] * means[0] + weights[1] * means[1]) / sum(weights)
    mass = weights[0] * masses[0] + weights[1] * masses[1]
    return (weights[0] * sums[0] + weights[1] * sums[1]) / mass if mass else 0.0


@settings(deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 4),
    st.integers(1, 5),
    st.sampled_from([0.8, 0.9, 1.0]),
    st.sampled_from([(1.0, 1.0), (1.0, 0.1), (0.0, 1.0), (2.0, 0.0)]),
    st.sampled_from(["streams", "tokens"]),
)
def test_acceptance_aware_loss_is_the_papers(seed, rounds, length, gamma, weights, normalization):
    g = torch.Generator().manual_seed(seed)
    q, p = (torch.randn(rounds, length, 5, generator=g, dtype=torch.float64) * 2 for _ in range(2))
    accepted = torch.randint(0, length + 1, (rounds,), generator=g)
    valid = torch.rand(rounds, length, generator=g) < 0.8
    found = d.acceptance_aware_loss(
        q,
        p,
        accepted,
        valid=valid,
        gamma=gamma,
        accepted_weight=weights[0],
        rejected_weight=weights[1],
        normalization=normalization,
    )
    expected = slow_loss(q, p, accepted, valid, gamma, weights, normalization)
    assert float(found.total) == pytest.approx(expected, abs=1e-10)


def test_all_accepted_and_all_rejected_leave_the_other_stream_empty():
    q, p = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    full = d.acceptance_aware_loss(q, p, torch.full((3,), 4))
    none = d.acceptance_aware_loss(q, p, torch.zeros(3, dtype=torch.long))
    assert full.rejected == 0 and full.accepted > 0
    assert none.accepted == 0 and none.rejected > 0


def test_what_is_not_valid_carries_neither_value_nor_gradient():
    q = torch.randn(2, 3, 5, requires_grad=True)
    p = torch.randn(2, 3, 5)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    poisoned = p.masked_fill(~valid[..., None], float("nan"))
    loss = d.acceptance_aware_loss(q, poisoned, torch.tensor([1, 0]), valid=valid).total
    loss.backward()
    assert torch.isfinite(loss) and (q.grad[~valid].nan_to_num(0.0) == 0).all()
    assert torch.isfinite(q.grad).all()


def test_bad_arguments_are_named():
    q = torch.randn(2, 3, 5)
    with pytest.raises(ValueError, match="belong together"):
        d.acceptance_aware_loss(q, q[:, :2], torch.zeros(2))
    with pytest.raises(ValueError, match="normalization"):
        d.acceptance_aware_loss(q, q, torch.zeros(2), normalization="mean")


@given(st.integers(0, 10**6))
def test_divergences_vanish_only_at_equality(seed):
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 4, 7, generator=g, dtype=torch.float64)
    for score in (forward_kl, reverse_kl):
        assert (score(a, a).abs() < 1e-12).all()
        assert (score(a, b) > 0).all()
    assert torch.allclose(overlap(a, a), torch.ones(4, dtype=torch.float64))
    assert (overlap(a, b) < 1).all()


def test_a_token_of_no_probability_does_not_make_nan():
    a, b = torch.randn(3, 6), torch.randn(3, 6)
    a[:, 2] = b[:, 2] = -torch.inf
    assert torch.isfinite(forward_kl(a, b)).all() and torch.isfinite(reverse_kl(a, b)).all()


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_expected_length_is_the_mean_over_all_outcomes(seed, length):
    """Σ_n n P(n) over the explicit distribution of the accepted length."""
    g = torch.Generator().manual_seed(seed)
    a = torch.rand(1, length, generator=g, dtype=torch.float64)
    ends = int(torch.randint(1, length + 1, (1,), generator=g))
    valid = torch.arange(length)[None] < ends
    expected = 0.0
    for n in range(1, ends + 1):
        p = math.prod(a[0, :n].tolist()) * (1 - a[0, n].item() if n < ends else 1.0)
        expected += n * p
    found = expected_length(a.log(), valid)
    assert float(found) == pytest.approx(expected, abs=1e-12)


# -- the LM head in chunks -------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from([forward_kl, reverse_kl, overlap]),
    st.sampled_from([1.0, 0.3]),
)
def test_chunked_scores_equal_whole_ones(seed, tokens, chunk, score, temperature):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    hidden, teacher, weight, teacher_weight = (
        make(tokens, 8),
        make(tokens, 6),
        make(11, 8),
        make(11, 6),
    )
    factor = torch.rand(tokens, generator=g, dtype=torch.float64)
    results = []
    for whole in (True, False):
        h = hidden.clone().requires_grad_()
        if whole:
            values = score(h @ weight.T, teacher @ teacher_weight.T / temperature)
        else:
            values = chunked_score(
                score,
                h,
                weight,
                teacher_hidden=teacher,
                teacher_weight=teacher_weight,
                temperature=temperature,
                chunk=chunk,
            )
        (values * factor).sum().backward()
        results.append((values.detach(), h.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_chunked_cross_entropy_equals_torchs():
    hidden = torch.randn(33, 8, dtype=torch.float64, requires_grad=True)
    weight, labels = torch.randn(17, 8, dtype=torch.float64), torch.randint(0, 17, (33,))
    chunked_score(cross_entropy, hidden, weight, labels=labels, chunk=7).sum().backward()
    mine, hidden.grad = hidden.grad, None
    torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="sum").backward()
    torch.testing.assert_close(mine, hidden.grad)


MEMORY = """
import json, sys, torch
from pathlib import Path
from draft_opd.losses.chunked import chunked_score
from draft_opd.losses.divergences import reverse_kl

def peak():  # KiB. Not getrusage: its maximum outlives exec, so a large pytest process shows in it.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0])

torch.set_num_threads(1)
torch.manual_seed(0)
tokens, vocabulary, width = 1024, 49152, 64
h = torch.randn(tokens, width, requires_grad=True)
t, w = torch.randn(tokens, width), torch.randn(vocabulary, width)
reverse_kl(h[:2] @ w.T, t[:2] @ w.T).sum().backward()  # libraries load their code first
before = peak()
if sys.argv[1] == "chunked":
    loss = chunked_score(reverse_kl, h, w, teacher_hidden=t, teacher_weight=w).mean()
else:
    loss = reverse_kl(h @ w.T, t @ w.T).mean()
loss.backward()
after = peak()
print(json.dumps({"mib": (after - before) / 1024, "loss": loss.item()}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_chunking_needs_at_most_a_quarter_of_the_memory():
    """49,152 vocabulary entries × 1,024 draft tokens; peak resident memory of two processes."""
    found = {}
    for side in ("whole", "chunked"):
        command = [sys.executable, "-c", MEMORY, side]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[side] = json.loads(out)
    assert found["whole"]["mib"] > 384  # at least p and q were there whole, or this proves nothing
    assert found["chunked"]["mib"] <= found["whole"]["mib"] / 4
    assert found["chunked"]["loss"] == pytest.approx(found["whole"]["loss"], rel=1e-4)


@given(data=st.data())
@settings(deadline=None, max_examples=80)
def test_closed_gradients_are_those_of_autograd(data):
    """In float64, over draft vocabularies too, and where the target excludes tokens."""
    score = data.draw(st.sampled_from(list(CLOSED)))
    n, size = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scale = data.draw(st.sampled_from([0.1, 1.0, 30.0]))
    ids = None
    if data.draw(st.booleans()):
        ids = torch.randperm(size, generator=generator)[: data.draw(st.integers(1, size))]
        if data.draw(st.booleans()):  # files need not have them in order
            ids = ids.sort().values
    width = size if ids is None else len(ids)
    draft = scale * torch.randn(n, width, generator=generator, dtype=torch.float64)
    target = scale * torch.randn(n, size, generator=generator, dtype=torch.float64)
    if score is forward_kl and width > 1 and data.draw(st.booleans()):
        target[:, 0 if ids is None else ids[0]] = -torch.inf
    labels = torch.randint(size, (n,), generator=generator)
    if ids is not None:
        labels = ids[labels % width]
    draft.requires_grad_(True)
    references = (labels,) if score is cross_entropy else (target,)
    expected = score(over_target(draft, ids, size), *references)
    (slope,) = torch.autograd.grad(expected.sum(), draft)
    found, closed = CLOSED[score](draft.detach().clone(), target.clone(), labels, ids)
    assert torch.allclose(found, expected, atol=1e-9)
    assert torch.allclose(closed, slope, atol=1e-9)


def test_a_token_that_cannot_be_drafted_has_no_probability():
    ids = torch.tensor([1, 3])
    draft = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    scores, slope = CLOSED[cross_entropy](draft.clone(), None, torch.tensor([2]), ids)
    assert scores.item() == float("inf") and slope.isfinite().all()


@pytest.mark.parametrize("score", [*CLOSED, total_variation], ids=lambda f: f.__name__)
@pytest.mark.parametrize("whole", [True, False])
def test_a_trained_heads_gradients_are_those_of_autograd(score, whole):
    """Through several chunks, with upstream weights, temperatures, on a draft vocabulary."""
    torch.manual_seed(0)
    size = 31
    ids = None if whole else torch.arange(0, size, 2)
    tensors = {
        "hidden": torch.randn(23, 8, dtype=torch.float64),
        "weight": torch.randn(size if whole else len(ids), 8, dtype=torch.float64),
    }
    states, head = torch.randn(23, 6).double(), torch.randn(size, 6).double()
    labels = torch.randint(size, (23,)) // 2 * 2
    upstream = torch.rand(23, dtype=torch.float64)
    grads = []
    for chunked in (True, False):
        hidden, weight = (x.clone().requires_grad_(True) for x in tensors.values())
        teacher = None if score is cross_entropy else states
        if chunked:
            scores = chunked_score(
                score,
                hidden,
                weight,
                teacher_hidden=teacher,
                teacher_weight=head,
                labels=labels if score is cross_entropy else None,
                temperature=0.7,
                draft_temperature=1.3,
                vocabulary=ids,
                chunk=5,
            )
        else:
            logits = over_target(hidden @ weight.t() / 1.3, ids, size)
            told = labels if score is cross_entropy else states @ head.t() / 0.7
            scores = score(logits, told)
        (scores * upstream).sum().backward()
        grads.append((scores, hidden.grad, weight.grad))
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_a_trained_heads_backward_keeps_autocast():
    """The gradients are of the logits that the loss was of."""
    torch.manual_seed(0)
    start = torch.randn(70, 16), torch.randn(40, 16)
    labels, grads = torch.randint(40, (70,)), []
    for chunked in (True, False):
        hidden, weight = (x.clone().requires_grad_(True) for x in start)
        with torch.autocast("cpu", torch.bfloat16):
            if chunked:
                scores = chunked_score(cross_entropy, hidden, weight, labels=labels, chunk=9)
            else:
                logits = torch.nn.functional.linear(hidden, weight)
                assert logits.dtype == torch.bfloat16
                scores = cross_entropy(logits.float(), labels)
        scores.sum().backward()
        assert hidden.grad.dtype == weight.grad.dtype == torch.float32
        grads.append((scores.detach(), hidden.grad, weight.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=0.05, rtol=0.05)


def test_fused_kernels_are_the_closed_forms():
    """Triton's kernels, value and gradient, in its interpreter (no GPU is needed)."""
    script = Path(__file__).parent / "fused_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
