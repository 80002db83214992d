"""Hindsight above temperature 0: the rounds that text may have had, in exact distribution."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import draft_opd as d
from draft_opd.data.collect import decode_trajectories
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.verification import acceptance_probability, bonus_distribution
from draft_opd.hindsight.lengths import Argmax
from draft_opd.hindsight.occupancy import expected_rounds, expected_tau, occupancy
from draft_opd.hindsight.trace import Conditional, draft_given_text, hindsight_traces
from draft_opd.training.batches import BatchSource
from draft_opd.training.rollouts import TraceCosts, hindsight_rollout
from draft_opd.utils import machine

EVERY_FAMILY = (
    "test_accepted_lengths_agree_with_live_decoding",
    "test_expected_tau_is_the_mean_of_many_traces",
    "test_lengths_are_those_of_whole_traces",
)

V, K = 3, 2
HOT = Sampling(temperature=1.0)


def tree(seed: int, sharp: float, depth: int) -> dict[tuple, torch.Tensor]:
    """The next token's distribution after every prefix of up to `depth` tokens."""
    g = torch.Generator().manual_seed(seed)
    prefixes = [p for n in range(depth + 1) for p in product(range(V), repeat=n)]
    return {p: (torch.randn(V, generator=g, dtype=torch.float64) * sharp).softmax(-1) for p in prefixes}


def rows(*probs: torch.Tensor) -> torch.Tensor:
    return torch.stack(probs)[None]


def live(p: dict, q: dict) -> dict[tuple, float]:
    """P(draft, accepted length, first K + 1 tokens of the text) of one round of decoding; what the
    round leaves open of the text is drawn from the target."""
    found: dict[tuple, float] = {}
    for draft in product(range(V), repeat=K):
        draft_probs = rows(*(q[draft[:k]] for k in range(K)))
        target_probs = rows(*(p[draft[:k]] for k in range(K + 1)))
        drawn = float(torch.stack([q[draft[:k]][draft[k]] for k in range(K)]).prod())
        accept = acceptance_probability(torch.tensor([draft]), draft_probs, target_probs[:, :K])[0]
        for n in range(K + 1):
            chance = drawn * float(accept[:n].prod()) * (float(1 - accept[n]) if n < K else 1.0)
            bonus = bonus_distribution(torch.tensor([n]), draft_probs, target_probs)[0]
            for rest in product(range(V), repeat=K + 1 - n):
                text = (*draft[:n], *rest)
                value = chance * float(bonus[rest[0]])
                for i in range(n + 1, K + 1):
                    value *= float(p[text[:i]][text[i]])
                found[draft, n, text] = found.get((draft, n, text), 0.0) + value
    return found


def hindsight(p: dict, q: dict) -> dict[tuple, float]:
    """The same from stored text: the text is the target's, the draft follows given the text."""
    found: dict[tuple, float] = {}
    for text in product(range(V), repeat=K + 1):
        said = 1.0
        for i in range(K + 1):
            said *= float(p[text[:i]][text[i]])
        for draft in product(range(V), repeat=K):
            value, n = said, 0
            for k in range(K):
                given_text = q[draft[:k]]
                if n == k:  # still on the text
                    given_text = draft_given_text(torch.tensor(text[k]), q[draft[:k]], p[text[:k]])
                    n += draft[k] == text[k]
                value *= float(given_text[draft[k]])
            found[draft, n, text] = found.get((draft, n, text), 0.0) + value
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 5), st.booleans(), st.sampled_from([None, 2, 1]))
def test_draft_length_and_text_are_distributed_as_when_decoding(seed, sharp, parallel, top_k):
    """Enumerated: `parallel` drafters ignore what they drafted before, others do not. With top-k
    some tokens are impossible on either side."""
    p, q = tree(seed, sharp, K), tree(seed + 1, sharp, K - 1)
    if parallel:
        q = {prefix: q[(0,) * len(prefix)] for prefix in q}
    if top_k:
        cut = Sampling(temperature=1.0, top_k=top_k)
        p, q = ({k: cut.probabilities(v.log()).double() for k, v in x.items()} for x in (p, q))
    a, b = live(p, q), hindsight(p, q)
    assert sum(a.values()) == pytest.approx(1.0, abs=1e-6)
    for key in set(a) | set(b):
        assert a.get(key, 0.0) == pytest.approx(b.get(key, 0.0), abs=1e-6)


