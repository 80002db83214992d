"""Candidates that are not in the product, tried in the league's setting by changing a run from outside.

    python benchmarks/objective_variants.py --plan benchmarks/league_fresh.yaml \
        --start 'runs/start-{seed}/last' --seeds 10,11 --only jitter3,ema --out runs/variants.json

Each takes the plan's common keys and, unless it says otherwise, D-PACE at the trace's anchors. What helps
belongs into the product, what does not stays a row of the results file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from machine import machine

from draft_opd.decoding.sampling import Sampling
from draft_opd.drafters import Drafter
from draft_opd.hindsight.occupancy import expected_tau
from draft_opd.losses import objectives
from draft_opd.losses.chunked import chunked_score
from draft_opd.losses.divergences import dpace_weights, rank_of_label, up_to_first_rejection
from draft_opd.losses.rounds_to_go import advantages, survival_before
from draft_opd.training import anchors, blocks, rollouts, stage_opd, values
from draft_opd.training.config import load_recipe
from draft_opd.training.optimizer import Optimizer
from draft_opd.training.trainer import Run

EMA = 0.98


def dpace_with(weigh):
    """D-PACE whose weights [N, K] are `weigh(r, weights)`."""

    def loss(r, o):
        weights = weigh(r, dpace_weights((-r.label_nll).exp(), r.reachable, o.dpace_alpha))
        return r.block_mean((r.label_nll * weights).sum(1), r.valid), {}

    return patched_objective("dpace", loss)


def patched_objective(kind, loss):
    spec = replace(objectives.OBJECTIVES[kind], loss=loss)
    return mock.patch.dict(objectives.OBJECTIVES, {kind: spec})


@torch.no_grad()
def ranks(r):
    found = chunked_score(
        rank_of_label,
        r.hidden[r.reachable].detach(),
        [w.detach() for w in r.head],
        labels=r.labels[r.reachable],
        teacher_weight=r.target_head,
    )
    return torch.zeros(r.reachable.shape).masked_scatter(r.reachable, found)


def near_misses(r, weights):
    """Twice the weight at the first rejection where the text's token was ranked second to fourth."""
    rank = ranks(r)
    first = r.reachable & (torch.arange(weights.shape[1]) == r.accepted[:, None])
    return weights * (1 + (first & (rank >= 1) & (rank <= 3)))


def margin(r, weights):
    """No loss where the text's token has a probability above 0.9 already."""
    return weights * ((-r.label_nll.detach()).exp() < 0.9)


def auf_decayed(r, o):
    used = up_to_first_rejection(r.accepted, r.reachable)
    decay = torch.exp(-torch.arange(used.shape[1]) / r.decay)
    return r.mean(r.label_nll, used * decay), {}


def from_first_rejection(r, o):
    """Cross-entropy with weight 1 up to the first rejected offset, decayed from there as SFT's is."""
    behind = torch.arange(r.labels.shape[1]) - r.accepted[:, None]
    return r.mean(r.label_nll, r.reachable * torch.exp(-behind.clamp_min(0) / r.decay)), {}


def log_ratio(draft_logits, target_logits, labels):
    """log min(1, q(y) / p(y)): of the chance that a sampled draft lets the text's token through."""
    log_q, log_p = (
        x.log_softmax(-1).gather(-1, labels[..., None])[..., 0] for x in (draft_logits, target_logits)
    )
    return (log_q - log_p).clamp_max(0)


def rounds_sampled():
    """`rounds` at temperature 1, with what verification accepts of sampled drafts: α = min(1, q(y) / p(y)).
    As far as its summary says, EDR's gradient: occupancy × survival × what the token is worth."""

    def loss(r, o):
        accept = r.score(log_ratio, r.valid, r.labels).exp() * r.valid
        fixed = accept.detach()
        saved = survival_before(fixed) * advantages(fixed, r.ahead)
        return r.block_mean(-(accept * saved).sum(1), r.valid), {}

    def ahead(target, drafter, batch, made, objective):
        def alpha(*where, **keys):
            keys["sharpness"] = None
            return everywhere(*where[:4], Sampling(temperature=1.0), **keys)

        everywhere = values.acceptance_everywhere
        with mock.patch.object(values, "acceptance_everywhere", alpha):
            return values.rounds_ahead(target, drafter, batch, made, objective)

    # A recipe refuses `rounds` for sampled drafts, so another kind carries it.
    spec = replace(objectives.OBJECTIVES["rounds"], loss=loss, needs_target_states=True)
    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.dict(objectives.OBJECTIVES, {"expected_overlap": spec}))
    stack.enter_context(mock.patch.object(stage_opd, "rounds_ahead", ahead))
    return stack


