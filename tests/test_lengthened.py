"""A finished run is lengthened; a step that does not fit the memory is one line."""

import json

import pytest
import torch
import yaml
from processes import metrics

from draft_opd.cli.main import run
from draft_opd.training import stage_sft
from draft_opd.training.config import Optim
from draft_opd.training.optimizer import learning_rate

FAMILY = "dflash"


def test_schedules_of_added_steps():
    o = {
        kind: Optim(learning_rate=1.0, warmup=0.5, extension=kind)
        for kind in ("rewarm", "rescale", "constant")
    }

    def rates(kind):
        return [learning_rate(k, 10, o[kind], [4, 8]) for k in range(10)]

    plain = [learning_rate(k, n, o["rescale"]) for n in (4, 4, 2) for k in range(n)]
    assert rates("rewarm") == pytest.approx(plain)
    assert rates("constant") == pytest.approx([*plain[:4], *[0.1] * 6])
    assert rates("rescale") == pytest.approx([learning_rate(k, 10, o["rescale"]) for k in range(10)])


def test_a_finished_run_is_lengthened_with_its_optimiser(recipe_for, tmp_path, capsys):
    """Its metrics go on, and the run can be lengthened again; shortened it cannot be."""
    pairs = ["steps=4", "evaluation.every=10", "data.heldout_limit=1", "batch_size=2"]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_for("sft", tmp_path / "run", *pairs).model_dump(mode="json")))
    words = ["sft", "--config", str(path), "--json"]
    assert run(words) == 0
    for steps in (8, 10):
        assert run([*words, f"steps={steps}", "--resume"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == steps
    rates = [m["lr"] for m in metrics(tmp_path / "run") if "lr" in m]
    o = Optim.model_validate(yaml.safe_load(path.read_text())["optim"])
    assert rates == pytest.approx([learning_rate(k, n, o) for n in (4, 4, 2) for k in range(n)])
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert saved["extended_from"] == [4, 8] and saved["steps"] == 10
    assert run([*words, "steps=6", "--resume"]) == 2
    assert "steps: 10 -> 6" in capsys.readouterr().err


def test_a_step_that_does_not_fit_is_one_line(recipe_for, tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe_for("sft", tmp_path / "run").model_dump(mode="json")))

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("draft_opd.training.stage_sft.sft_loss", full)
        assert run(["sft", "--config", str(path)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step 1 ran out of memory (8 texts of up to" in error and "lower batch_size" in error
    assert run(["sft", "--config", str(path), "--resume"]) == 0  # nothing was lost


def test_batch_size_auto_finds_what_fits(recipe_for, tmp_path, monkeypatch, capsys):
    """16 trajectories a step in forwards that the memory holds; resuming takes what was found."""
    recipe = recipe_for("sft", tmp_path / "run").model_dump(mode="json")
    recipe |= {"batch_size": "auto", "steps": 1}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    whole = stage_sft.sft_loss

    def small(target, drafter, batch, *rest, **options):
        if len(batch.ids) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return whole(target, drafter, batch, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stage_sft, "sft_loss", small)
        assert run(["sft", "--config", str(path)]) == 0
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert (saved["batch_size"], saved["accumulate"]) == (4, 4 * recipe["accumulate"])
    assert run(["sft", "--config", str(path), f"steps={recipe['steps'] + 1}", "--resume"]) == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["batch_size"] == 4

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(stage_sft, "sft_loss", full)
    assert run(["sft", "--config", str(path), f"out={tmp_path / 'other'}"]) == 1
    assert "one text of" in capsys.readouterr().err.splitlines()[-1]
