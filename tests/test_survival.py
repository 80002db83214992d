"""Runs survive: kills at any moment, requests to stop, damaged checkpoints, changed data."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import draft_opd as d
from draft_opd.training.checkpoint import Checkpoints, damage
from draft_opd.training.trainer import Run

STEPS = 18


@pytest.fixture(scope="module")
def command(recipe_for, trained_folder, tmp_path_factory):
    """command(out): an OPD run in which everything that has a state has one: traces of several
    steps, Muon, features that are kept, checkpoints at every step and between evaluations."""

    def make(out: Path, *pairs: str) -> list:
        recipe = recipe_for(
            "opd",
            out,
            f"drafter={trained_folder}",
            f"steps={STEPS}",
            "evaluation.every=4",
            "save_every=1",
            "opd.trace_every=3",
            "data.cache_features=memory",
            "data.limit=24",
            "data.heldout_limit=3",
            "batch_size=4",
            "data.max_length=110",
            "optim.name=muon",
            "opd.max_anchors=6",
            "opd.objective.kind=dpace",
            *pairs,
        )
        path = tmp_path_factory.mktemp("recipe") / "r.yaml"
        path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
        return ["opd", "--config", path, "--resume"]

    return make


def finish(forked, *arguments, log: Path, status: int = 0) -> None:
    assert forked.status(forked.start(*arguments, log=log)) == status, log.read_text()


def metrics(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def same_files(a: Path, b: Path, *names: str) -> bool:
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in names)


WEIGHTS = (
    "last/model.safetensors",
    "last/training/optimizer.safetensors",
    "best/model.safetensors",
    "best/best.json",
)


@pytest.fixture(scope="module")
def whole(forked, command, tmp_path_factory):
    """A run that nobody interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(forked, *command(out), log=out.with_suffix(".log"))
    return out


def test_twenty_kills_change_nothing(forked, command, whole, family, tmp_path):
    """SIGKILL at 20 random moments, saving and renaming among them; then the same weights, the
    same optimiser, the same best drafter, the same metrics, bit for bit. (EAGLE-3: at 5.)"""
    expected, wanted = whole, 20 if family == "dflash" else 5
    out, arguments = tmp_path / "run", command(tmp_path / "run")
    log, rng = tmp_path / "log", random.Random(8)
    kills, steps, lines, longest = 0, [], out / "metrics.jsonl", 1.0
    while kills < wanted:
        began = time.time_ns()
        process = forked.start(*arguments, log=log)
        if kills % 5:  # once it has begun with its steps
            while not lines.exists() or lines.stat().st_mtime_ns < began:
                assert time.time_ns() < began + 120 * 10**9, log.read_text()
                time.sleep(0.002)
        time.sleep(rng.uniform(0, longest))
        os.kill(process, signal.SIGKILL)
        if forked.status(process) == 0:  # it had ended: the next one begins again
            assert same_files(expected, out, *WEIGHTS)
            shutil.rmtree(out)
            longest = max(1.0, longest / 1.8)  # it waited too long
            continue
        kills += 1
        progress = out / "last" / "training" / "progress.json"
        steps.append(json.loads(progress.read_text())["step"] if progress.exists() else -1)
        if len(set(steps[-2:])) == 1:  # on a busy machine everything takes longer
            longest *= 1.8
    assert len(set(steps)) > wanted // 4, steps
    finish(forked, *arguments, log=log)
    assert same_files(expected, out, *WEIGHTS), steps
    assert metrics(out) == metrics(expected)
    left = {p.name for p in out.iterdir()}
    assert left - {".lock", ".last.tmp", ".best.tmp"} == {
        "last",
        "best",
        "checkpoints",
        "metrics.jsonl",
        "recipe.yaml",
        "run.json",
    }, left


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_saves_and_has_its_own_status(forked, command, whole, tmp_path, number):
    out, log = tmp_path / "run", tmp_path / "log"
    # Saved nowhere but where it is stopped, in the middle of traces that later steps will use.
    arguments = command(out, "save_every=100", "evaluation.every=100")
    process = forked.start(*arguments, log=log)
    while not (out / "metrics.jsonl").exists() or '"loss"' not in (out / "metrics.jsonl").read_text():
        time.sleep(0.01)
    os.kill(process, number)
    assert forked.status(process) == 75
    last = log.read_text().splitlines()[-1]
    assert last.startswith("stopped at step") and "go on with --resume" in last
    progress = json.loads((out / "last" / "training" / "progress.json").read_text())
    assert 0 < progress["step"] < STEPS
    finish(forked, *arguments, log=log)
    assert same_files(whole, out, "last/model.safetensors")


