"""What is replayed: rounds of the trace or other anchors, and how many of them."""

import json
import shutil

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import draft_opd as d
from draft_opd.decoding.sampling import Sampling
from draft_opd.hindsight.trace import hindsight_traces
from draft_opd.pipelines.ablation import Ablation, load_plan, summarise
from draft_opd.training.anchors import choose_blocks, choose_rounds, draw_by_weight
from draft_opd.training.batches import BatchSource
from draft_opd.training.config import Opd, load_recipe
from draft_opd.training.rollouts import hindsight_rollout
from draft_opd.training.stage_opd import opd_loss
from draft_opd.training.trainer import Run

GREEDY = Sampling()


@pytest.fixture
def batch(target, trained, heldout):
    return BatchSource(target, trained.target_layers).batch(heldout[:4])


@pytest.fixture
def traces(target, trained, heldout):
    return hindsight_traces(target, trained, heldout[:4])


def chosen(target, drafter, batch, traces, num_draft_tokens=15, sampling=GREEDY, **options):
    return choose_blocks(target, drafter, batch, traces, Opd(**options), num_draft_tokens, sampling, "s")


def test_trace_anchors_are_rounds_of_the_trace(target, trained, batch, traces):
    blocks = chosen(target, trained, batch, traces, max_anchors=1000)
    for i, trace in enumerate(traces):
        assert blocks.anchors[i][blocks.present[i]].tolist() == [r.anchor for r in trace]
        assert blocks.accepted[i][blocks.present[i]].tolist() == [r.accepted for r in trace]


def test_at_most_max_anchors_are_replayed_in_order(traces):
    rows = choose_rounds(traces, 5, "s")
    assert [len(row) for row in rows] == [min(5, len(t)) for t in traces]
    assert all([r.anchor for r in row] == sorted(r.anchor for r in row) for row in rows)
    assert rows == choose_rounds(traces, 5, "s")
    assert choose_rounds(traces, 1000, "s") == traces


def test_random_anchors_have_the_same_budget(target, trained, batch, traces):
    ours = chosen(target, trained, batch, traces, max_anchors=6)
    random = chosen(target, trained, batch, traces, max_anchors=6, anchors="random")
    assert random.present.sum() == ours.present.sum()
    assert random.anchors.tolist() != ours.anchors.tolist()


def test_drafts_at_given_anchors_are_those_of_the_trace(target, trained, batch, traces):
    """Every position is drafted at; where a round began, draft and accepted length are its own."""
    every = chosen(target, trained, batch, traces, max_anchors=10_000, anchors="all")
    for i, trace in enumerate(traces):
        place = {int(a): j for j, a in enumerate(every.anchors[i]) if every.present[i, j]}
        assert len(place) == len(batch.trajectories[i].response_ids)
        for r in trace:
            assert every.drafted[i, place[r.anchor]].tolist() == r.drafted
            assert int(every.accepted[i, place[r.anchor]]) == r.accepted


def test_occupancy_at_temperature_zero_is_the_trace(target, trained, batch, traces):
    blocks = chosen(target, trained, batch, traces, max_anchors=1000, anchors="occupancy")
    for i, trace in enumerate(traces):
        kept = blocks.present[i]
        assert blocks.anchors[i][kept].tolist() == [r.anchor for r in trace]
        assert (blocks.weight[i][: len(trace)] == 1).all() and not blocks.weight[i][~kept].any()


