"""Collecting from a server: the same trajectories as here, whatever the server does meanwhile."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from servers import fetch, served, start

import draft_opd as d
from draft_opd.data.collect import collect
from draft_opd.data.openai_client import Server
from draft_opd.data.prompts import read_prompts
from draft_opd.data.server_collect import AnswerRejected, InvalidResponse, gather_from, read_answer
from draft_opd.decoding.sampling import Sampling
from draft_opd.models.target_info import TargetInfo
from draft_opd.serving.vllm_process import free_port

FAMILY = "dflash"
LONGEST = 40


@pytest.fixture(scope="module")
def text() -> TargetInfo:
    return TargetInfo.from_pretrained("embedded")


@pytest.fixture(scope="module")
def here(data):
    """The target's own answers, cut to what the tests ask for, by id."""
    return {t.id: t.response_ids[:LONGEST] for t in d.read_trajectories(data / "train")}


def gather(url, text, out, count=6, **options) -> tuple[dict, dict]:
    """What was dropped, and trajectories by id."""
    options = {"in_flight": 4, "patience": 60.0, **options}
    server = Server(url, **options)
    server.check()
    prompts = read_prompts("embedded:train", count)
    made = gather_from(server, text, prompts, out, max_new_tokens=LONGEST, sampling=Sampling())
    return made.dropped, {t.id: t for t in d.read_trajectories(made.path)}


def test_text_side_and_target_agree(target, text):
    assert (text.vocab_size, text.max_positions) == (target.vocab_size, target.max_positions)
    assert text.stop_ids == target.stop_ids
    messages = [{"role": "user", "content": "Which number is next?"}]
    assert text.chat_ids(messages) == target.chat_ids(messages)


def test_a_server_gives_what_decoding_here_gives(text, here, tmp_path):
    with served("busy") as url:
        for endpoint in ("completions", "chat"):
            dropped, found = gather(url, text, tmp_path / endpoint, endpoint=endpoint)
            assert {k: t.response_ids for k, t in found.items()} == {
                k: here[k] for k in map(str, range(1, 7))
            }
            assert not dropped
        asked = fetch(f"{url}/seen")["seen"][0]
    # Servers take what is not said from the model's generation_config.
    assert (asked["top_k"], asked["repetition_penalty"], asked["min_p"]) == (-1, 1.0, 0.0)


@pytest.mark.parametrize("planted", ["busy", "rate-limit", "garbage", "no-choices", "cut-off"])
def test_what_passes_is_tried_again(text, here, tmp_path, monkeypatch, planted):
    """A third of the answers fail: every prompt has its trajectory in the end, and one only."""
    monkeypatch.setattr("draft_opd.data.server_collect.BACKOFF", (0.02, 0.1))
    with served(planted) as url:
        dropped, found = gather(url, text, tmp_path, count=9)
        asked = len(fetch(f"{url}/seen")["seen"])
    expected = {str(i): here[str(i)] for i in range(1, 10)}
    assert {k: t.response_ids for k, t in found.items()} == expected
    assert not dropped and asked > 9
    assert (tmp_path / "trajectories.jsonl").read_text().count("\n") == 9
    ended = json.loads((tmp_path / "collect.json").read_text())["ended"]
    assert ended == {"asked": 9, "answered": 9}


def test_a_prompt_that_hangs_is_given_up(text, tmp_path, monkeypatch):
    monkeypatch.setattr("draft_opd.data.server_collect.BACKOFF", (0.02, 0.1))
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": "word word"}, *({"prompt": f"Which is next? {i}"} for i in range(4))]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with served("one-hangs") as url:
        server = Server(url, in_flight=2, timeout=1.0)
        server.check()
        options = {"max_new_tokens": 4, "sampling": Sampling()}
        made = gather_from(server, text, read_prompts(prompts), tmp_path / "out", **options)
    assert {t.id for t in d.read_trajectories(made.path)} == {"2", "3", "4", "5"}
    assert made.dropped == {"no answer in N s": 1}
    ended = json.loads((tmp_path / "out" / "collect.json").read_text())["ended"]
    assert ended == {"asked": 5, "answered": 4}


def test_a_slow_server_is_not_an_absent_one(text, here, tmp_path, monkeypatch):
    """Its answers take longer than `patience`, and another server is away all the time."""
    monkeypatch.setattr("draft_opd.data.server_collect.BACKOFF", (0.02, 0.1))
    with served("slow") as url:
        servers = [Server(u, "small", patience=0.3) for u in (url, "http://127.0.0.1:9")]
        made = gather_from(
            servers,
            text,
            read_prompts("embedded:train", 3),
            tmp_path,
            max_new_tokens=LONGEST,
            sampling=Sampling(),
        )
    rows = d.read_trajectories(made.path)
    assert {t.id: t.response_ids for t in rows} == {str(i): here[str(i)] for i in range(1, 4)}


