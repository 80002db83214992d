"""Numbers at their limits: extreme and infinite logits, padded and draft vocabularies, 16 bit; and
what a run does with a step that is not finite."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_objectives import V, make
from transformers import Qwen3ForCausalLM

import draft_opd as d
from draft_opd.losses.config import Objective
from draft_opd.losses.objectives import OBJECTIVES, STREAMS, ReplayedBlocks, objective_loss
from draft_opd.training.config import load_recipe
from draft_opd.training.trainer import Run
from draft_opd.utils.errors import Failure

KINDS = sorted(OBJECTIVES)
ESTIMATORS = ["exact", "top_k", "k1", "k2", "k3", "bernoulli"]


def objectives() -> list[Objective]:
    every = [Objective(kind=kind, trajectory_weight=0.1, top_k=3) for kind in KINDS]
    every += [Objective(kind="acceptance_aware", estimator=e, top_k=3) for e in ESTIMATORS]
    return [*every, Objective(normalization="tokens", supervise_correction=True)]


def parts_of(r: ReplayedBlocks, bounds: list[int]) -> tuple[list[ReplayedBlocks], list[list[torch.Tensor]]]:
    """A batch's blocks as processes have them, and the masses that each asks the sums of."""
    rows = [slice(a, b) for a, b in zip([0, *bounds], [*bounds, len(r.valid)], strict=True)]
    asked: list[list[torch.Tensor]] = [[] for _ in rows]

    def part(i: int, at: slice) -> ReplayedBlocks:
        def total(mass: torch.Tensor) -> torch.Tensor:
            asked[i].append(mass.detach())
            return mass.detach()

        own = {f.name: getattr(r, f.name) for f in fields(ReplayedBlocks)}
        for name in ("hidden", "states", "labels", "drafted", "accepted", "valid", "weight", "ahead"):
            own[name] = own[name][at]
        if r.draftable is not None:
            own["draftable"] = r.draftable[at]
        return ReplayedBlocks(**own | {"total": total})

    found = [part(i, at) for i, at in enumerate(rows)]
    return found, asked


@settings(deadline=None, max_examples=80)
@given(
    st.integers(0, 10**6),
    st.sampled_from(objectives()),
    st.booleans(),
    st.lists(st.integers(0, 7), min_size=1, max_size=3),
)
def test_parts_of_a_batch_add_up_to_it(seed, objective, narrow, bounds):
    """Losses, figures and gradients of processes with any share of the supervised tokens, none
    among them: the sum is that of one process with the whole batch."""
    r = make(seed, blocks=7)
    if narrow:
        r = with_vocabulary(r, seed)
    loss, figures = objective_loss(r, objective)
    (gradient,) = torch.autograd.grad(loss, r.hidden)
    parts, asked = parts_of(r, sorted(bounds))
    for part in parts:  # what each would tell the others
        objective_loss(part, objective)
    sums = [sum(column) for column in zip(*asked, strict=True)]
    total, added, slopes = 0.0, dict.fromkeys(figures, 0.0), torch.zeros_like(gradient)
    for part in parts:
        given_sums = iter(sums)
        fresh = replace(part, total=lambda _, s=given_sums: next(s))
        value, own = objective_loss(fresh, objective)
        total += value.item()
        added = {k: added[k] + own[k] for k in figures}
        if value.requires_grad:
            slopes += torch.autograd.grad(value, r.hidden, allow_unused=True)[0]
    assert total == pytest.approx(loss.item(), rel=1e-9, abs=1e-9)
    assert added == pytest.approx(figures, rel=1e-9, abs=1e-9)
    assert torch.allclose(slopes, gradient, atol=1e-12)


