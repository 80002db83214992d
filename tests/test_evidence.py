"""scripts/evidence.py, made tiny: every phase runs, a copy goes on, what is left out is named."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAMILY = "dflash"


@pytest.fixture(scope="module")
def evidence():
    """The script as a module; what it puts on the path goes again."""
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("evidence")
    sys.path[:] = before


@pytest.fixture
def run(evidence, monkeypatch):
    """run(out, argument, ...): its exit status."""

    def begin(out: Path, *arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["evidence", "--out", str(out), *arguments])
        monkeypatch.chdir(ROOT)  # it changes the folder
        return evidence.main()

    return begin


def test_every_phase_runs_and_a_copy_goes_on(run, evidence, tmp_path, capsys):
    out = tmp_path / "here"
    assert run(out, "--size", "tiny") == 0
    said = capsys.readouterr().out
    for name in evidence.PHASES:
        value = json.loads((out / f"{name}.json").read_text())
        assert value["seconds"] > 0 and value["machine"]["cpu"] and value["table"]["rows"]
        assert f"{name}: about {value['estimated_seconds']:.0f} s of" in said
    assert json.loads((out / "lossless.json").read_text())["matched"] == 10
    page = (out / "report.html").read_text()
    assert all(kind.title.split(" (")[0] in page for kind in evidence.PHASES.values())
    # Killed in the middle of the league, and copied to another machine.
    there = tmp_path / "there"
    shutil.copytree(out, there)
    for name in ("league.json", "decode.json", "league/ablation.json"):
        (there / name).unlink()
    assert run(there, "--size", "tiny", "--minutes", "0") == 0
    said = capsys.readouterr().out
    assert "sft: done before" in said
    assert "league: left out, takes about" in said and "0 s are left" in said
    assert "left out, " in said and "Left out" in (there / "report.html").read_text()
    assert run(there, "--size", "tiny", "--phases", "league") == 0
    one, other = (json.loads((x / "league.json").read_text())["runs"] for x in (out, there))
    assert [r["tau"] for r in one] == [r["tau"] for r in other]


def test_what_it_refuses(run, tmp_path, capsys):
    for arguments, message in (
        (("--phases", "sft,leage"), "--phases leage: there are machine, "),
        (("--smollm2", str(tmp_path / "none.whl")), "there is no such wheel"),
        (("--data", str(tmp_path)), "it has no gsm8k_train.jsonl"),
    ):
        assert run(tmp_path / "out", "--size", "tiny", *arguments) == 2
        assert message in capsys.readouterr().err
    assert run(tmp_path / "out", "--size", "tiny", "--phases", "decode") == 0
    assert "decode: left out, needs sft/best" in capsys.readouterr().out