def test_a_server_that_breaks_down_costs_no_prompts(text, tmp_path, monkeypatch):
    """It answered, and now only says 500: that is not the prompts' fault, and it ends.

    One request at a time: no slow answer comes behind the first 500."""
    monkeypatch.setattr("draft_opd.data.server_collect.BACKOFF", (0.02, 0.1))
    with served("breaks-down") as url:
        server = Server(url, in_flight=1, patience=1.5)
        server.check()
        with pytest.raises(d.UserError, match=r"not answered for 1\.5 s \(HTTP 500"):
            gather_from(
                server,
                text,
                read_prompts("embedded:train", 9),
                tmp_path,
                max_new_tokens=LONGEST,
                sampling=Sampling(),
            )
    assert len(d.read_trajectories(tmp_path)) == 3
    assert "ended" not in json.loads((tmp_path / "collect.json").read_text())


def test_several_servers_share_the_work_and_one_may_die(text, here, tmp_path, monkeypatch):
    monkeypatch.setattr("draft_opd.data.server_collect.BACKOFF", (0.02, 0.1))
    ports = free_port(), free_port()
    processes = [start(port) for port in ports]
    servers = [Server(f"http://127.0.0.1:{p}", in_flight=2, patience=30) for p in ports]
    for server in servers:
        server.check()
    seen: dict[int, int] = {}

    def progress(done: int, _total: int, _tokens: int) -> None:
        if done == 8:
            seen.update({p: len(fetch(f"http://127.0.0.1:{p}/seen")["seen"]) for p in ports})
            processes[0].kill()
            processes[0].wait()

    try:
        made = gather_from(
            servers,
            text,
            read_prompts("embedded:train", 24),
            tmp_path,
            max_new_tokens=LONGEST,
            sampling=Sampling(),
            progress=progress,
        )
    finally:
        for process in processes:
            process.kill()
            process.wait()
    rows = d.read_trajectories(made.path)
    assert {t.id: t.response_ids for t in rows} == {str(i): here[str(i)] for i in range(1, 25)}
    assert len(rows) == 24 and not made.dropped and min(seen.values()) > 0