def moved(shift=0, share=0.0):
    """Anchors of the trace moved by up to `shift` positions; `share` of them drawn anew at random."""
    own = anchors.pack_anchors

    def pack(batch, rows, count):
        drawn = []
        for t, row in zip(batch.trajectories, rows, strict=True):
            rng, first, last = (
                random.Random(f"{t.id}/{len(row)}/{sum(row)}"),
                len(t.prompt_ids) - 1,
                len(t.ids) - 2,
            )
            found = set()
            for a in row:
                a = rng.randint(first, last) if rng.random() < share else a + rng.randint(-shift, shift)
                found.add(min(max(a, first), last))
            drawn.append(sorted(found))
        return own(batch, drawn, count)

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(anchors, "pack_anchors", pack))
    # What was drafted there is not known, and D-PACE does not ask.
    stack.enter_context(mock.patch.object(anchors, "attach_drafts", lambda made, rounds: made))
    return stack


def by_occupancy(everywhere):
    """Anchors weighted by the exact probability that a round begins there: all, or as many random ones."""

    def choose(target, drafter, batch, count, sampling, options, seed):
        places, alpha = values.acceptance_everywhere(target, drafter, batch, count, sampling)
        begins = anchors.occupancy(alpha, places.valid).float()
        size = 10**6 if everywhere else options.max_anchors
        rows = anchors.random_anchors(batch, size, seed)
        weights = torch.zeros(len(rows), max(map(len, rows)))
        for i, row in enumerate(rows):
            at = torch.tensor(row) - int(batch.starts[i])
            weights[i, : len(row)] = begins[i, at]
        return rows, weights

    return mock.patch.object(anchors, "_by_occupancy", choose)


def traces_of(folder):
    """Traces of another drafter than the one that is trained."""
    other = Drafter.from_pretrained(str(folder), device="cpu").requires_grad_(False)
    own, now, training = rollouts.hindsight_rollout, rollouts.Rollouts._now, []

    def roll(target, drafter, *rest):
        other.bind(target)
        return own(target, other if training else drafter, *rest)

    def for_training(self, *args, **keys):
        """Held-out texts are traced by another way: with the drafter itself."""
        training.append(True)
        try:
            return now(self, *args, **keys)
        finally:
            training.pop()

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(rollouts, "hindsight_rollout", roll))
    stack.enter_context(mock.patch.object(rollouts.Rollouts, "_now", for_training))
    return stack


def regression(weight):
    """Adds 1 - cos between the drafter's state and the target's at the same offset."""
    own = stage_opd.replay

    def replay(target, drafter, batch, made, states, *rest):
        r = own(target, drafter, batch, made, states, *rest)
        theirs = blocks.text_states(batch, made).flatten(0, 1)
        apart = 1 - F.cosine_similarity(r.hidden.float(), theirs.float(), dim=-1)
        return replace(r, confidence=apart)

    def loss(r, o):
        value, figures = objectives._dpace(replace(r, confidence=None), o)
        return value + weight * r.mean(r.confidence, r.reachable.float()), figures

    stack = contextlib.ExitStack()
    stack.enter_context(mock.patch.object(stage_opd, "replay", replay))
    stack.enter_context(patched_objective("dpace", loss))
    # The replay carries the distances where a confidence would be: nothing learns from it as one.
    stack.enter_context(mock.patch.object(stage_opd, "with_heads", lambda r, f, *a, **k: f(r)))
    return stack


class Average:
    """An exponential moving average of the weights, which is what is measured at the end."""

    def __init__(self, beta):
        self.beta, self.kept = beta, {}

    def patch(self):
        own = Optimizer.step

        def step(optimizer):
            own(optimizer)
            for parameter, name in optimizer._names.items():
                if name not in self.kept:
                    self.kept[name] = parameter.detach().clone()
                self.kept[name].lerp_(parameter.detach(), 1 - self.beta)

        return mock.patch.object(Optimizer, "step", step)

    def apply(self, drafter):
        with torch.no_grad():
            for name, parameter in drafter.named_parameters():
                parameter.copy_(self.kept[name])


def falling(first, last):
    """Keys of an α of D-PACE that goes from one to the other."""
    return {"opd.objective.dpace_alpha": first, "opd.objective.dpace_alpha_end": last}