def with_vocabulary(r: ReplayedBlocks, seed: int) -> ReplayedBlocks:
    """The same with a draft vocabulary that misses tokens of the text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(V, generator=generator)[: V // 2].sort().values
    return replace(
        r,
        head=r.head[ids],
        vocabulary=ids,
        draftable=torch.isin(r.labels, ids),
        drafted=ids[r.drafted % len(ids)],
    )


@settings(deadline=None, max_examples=120)
@given(
    st.integers(0, 10**6),
    st.sampled_from(objectives()),
    st.booleans(),
    st.sampled_from([1e2, 1e4, 1e18]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_extreme_logits_stay_finite(seed, objective, narrow, scale, dtype):
    """Target and drafter certain, of different tokens or of the same."""
    r = make(seed)
    if narrow:
        r = with_vocabulary(r, seed)
    own = {n: getattr(r, n).detach().to(dtype) for n in ("hidden", "states", "head", "target_head")}
    own["hidden"] = (own["hidden"] * scale).requires_grad_()
    own["states"] = own["states"] * scale
    r = replace(r, **own, weight=r.weight.to(dtype))
    loss, figures = objective_loss(r, objective)
    (gradient,) = torch.autograd.grad(loss, r.hidden)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert all(math.isfinite(x) for x in figures.values())


@pytest.mark.parametrize("objective", objectives(), ids=str)
def test_nothing_to_supervise_is_a_loss_of_zero(objective):
    """A process may have a share without a supervised token."""
    r = make(3)
    r = replace(r, valid=torch.zeros_like(r.valid), accepted=torch.zeros_like(r.accepted))
    loss, _ = objective_loss(r, objective)
    (gradient,) = torch.autograd.grad(loss, r.hidden)
    assert loss.item() == 0 and not gradient.any()


@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bit_is_near(kind):
    """Under autocast, as training with precision: bfloat16."""
    r = make(11, blocks=12)
    narrow = {n: getattr(r, n).detach().float() for n in ("hidden", "states", "head", "target_head")}
    narrow["hidden"].requires_grad_()
    fresh = replace(r, **narrow, weight=r.weight.float())
    exact = objective_loss(r, Objective(kind=kind))[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective_loss(fresh, Objective(kind=kind))[0]
    (a,), (b,) = (torch.autograd.grad(x, y.hidden) for x, y in ((exact, r), (loss, fresh)))
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)
    assert torch.nn.functional.cosine_similarity(a.flatten(), b.double().flatten(), 0) > 0.999


@pytest.mark.parametrize("kind", sorted(STREAMS))
def test_what_the_target_never_says_may_be_minus_infinity(kind):
    """Logits of -inf, as vocabulary padding has in some models."""
    from draft_opd.losses.divergences import acceptance_aware_loss

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(4, 3, V, generator=generator, requires_grad=True)
    p = torch.randn(4, 3, V, generator=generator)
    p[..., -2:] = -torch.inf
    # q must not say it either: KL(q || p) would be infinite, and rightly so.
    masked = q.masked_fill(p == -torch.inf, -torch.inf)
    first, second = (score for score, _ in STREAMS[kind])
    for score in (first, second):
        value = score(masked, p)
        (gradient,) = torch.autograd.grad(value.sum(), q, retain_graph=True)
        assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
    accepted = torch.tensor([0, 1, 2, 3])
    assert torch.isfinite(acceptance_aware_loss(masked, p, accepted).total)


# -- whole models ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def padded(target):
    """The shipped target with rows of zeros behind its vocabulary, to a multiple of 128."""
    model = Qwen3ForCausalLM(type(target.model.config).from_dict(target.model.config.to_dict()))
    model.load_state_dict({k: v.clone() for k, v in target.model.state_dict().items()})
    model.resize_token_embeddings(896, mean_resizing=False)
    with torch.no_grad():
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            part.weight[target.vocab_size :] = 0
    return d.Target(model, target.tokenizer, "padded")


def test_vocabulary_padding_changes_nothing(target, padded, heldout, recipe_for, family, tmp_path):
    """The same text, losslessly; a drafter for it trains, and never drafts a row of padding."""
    assert padded.vocab_size == 896 > target.vocab_size
    new = (
        "steps=8",
        "evaluation.every=8",
        "optim.learning_rate=3e-3",
        "data.heldout_limit=2",
        "batch_size=2",
        "data.max_length=100",
    )
    run = Run("sft", recipe_for("sft", tmp_path / "r", *new), target=padded)
    assert math.isfinite(run.train().tau)
    for t in heldout[:2]:
        made = d.generate(padded, run.drafter, t.prompt_ids, max_new_tokens=40)
        assert made.token_ids == t.response_ids[:40]
        assert all(max(r.drafted) < target.vocab_size for r in made.rounds)


# -- steps that are not finite ---------------------------------------------------------------

EXPLODES = (
    "steps=20",
    "evaluation.every=20",
    "batch_size=2",
    "accumulate=2",
    "data.max_length=70",
    "data.heldout_limit=1",
    "optim.name=adamw",
    "optim.warmup=0",
    "optim.learning_rate=1e30",
)


def lines(out) -> list[dict]:
    return [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_explodes_stops_names_the_batch_and_keeps_it(target, recipe_for, tmp_path):
    out = tmp_path / "run"
    run = Run("sft", recipe_for("sft", out, *EXPLODES), target=target)
    with pytest.raises(Failure, match=r"step 2: the (loss|gradient).*trajectories \w+, ") as caught:
        run.train()
    assert caught.value.status == 1 and "\n" not in str(caught.value)
    folder = out / "nonfinite" / "step-00000002"
    rows = d.read_trajectories(folder / "batch.jsonl")
    assert len(rows) == 4 and all(t.id in str(caught.value) for t in rows)
    # The step again, as the message says: the same end.
    again = load_recipe(folder / "recipe.yaml")
    run = Run("sft", again, target=target, resume=True)
    assert run.progress.step == 1
    with pytest.raises(Failure) as second:
        run.train()
    assert str(second.value).partition(";")[0] == str(caught.value).partition(";")[0]
    assert str(second.value).endswith("as before") and not (folder / "nonfinite").exists()
    assert len(lines(out)) == 2  # step 0's τ and step 1: nothing of step 2


def poison(target, monkeypatch, bad: tuple[int, ...]):
    """From now on the target says infinity of one text."""
    honest = target.trajectories

    def trajectories(ids, layers=(), cache=None):
        out = honest(ids, layers, cache)
        hit = [row.tolist()[: len(bad)] == list(bad) for row in ids]
        out.hidden[torch.tensor(hit)] = torch.inf
        if out.features is not None:
            out.features[torch.tensor(hit)] = torch.inf
        return out

    monkeypatch.setattr(target, "trajectories", trajectories)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_batch_that_is_not_finite_is_skipped_where_the_recipe_says_so(
    target, recipe_for, tmp_path, monkeypatch, precision
):
    out = tmp_path / "run"
    pairs = (
        "steps=6",
        "evaluation.every=6",
        "batch_size=2",
        "data.limit=12",
        "data.max_length=80",
        "data.heldout_limit=1",
        f"precision={precision}",
        "data.cache_features=none",
        "optim.nonfinite=skip",
    )
    run = Run("sft", recipe_for("sft", out, *pairs), target=target)
    bad = run._rows(2)[0]
    poison(target, monkeypatch, tuple(bad.ids))
    result = run.train()
    monkeypatch.undo()
    skipped = [m for m in lines(out) if "skipped" in m]
    assert [m["step"] for m in skipped] == [3] and "loss" not in skipped[0]
    assert result.step == 6 and all(
        torch.isfinite(x).all() for x in load_file(out / "last" / "model.safetensors").values()
    )
    kept = d.read_trajectories(out / "nonfinite" / "step-00000003" / "batch.jsonl")
    assert bad.id in [t.id for t in kept]
    told = json.loads((out / "nonfinite" / "step-00000003" / "nonfinite.json").read_text())
    assert told["step"] == 3 and told["trajectories"] == [t.id for t in kept]


def test_a_run_that_only_skips_stops(target, recipe_for, tmp_path):
    recipe = recipe_for("sft", tmp_path / "run", *EXPLODES, "optim.nonfinite=skip")
    with pytest.raises(Failure, match="10 times in a row: see the first"):
        Run("sft", recipe, target=target).train()
    kept = sorted(p.name for p in (tmp_path / "run" / "nonfinite").iterdir())
    assert kept == ["step-00000002", "step-00000003", "step-00000004"]