def test_the_chooser_draws_what_was_enumerated():
    """All at once and offset by offset; text that ends inside the block leaves drafts free."""
    p, q = tree(3, 1.5, K), tree(4, 1.5, K - 1)
    q = {prefix: q[(0,) * len(prefix)] for prefix in q}
    n, text = 60_000, (1, 0)
    logits = torch.stack([q[()], q[(0,)]]).log().float().expand(n, K, V)
    probs = torch.stack([p[()], p[text[:1]]]).float().expand(n, K, V)
    exact = {key[0]: 0.0 for key in hindsight(p, q)}
    for (draft, _, said), value in hindsight(p, q).items():
        if said[:K] == text:
            exact[draft] += value
    total = sum(exact.values())
    for parts in ((slice(0, K),), (slice(0, 1), slice(1, 2))):
        choose = Conditional(
            Sampling(temperature=1.0),
            torch.tensor(text).expand(n, K),
            torch.ones(n, K, dtype=torch.bool),
            probs,
            torch.Generator().manual_seed(0),
        )
        drawn = torch.cat([choose(logits[:, part])[0] for part in parts], 1)
        for draft, value in exact.items():
            share = float((drawn == torch.tensor(draft)).all(1).double().mean())
            assert share == pytest.approx(value / total, abs=5 * (0.25 / n) ** 0.5)
    known = torch.zeros(n, K, dtype=torch.bool)
    choose = Conditional(
        Sampling(temperature=1.0),
        torch.tensor(text).expand(n, K),
        known,
        probs,
        torch.Generator().manual_seed(0),
    )
    share = torch.nn.functional.one_hot(choose(logits)[0], V).double().mean(0)
    assert (share - torch.stack([q[()], q[(0,)]])).abs().max() < 5 * (0.25 / n) ** 0.5


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 4))
def test_occupancy_is_the_mean_over_all_traces(seed, count, length):
    """Against following every possible trace with its probability."""
    g = torch.Generator().manual_seed(seed)
    alpha = torch.rand(count, length, generator=g, dtype=torch.float64)
    valid = torch.arange(count)[:, None] + torch.arange(length) < count
    expected = [0.0] * count

    def follow(anchor: int, probability: float) -> None:
        if anchor >= count:
            return
        expected[anchor] += probability
        survived = probability
        for n in range(length + 1):
            if n == length or not valid[anchor, n]:
                follow(anchor + n + 1, survived)
                return
            follow(anchor + n + 1, survived * (1 - float(alpha[anchor, n])))
            survived *= float(alpha[anchor, n])

    follow(0, 1.0)
    assert occupancy(alpha, valid).tolist() == pytest.approx(expected, abs=1e-12)


def test_expected_tau_is_the_decoded_one_at_temperature_zero(target, trained, heldout):
    some = heldout[:6]
    decoded = [r for trace in hindsight_traces(target, trained, some) for r in trace]
    assert expected_tau(target, trained, some) == pytest.approx(d.tau(decoded), rel=1e-9)


@pytest.fixture(scope="session")
def sampled(target, heldout):
    """Texts of the target at temperature 1, 2 a prompt."""
    sampling = HOT
    requests = [(f"{t.id}-{i}", t.prompt_ids) for t in heldout[:16] for i in range(2)]
    made: list = []
    decode_trajectories(
        target, requests, made.extend, max_new_tokens=100, batch_size=64, sampling=sampling, seed=5
    )
    return made


def test_expected_tau_is_the_mean_of_many_traces(target, trained, sampled):
    text, sampling = replace(sampled[0], response_ids=sampled[0].response_ids[:48]), HOT
    rounds, tokens = expected_rounds(target, trained, [text], sampling=sampling)
    traces = hindsight_traces(target, trained, [text] * 64, sampling=sampling, seed=3)
    draws = torch.tensor([[len(t), sum(r.accepted + 1 for r in t)] for t in traces], dtype=torch.float64)
    error = draws.std(0) / len(draws) ** 0.5
    expected = torch.stack([rounds.sum(), tokens.sum()])
    # Where all 64 draws are equal, another value may have a chance of less than one in 64.
    bound = torch.where(error > 0, 4 * error + 1e-9, 1 / 64)
    assert ((draws.mean(0) - expected).abs() < bound).all()


@pytest.mark.parametrize("draft", ["sample", "argmax"])
def test_accepted_lengths_agree_with_live_decoding(target, trained, heldout, sampled, draft):
    """Live rounds, and those of hindsight on the very text that they made (other texts are harder
    or easier): chi-squared test of equal histograms, p > 0.001."""
    sampling = Sampling(temperature=1.0, draft=draft)
    made = d.speculate(
        target,
        trained,
        [t.prompt_ids for t in sampled],
        max_new_tokens=100,
        sampling=sampling,
        seed=11,
    )
    texts = [d.Trajectory(g.prompt_ids, g.token_ids) for g in made]
    traces = hindsight_traces(target, trained, texts, sampling=sampling, seed=17)
    sides = [[r.accepted for t in side for r in t] for side in ([g.rounds for g in made], traces)]
    assert min(map(len, sides)) >= 700
    counts = torch.tensor(
        [[x.count(n) for n in range(2)] + [sum(a > 1 for a in x)] for x in sides],
        dtype=torch.float64,
    )
    assert same_distribution(counts) > 0.001
    assert same_distribution(counts + torch.tensor([[0, 180, 0], [0, 0, 0]])) < 0.001


