"""Rounds as CUDA graphs. These need a GPU: `pytest -m gpu`."""

import pytest
import torch

import draft_opd as d
from draft_opd.data.prompts import read_prompts
from draft_opd.decoding.captured import GRAPHS, WORKSPACES, GraphRunner, workspace
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.static import StaticBatch, eager
from draft_opd.evaluation.regret import regret

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
EVERY_FAMILY = True
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9, top_p=0.9)


@pytest.fixture(scope="module")
def card():
    return d.Target.from_pretrained("embedded", device="cuda")


@pytest.fixture
def helper(trained_folder, card):
    drafter = d.Drafter.from_pretrained(str(trained_folder), device="cuda")
    drafter.bind(card)
    return drafter


@pytest.fixture(scope="module")
def prompts(card):
    return [p.ids(card) for p in read_prompts("embedded:heldout", 6)]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_captured_equals_uncaptured(card, helper, prompts, sampling):
    """In float32: alone, in a batch, and refilled, with a drafter and without."""
    assert card.capturable
    slow = d.Target.from_pretrained("embedded", device="cuda", captured=False)
    for drafter in (helper, None):
        options = {"max_new_tokens": 60, "sampling": sampling, "seed": 3}
        wanted = d.speculate(slow, drafter, prompts, **options)
        for made in (
            d.speculate(card, drafter, prompts, **options),
            d.speculate(card, drafter, prompts, rows=2, **options),
            [d.speculate(card, drafter, [p], **options)[0] for p in prompts],
        ):
            assert [g.token_ids for g in made] == [g.token_ids for g in wanted]
            assert [g.rounds for g in made] == [g.rounds for g in wanted]


def test_drafts_end_by_confidence_in_captured_rounds_too(card, helper, prompts):
    if not helper.has_confidence:
        pytest.skip("this family does not say how sure it is")
    slow = d.Target.from_pretrained("embedded", device="cuda", captured=False)
    for sampling in (GREEDY, SAMPLED):
        options = {"max_new_tokens": 60, "sampling": sampling, "seed": 3, "confidence": 0.5}
        made, wanted = (d.speculate(x, helper, prompts, **options) for x in (card, slow))
        assert [g.token_ids for g in made] == [g.token_ids for g in wanted]
        assert [g.rounds for g in made] == [g.rounds for g in wanted]


def test_a_replay_is_the_round(card, helper, prompts):
    batches = [StaticBatch(card, helper, SAMPLED, 4, 512, helper.draft_length) for _ in range(2)]
    runner = GraphRunner()
    with torch.inference_mode():
        for batch, run in zip(batches, (eager, runner), strict=True):
            batch.admit(range(4), prompts[:4], range(4))
            for _ in range(3):
                batch.draw()
                run(batch, 4, 384, helper.draft_length)
    for name in ("table", "anchors", "last"):
        assert torch.equal(getattr(batches[0], name), getattr(batches[1], name))
    assert runner.captures == 1 and runner.seconds > 0


def test_graphs_and_workspaces_are_bounded(card, helper, prompts):
    batch = StaticBatch(card, helper, GREEDY, 4, 2048, helper.draft_length)
    runner = GraphRunner(most=3)
    with torch.inference_mode():
        batch.admit(range(4), prompts[:4], range(4))
        batch.alive.zero_()
        for slots in (256, 384, 512, 768, 1024, 256):
            runner(batch, 4, slots, 3)
    assert len(runner.graphs) == 3 and runner.captures == 6
    for rows in (1, 2, 4):
        workspace(card, helper, GREEDY, rows, 700)
    assert len(card.workspaces) <= WORKSPACES and GRAPHS >= 8
    kept, _ = workspace(card, helper, GREEDY, 4, 600)
    assert workspace(card, helper, GREEDY, 4, 700)[0] is kept and kept.capacity == 1024


def test_bfloat16_is_lossless_up_to_rounding(trained_folder, prompts):
    target = d.Target.from_pretrained("embedded", device="cuda", dtype="bfloat16")
    drafter = d.Drafter.from_pretrained(str(trained_folder), device="cuda").to(torch.bfloat16)
    for g in d.speculate(target, drafter, prompts, max_new_tokens=80):
        gap, bound = regret(target, g.prompt_ids, g.token_ids)
        assert (gap <= bound).all()


def test_a_drafter_that_trains_in_place_is_seen(card, helper, prompts):
    """Graphs read the weights where they are."""
    before = d.speculate(card, helper, prompts[:1], max_new_tokens=40)[0]
    with torch.no_grad():
        for weight in helper.parameters():
            weight.mul_(0.5)
    after = d.speculate(card, helper, prompts[:1], max_new_tokens=40)[0]
    assert after.token_ids == before.token_ids and after.rounds != before.rounds


def test_attention_uses_no_slow_kernel(card, helper, prompts):
    """A round runs fused attention: no kernel of the unfused fallback is among them."""
    batch = StaticBatch(card, helper, GREEDY, 2, 512, helper.draft_length)
    with torch.inference_mode():
        batch.admit(range(2), prompts[:2], range(2))
        batch.round(2, 384, helper.draft_length)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            batch.round(2, 384, helper.draft_length)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_attention_math" not in names


def test_captured_rounds_of_compiled_layers(card, helper, prompts):
    """The same tokens; layers are compiled once a kind, whatever the rows and buckets are."""
    batches = [StaticBatch(card, helper, GREEDY, 4, 512, helper.draft_length, f) for f in (False, True)]
    with torch.inference_mode():
        for batch in batches:
            runner = GraphRunner()
            batch.admit(range(4), prompts[:4], range(4))
            for rows, slots in ((4, 256), (4, 384), (2, 384)):
                runner(batch, rows, slots, helper.draft_length)
            assert runner.captures == 3 and not runner.failed
    assert batches[1].fused, "fell back to layers that are not compiled"
    assert torch.equal(batches[0].table, batches[1].table)
    assert torch.equal(batches[0].anchors, batches[1].anchors)
