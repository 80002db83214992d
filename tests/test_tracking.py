"""Trackers hold what metrics.jsonl holds, whichever is chosen, and through a resume."""

import json
import sqlite3
import subprocess
import sys
from importlib.util import find_spec

import pytest

import draft_opd as d
from draft_opd.training import tracking
from draft_opd.training.tracking import check_tracker, numbers, open_tracker
from draft_opd.training.trainer import Run

FAMILY = "dflash"


def scalars(folder) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    names = found.Tags()["scalars"]
    return {name: {e.step: e.value for e in found.Scalars(name)} for name in names}


def test_tensorboard_has_every_figure_through_a_resume(target, recipe_for, tmp_path, monkeypatch):
    recipe = recipe_for("sft", tmp_path / "r", "tracker=tensorboard")

    def break_off(self, *, whole=Run._next):
        if self.progress.step == 3:
            raise KeyboardInterrupt
        return whole(self)

    monkeypatch.setattr(Run, "_next", break_off)
    with pytest.raises(KeyboardInterrupt):
        Run("sft", recipe, target=target).train()
    monkeypatch.undo()
    Run("sft", recipe, target=target, resume=True).train()
    lines = [json.loads(x) for x in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    wanted: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in numbers(line):
            wanted.setdefault(name, {})[line["step"]] = value
    found = scalars(tmp_path / "r" / "tensorboard")
    assert set(found) == set(wanted) and {"tau", "loss", "seconds/all"} <= set(found)
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-5), name


def test_a_tracker_may_change_on_resume_and_leaves_no_trace_if_absent(
    target, recipe_for, tmp_path, monkeypatch
):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(d.UserError, match=r"tracker: wandb is not installed.*draft-opd\[wandb\]"):
        Run("sft", recipe_for("sft", tmp_path / "r", "tracker=wandb"), target=target)
    assert not (tmp_path / "r").exists()
    Run("sft", recipe_for("sft", tmp_path / "r"), target=target).train()
    with pytest.raises(d.UserError, match="the recipe changed: batch_size"):
        Run("sft", recipe_for("sft", tmp_path / "r", "batch_size=3"), target=target, resume=True)
    monkeypatch.undo()
    recipe = recipe_for("sft", tmp_path / "r", "tracker=tensorboard")
    Run("sft", recipe, target=target, resume=True)


def test_only_numbers_are_tracked():
    line = {
        "step": 3,
        "loss": 0.5,
        "seconds": {"all": 2, "head": {"x": 1.0}},
        "counts": [1, 2],
        "flag": True,
        "name": "x",
    }
    assert dict(numbers(line)) == {"loss": 0.5, "seconds/all": 2, "seconds/head/x": 1.0}


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_other_trackers_really_take_it(kind, tmp_path):
    """In a process of its own, without the network."""
    if find_spec(kind) is None:
        pytest.skip(f"{kind} is not installed here (pip install 'draft-opd[{kind}]')")
    code = (
        "import sys; from pathlib import Path; "
        "from draft_opd.training.tracking import open_tracker; out = Path(sys.argv[2]); "
        "t = open_tracker(sys.argv[1], out, {'a': 1}, 0); t.log(1, {'tau': 2.0}); t.close(False); "
        "t = open_tracker(sys.argv[1], out, {'a': 1}, 1); t.log(2, {'tau': 3.0}); t.close(False)"
    )
    environment = {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "PYTHONPATH": ":".join(sys.path),
    }
    out = tmp_path / "run"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, kind, out], env=environment, check=True, stdout=subprocess.PIPE
    )
    assert done.stdout == b""  # that is for results
    assert json.loads((out / "tracker.json").read_text())["id"].startswith("run-")
    if kind == "wandb":
        assert len(list(out.glob("wandb/offline-run-*"))) >= 1
    else:
        (base,) = (tmp_path / "trackio").glob("*.db")
        rows = sqlite3.connect(base).execute("select run_name, step, metrics from metrics")
        found = [(name, step, json.loads(values)) for name, step, values in rows]
        (name,) = {row[0] for row in found}
        assert [row[1:] for row in found] == [(1, {"tau": 2.0}), (2, {"tau": 3.0})]
        assert name == json.loads((out / "tracker.json").read_text())["id"]


def test_no_tracker_is_the_default(tmp_path):
    check_tracker("none")
    assert open_tracker("none", tmp_path, {}, 0) is None and not list(tmp_path.iterdir())