def test_a_run_is_not_resumed_while_it_runs(forked, command, whole, tmp_path):
    """A job that was started again too early: it is refused, and spoils nothing."""
    out, log = tmp_path / "run", tmp_path / "log"
    arguments = command(out)
    process = forked.start(*arguments, log=log)
    lines = out / "metrics.jsonl"
    while not lines.exists() or '"loss"' not in lines.read_text():
        time.sleep(0.01)
    os.kill(process, signal.SIGSTOP)  # so that it is there for certain
    second = tmp_path / "second"
    finish(forked, *arguments, log=second, status=2)
    assert "another process is writing into" in second.read_text().splitlines()[-1]
    os.kill(process, signal.SIGCONT)
    assert forked.status(process) == 0, log.read_text()
    assert same_files(whole, out, *WEIGHTS) and metrics(out) == metrics(whole)


# -- checkpoints that are not what was written -----------------------------------------------


@pytest.fixture
def copy(whole, tmp_path):
    """A finished run to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip(path: Path, at: int, mask: int) -> None:
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= mask
    path.write_bytes(data)


CHECKED = ("model.safetensors", "config.json", "training/optimizer.safetensors", "training/progress.json")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(CHECKED), st.integers(0, 1 << 40), st.integers(1, 255), st.booleans())
def test_any_altered_byte_and_any_cut_is_seen(copy, name, at, mask, cut):
    path = copy / "last" / name
    before = path.read_bytes()
    try:
        if cut:
            path.write_bytes(before[: at % len(before)])
        else:
            flip(path, at, mask)
        assert damage(copy / "last") == f"{name} is not what was written"
    finally:
        path.write_bytes(before)
    assert damage(copy / "last") is None


@pytest.mark.parametrize(
    "harm",
    [
        lambda last: flip(last / "model.safetensors", 5000, 1),
        lambda last: (last / "training" / "optimizer.safetensors").unlink(),
        lambda last: (last / "training" / "files.json").write_text("{"),
        lambda last: (last / "training" / "files.json").write_text("[]"),
        lambda last: (last / "training" / "progress.json").write_bytes(b""),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(forked, command, copy, whole, caplog, harm):
    harm(copy / "last")
    found = Checkpoints(copy).newest()
    assert found == copy / "checkpoints" / f"step-{STEPS - 1:08d}"
    assert "last" in caplog.text and "going on from" in caplog.text
    assert (copy / "last.damaged").is_dir() and not (copy / "last").exists()
    arguments, log = command(copy), copy.with_suffix(".log")
    finish(forked, *arguments, log=log)
    assert same_files(whole, copy, *WEIGHTS) and metrics(copy) == metrics(whole)


def test_where_all_are_damaged_nothing_is_lost(forked, command, copy, tmp_path):
    for folder in (copy / "last", *(copy / "checkpoints").iterdir()):
        flip(folder / "model.safetensors", 999, 4)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    finish(forked, *command(copy), log=tmp_path / "log", status=2)
    line = (tmp_path / "log").read_text().splitlines()[-1]
    assert line.startswith("error: no checkpoint can be resumed from") and "step-000" in line
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}


def test_old_checkpoints_go(target, recipe_for, tmp_path):
    recipe = recipe_for(
        "sft",
        tmp_path / "run",
        "steps=6",
        "save_every=1",
        "keep_checkpoints=2",
        "evaluation.every=6",
        "batch_size=2",
        "data.max_length=90",
    )
    Run("sft", recipe, target=target).train()
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000004", "step-00000005"]
    for name in kept:  # each is a drafter
        d.Drafter.from_pretrained(str(tmp_path / "run" / "checkpoints" / name))


def test_what_lies_beside_a_checkpoints_files_is_left_alone(copy):
    (copy / "last" / "README.md").write_text("mine")
    assert damage(copy / "last") is None


def test_a_kill_between_two_renames_loses_one_step(forked, command, copy, whole, tmp_path):
    (copy / "last").rename(copy / ".last.tmp")
    finish(forked, *command(copy), log=tmp_path / "log")
    assert same_files(whole, copy, *WEIGHTS) and metrics(copy) == metrics(whole)


def test_a_kill_before_the_best_drafter_was_written_is_mended(forked, command, whole, tmp_path):
    """The checkpoint says that it is the best one; `best` still is another."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    best = json.loads((out / "best" / "best.json").read_text())
    progress = json.loads((out / "last" / "training" / "progress.json").read_text())
    progress["best_step"], progress["best_tau"] = progress["step"], progress["tau"]
    (out / "last" / "training" / "progress.json").write_text(json.dumps(progress))
    hashes = json.loads((out / "last" / "training" / "files.json").read_text())
    from draft_opd.training.checkpoint import _files

    (out / "last" / "training" / "files.json").write_text(
        json.dumps({k: v for k, v in _files(out / "last").items() if k in hashes})
    )
    flip(out / "best" / "model.safetensors", 5000, 1)
    (out / "best" / "best.json").write_text(json.dumps({**best, "step": 0}))
    finish(forked, *command(out), log=tmp_path / "log")
    assert same_files(out / "best", out / "last", "model.safetensors", "config.json")
    assert json.loads((out / "best" / "best.json").read_text())["step"] == STEPS


