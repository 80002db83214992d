"""A running server as a side of eval: what its users see, and what it counts itself."""

import json

import pytest
from servers import fetch, served

import draft_opd as d
from draft_opd.cli.main import run
from draft_opd.data.openai_client import Server
from draft_opd.data.prompts import Prompt, read_prompts
from draft_opd.data.tasks import Task
from draft_opd.decoding.sampling import Sampling
from draft_opd.serving.measure_server import ask_all, measure_server
from draft_opd.serving.vllm_process import Acceptance

FAMILY = "dflash"
OPTIONS = {"max_new_tokens": 40, "sampling": Sampling()}


def test_a_server_against_one_without_a_drafter(capsys, target, trained, trained_folder, tmp_path):
    with served(f"drafter={trained_folder}") as url, served() as baseline:
        code = run(
            [
                "eval-server",
                "--target",
                "embedded",
                "--server",
                url,
                "--baseline-server",
                baseline,
                "--tasks",
                "embedded",
                "--limit",
                "4",
                "--max-new-tokens",
                "40",
                "--concurrency",
                "1,3",
                "--out",
                str(tmp_path),
                "--json",
            ]
        )
    report = json.loads(capsys.readouterr().out)
    assert code == 0 and report == json.loads((tmp_path / "eval.json").read_text())
    (task,) = report["tasks"]
    made = [
        d.generate(target, trained, p.ids(target), max_new_tokens=40)
        for p in read_prompts("embedded:heldout", 4)
    ]
    rounds = [r for g in made for r in g.rounds]
    assert task["rounds"] == len(rounds)
    assert task["tau"] == pytest.approx(sum(r.accepted + 1 for r in rounds) / len(rounds))
    assert task["tokens"] == sum(len(g.token_ids) for g in made)
    assert task["lossless"] == {"matched": 4, "of": 4}
    assert [level["in_flight"] for level in task["concurrency"]] == [1, 3]
    assert task["speedup"] == pytest.approx(
        task["tokens_per_second"]["speculative"] / task["tokens_per_second"]["target"]
    )
    # Twice as many requests as are in flight: the prompts are asked again.
    assert [level["speculative"]["requests"] for level in task["concurrency"]] == [4, 8]
    assert task["concurrency"][1]["speculative"]["mean_in_flight"] > 2
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
        value = measure_server(server, None, task, [1], **OPTIONS).to_json()
    assert value["tau"] > 1 and "SGLang" in value["tau_from"] and value["rounds"] is None
    assert value["speedup"] is None and value["lossless"]["of"] == 0


def test_no_counters_is_no_figure_and_turns_follow(target):
    prompt = Prompt("1", [{"role": "user", "content": "Which number is next?"}], ("And then?",))
    with served() as url:
        server = Server(url)
        server.check()
        value = measure_server(server, None, Task("t", [prompt]), [1], **OPTIONS).to_json()
    assert value["tau"] is None and value["tau_from"] is None
    assert value["prompts"] == 1
    # Two requests at a level of one, each with its two turns.
    assert value["responses"] == 4


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        ("busy", "HTTP 503 queue"),
        ("breaks", "broke off in the middle"),
        ("error-event", "ran out of memory"),
        ("no-usage", "does not say how many"),
    ],
)
def test_a_server_that_fails_is_told(capsys, planted, message):
    with served(planted) as url:
        code = run(
            [
                "eval-server",
                "--target",
                "embedded",
                "--server",
                url,
                "--tasks",
                "embedded",
                "--limit",
                "2",
                "--max-new-tokens",
                "40",
            ]
        )
    error = capsys.readouterr().err.splitlines()[-1]
    assert code == 2 and message in error and url in error


def test_thinking_is_no_part_of_the_answer_that_the_next_turn_sees():
    prompt = Prompt("1", [{"role": "user", "content": "Which number is next?"}], ("And then?",))
    with served("thinks") as url:
        server = Server(url)
        server.check()
        (first, _), _ = ask_all(server, [prompt], 1, **OPTIONS)
        told = fetch(f"{url}/seen")["seen"][-1]["messages"]
    assert first.text == "hm" + first.content
    assert told[1] == {"role": "assistant", "content": first.content}


def test_a_server_that_drafted_nothing_has_no_tau(trained_folder):
    """One token a response comes from the prompt's own forward in an engine."""
    none = Acceptance(0, [0, 0], 4)
    assert (none - Acceptance(0, [0, 0], 0)).tau == 0.0
    with served(f"drafter={trained_folder}") as url:
        server = Server(url)
        server.check()
        value = measure_server(
            server,
            None,
            Task("t", read_prompts("embedded:heldout", 1)),
            [1],
            **{**OPTIONS, "max_new_tokens": 1},
        ).to_json()
    assert value["tau"] in (None, 1.0, 2.0)  # the small server may have drafted that one token
