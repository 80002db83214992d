"""Training: it learns, it resumes to the same weights, and recipes complain usefully."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import draft_opd as d
from draft_opd.data.trajectory import Trajectory
from draft_opd.drafters.dflash_options import default_decay
from draft_opd.losses.config import Objective
from draft_opd.training.anchors import random_anchors
from draft_opd.training.batches import (
    BatchSource,
    EpochBatches,
    batch_order,
    forward_cost,
    length_groups,
)
from draft_opd.training.blocks import attach_drafts, pack_anchors
from draft_opd.training.config import load_recipe
from draft_opd.training.inputs import truncate
from draft_opd.training.optimizer import learning_rate
from draft_opd.training.rollouts import hindsight_rollout, live_rollout
from draft_opd.training.trainer import Run


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_sft_raises_held_out_tau(target, recipe_for, tmp_path):
    """From nothing, in a few steps on texts of which it has seen the like."""
    recipe = recipe_for(
        "sft",
        tmp_path / "run",
        "steps=40",
        "evaluation.every=40",
        "optim.learning_rate=3e-3",
        "batch_size=2",
        "data.max_length=110",
        "data.heldout_limit=4",
    )
    Run("sft", recipe, target=target).train()
    taus = [m["tau"] for m in metrics(tmp_path / "run") if "tau" in m]
    assert taus[0] < 1.1 and taus[-1] > 1.1


def test_a_run_ends_at_its_plateau(target, recipe_for, tmp_path):
    """A drafter that learns nothing: after two measurements without a new best; and it stays so."""
    recipe = recipe_for(
        "sft",
        tmp_path / "run",
        "steps=50",
        "evaluation.every=1",
        "evaluation.patience=2",
        "optim.learning_rate=1e-12",
        "data.max_length=60",
        "data.heldout_limit=2",
        "batch_size=2",
    )
    result = Run("sft", recipe, target=target).train()
    assert (result.step, result.best_step) == (2, 0) and result.last.is_dir()
    assert Run("sft", recipe, target=target, resume=True).train().step == 2


@pytest.mark.parametrize("kind", ["acceptance_aware", "cross_entropy", "expected_length"])
def test_every_objective_lowers_its_own_loss(target, recipe_for, trained_folder, tmp_path, kind):
    """On the same few trajectories again and again, so that the loss has to fall."""
    recipe = recipe_for(
        "opd",
        tmp_path / "run",
        f"drafter={trained_folder}",
        f"opd.objective.kind={kind}",
        "data.limit=2",
        "batch_size=2",
        "steps=8",
        "evaluation.every=8",
        "optim.learning_rate=3e-4",
        "opd.max_anchors=200",
        "opd.trace_every=8",  # and the same rounds
        "opd.objective.trajectory_weight=0",
        "data.max_length=80",
        "data.heldout_limit=1",
    )
    Run("opd", recipe, target=target).train()
    losses = [m["loss"] for m in metrics(tmp_path / "run") if "loss" in m]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))


def test_dpace_alpha_goes_in_a_straight_line():
    objective = Objective(kind="dpace", dpace_alpha=0.8, dpace_alpha_end=0.3)
    assert [objective.at(x).dpace_alpha for x in (0, 0.5, 1)] == pytest.approx([0.8, 0.55, 0.3])
    assert Objective(kind="dpace").at(0.5) == Objective(kind="dpace")


@pytest.mark.parametrize("family", ["dflash"], indirect=True)
def test_a_run_follows_dpace_alpha(target, family, recipe_for, trained_folder, tmp_path):
    """The same first step; the second has another alpha where an end is given."""
    losses = []
    for end in ("null", "0.5", "0.0"):
        recipe = recipe_for(
            "opd",
            tmp_path / end,
            f"drafter={trained_folder}",
            "opd.objective.kind=dpace",
            "opd.objective.dpace_alpha=0.5",
            f"opd.objective.dpace_alpha_end={end}",
            "steps=2",
            "batch_size=2",
            "evaluation.every=2",
            "data.max_length=80",
            "data.heldout_limit=1",
        )
        Run("opd", recipe, target=target).train()
        losses.append([m["loss"] for m in metrics(tmp_path / end) if "loss" in m])
    stays, same, falls = losses
    assert stays == same and falls[0] == stays[0] and falls[1] != stays[1]


def test_live_and_hindsight_rollouts_are_one(target, trained, heldout):
    rows = heldout[:6]
    batch = BatchSource(target, trained.target_layers).batch(rows)
    fresh, traces = live_rollout(target, trained, rows, trained.draft_length)
    assert [t.ids for t in fresh] == [t.ids for t in rows]
    assert traces == hindsight_rollout(target, trained, batch, trained.draft_length)


@pytest.mark.parametrize(
    ("stage", "pairs"),
    [
        ("sft", []),
        ("sft", ["optim.name=adamw"]),
        ("opd", ["opd.trace_every=3", "data.cache_features=none"]),  # saved between two traces
        ("opd", ["opd.objective.kind=acceptance_aware", "accumulate=2"]),
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(
    target, family, recipe_for, trained_folder, tmp_path, stage, pairs
):
    pairs = [
        *pairs,
        "steps=6",
        "evaluation.every=2",
        "batch_size=3",
        "data.max_length=80",
        "data.heldout_limit=2",
    ]
    if stage == "opd":
        pairs += [f"drafter={trained_folder}", "opd.max_anchors=4"]
    elif family == "eagle3":
        pytest.skip("the stage is that of DFlash")
    Run(stage, recipe_for(stage, tmp_path / "whole", *pairs), target=target).train()

    class Killed(Exception):
        pass

    def kill(line):
        if line["step"] == 5 and "loss" in line:
            raise Killed

    recipe = recipe_for(stage, tmp_path / "cut", *pairs)
    with pytest.raises(Killed):
        Run(stage, recipe, target=target, on_metrics=kill).train()
    result = Run(stage, recipe, target=target, resume=True).train()
    assert result.step == 6
    whole, cut = (load_file(tmp_path / n / "last" / "model.safetensors") for n in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    a, b = metrics(tmp_path / "whole"), metrics(tmp_path / "cut")
    assert [m["step"] for m in a] == [m["step"] for m in b]
    assert [m.get("tau", m.get("loss")) for m in a] == [m.get("tau", m.get("loss")) for m in b]


def test_a_folder_with_a_run_is_not_overwritten(target, recipe_for, tmp_path):
    recipe = recipe_for("sft", tmp_path / "run", "steps=1", "evaluation.every=1")
    Run("sft", recipe, target=target).train()
    # Its state is safetensors and JSON, and the checkpoint a drafter.
    last = tmp_path / "run" / "last"
    assert {p.name for p in (last / "training").iterdir()} == {
        "optimizer.safetensors",
        "progress.json",
        "files.json",
    }
    assert not list(last.rglob("*.pt")) and not list(last.rglob("*.bin"))
    d.Drafter.from_pretrained(str(last), device="cpu")
    with pytest.raises(d.UserError, match="--resume"):
        Run("sft", recipe, target=target)
    changed = recipe_for("sft", tmp_path / "run", "steps=1", "evaluation.every=1", "batch_size=4")
    with pytest.raises(d.UserError, match="changed: batch_size: 8 -> 4"):
        Run("sft", changed, target=target, resume=True)


def test_masks_that_supervise_nothing_are_refused(target, recipe_for, tmp_path):
    with pytest.raises(d.UserError, match="all zeros"):
        Run("sft", recipe_for("sft", tmp_path / "r", "data.max_length=8"), target=target)


def test_training_on_the_yardstick_is_refused(target, recipe_for, data, tmp_path):
    same = recipe_for("sft", tmp_path / "r", f"data.trajectories={data / 'heldout'}")
    with pytest.raises(d.UserError, match="flatter"):
        Run("sft", same, target=target)


def test_leaks_are_seen_whatever_the_ids(target, recipe_for, data, tmp_path):
    rows = (data / "heldout" / "trajectories.jsonl").read_text().splitlines()[:8]
    renamed = [json.dumps({**json.loads(r), "id": f"other-{i}"}) for i, r in enumerate(rows)]
    (tmp_path / "t.jsonl").write_text("\n".join(renamed))
    recipe = recipe_for("sft", tmp_path / "r", f"data.trajectories={tmp_path / 't.jsonl'}")
    with pytest.raises(d.UserError, match="flatter"):
        Run("sft", recipe, target=target)


def test_live_rollouts_end_where_the_stored_text_ends(target, trained, heldout):
    rows = [truncate(t, len(t.prompt_ids) + n) for t, n in zip(heldout, (43, 32, 7), strict=False)]
    fresh, traces = live_rollout(target, trained, rows, trained.draft_length)
    assert [t.response_ids for t in fresh] == [t.response_ids for t in rows]
    batch = BatchSource(target, trained.target_layers).batch(rows)
    assert traces == hindsight_rollout(target, trained, batch, trained.draft_length)


def test_offsets_that_were_not_drafted_carry_no_loss(target, trained, heldout):
    batch = BatchSource(target, trained.target_layers).batch(heldout[:1])
    first = len(heldout[0].prompt_ids) - 1
    blocks = attach_drafts(
        pack_anchors(batch, [[first]], 15), [[d.Round(first, heldout[0].response_ids[:3], 3)]]
    )
    assert blocks.valid[0, 0].tolist() == [True] * 3 + [False] * 12


def test_trajectories_of_another_target_are_refused(target, recipe_for, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"prompt_ids": [1], "response_ids": [5000]}\n')
    recipe = recipe_for("sft", tmp_path / "r", f"data.trajectories={tmp_path / 't.jsonl'}")
    with pytest.raises(d.UserError, match="vocabulary"):
        Run("sft", recipe, target=target)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (["stepz=3"], "unknown key 'stepz'; did you mean 'steps'"),
        (["optim.learnin_rate=1"], "did you mean 'learning_rate'"),
        (["steps=0"], "'steps'"),
        (["steps=many"], "'steps'.*got 'many'"),
        (["steps"], "is not KEY=VALUE"),
        (["opd.objective.kind=mse"], "'opd.objective.kind'"),
        (["opd.objective.kind=total_variation", "opd.objective.estimator=k3"], "KL divergence"),
        (["steps.x=1"], "is a value, not a section"),
        (["model=[}"], "not valid YAML"),
    ],
)
def test_a_wrong_recipe_key_is_named(pairs, message):
    with pytest.raises(d.UserError, match=message):
        load_recipe("embedded", pairs, "opd")


def test_unreadable_recipes_are_named(tmp_path):
    with pytest.raises(d.UserError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_text("a: [")
    with pytest.raises(d.UserError, match="not readable YAML"):
        load_recipe(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("stages: {sft: 5}")
    with pytest.raises(d.UserError, match=r"stages\.sft"):
        load_recipe(tmp_path / "r.yaml", stage="sft")
    (tmp_path / "r.yaml").write_text("steps: 3")
    with pytest.raises(d.UserError, match="'target' is missing"):
        load_recipe(tmp_path / "r.yaml")


def test_unknown_families_and_options_are_named(target, recipe_for, tmp_path):
    with pytest.raises(d.UserError, match="known: dflash"):
        Run("sft", recipe_for("sft", tmp_path / "a", "model.family=gpt"), target=target)
    with pytest.raises(d.UserError, match=r"model\.options"):
        Run("sft", recipe_for("sft", tmp_path / "b", "model.options.depth=3"), target=target)
    for option in ("num_layers=two", "num_layers=0", "block_size=8.5", "head_dim=7", "num_attention_heads=7"):
        with pytest.raises(d.UserError, match=r"model\.options"):
            Run("sft", recipe_for("sft", tmp_path / "c", f"model.options.{option}"), target=target)


def test_a_run_that_names_no_family_has_its_drafters_and_can_be_run_again(
    target, data, trained_folder, family, tmp_path
):
    keys = {
        "target": "embedded",
        "drafter": str(trained_folder),
        "out": str(tmp_path / "run"),
        "data": {"trajectories": str(data / "train"), "heldout": str(data / "heldout"), "limit": 8},
        "steps": 1,
        "batch_size": 4,
        "precision": "float32",
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(keys))
    written = tmp_path / "run" / "recipe.yaml"
    Run("sft", load_recipe(tmp_path / "r.yaml", [], "sft"), target=target).train()
    for place, pairs, resume in (
        (tmp_path / "r.yaml", [], True),
        (written, [], True),
        (written, [f"out={tmp_path / 'again'}"], False),
    ):
        run = Run("sft", load_recipe(place, pairs, "sft"), target=target, resume=resume)
        assert run.drafter.family == family


def test_an_epoch_visits_everything_once_and_depends_on_its_seed_only():
    lengths = [int(x) for x in torch.randint(5, 90, (100,))]
    batches = batch_order(lengths, 8, 3, 0)
    assert sorted(i for b in batches for i in b) == sorted({i for b in batches for i in b})
    assert sum(map(len, batches)) >= 96 and batches == batch_order(lengths, 8, 3, 0)
    assert batches != batch_order(lengths, 8, 4, 0) and batches != batch_order(lengths, 8, 3, 1)
    rows = [Trajectory([1], [2] * (n - 1), str(i)) for i, n in enumerate(lengths)]
    at = EpochBatches(rows, 8, 3)
    for index in (len(batches), 0, len(batches) - 1):  # in any order
        epoch, place = divmod(index, len(batches))
        assert at(index) == [rows[i] for i in batch_order(lengths, 8, 3, epoch)[place]]


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=7), cost=st.integers(0, 80))
def test_rows_are_split_as_is_cheapest(lengths, cost):
    def tokens(groups):
        return sum(len(g) * max(lengths[i] for i in g) + cost for g in groups)

    groups = length_groups(lengths, cost)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cuts = itertools.product([False, True], repeat=len(order) - 1)
    every = [[list(g) for g in _cut(order, places)] for places in cuts]
    assert tokens(groups) == min(map(tokens, every))


def _cut(order, places):
    groups = [[order[0]]]
    for i, new in zip(order[1:], places, strict=True):
        groups.append([i]) if new else groups[-1].append(i)
    return groups


def test_rows_that_run_in_groups_have_the_same_states(target, heldout):
    """One long text among short ones."""
    rows = [replace(t, response_ids=t.response_ids[: 6 + 2 * i]) for i, t in enumerate(heldout[:5])]
    rows.insert(1, replace(heldout[5], response_ids=heldout[5].response_ids * 4))
    batch = BatchSource(target, (1, 3)).batch(rows)
    assert len(length_groups([len(t.ids) for t in rows], forward_cost(target))) > 1
    for i, t in enumerate(rows):
        alone = target.trajectories(torch.tensor([t.ids]), (1, 3))
        for found, wanted in ((batch.features, alone.features), (batch.hidden, alone.hidden)):
            torch.testing.assert_close(found[i, : len(t.ids)], wanted[0], rtol=1e-4, atol=1e-4)


def test_random_anchors_have_a_next_token(target, heldout):
    batch = BatchSource(target, (1,)).batch(heldout[:4])
    for t, row in zip(heldout, random_anchors(batch, 1000, "s"), strict=False):
        assert row == list(range(len(t.prompt_ids) - 1, len(t.ids) - 1))


def test_schedules(recipe_for, tmp_path):
    assert [default_decay(b) for b in (8, 10, 16)] == [4, 5, 7]
    recipe = recipe_for("sft", tmp_path, "optim.warmup=0.1", "optim.learning_rate=1.0")
    rates = [learning_rate(s, 100, recipe.optim) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1.0
    assert rates[-1] < 0.001 and rates[10:] == sorted(rates[10:], reverse=True)