def same_distribution(counts: torch.Tensor) -> float:
    """p of Pearson's chi-squared test that two rows of counts are of one distribution."""
    expected = counts.sum(0) * counts.sum(1, keepdim=True) / counts.sum()
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((counts.shape[1] - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def lengths_of(traces):
    return [[(r.anchor, r.accepted) for r in trace] for trace in traces]


@pytest.mark.parametrize("logits", [1, 40_000, 1 << 22])  # offsets one by one, a few, all at once
@pytest.mark.parametrize("length", [1, 4, 15])
def test_lengths_are_those_of_whole_traces(target, trained, heldout, monkeypatch, length, logits):
    """Round by round and at every position; on rows that differ in length and have nothing to say."""
    monkeypatch.setattr(machine, "_logits", lambda _: logits)
    rows = [*heldout[:5], replace(heldout[5], response_ids=[])]
    batch = BatchSource(target, trained.target_layers).batch(rows)
    whole = lengths_of(hindsight_rollout(target, trained, batch, length))
    assert whole[-1] == [] and sum(map(len, whole)) > 20
    for at_once in (False, True):
        found = hindsight_rollout(target, trained, batch, length, whole=False, at_once=at_once)
        assert lengths_of(found) == whole
        assert all(r.drafted == [] for trace in found for r in trace)


def test_rows_without_a_response_have_no_rounds(target, trained, heldout):
    batch = BatchSource(target, trained.target_layers).batch(
        [replace(t, response_ids=[]) for t in heldout[:2]]
    )
    for at_once in (False, True):
        assert hindsight_rollout(target, trained, batch, 4, whole=False, at_once=at_once) == [[], []]


def test_sampled_lengths_depend_on_the_text_and_the_seed_alone(target, trained, heldout):
    """Both ways find the same, in any company; another seed draws other coins."""
    sampling = Sampling(temperature=1.0, top_p=0.95)
    source = BatchSource(target, trained.target_layers)

    def lengths(rows, at_once, seed=3):
        batch = source.batch(rows)
        found = hindsight_rollout(target, trained, batch, 7, sampling, seed, whole=False, at_once=at_once)
        return lengths_of(found)

    rows = heldout[:4]
    wanted = lengths(rows, False)
    assert lengths(rows, True) == wanted
    assert [lengths([t], False)[0] for t in rows] == wanted
    assert lengths(rows, True, seed=4) != wanted


def test_sampled_lengths_have_the_distribution_of_sampled_traces(target, trained, heldout):
    """First rounds of one text: with drafts drawn, and by coins alone."""
    sampling = Sampling(temperature=1.0)
    text = replace(heldout[0], temperature=1.0, response_ids=heldout[0].response_ids[:6])
    batch = BatchSource(target, trained.target_layers).batch([text] * 64)
    counts = torch.zeros(2, 6, dtype=torch.float64)
    for seed in range(12):
        for side, whole in enumerate((True, False)):
            for trace in hindsight_rollout(target, trained, batch, 5, sampling, seed, whole):
                counts[side, trace[0].accepted] += 1
    counts = counts[:, counts.sum(0) > 10]
    assert counts.shape[1] > 1 and same_distribution(counts) > 0.001


def test_ties_among_drafts_go_to_the_lowest_id(target, trained):
    judge = Argmax(target, trained)
    size = trained.head(target).weight.shape[0]
    logits = torch.zeros(2, 1, size)
    logits[:, :, [5, 9]] = 1.0
    lowest = 5 if trained.vocabulary is None else int(trained.vocabulary[5])
    text = torch.tensor([[lowest], [lowest + 4]])
    assert judge(logits, text, None, None, 0).tolist() == [[True], [False]]


def test_the_cheaper_way_to_trace_is_taken(heldout):
    costs = TraceCosts(round=1.0, position=0.1)
    rows = [replace(heldout[0], response_ids=[1] * n) for n in (100, 50)]
    assert costs.choice(rows, tau=10.0) == "walk"  # 10 rounds against 15 s
    assert costs.choice(rows, tau=5.0) == "everywhere"  # 20 rounds


def test_near_the_end_of_the_context_both_draft_less(target, trained, heldout):
    row = heldout[0]
    longest = target.max_positions
    text = replace(row, response_ids=(row.response_ids * longest)[: longest - len(row.prompt_ids)])
    batch = BatchSource(target, trained.target_layers).batch([text])
    one, other = (
        hindsight_rollout(target, trained, batch, 7, whole=False, at_once=at_once)[0]
        for at_once in (False, True)
    )

    def before_the_end(trace):  # a block that would reach beyond it is another block in the walk
        return [(r.anchor, r.accepted) for r in trace if r.anchor + 8 < longest]

    assert before_the_end(one) == before_the_end(other) and any(r.accepted for r in one)
    for trace in (one, other):
        assert trace[-1].anchor + len(trace[-1].drafted) < longest
        # Where the last round accepts all there is, its bonus token would be beyond the text.
        assert sum(r.accepted + 1 for r in trace) - len(text.response_ids) in (0, 1)
