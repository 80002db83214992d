"""Verification: the committed tokens follow the target's distribution, exactly."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import draft_opd as d
from draft_opd.decoding.sampling import Sampling, one_hot
from draft_opd.decoding.verification import acceptance_probability, bonus_distribution

V, K = 3, 2


def tree(seed: int, sharp: float) -> dict[tuple, torch.Tensor]:
    """A target: the next token's distribution after every prefix of up to K tokens."""
    g = torch.Generator().manual_seed(seed)
    prefixes = [p for n in range(K + 1) for p in product(range(V), repeat=n)]
    return {p: (torch.randn(V, generator=g, dtype=torch.float64) * sharp).softmax(-1) for p in prefixes}


def probability(p: dict, sequence: tuple) -> float:
    value = 1.0
    for i, token in enumerate(sequence):
        value *= float(p[sequence[:i]][token])
    return value


def committed_distribution(p: dict, q: list[torch.Tensor]) -> dict[tuple, float]:
    """Distribution of the first K + 1 tokens when one round of verification starts them.

    Sums over every draft, every accepted length and every bonus token; what a short round leaves
    open is drawn from the target.
    """
    total: dict[tuple, float] = {}
    for draft in product(range(V), repeat=K):
        drawn = float(torch.stack([q[k][draft[k]] for k in range(K)]).prod())
        if drawn == 0:
            continue
        drafted = torch.tensor([draft])
        draft_probs = torch.stack(q)[None]
        target_probs = torch.stack([p[draft[:k]] for k in range(K + 1)])[None]
        accept = acceptance_probability(drafted, draft_probs, target_probs[:, :K])[0]
        for n in range(K + 1):
            chance = drawn * float(accept[:n].prod()) * float(1 - accept[n] if n < K else 1)
            if chance == 0:
                continue
            bonus = bonus_distribution(torch.tensor([n]), draft_probs, target_probs)[0]
            for token in range(V):
                start = (*draft[:n], token)
                for rest in product(range(V), repeat=K - n):
                    full = start + rest
                    value = chance * float(bonus[token])
                    for i in range(len(start), K + 1):
                        value *= float(p[full[:i]][full[i]])
                    total[full] = total.get(full, 0.0) + value
    return total


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 6), st.booleans())
def test_the_committed_distribution_is_the_targets_by_enumeration(seed, sharp, argmax):
    p = tree(seed, sharp)
    g = torch.Generator().manual_seed(seed + 1)
    q = [(torch.randn(V, generator=g, dtype=torch.float64) * sharp).softmax(-1) for _ in range(K)]
    if argmax:
        q = [one_hot(x.argmax(), V).double() for x in q]
    found = committed_distribution(p, q)
    for sequence in product(range(V), repeat=K + 1):
        assert found.get(sequence, 0.0) == pytest.approx(probability(p, sequence), abs=1e-9)


@pytest.mark.parametrize("draft", ["sample", "argmax"])
@pytest.mark.parametrize("top", [{}, {"top_k": 2}, {"top_p": 0.7}])
def test_sampling_settings_act_on_both_sides_alike(draft, top):
    """With top-k and top-p on both sides the result is the target's *filtered* distribution."""
    g = torch.Generator().manual_seed(3)
    sampling = Sampling(temperature=0.7, draft=draft, **top)
    logits = {k: torch.randn(V, generator=g).double() for k in tree(0, 1.0)}
    p = {k: sampling.probabilities(v).double() for k, v in logits.items()}
    if draft == "sample":
        q = [sampling.probabilities(torch.randn(V, generator=g)).double() for _ in range(K)]
    else:
        q = [one_hot(torch.randn(V, generator=g).argmax(), V).double() for _ in range(K)]
    found = committed_distribution(p, q)
    for sequence in product(range(V), repeat=K + 1):
        assert found.get(sequence, 0.0) == pytest.approx(probability(p, sequence), abs=1e-6)


