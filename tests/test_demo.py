"""The demo, made small: every stage, every file, every promised field."""

import json

import pytest
import yaml

import draft_opd as d
from draft_opd.data.trajectory import read_trajectories
from draft_opd.pipelines.demo import run_demo
from draft_opd.utils.console import Screen


@pytest.fixture(scope="session")
def demo(family, tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "run"
    small = [
        "data.limit=12",
        "data.heldout_limit=2",
        "steps=6",
        "evaluation.every=3",
        "batch_size=4",
        "opd.trace_every=3",
        "precision=float32",
    ]
    return out, run_demo(out, family, 0, Screen(True), small, max_new_tokens=24)


def test_the_summary_has_its_fields(demo):
    out, summary = demo
    assert summary == json.loads((out / "summary.json").read_text())
    taus = summary["tau"]
    assert set(taus) == {"untrained", "sft", "sft_continued", "draft_opd"}
    assert summary["gain"] == pytest.approx(taus["draft_opd"] / taus["sft_continued"] - 1)
    assert summary["lossless"] == {"matched": 8, "of": 8}
    assert {"sft", "draft_opd"} <= set(summary["speedup"]) and summary["seed"] == 0
    assert summary["steps"]["sft_continued"] == summary["steps"]["draft_opd"] == 6
    assert {"collect", "sft", "sft_continued", "draft_opd", "evaluate"} <= set(summary["seconds"])


def test_both_ways_on_start_alike_and_see_as_much(demo):
    """Same start, batches and schedule; supervised tokens equal but for ends of text."""
    out, _ = demo
    rows = {}
    for name in ("sft_continued", "draft_opd"):
        lines = [json.loads(x) for x in (out / name / "metrics.jsonl").read_text().splitlines()]
        rows[name] = lines
    a, b = rows["sft_continued"], rows["draft_opd"]
    assert a[0]["tau"] == b[0]["tau"]
    assert [x.get("lr") for x in a] == [x.get("lr") for x in b]
    total = [sum(x.get("supervised", 0) for x in lines) for lines in (a, b)]
    assert total[1] == pytest.approx(total[0], rel=0.1)


def test_they_go_on_with_text_that_sft_has_not_seen(demo):
    out, _ = demo
    first, fresh = (
        {tuple(t.prompt_ids) for t in read_trajectories(out / "data" / part)} for part in ("train", "fresh")
    )
    assert len(first) == len(fresh) == 12 and not first & fresh
    for name in ("sft_continued", "draft_opd"):
        recipe = yaml.safe_load((out / name / "recipe.yaml").read_text())
        assert recipe["data"]["trajectories"] == str(out / "data" / "fresh")


def test_the_report_opens_offline(demo):
    out, summary = demo
    page = (out / "report.html").read_text()
    plots = [sorted(p.stem for p in (out / "plots").glob(f"*.{kind}")) for kind in ("svg", "png")]
    assert plots[0] == plots[1] and page.count("<svg") == len(plots[0]) == 6
    assert (out / "evaluation" / "rounds.jsonl").exists()
    assert f"{summary['tau']['draft_opd']:.3f}" in page
    assert "<script" not in page and 'src="http' not in page and "<link" not in page


def test_its_drafters_can_be_used(demo):
    out, _ = demo
    target = d.Target.from_pretrained("embedded", device="cpu")
    for name in ("untrained", "sft/last", "sft_continued/last", "draft_opd/last", "draft_opd/best"):
        drafter = d.Drafter.from_pretrained(str(out / name), device="cpu")
        drafter.bind(target)


def test_a_folder_in_use_is_left_alone(demo, family):
    out, _ = demo
    with pytest.raises(d.UserError, match="finished demo"):
        run_demo(out, family, 0, Screen(True))


def test_a_killed_demo_goes_on(tmp_path, monkeypatch):
    from draft_opd.training.trainer import Run

    small = [
        "data.limit=8",
        "data.heldout_limit=2",
        "steps=2",
        "evaluation.every=2",
        "batch_size=4",
        "opd.trace_every=1",
    ]
    whole = Run.train

    def killed(self):
        if self.stage == "opd":
            raise KeyboardInterrupt
        return whole(self)

    def demo(seed):
        return run_demo(tmp_path / "d", "dflash", seed, Screen(True), small, max_new_tokens=20)

    monkeypatch.setattr(Run, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        demo(0)
    monkeypatch.undo()
    with pytest.raises(d.UserError, match="another family or seed"):
        demo(1)
    assert demo(0)["steps"] == {"sft": 2, "sft_continued": 2, "draft_opd": 2}
