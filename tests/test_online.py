"""The loop of collecting, training, exporting and reloading, with a server of its own."""

import copy
import json

import pytest
import torch
import yaml
from servers import served

import draft_opd as d
from draft_opd.cli.main import run
from draft_opd.data.prompts import read_prompts

FAMILY = "dflash"


SKIP = ("--skip-invalid", "--max-skip-share", "0.5")


@pytest.fixture
def recipe(family, recipe_for, trained, tmp_path):
    """write(url, **online): a recipe file for the loop, from a drafter that was harmed: it has much
    to learn again."""
    beginner, harmed = tmp_path / "beginner", copy.deepcopy(trained)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in harmed.parameters():
            p += 0.5 * p.std() * torch.randn(p.shape, generator=generator)
    harmed.save_pretrained(beginner)

    def write(url, **online):
        tree = recipe_for(
            "opd",
            tmp_path / "loop",
            "steps=10",
            "evaluation.every=5",
            "batch_size=4",
            f"drafter={beginner}",
            "opd.objective.kind=cross_entropy",
            "optim.learning_rate=3e-3",
            "data.heldout_limit=3",
        ).model_dump(mode="json")
        del tree["data"]["trajectories"]
        tree["online"] = {
            "server": url,
            "prompts": str(tmp_path / "traffic.jsonl"),
            "rounds": 3,
            "prompts_per_round": 4,
            "window": 2,
            "max_new_tokens": 40,
            "patience": 20,
            "export_dtype": "float32",
            **online,
        }
        path = tmp_path / "online.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    asked = read_prompts("embedded:train", 110)[100:]
    rows = [json.dumps({"id": "same", "messages": p.messages}) for p in asked]
    # What a log of other people's requests holds as well.
    rows[2:2] = ["not JSON", '{"messages": [{"role": "assistant", "content": null}]}', "{}"]
    # The last line is still being written.
    (tmp_path / "traffic.jsonl").write_text("\n".join(rows) + "\n" + '{"prompt": "A row beg')
    return write


def test_rounds_follow_the_traffic(capsys, recipe, family, tmp_path):
    log = tmp_path / "reloads"
    with served() as url:
        # A server in the background must not hold the loop up.
        path = recipe(url, reload=f"cat {{drafter}}/config.json && echo x >> {log}; sleep 60 &")
        assert run(["online", "--config", str(path), *SKIP, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert [r["trajectories"] for r in value["rounds"]] == [4, 4, 2]  # the file has ten
    assert [r["next_line"] for r in value["rounds"]] == [7, 11, 13]
    assert [r["passed_over"] for r in value["rounds"]] == [3, 0, 0]
    assert any(r["served"] for r in value["rounds"])
    out = tmp_path / "loop"
    kept = [len(d.read_trajectories(out / f"round-{i}" / "train.jsonl")) for i in range(3)]
    assert kept == [4, 8, 6]  # a window of two rounds
    for before, after in zip(value["rounds"], value["rounds"][1:], strict=False):
        recipe_of = yaml.safe_load((out / f"round-{after['round']}" / "run" / "recipe.yaml").read_text())
        assert recipe_of["drafter"] == before["drafter"]
        assert after["tau_before"] == pytest.approx(before["tau"])
        assert after["tau"] >= after["tau_before"]  # a worse drafter is not served
    # What is served is the last one that was better, and the server was told each time.
    last = d.Drafter.from_pretrained(value["rounds"][-1]["drafter"], device="cpu").state_dict()
    served_now = d.Drafter.from_pretrained(value["served"], device="cpu").state_dict()
    assert all((last[k] == served_now[k]).all() for k in last)
    assert log.read_text().count("x") == 1 + sum(r["served"] for r in value["rounds"])
    assert (out / "served" / "README.md").exists()


def test_a_loop_goes_on_where_it_stopped(capsys, recipe, family, tmp_path):
    with served() as url:
        log = tmp_path / "reloads"
        path = recipe(url, reload="false", rounds=2)
        assert run(["online", "--config", str(path), *SKIP]) == 2
        assert "online.reload ended with status 1" in capsys.readouterr().err
        path = recipe(url, rounds=1, reload=f"echo x >> {log}")
        assert run(["online", "--config", str(path), *SKIP, "--json"]) == 0
        first = json.loads(capsys.readouterr().out)["rounds"]
        # The reload that failed was done again.
        assert log.read_text().count("x") == 1 + sum(r["served"] for r in first)
        path = recipe(url, rounds=2)
        assert run(["online", "--config", str(path), *SKIP, "--json"]) == 0
        second = json.loads(capsys.readouterr().out)["rounds"]
    assert second[:1] == first and len(second) == 2


def test_what_the_loop_refuses(capsys, recipe, family, tmp_path):
    path = recipe("http://127.0.0.1:9", patience=0.5)
    assert run(["online", "--config", str(path), *SKIP]) == 2
    assert "does not answer" in capsys.readouterr().err
    assert run(["online", "--config", str(path), *SKIP, "online.promts=x"]) == 2
    assert "did you mean 'prompts'" in capsys.readouterr().err
    assert run(["online", "--config", str(path), *SKIP, f"online.prompts={tmp_path}/none.jsonl"]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "traffic.jsonl").write_text("nothing\n")
    assert run(["online", "--config", str(path), *SKIP]) == 2
    assert "1 of 1 rows cannot be used" in capsys.readouterr().err
    assert run(["online", "--config", str(path), *SKIP, "online=null"]) == 2
    assert "no section `online`" in capsys.readouterr().err
    assert run(["online", "--config", str(path), *SKIP, "drafter=null"]) == 2
    assert "trained drafter" in capsys.readouterr().err