def test_a_request_that_comes_early_is_kept(forked, command, tmp_path):
    """While models are loaded: nothing is lost, and the status is that of a request."""
    out, log = tmp_path / "run", tmp_path / "log"
    process = forked.start(*command(out), log=log)
    while not (out / ".lock").exists():  # behind the target, before the first step
        time.sleep(0.002)
    os.kill(process, signal.SIGTERM)
    assert forked.status(process) == 75, log.read_text()
    assert (out / "last" / "training" / "progress.json").exists()


def test_a_torn_best_json_does_not_stop_a_resumed_run(forked, command, copy, whole, tmp_path):
    (copy / "best" / "best.json").write_text("{")
    finish(forked, *command(copy), log=tmp_path / "log")
    best = (copy / "best" / "best.json").read_text()
    assert best == (whole / "best" / "best.json").read_text() or (
        "best' is missing or damaged" in (tmp_path / "log").read_text()
    )


# -- what a run was begun with -----------------------------------------------------------------


def test_other_data_under_the_same_name_is_refused(target, recipe_for, data, tmp_path):
    copied = tmp_path / "train.jsonl"
    rows = (data / "train" / "trajectories.jsonl").read_text().splitlines()
    copied.write_text("\n".join(rows[:40]))
    recipe = recipe_for("sft", tmp_path / "run", f"data.trajectories={copied}", "steps=2")
    Run("sft", recipe, target=target).train()
    copied.write_text("\n".join(rows[:48]))  # a collection that went on meanwhile
    with pytest.raises(d.UserError, match=r"not what the run began with.*40 traj.*48 traj"):
        Run("sft", recipe, target=target, resume=True)
    other = d.Target.from_pretrained("embedded", device="cpu")
    with torch.no_grad():
        other.head.weight[0, 0] += 1
    copied.write_text("\n".join(rows[:40]))
    with pytest.raises(d.UserError, match="target is not what the run began with"):
        Run("sft", recipe, target=other, resume=True)
    assert Run("sft", recipe, target=target, resume=True).progress.step == 2


def test_features_do_not_depend_on_the_batch(target, trained, heldout):
    from draft_opd.training.batches import BatchSource

    rows, found = heldout[:5], []
    for order in ([0, 1, 2, 3, 4], [4, 2], [3, 0, 1]):
        source = BatchSource(target, trained.target_layers, {}, torch.float32)
        source.batch([rows[i] for i in order])
        found.append(source.feature_cache)
    for key in {k for cache in found for k in cache}:
        rows_of = [cache[key] for cache in found if key in cache]
        assert all(torch.equal(a, b) for x in rows_of for a, b in zip(x, rows_of[0], strict=True))


def test_a_finished_run_resumed_says_the_same_again(forked, command, copy, tmp_path):
    before = load_file(copy / "last" / "model.safetensors")
    finish(forked, *command(copy), "--json", log=tmp_path / "log")
    value = json.loads((tmp_path / "log").read_text().splitlines()[-1])
    assert value["step"] == STEPS and value["tau"] == metrics(copy)[-1]["tau"]
    after = load_file(copy / "last" / "model.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
