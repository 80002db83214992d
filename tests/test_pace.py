"""The automatic draft length finds what is fastest and leaves the text as it is."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import draft_opd as d
from draft_opd.data.prompts import read_prompts
from draft_opd.decoding.draft_length import DraftLengthController
from draft_opd.decoding.generate import speculate
from draft_opd.decoding.sampling import Sampling
from draft_opd.utils.errors import UserError


def simulate(pace, chance, cost, rounds, rng, noise=0.05):
    """Rounds of a drafter whose every offset passes with `chance`; returns tokens and seconds."""
    tokens = seconds = 0.0
    for _ in range(rounds):
        length = pace.choose()
        accepted = 0
        while accepted < length and rng.random() < chance:
            accepted += 1
        took = cost(length) * (1 + noise * rng.random())
        if rng.random() < 0.05:
            took *= 5  # the machine had something else to do
        pace.record(length, [accepted], took)
        tokens, seconds = tokens + accepted + 1, seconds + cost(length)
    return tokens, seconds


@settings(deadline=None, max_examples=60)
@example(chance=0.71875, slope=0.03125, step=1.5, seed=0)  # alone, and no neighbour of that pays
@given(
    chance=st.floats(0, 0.99),
    slope=st.floats(0.001, 0.6),
    step=st.floats(0, 1.5),
    seed=st.integers(0, 10**6),
)
def test_it_is_nearly_as_fast_as_the_best_fixed_length(chance, slope, step, seed):
    def cost(length):
        return 1.0 + (length > 0) * step + slope * length

    def rate(length):
        return sum(chance**k for k in range(length + 1)) / cost(length)

    pace, rng = DraftLengthController(15), random.Random(seed)
    simulate(pace, chance, cost, 100, rng)  # learns
    tokens, seconds = simulate(pace, chance, cost, 2000, rng)
    best = max(rate(n) for n in pace.lengths)
    assert tokens / seconds > 0.85 * best


@pytest.mark.parametrize(
    ("chance", "step", "slope"),
    [(0.82, 0.0, 0.3), (0.9, 0.0, 0.3), (0.95, 0.2, 0.05), (0.3, 0, 0.3)],
)
def test_it_pays_within_one_answer(chance, step, slope):
    """In the first 60 rounds, learning included, on the mean of many answers."""

    def cost(length):
        return 1.0 + (length > 0) * step + slope * length

    best = max(sum(chance**k for k in range(n + 1)) / cost(n) for n in DraftLengthController(15).lengths)
    made = [simulate(DraftLengthController(15), chance, cost, 60, random.Random(s)) for s in range(40)]
    tokens, seconds = (sum(column) for column in zip(*made, strict=True))
    assert tokens / seconds > 0.8 * best


def test_it_follows_a_change():
    pace, rng = DraftLengthController(15), random.Random(0)
    simulate(pace, 0.95, lambda n: 1 + 0.05 * n, 200, rng)
    assert pace.choose() >= 11
    simulate(pace, 0.05, lambda n: 1 + 0.05 * n, 400, rng)
    assert pace.choose() <= 2


def test_a_useless_drafter_is_left_alone():
    pace = DraftLengthController(7)
    simulate(pace, 0.0, lambda n: 1 + 0.3 * n, 200, random.Random(1))
    chosen = [pace.choose() for _ in range(1)]
    assert chosen == [0]


def test_near_the_end_of_the_context_it_drafts_less():
    pace = DraftLengthController(15)
    assert pace.choose() == 15 and pace.choose(at_most=5) == 4 and pace.choose(at_most=0) == 0


def test_text_and_trace_are_what_they_were(target, trained):
    for prompt in read_prompts("embedded:heldout", 2):
        ids = prompt.ids(target)
        alone = d.generate(target, None, ids, max_new_tokens=60)
        auto = d.generate(target, trained, ids, max_new_tokens=60, draft_length="auto")
        assert auto.token_ids == alone.token_ids
        assert sum(r.accepted + 1 for r in auto.rounds) >= len(auto.token_ids)
        lengths = {len(r.drafted) for r in auto.rounds}
        assert lengths <= set(DraftLengthController(trained.draft_length).lengths) and len(lengths) > 1


def test_rows_of_a_batch_share_it(target, trained):
    prompts = [p.ids(target) for p in read_prompts("embedded:heldout", 3)]
    pace = DraftLengthController(trained.draft_length)
    made = speculate(target, trained, prompts, max_new_tokens=60, pace=pace)
    alone = speculate(target, None, prompts, max_new_tokens=60)
    assert [g.token_ids for g in made] == [g.token_ids for g in alone]
    assert pace.rounds == max(len(g.rounds) for g in made)


class Turning(DraftLengthController):
    """Another length every round, whatever they bring."""

    def choose(self, at_most=None):
        return (0, 3, 1, 2)[self.rounds % 4]


def test_sampled_text_keeps_its_distribution(target, trained):
    """Draft lengths that change by the round leave p of the first two tokens as it is."""
    ids = read_prompts("embedded:heldout", 1)[0].ids(target)
    sampling, draws = Sampling(temperature=1.5), 600
    pace = Turning(trained.draft_length)
    pairs: Counter = Counter()
    for seed in range(draws // 300):
        made = speculate(
            target,
            trained,
            [ids] * 300,
            max_new_tokens=2,
            sampling=sampling,
            seed=seed,
            pace=pace,
            stop_ids=(),
        )
        pairs.update(tuple(g.token_ids) for g in made)
    firsts = Counter(a for a, _ in pairs.elements())
    common = firsts.most_common(1)[0][0]
    seconds = Counter(b for a, b in pairs.elements() if a == common)
    assert firsts[common] > 40
    for begun, counts in ((ids, firsts), ([*ids, common], seconds)):
        hidden = target.trajectories(torch.tensor([begun])).hidden[0, -1]
        p, of = sampling.probabilities(target.logits(hidden)), counts.total()
        found = torch.tensor([counts[i] / of for i in range(len(p))])
        large = p > 0.01
        assert ((found - p).abs() < 5 * (p * (1 - p) / of).sqrt())[large].all()


def test_a_tree_has_no_pace(target, trained):
    if not trained.has_trees:
        pytest.skip("this family drafts no trees")
    with pytest.raises(UserError, match="not both"):
        speculate(target, trained, [[1, 2]], max_new_tokens=4, tree=[2, 2], pace=DraftLengthController(2))
