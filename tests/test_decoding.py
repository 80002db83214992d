"""Speculative decoding: the text is the target's whoever drafts; hindsight sees its rounds."""

import itertools

import pytest
import torch

import draft_opd as d
from draft_opd.decoding.rounds import committed
from draft_opd.decoding.sampling import Sampling
from draft_opd.hindsight.trace import hindsight_traces
from draft_opd.training.batches import BatchSource
from draft_opd.training.blocks import attach_drafts, pack_anchors, replay_hidden

EVERY_FAMILY = (
    "test_held_out_prompts_keep_their_text_and_their_trace",
    "test_sampled_decoding_repeats_with_its_seed_and_follows_the_target",
)

MAX_NEW_TOKENS = 320


def speculated(target, drafter, rows, length, size=64):
    made = []
    for start in range(0, len(rows), size):
        prompts = [t.prompt_ids for t in rows[start : start + size]]
        made += d.speculate(target, drafter, prompts, max_new_tokens=MAX_NEW_TOKENS, draft_length=length)
    return made


def check(target, drafter, rows, length):
    """Losslessness, and hindsight equal to live, for every row."""
    made = speculated(target, drafter, rows, length)
    assert [g.token_ids for g in made] == [t.response_ids for t in rows]
    assert [g.finish_reason for g in made] == [t.finish_reason for t in rows]
    traces = hindsight_traces(target, drafter, rows, draft_length=length)
    for t, trace, g in zip(rows, traces, made, strict=True):
        same_rounds(target, drafter, t, trace, g.rounds)
    return made


def same_rounds(target, drafter, trajectory, one, other):
    """Equal, round by round; only where the drafter itself is torn between two tokens (their logits
    differ by rounding, as an untrained drafter's do) may it have proposed either."""
    where = [(r.anchor, r.accepted, len(r.drafted)) for r in one]
    assert where == [(r.anchor, r.accepted, len(r.drafted)) for r in other]
    for a, b in zip(one, other, strict=True):
        if a.drafted == b.drafted:
            continue
        batch = BatchSource(target, drafter.target_layers).batch([trajectory])
        blocks = attach_drafts(pack_anchors(batch, [[a.anchor]], len(a.drafted)), [[a]])
        logits = drafter.logits(target, replay_hidden(target, drafter, batch, blocks)[0, 0])
        for k, (x, y) in enumerate(zip(a.drafted, b.drafted, strict=True)):
            assert x == y or (logits[k, x] - logits[k, y]).abs() < 1e-4 * logits[k].abs().max()


def test_held_out_prompts_keep_their_text_and_their_trace(target, trained, heldout):
    """On all of them, at every block size: the slow test below."""
    made = check(target, trained, heldout[:32], 15)
    lengths = {r.accepted for g in made for r in g.rounds}
    assert len(made) == 32 and {0, 1, 2, 3} <= lengths  # rejected at several offsets


@pytest.mark.parametrize("size", [2, 3, 5, 8, 11])
def test_block_sizes_keep_the_text(target, trained, heldout, size):
    check(target, trained, heldout[size::24], size - 1)


@pytest.mark.parametrize("size", [2, 16])
def test_a_drafter_that_knows_nothing_keeps_the_text(target, untrained, heldout, size):
    check(target, untrained, heldout[size::40], size - 1)


@pytest.mark.slow
@pytest.mark.parametrize("size", range(2, 17))
@pytest.mark.parametrize("who", ["trained", "untrained"])
def test_every_block_size_on_every_prompt(target, drafters, every_heldout, who, size):
    check(target, drafters[who], every_heldout, size - 1)


def test_one_at_a_time_is_the_same_as_in_a_batch(target, trained, heldout):
    for t in heldout[:3]:
        result = d.generate(target, trained, t.prompt_ids, max_new_tokens=MAX_NEW_TOKENS)
        assert result.token_ids == t.response_ids
        same_rounds(target, trained, t, d.hindsight_trace(target, trained, t), result.rounds)
        assert result.tau == pytest.approx(d.tau(result.rounds)) and result.tau >= 1


def test_rounds_that_draft_nothing_lose_no_context(target, trained, heldout):
    """A row alone leaves its context's keys to the next block; a row in a batch does not. Draft lengths
    go up and down, 0 among them, which no block follows."""

    class Lengths:
        def __init__(self):
            self.next = itertools.cycle([7, 0, 0, 3, 15, 0, 1])

        def choose(self, at_most):
            return min(next(self.next), at_most)

        def record(self, *_):
            pass

    for t in heldout[:2]:
        alone, twice = (
            d.speculate(target, trained, [t.prompt_ids] * n, max_new_tokens=60, pace=Lengths())
            for n in (1, 2)
        )
        assert alone[0].rounds == twice[0].rounds == twice[1].rounds
        assert any(r.accepted for r in alone[0].rounds)


