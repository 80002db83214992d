"""A family, an engine: each is its own file and one line of a registry. Nothing else changes for it."""

import json

import pytest
import torch

import draft_opd as d
from draft_opd.cli.main import run
from draft_opd.drafters.registry import FAMILIES
from draft_opd.losses.config import Objective
from draft_opd.losses.objectives import OBJECTIVES
from draft_opd.serving.engines import ENGINES


@pytest.fixture
def bigram():
    from toy_family import BigramDrafter

    FAMILIES["bigram"] = BigramDrafter
    yield BigramDrafter
    del FAMILIES["bigram"]


def test_a_family_goes_through_opd_eval_and_export(bigram, target, data, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    bigram.create(target).save_pretrained(tmp_path / "new")

    def opd(out, drafter, *pairs):
        words = [
            *("opd", "--config", "embedded", f"out={tmp_path / out}", f"drafter={drafter}", "--json"),
            *(f"data.trajectories={data / 'train'}", f"data.heldout={data / 'heldout'}"),
            *("data.heldout_limit=4", "data.max_length=160", "batch_size=4", "precision=float32"),
        ]
        assert run([*words, *pairs]) == 0
        return json.loads(capsys.readouterr().out)

    told = opd(
        "dpace",
        tmp_path / "new",
        "steps=60",
        "opd.objective.kind=dpace",
        "evaluation.every=60",
        "optim.name=adamw",
        "optim.learning_rate=0.01",
    )
    assert told["tau"] > 1.15 > told["start_tau"]  # it has learned which token follows which
    assert opd("opd", tmp_path / "dpace" / "last", "steps=2")["step"] == 2  # the paper's loss

    pair = ["--target", "embedded", "--drafter", str(tmp_path / "opd" / "last")]
    assert (
        run(["eval", *pair, "--tasks", "embedded", "--limit", "2", "--max-new-tokens", "60", "--json"]) == 0
    )
    (task,) = json.loads(capsys.readouterr().out)["tasks"]
    assert task["lossless"] == {"matched": 2, "of": 2} and task["tau"] > 1

    monkeypatch.setitem(ENGINES, "toy", lambda drafter, target, folder: f"toy-server {target} {folder}")
    assert run(["export", *pair, "--format", "toy", "--out", str(tmp_path / "served"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["serve"].startswith("toy-server ")
    again = d.Drafter.from_pretrained(str(tmp_path / "served"))
    assert type(again) is bigram
    assert run(["inspect", str(tmp_path / "served"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["family"] == "bigram"


def test_every_objective_of_the_recipe_is_written_and_no_other():
    assert set(Objective.model_fields["kind"].annotation.__args__) == set(OBJECTIVES)