def test_two_collections_do_not_share_a_folder(target, tmp_path):
    """The lock is a process's: another one must be refused, and let in once that is killed."""
    code = (
        "import sys, time; from pathlib import Path; from draft_opd.utils.files import lock_folder; "
        "kept = lock_folder(Path(sys.argv[1])); print(1, flush=True); time.sleep(99)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout.read(1) == b"1"
        with pytest.raises(d.UserError, match="another process is writing"):
            collect(target, read_prompts("embedded:train", 1), tmp_path, max_new_tokens=2)
    finally:
        other.kill()
        other.wait()
    collect(target, read_prompts("embedded:train", 1), tmp_path, max_new_tokens=2)


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_without_token_ids_text_is_tokenised_again(text, here, tmp_path, endpoint):
    with served("no-ids") as url:
        dropped, found = gather(url, text, tmp_path, endpoint=endpoint)
    for name, t in found.items():
        assert t.response_ids == here[name]
    assert len(found) + dropped.total() == 6 and len(found) >= 3


def test_sglangs_names_are_read(text, here, tmp_path):
    with served("sglang") as url:
        _, found = gather(url, text, tmp_path, endpoint="chat")
    assert all(t.response_ids == here[k] for k, t in found.items()) and len(found) == 6


@pytest.mark.parametrize(
    ("planted", "endpoint", "message"),
    [
        (("template-twice",), "chat", "another prompt"),
        (("template-twice", "no-ids"), "chat", "another prompt"),
        (("other-tokenizer", "no-ids"), "completions", "number of tokens"),
    ],
)
def test_what_is_not_certain_is_dropped(text, tmp_path, planted, endpoint, message):
    with served(*planted) as url, pytest.raises(d.UserError, match=f"6 dropped.*{message}"):
        gather(url, text, tmp_path, endpoint=endpoint)
    assert not (tmp_path / "trajectories.jsonl").read_text()


def test_a_refused_prompt_does_not_stop_the_others(text, tmp_path):
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": "Which number is next?"}, {"prompt": "word " * 450}]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with served() as url:
        server = Server(url)
        server.check()
        options = {"max_new_tokens": 4, "sampling": Sampling()}
        made = gather_from(server, text, read_prompts(prompts), tmp_path / "out", **options)
    assert [t.id for t in d.read_trajectories(made.path)] == ["1"]
    assert made.dropped == {"HTTP 400 the prompt is too long": 1}


def test_a_prompt_the_server_fails_on_is_given_up(text, tmp_path, monkeypatch):
    """While others are answered; it would stop every new attempt as well."""
    monkeypatch.setattr("draft_opd.data.server_collect.BACKOFF", (0.02, 0.1))
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": "word word"}, *({"prompt": f"Which is next? {i}"} for i in range(12))]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with served("one-fails") as url:
        server = Server(url, in_flight=2)
        server.check()
        options = {"max_new_tokens": 12, "sampling": Sampling()}
        made = gather_from(server, text, read_prompts(prompts), tmp_path / "out", **options)
    assert len(d.read_trajectories(made.path)) == 12
    assert made.dropped == {"HTTP 500 out of memory": 1}


def test_samples_differ_and_can_be_drawn_again(text, tmp_path):
    made = []
    with served() as url:
        for out in (tmp_path / "a", tmp_path / "b"):
            server = Server(url)
            server.check()
            gather_from(
                server,
                text,
                read_prompts("embedded:train", 1),
                out,
                max_new_tokens=30,
                sampling=Sampling(temperature=1.5),
                samples=3,
                seed=5,
            )
            made.append({t.id: t.response_ids for t in d.read_trajectories(out)})
    assert made[0] == made[1] and len({tuple(v) for v in made[0].values()}) == 3


def test_a_server_killed_and_restarted_loses_nothing(here, tmp_path):
    port, count = free_port(), 24
    first = start(port)
    command = [
        sys.executable,
        "-m",
        "draft_opd.cli.main",
        "collect",
        "--target",
        "embedded",
        "--prompts",
        "embedded:train",
        "--limit",
        str(count),
        "--out",
        str(tmp_path),
        "--max-new-tokens",
        str(LONGEST),
        "--server",
        f"http://127.0.0.1:{port}/v1/",
        "--in-flight",
        "3",
        "--json",
    ]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    file = tmp_path / "trajectories.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if file.exists() and file.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert 5 <= file.read_bytes().count(b"\n") < count
    second = start(port)
    try:
        out, log = client.communicate(timeout=300)
    finally:
        second.kill()
        second.wait()
    assert client.returncode == 0, log
    assert json.loads(out)["trajectories"] == count and json.loads(out)["dropped"] == {}
    found = {t.id: t.response_ids for t in d.read_trajectories(tmp_path)}
    assert found == {str(i): here[str(i)] for i in range(1, count + 1)}


def test_a_server_that_stays_away_says_so(text, tmp_path):
    with served() as url:
        server = Server(url, patience=1.0)
        server.check()
    with pytest.raises(d.UserError, match=r"has not answered for 1 s.*run the same command"):
        gather_from(
            server, text, read_prompts("embedded:train", 2), tmp_path, max_new_tokens=4, sampling=Sampling()
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "give a URL"),
        ({"url": "http://127.0.0.1:9"}, "does not answer"),
        ({"url": "http://127.0.0.1:9", "endpoint": "responses"}, "completions or chat"),
    ],
)
def test_a_wrong_server_is_refused(options, message):
    with pytest.raises(d.UserError, match=message):
        Server(**options).check()


def test_a_model_that_is_not_served_is_named():
    with served() as url, pytest.raises(d.UserError, match=r"'big' is not served.*small"):
        Server(url, model="big").check()


def answer(text: str, finish: str = "stop", count: int = 0, **choice) -> dict:
    return {
        "choices": [{"text": text, "finish_reason": finish, **choice}],
        "usage": {"prompt_tokens": 3, "completion_tokens": count},
    }


def test_the_stop_token_is_put_back(text):
    words = text.tokenizer.encode("The next number is", add_special_tokens=False)
    stop = min(text.stop_ids)
    told = text.tokenizer.decode(words)
    for extra in ({"token_ids": words}, {"token_ids": [*words, stop]}, {}):
        found = read_answer(text, [1, 2, 3], answer(told, count=len(words) + 1, **extra))
        assert found == ([*words, stop], "stop")
    found = read_answer(text, [1, 2, 3], answer(told, "length", len(words)))
    assert found == (words, "length")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (answer("x", "content_filter"), "content_filter"),
        (answer("x", count=1, token_ids=[9999]), "does not have"),
        (answer("x", count=2, token_ids=[5], stop_reason="###"), "something else"),
        (answer("x", count=7, token_ids=[5]), "not as many"),
        (answer("", "length"), "empty"),
    ],
)
def test_answers_that_are_no_trajectory(text, value, message):
    with pytest.raises(AnswerRejected, match=message):
        read_answer(text, [1, 2, 3], value)
    with pytest.raises(InvalidResponse, match="no completion"):
        read_answer(text, [1, 2, 3], {"error": "no"})