def test_rounds_account_for_every_token(target, trained, heldout):
    for g in speculated(target, trained, heldout[:12], 15):
        position = len(g.prompt_ids) - 1
        text = g.prompt_ids + g.token_ids
        for r in g.rounds:
            assert r.anchor == position and len(r.drafted) == 15
            assert text[position + 1 : position + 1 + r.accepted] == r.drafted[: r.accepted]
            position += r.accepted + 1
        # The last round ends at the last token, which may be one of its accepted ones.
        assert position in (len(text) - 1, len(text))


@pytest.mark.parametrize("limit", [1, 2, 7, 16])
def test_length_limits_hold_exactly(target, trained, heldout, limit):
    for t in heldout[:3]:
        result = d.generate(target, trained, t.prompt_ids, max_new_tokens=limit)
        assert result.token_ids == t.response_ids[:limit]
        assert result.finish_reason == "length"


def test_any_token_can_be_a_stop_token(target, trained, heldout):
    t = heldout[0]
    for stop in sorted(set(t.response_ids))[:12:2]:
        made = d.speculate(target, trained, [t.prompt_ids], max_new_tokens=MAX_NEW_TOKENS, stop_ids=[stop])[0]
        assert made.token_ids == t.response_ids[: t.response_ids.index(stop) + 1]
        assert made.finish_reason == "stop"


def test_the_end_of_the_context_is_respected(target, trained):
    ids = (target.chat_ids([{"role": "user", "content": "Mia has 3 apples. " * 200}]))[:1020]
    alone = d.generate(target, None, ids, max_new_tokens=50)
    result = d.generate(target, trained, ids, max_new_tokens=50)
    assert result.token_ids == alone.token_ids and len(result.token_ids) <= 4


@pytest.mark.parametrize("draft", ["sample", "argmax"])
def test_sampled_decoding_repeats_with_its_seed_and_follows_the_target(target, trained, heldout, draft):
    """First committed tokens over many samples, against the target's own distribution (5 sigma)."""
    sampling, n = Sampling(temperature=1.5, draft=draft), 300

    def next_token(prompt):
        hidden = target.trajectories(torch.tensor([prompt])).hidden[0, -1]
        return sampling.probabilities(target.logits(hidden))

    # Somewhere the drafter is right and the target in doubt.
    rounds = d.hindsight_trace(target, trained, heldout[0], draft_length=3)
    starts = (heldout[0].ids[: r.anchor + 1] for r in rounds if r.accepted)
    prompt = next(ids for ids in starts if next_token(ids).max() < 0.95)

    def run(seed, count):
        return d.speculate(
            target,
            trained,
            [prompt] * count,
            max_new_tokens=2,
            sampling=sampling,
            seed=seed,
            draft_length=3,
        )

    assert [g.token_ids for g in run(7, 20)] == [g.token_ids for g in run(7, 20)]
    made = run(0, n)
    p = next_token(prompt)
    share = torch.bincount(torch.tensor([g.token_ids[0] for g in made]), minlength=len(p)) / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 5 / n).all()
    assert 0 < sum(g.rounds[0].accepted for g in made) < 3 * n


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "empty"),
        ([[5] * 1024], {}, "context"),
        ([[5, 6]], {"draft_length": 16}, "draft length 16"),
        ([[5, 6]], {"draft_length": 0}, "draft length 0"),
    ],
)
def test_what_cannot_be_decoded_is_refused(target, trained, prompts, options, message):
    with pytest.raises(d.UserError, match=message):
        d.speculate(target, trained, prompts, max_new_tokens=4, **options)


def test_committed_cuts_at_stop_and_room():
    stops = frozenset([9])
    assert committed([1, 2, 3], 2, 7, stops, 10) == ([1, 2, 7], 2, None)
    assert committed([1, 9, 3], 3, 7, stops, 10) == ([1, 9], 2, "stop")
    assert committed([1, 2, 3], 2, 9, stops, 10) == ([1, 2, 9], 2, "stop")
    assert committed([1, 2, 3], 3, 7, stops, 2) == ([1, 2], 2, "length")
    assert committed([1, 2, 3], 0, 7, stops, 1) == ([7], 0, "length")
