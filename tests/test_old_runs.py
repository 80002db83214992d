"""Run folders that earlier versions wrote: they are read, resumed, evaluated and reported.

old_runs/VERSION/FAMILY-STAGE were stopped at step 2 of 4; old_runs/VERSION/data holds what they
train on. Version 0.1 is commit aae165b.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from draft_opd.cli.main import run

OLD = Path(__file__).parent / "old_runs"
FOLDERS = sorted(p.parent for p in OLD.glob("*/*/recipe.yaml"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Copies of all of them, in the folder that is current: their paths are relative."""
    shutil.copytree(OLD, tmp_path / "old")
    for version in (tmp_path / "old").iterdir():
        monkeypatch.chdir(version)
    return Path()


def test_there_is_one_of_each_family_and_stage():
    assert {p.name for p in FOLDERS} >= {f"{f}-{s}" for f in ("dflash", "eagle3") for s in ("sft", "opd")}


@pytest.mark.parametrize("name", [p.name for p in FOLDERS])
def test_it_goes_on_to_its_end(here, name, capsys):
    """By the recipe it was begun with, as it was written then."""
    stage, before = name.split("-")[1], (here / name / "metrics.jsonl").read_text()
    recipe = yaml.safe_load((here / name / "recipe.yaml").read_text())
    assert "muon_dtype" not in recipe["optim"]
    assert run([stage, "--config", f"{name}/recipe.yaml", "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 4
    lines = [json.loads(x) for x in (here / name / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2, 3, 4]
    assert [x["step"] for x in lines if "tau" in x] == [0, 2, 4]
    assert lines[0] == json.loads(before.splitlines()[0])
    now = yaml.safe_load((here / name / "recipe.yaml").read_text())
    assert now["optim"]["muon_dtype"] == "bfloat16"  # as that version always had it
    # Changed keys are still refused.
    words = [stage, "--config", f"{name}/recipe.yaml", "batch_size=3", "--resume"]
    assert run(words) == 2
    assert "changed: batch_size: 2 -> 3" in capsys.readouterr().err


@pytest.mark.parametrize("name", [p.name for p in FOLDERS if p.name.endswith("opd")])
def test_its_drafter_and_its_data_serve(here, name, capsys):
    pair = ["--target", "embedded", "--drafter", f"{name}/last"]
    words = ["analyze", *pair, "--trajectories", "data/heldout", "--out", "analysis"]
    assert run(words) == 0
    assert run(["inspect", name, "--json"]) == 0
    assert run(["report", "analysis", name, "--out", "report"]) == 0
    page = Path("report/report.html").read_text()
    assert "Held-out τ over steps" in page


def test_a_removed_key_is_read_at_its_default_and_refused_otherwise(here, capsys):
    path = here / "dflash-opd" / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert recipe["opd"]["stride"] == 1 and recipe["opd"]["objective"]["clamp"] == 10.0
    path.write_text(yaml.safe_dump({**recipe, "opd": {**recipe["opd"], "stride": 2}}))
    for words in (["--resume"], ["opd.stride=1", "--resume"], ["out=elsewhere"]):
        assert run(["opd", "--config", str(path), *words]) == 2
        assert "'opd.stride' was removed" in capsys.readouterr().err
    assert not Path("elsewhere").exists()
