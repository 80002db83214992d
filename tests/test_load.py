"""A running server as a side of eval: what its users see, and what it counts itself."""

import json

import pytest
from servers import served

import draft_opd as d
from draft_opd.cli import run
from draft_opd.decoding.sampling import Sampling
from draft_opd.evaluation.tasks import Task
from draft_opd.rollout.prompts import Prompt, read_prompts
from draft_opd.rollout.server import Server
from draft_opd.serving.load import measure_server

FAMILY = "dflash"
OPTIONS = {"max_new_tokens": 40, "sampling": Sampling()}


def test_a_server_against_one_without_a_drafter(capsys, target, trained, trained_folder, tmp_path):
    with served(f"drafter={trained_folder}") as url, served() as baseline:
        code = run(["eval", "--target", "embedded", "--server", url, "--baseline-server", baseline,
                    "--tasks", "embedded", "--limit", "4", "--max-new-tokens", "40",
                    "--concurrency", "1,3", "--out", str(tmp_path), "--json"])  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and report == json.loads((tmp_path / "eval.json").read_text())
    (task,) = report["tasks"]
    made = [
        d.generate(target, trained, p.ids(target), max_new_tokens=40)
        for p in read_prompts("embedded:heldout", 4)
    ]
    rounds = [r for g in made for r in g.rounds]
    # Both levels asked the same: the engine's counters over them are twice those of ours.
    assert task["rounds"] == 2 * len(rounds)
    assert task["tau"] == pytest.approx(sum(r.accepted + 1 for r in rounds) / len(rounds))
    assert task["tokens"] == sum(len(g.token_ids) for g in made)
    assert task["lossless"] == {"matched": 4, "of": 4}
    assert [level["in_flight"] for level in task["concurrency"]] == [1, 3]
    assert task["speedup"] == pytest.approx(
        task["tokens_per_second"]["speculative"] / task["tokens_per_second"]["target"]
    )
    for level in task["concurrency"]:
        for side in ("target", "speculative"):
            first = level[side]["milliseconds_to_first_token"]["p50"]
            assert 0 < first <= 1000 * level[side]["seconds_per_request"]["p95"]
    assert "Requests at a time" in (tmp_path / "report.html").read_text()


def test_sglang_tells_an_average(trained_folder):
    task = Task("t", read_prompts("embedded:heldout", 2))
    with served(f"drafter={trained_folder}", "sglang") as url:
        server = Server(url)
        server.check()
        value = measure_server(server, None, task, [1], **OPTIONS)
    assert value["tau"] > 1 and "SGLang" in value["tau_from"] and value["rounds"] is None
    assert value["speedup"] is None and value["lossless"]["of"] == 0


def test_no_counters_is_no_figure_and_turns_follow(target):
    prompt = Prompt("1", [{"role": "user", "content": "Which number is next?"}], ("And then?",))
    with served() as url:
        server = Server(url)
        server.check()
        value = measure_server(server, None, Task("t", [prompt]), [1], **OPTIONS)
    assert value["tau"] is None and value["tau_from"] is None
    assert value["prompts"] == 1 and value["responses"] == 2


@pytest.mark.parametrize(("planted", "message"), [("busy", "HTTP 503 queue"), ("breaks", "broke")])
def test_a_server_that_fails_is_told(capsys, planted, message):
    with served(planted) as url:
        code = run(["eval", "--target", "embedded", "--server", url, "--tasks", "embedded",
                    "--limit", "2", "--max-new-tokens", "40"])  # fmt: skip
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and message in error and url in error