def test_occupancy_above_it_weights_every_position(target, trained, batch, traces):
    blocks = chosen(
        target,
        trained,
        batch,
        traces,
        max_anchors=1000,
        anchors="occupancy",
        sampling=Sampling(temperature=1.0),
    )
    assert blocks.present.sum() > sum(map(len, traces))
    assert (blocks.weight <= 1 + 1e-6).all() and (blocks.weight[:, 0] == 1).all()
    assert ((blocks.weight > 0) == blocks.present).all()


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda w: max(w) > 1e-3),
    st.integers(1, 14),
)
def test_drawing_by_weight_keeps_every_expectation(weights, count):
    """Averaged over a fine grid of starts: each index's expected weight is its own."""
    grid = 2000
    means, sizes = [0.0] * len(weights), []
    for i in range(grid):
        drawn = draw_by_weight(weights, count, (i + 0.5) / grid)
        sizes.append(len(drawn))
        for j, w in drawn:
            means[j] += w / grid
    kept = [w if w > 1e-9 else 0.0 for w in weights]
    for mean, w in zip(means, kept, strict=True):
        assert mean == pytest.approx(w, abs=0.02 * max(1.0, sum(kept)))
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= max(1, min(count, sum(w > 0 for w in kept))) + 1


@pytest.mark.parametrize("anchors", ["trace", "random", "all", "occupancy"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_choice_trains(target, trained, batch, traces, anchors, temperature):
    options = Opd(anchors=anchors, max_anchors=4, objective={"kind": "expected_length"})
    loss, figures = opd_loss(
        target,
        trained,
        batch,
        traces,
        options,
        num_draft_tokens=15,
        seed="s",
        sampling=Sampling(temperature=temperature),
    )
    loss.backward()
    gradient = trained.fc.weight.grad
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0
    assert figures["anchors"] <= 16 and figures["supervised"] > 0
    trained.zero_grad(set_to_none=True)


def test_a_run_above_temperature_zero(target, recipe_for, trained_folder, tmp_path):
    """Collected, trained and measured at one temperature; another one is refused."""
    from draft_opd.data.collect import collect
    from draft_opd.data.prompts import read_prompts

    hot = Sampling(temperature=1.0)
    for part, limit in (("train", 6), ("heldout", 2)):
        prompts = read_prompts(f"embedded:{part}", limit)
        collect(target, prompts, tmp_path / part, max_new_tokens=60, sampling=hot)
    pairs = [
        f"drafter={trained_folder}",
        f"data.trajectories={tmp_path / 'train'}",
        f"data.heldout={tmp_path / 'heldout'}",
        "batch_size=4",
        "steps=2",
        "opd.objective.kind=expected_overlap",
    ]
    with pytest.raises(d.UserError, match="sampling"):
        Run("opd", recipe_for("opd", tmp_path / "a", *pairs), target=target)
    recipe = recipe_for("opd", tmp_path / "b", *pairs, "sampling.temperature=1.0")
    result = Run("opd", recipe, target=target).train()
    lines = [json.loads(x) for x in (tmp_path / "b" / "metrics.jsonl").read_text().splitlines()]
    assert result.step == 2 and result.tau > 1
    costs = next(x["seconds"] for x in lines if "loss" in x)
    assert {"all", "target", "trace", "branches", "forward", "backward", "update"} == set(costs)
    assert costs["all"] >= sum(v for k, v in costs.items() if k != "all") > 0


# -- ablations -------------------------------------------------------------------------------------

PLAN = """
recipe: embedded
common:
  {{data.trajectories: {data}/train, data.heldout: {data}/heldout, data.limit: 16,
   data.heldout_limit: 2, evaluation.every: 2, steps: 2, opd.trace_every: 1, batch_size: 4,
   data.max_length: 110}}
seeds: [0, 1]
baseline: sft_continued
variants:
  sft_continued: {{stage: sft}}
  replay: {{set: {{opd.objective.kind: cross_entropy}}}}
  replay_tokens: {{as: replay, budget: tokens}}
"""


def test_an_ablation_is_paired_and_resumable(data, tmp_path, monkeypatch):
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.format(data=data))
    plan = load_plan(path)
    with pytest.raises(d.UserError, match="run them first"):
        Ablation(plan.narrowed("0", "replay_tokens"), tmp_path / "none").run()
    Ablation(plan.narrowed("0", "sft_continued"), tmp_path / "out").run()
    trained = []
    whole = Run.train
    monkeypatch.setattr(Run, "train", lambda self: trained.append(self.out.name) or whole(self))
    report = Ablation(plan, tmp_path / "out").run()
    assert "sft_continued-0" not in trained and "sft_continued-1" in trained
    assert report == json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert len(report["runs"]) == 6 and {r["seeds"] for r in report["table"]} == {2}
    base = next(r for r in report["table"] if r["variant"] == "sft_continued")
    assert base["gain_percent"] == 0
    assert "<svg" in (tmp_path / "out" / "ablation.svg").read_text()
    path.write_text(PLAN.format(data=data).replace("cross_entropy", "dpace"))
    with pytest.raises(d.UserError, match=r"changed: variants\.replay"):
        Ablation(load_plan(path), tmp_path / "out")


def test_an_ablation_may_sweep_and_begin_with_finished_drafters(data, trained_folder, tmp_path):
    path = tmp_path / "plan.yaml"
    plan = yaml.safe_load(PLAN.format(data=data))
    folder = tmp_path / "begin-0" / "last"
    shutil.copytree(trained_folder, folder)
    plan |= {
        "seeds": [0],
        "start": {"drafter": str(tmp_path / "begin-{seed}" / "last")},
        "sweep": {"optim.learning_rate": [0.0001, 0.001]},
        "baseline": "replay@0.001",
        "variants": {"replay": plan["variants"]["replay"]},
    }
    path.write_text(json.dumps(plan))
    report = Ablation(load_plan(path), tmp_path / "out").run()
    assert {r["variant"] for r in report["runs"]} == {"replay@0.0001", "replay@0.001"}
    (start,) = {r["start"] for r in report["runs"]}
    assert start > 1 and not list((tmp_path / "out").glob("start-*"))
    rates = [
        load_recipe(tmp_path / "out" / f"{n}-0" / "recipe.yaml").optim.learning_rate
        for n in ("replay@0.0001", "replay@0.001")
    ]
    assert rates == [0.0001, 0.001]
    path.write_text(json.dumps(plan | {"start": {"drafter": str(tmp_path / "no-{seed}")}}))
    with pytest.raises(d.UserError, match=r"start\.drafter .*no-0"):
        Ablation(load_plan(path), tmp_path / "other")
    path.write_text(json.dumps(plan | {"baseline": "replay"}))
    with pytest.raises(d.UserError, match="not one of the variants"):
        load_plan(path)


def test_paired_differences():
    rows = [
        {"variant": v, "seed": s, "tau": t, "steps": 1, "supervised": 1, "seconds": 1.0}
        for v, s, t in (("a", 0, 2.0), ("a", 1, 4.0), ("b", 0, 2.2), ("b", 1, 3.8))
    ]
    table = {r["variant"]: r for r in summarise(rows, "a")}
    assert table["b"]["gain_percent"] == pytest.approx((10 - 5) / 2)
    assert table["b"]["wins"] == 1 and table["b"]["tau"] == pytest.approx(3.0)
    assert table["b"]["gain_sd"] == pytest.approx(15 / 2**0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "none"}, "not one of the variants"),
        ({"variants": {"sft_continued": {"stages": "sft"}}}, "variants"),
        ({"variants": {"sft_continued": {"budget": "seconds"}}}, "needs `as"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_a_wrong_plan_is_named(tmp_path, change, message):
    plan = {
        "recipe": "embedded",
        "seeds": [0],
        "baseline": "sft_continued",
        "variants": {"sft_continued": {"stage": "sft"}},
        **change,
    }
    path = tmp_path / "plan.yaml"
    path.write_text(json.dumps(plan))
    with pytest.raises(d.UserError, match=message):
        load_plan(path)


def test_drafts_that_were_not_followed_are_completed_where_they_count(target, trained, batch):
    whole = hindsight_rollout(target, trained, batch, 15)

    partly = hindsight_rollout(target, trained, batch, 15, whole=False)
    expected, found = (chosen(target, trained, batch, t, max_anchors=5) for t in (whole, partly))
    assert torch.equal(found.anchors, expected.anchors)
    assert torch.equal(found.drafted[found.present], expected.drafted[found.present])
    assert torch.equal(found.accepted, expected.accepted)
