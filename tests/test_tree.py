"""Draft trees: whatever they hold, the text is the target's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import draft_opd as d
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.tree import ancestry
from draft_opd.decoding.verification import follow_path
from draft_opd.drafters.tree_expansion import best_children

FAMILY = "eagle3"


@st.composite
def trees(draw):
    """parents, tokens and depths of a tree whose siblings differ."""
    parents, tokens, depths = [-1], [0], [0]
    for i in range(1, draw(st.integers(1, 12)) + 1):
        parent = draw(st.integers(0, i - 1))
        taken = {t for t, p in zip(tokens, parents, strict=True) if p == parent}
        parents.append(parent)
        depths.append(depths[parent] + 1)
        tokens.append(draw(st.integers(0, 20).filter(lambda t, taken=taken: t not in taken)))
    return parents, tokens, depths


@given(trees(), st.data())
def test_the_path_is_the_longest_that_the_target_agrees_with(tree, data):
    parents, tokens, depths = tree
    chosen = [data.draw(st.sampled_from([*tokens, 99])) for _ in tokens]
    expected, at = [0], 0
    while True:
        child = [i for i, p in enumerate(parents) if p == at and tokens[i] == chosen[at]]
        if not child:
            break
        at = child[0]
        expected.append(at)
    deepest = max(depths)
    path, accepted = follow_path(*(torch.tensor([x]) for x in (tokens, parents, chosen)), deepest)
    assert int(accepted) == len(expected) - 1
    assert path[0].tolist() == expected + [expected[-1]] * (deepest + 1 - len(expected))
    seen = ancestry(torch.tensor([parents]))[0]
    for i in range(len(parents)):
        line, j = set(), i
        while j >= 0:
            line.add(j)
            j = parents[j]
        assert set(seen[i].nonzero()[:, 0].tolist()) == line


@settings(max_examples=30)
@given(st.integers(0, 999), st.integers(1, 12))
def test_children_are_the_most_probable_of_all(seed, width):
    g = torch.Generator().manual_seed(seed)
    logits, score = torch.randn(2, 3, 4, generator=g), torch.randn(2, 3, generator=g)
    tokens, parents, scores = best_children(logits, score, width)
    for b in range(2):
        every = {
            (p, v): float(score[b, p] + logits[b, p].log_softmax(-1)[v]) for p in range(3) for v in range(4)
        }
        best = sorted(every, key=every.get, reverse=True)[:width]
        assert list(zip(parents[b].tolist(), tokens[b].tolist(), strict=True)) == best
        assert scores[b].tolist() == pytest.approx([every[x] for x in best], abs=1e-5)


@pytest.mark.parametrize("widths", [(1,), (3,), (1,) * 15, (4, 4, 2, 2, 1), (2, 8, 8)])
def test_a_tree_keeps_the_text(target, trained, heldout, widths):
    rows = heldout[:4]
    made = d.speculate(target, trained, [t.prompt_ids for t in rows], max_new_tokens=320, tree=widths)
    assert [g.token_ids for g in made] == [t.response_ids for t in rows]
    for t, g in zip(rows, made, strict=True):
        position = len(t.prompt_ids) - 1
        for r in g.rounds:
            assert r.anchor == position
            assert t.ids[position + 1 : position + 1 + r.accepted] == r.drafted[: r.accepted]
            position += r.accepted + 1


def test_a_tree_of_one_branch_is_the_chain_and_more_branches_accept_more(target, trained, heldout):
    prompts = [t.prompt_ids for t in heldout[:8]]

    def rounds(**options):
        made = d.speculate(target, trained, prompts, max_new_tokens=320, **options)
        return [(r.anchor, r.accepted) for g in made for r in g.rounds]

    chain = rounds(draft_length=5)
    assert rounds(tree=(1,) * 5) == chain
    assert len(rounds(tree=(4,) * 5)) < len(chain)


def test_a_sampled_tree_follows_the_target(target, trained, heldout):
    """Second committed tokens over many samples, against the target's distribution (5 sigma)."""
    n, sampling = 400, Sampling(temperature=1.5)
    prompt = heldout[0].prompt_ids + heldout[0].response_ids[:10]
    made = d.speculate(
        target, trained, [prompt] * n, max_new_tokens=2, sampling=sampling, tree=(4, 4), seed=3
    )
    first = torch.tensor([g.token_ids[0] for g in made])
    logits = target.logits(target.trajectories(torch.tensor([prompt])).hidden[0, -1])
    p = sampling.probabilities(logits)
    share = torch.bincount(first, minlength=len(p)) / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 5 / n).all()
    usual = int(first.mode().values)
    second = torch.tensor([g.token_ids[1] for g in made if g.token_ids[0] == usual])
    logits = target.logits(target.trajectories(torch.tensor([[*prompt, usual]])).hidden[0, -1])
    p, n = sampling.probabilities(logits), len(second)
    share = torch.bincount(second, minlength=len(p)) / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 5 / n).all()
    assert 0 < sum(g.rounds[0].accepted for g in made) < 2 * len(made)


def test_the_end_of_the_context_is_respected(target, trained):
    ids = target.chat_ids([{"role": "user", "content": "Mia has 3 apples. " * 200}])[:1020]
    alone = d.generate(target, None, ids, max_new_tokens=50)
    assert d.generate(target, trained, ids, max_new_tokens=50, tree=(4, 4, 4, 4)).token_ids == (
        alone.token_ids
    )


@pytest.mark.parametrize(
    ("widths", "message"),
    [((), "1 or more"), ((0,), "1 or more"), ((200, 200), "at most"), ((1,) * 16, "too deep")],
)
def test_impossible_trees_are_refused(target, trained, widths, message):
    with pytest.raises(d.UserError, match=message):
        d.generate(target, trained, [5, 6], tree=widths)


def test_families_without_trees_say_so(target):
    from draft_opd.drafters.dflash import DFlashDrafter

    with pytest.raises(d.UserError, match="no trees"):
        d.generate(target, DFlashDrafter.create(target), [5, 6], tree=(2, 2))


def test_a_tree_and_a_draft_length_contradict(target, trained):
    with pytest.raises(d.UserError, match="not both"):
        d.generate(target, trained, [5, 6], tree=(2, 2), draft_length=2)