def variants(start, seed):
    """{name: (stage, keys, patch)}"""
    other = str(start).replace("{seed}", str(seed + 1))
    own = str(start).replace("{seed}", str(seed))
    none = contextlib.nullcontext
    occupancy = {"opd.anchors": "occupancy"}
    return {
        "sft": ("sft", {"sft.anchors": 16}, none),
        "dpace": ("opd", {}, none),
        # of one step: what loading and measuring τ take of `cpu_seconds`
        "one_step": ("sft", {"steps": 1, "evaluation.every": 1}, none),
        "sft_ema": ("sft", {"sft.anchors": 16}, none),
        "ema": ("opd", {}, none),
        "jitter1": ("opd", {}, lambda: moved(1)),
        "jitter3": ("opd", {}, lambda: moved(3)),
        "random20": ("opd", {}, lambda: moved(share=0.2)),
        "near_misses": ("opd", {}, lambda: dpace_with(near_misses)),
        "margin": ("opd", {}, lambda: dpace_with(margin)),
        "auf_decayed": ("opd", {"opd.objective.kind": "auf"}, lambda: patched_objective("auf", auf_decayed)),
        "first_rejection": (
            "opd",
            {"opd.objective.kind": "auf"},
            lambda: patched_objective("auf", from_first_rejection),
        ),
        "rounds_sampled": ("opd", {"opd.objective.kind": "expected_overlap"}, rounds_sampled),
        "alpha_down": ("opd", falling(0.8, 0.3), none),
        "alpha_down_far": ("opd", falling(1.0, 0.1), none),
        "alpha_up": ("opd", falling(0.3, 0.8), none),
        "chain_tv+ce": (
            "opd",
            {"opd.objective.kind": "chain_tv", "opd.objective.trajectory_weight": 0.1},
            none,
        ),
        "regression": ("opd", {}, lambda: regression(1.0)),
        "frozen_trace": ("opd", {}, lambda: traces_of(own)),
        "others_trace": ("opd", {}, lambda: traces_of(other)),
        "random_weighted": ("opd", occupancy, lambda: by_occupancy(False)),
        "occupancy_drawn": ("opd", occupancy, none),
        "advantage_drawn": ("opd", {**occupancy, "opd.objective.kind": "advantage"}, none),
        "all_weighted": ("opd", occupancy, lambda: by_occupancy(True)),
    }


def run_one(plan, start, seed, name):
    stage, keys, patch = variants(start, seed)[name]
    with tempfile.TemporaryDirectory() as out:
        pairs = {
            **plan["common"],
            **keys,
            "seed": seed,
            "out": f"{out}/run",
            "drafter": str(start).format(seed=seed),
        }
        recipe = load_recipe(plan["recipe"], [f"{k}={json.dumps(v)}" for k, v in pairs.items()], "opd")
        average = Average(EMA) if name.endswith("ema") else None
        with patch(), average.patch() if average else contextlib.nullcontext():
            run = Run(stage, recipe)
            began = time.process_time()
            result = run.train()
            spent = time.process_time() - began
        tau = result.tau
        if not recipe.sampling.takes_argmax:
            run.drafter.eval()
            where = {"draft_length": recipe.draft_length, "sampling": recipe.sampling}
            tau = expected_tau(run.target, run.drafter, run.held_out, **where)
        elif average:
            average.apply(run.drafter)
            counts = run.held_out_counts()
            tau = sum((n + 1) * c for n, c in enumerate(counts)) / sum(counts)
        shutil.rmtree(f"{out}/run")
    seconds = {"seconds": round(result.seconds, 1), "cpu_seconds": round(spent, 1)}
    return {"variant": name, "seed": seed, "tau": tau, **seconds}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for key in ("plan", "start", "seeds", "out"):
        parser.add_argument(f"--{key}", required=True)
    parser.add_argument("--only", default="")
    a = parser.parse_args()
    plan, out = yaml.safe_load(Path(a.plan).read_text()), Path(a.out)
    rows = json.loads(out.read_text())["runs"] if out.exists() else []
    for seed in map(int, a.seeds.split(",")):
        for name in a.only.split(",") if a.only else variants(a.start, seed):
            if any((r["variant"], r["seed"]) == (name, seed) for r in rows):
                continue
            rows.append(run_one(plan, a.start, seed, name))
            print(rows[-1], flush=True)
            out.write_text(json.dumps({"plan": plan["common"], "machine": machine(), "runs": rows}, indent=1))


if __name__ == "__main__":
    main()