def test_verify_sampled_draws_what_was_enumerated():
    """The function that decodes, against the enumeration: N is large, the bound is 5 sigma."""
    n, g = 200_000, torch.Generator().manual_seed(0)
    p, q = tree(5, 1.5), [tree(6, 1.5)[()], tree(7, 1.5)[()]]
    drafted = torch.stack([torch.multinomial(x, n, replacement=True, generator=g) for x in q], 1)
    draft_probs = torch.stack(q).expand(n, K, V)
    lookup = torch.stack([p[()]] * V), torch.stack([p[(a,)] for a in range(V)])
    second = lookup[1][drafted[:, 0]]
    third = torch.stack([torch.stack([p[(a, b)] for b in range(V)]) for a in range(V)])
    target_probs = torch.stack([p[()].expand(n, V), second, third[drafted[:, 0], drafted[:, 1]]], 1)
    accepted, bonus = d.verify_sampled(drafted, draft_probs, target_probs, g)
    first = torch.where(accepted > 0, drafted[:, 0], bonus)
    share = torch.bincount(first, minlength=V) / n
    assert (share - p[()]).abs().max() < 5 * (0.25 / n) ** 0.5
    # Two tokens are known when the first was accepted.
    known = accepted >= 1
    pair = torch.where(accepted >= 2, drafted[:, 1], bonus)[known]
    for token in range(V):
        rows = pair[drafted[known, 0] == token]
        share = torch.bincount(rows, minlength=V) / len(rows)
        assert (share - p[(token,)]).abs().max() < 5 * (0.25 / len(rows)) ** 0.5


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 5), st.integers(2, 7))
def test_verify_greedy_is_the_longest_matching_prefix(seed, rounds, length, size):
    g = torch.Generator().manual_seed(seed)
    drafted = torch.randint(0, 2, (rounds, length), generator=g)
    logits = torch.randn(rounds, length + 1, size, generator=g)
    found = d.verify_greedy(drafted, logits).tolist()
    for row in range(rounds):
        n = 0
        while n < length and int(drafted[row, n]) == int(logits[row, n].argmax()):
            n += 1
        assert found[row] == n


@pytest.mark.parametrize(
    "shapes", [((2, 3), (2, 3, 5)), ((2, 3), (1, 4, 5)), ((2, 3), (2, 4)), ((6,), (2, 4, 5))]
)
def test_shapes_that_do_not_belong_together_are_refused(shapes):
    drafted, logits = torch.zeros(shapes[0], dtype=torch.long), torch.zeros(shapes[1])
    with pytest.raises(ValueError, match="drafted"):
        d.verify_greedy(drafted, logits)


def test_an_identical_draft_is_always_accepted():
    probs = torch.rand(50, 4, 6).softmax(-1)
    drafted = torch.multinomial(probs[:, :3].flatten(0, 1), 1).view(50, 3)
    accepted, _ = d.verify_sampled(drafted, probs[:, :3], probs)
    assert (accepted == 3).all()


@given(st.integers(0, 10**6), st.floats(0.05, 1.0), st.integers(0, 8))
def test_top_p_keeps_the_smallest_set_that_reaches_it(seed, top_p, top_k):
    logits = torch.randn(9, generator=torch.Generator().manual_seed(seed))
    probs = Sampling(temperature=1.0, top_p=top_p, top_k=top_k).probabilities(logits)
    assert probs.sum() == pytest.approx(1.0, abs=1e-5)
    kept = (probs > 0).sum().item()
    plain = logits.softmax(-1)
    if top_k:
        plain = torch.where(plain >= plain.sort(descending=True).values[top_k - 1], plain, 0.0)
        plain = plain / plain.sum()
    mass = plain.sort(descending=True).values.double().cumsum(-1)
    least = int((mass < top_p - 1e-6).sum()) + 1
    assert kept in (least, min(least + 1, 9))  # rounding at the edge may keep one more
