"""Trajectories survive kills; prompt files say what is wrong with them."""

import json
import time

import pytest
from forked import Process

import draft_opd as d
from draft_opd.data.collect import collect
from draft_opd.data.prompts import read_prompts
from draft_opd.data.trajectory import Trajectory, TrajectoryWriter, read_trajectories, write_trajectories

FAMILY = "dflash"


def test_a_killed_collection_goes_on_without_losing_or_doubling(tmp_path, data):
    command = [
        "collect",
        "--target",
        "embedded",
        "--prompts",
        "embedded:train",
        "--limit",
        "24",
        "--out",
        str(tmp_path / "out"),
        "--batch-size",
        "4",
        "--max-new-tokens",
        "80",
    ]
    file = tmp_path / "out" / "trajectories.jsonl"
    process = Process(*command)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if file.exists() and file.read_bytes().count(b"\n") >= 8:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = file.read_bytes()
    assert 8 <= before.count(b"\n") < 24
    with open(file, "ab") as torn:  # what a kill in the middle of a write leaves
        torn.write(b'{"id": "99", "prompt_ids": [1')
    assert Process(*command).wait() == 0
    after = file.read_bytes()
    assert after.startswith(before)
    rows = [json.loads(line) for line in after.splitlines()]
    assert sorted(int(r["id"]) for r in rows) == list(range(1, 25))
    whole = {t.id: t for t in d.read_trajectories(data / "train")}
    assert all(r["response_ids"] == whole[r["id"]].response_ids[:80] for r in rows)


def test_other_prompts_under_the_same_ids_are_refused(target, tmp_path):
    collect(target, read_prompts("embedded:train", 2), tmp_path, max_new_tokens=4)
    with pytest.raises(d.UserError, match="already holds another prompt"):
        collect(target, read_prompts("embedded:heldout", 2), tmp_path, max_new_tokens=4)


def test_going_on_in_another_way_is_refused(target, tmp_path):
    from draft_opd.decoding.sampling import Sampling

    prompts = read_prompts("embedded:train", 2)
    collect(target, prompts, tmp_path, max_new_tokens=4)
    collect(target, prompts, tmp_path, max_new_tokens=4)
    with pytest.raises(d.UserError, match="max_new_tokens 4 before, 5 now"):
        collect(target, prompts, tmp_path, max_new_tokens=5)
    with pytest.raises(d.UserError, match="sampling"):
        collect(target, prompts, tmp_path, max_new_tokens=4, sampling=Sampling(temperature=1.0))


def test_more_samples_later_are_new_ones(target, tmp_path):
    from draft_opd.decoding.sampling import Sampling

    hot = Sampling(temperature=1.5)
    for samples in (2, 4):
        path = collect(
            target,
            read_prompts("embedded:train", 1),
            tmp_path,
            max_new_tokens=30,
            samples=samples,
            sampling=hot,
        )
    rows = d.read_trajectories(path)
    assert len(rows) == len({tuple(t.response_ids) for t in rows}) == 4


def test_several_samples_differ_and_are_named(target, tmp_path):
    from draft_opd.decoding.sampling import Sampling

    path = collect(
        target,
        read_prompts("embedded:train", 2),
        tmp_path,
        max_new_tokens=60,
        samples=3,
        sampling=Sampling(temperature=1.5),
    )
    rows = d.read_trajectories(path)
    assert {t.id for t in rows} == {"1-0", "1-1", "1-2", "2-0", "2-1", "2-2"}
    assert len({tuple(t.response_ids) for t in rows}) > 2
    assert all(t.temperature == 1.5 for t in rows)


def test_a_drafter_speeds_collection_up_without_changing_it(target, trained, data, tmp_path):
    prompts = read_prompts("embedded:train", 8)
    path = collect(target, prompts, tmp_path, max_new_tokens=320, drafter=trained)
    whole = {t.id: t.response_ids for t in d.read_trajectories(data / "train")}
    assert all(t.response_ids == whole[t.id] for t in d.read_trajectories(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "2: not valid JSON"),
        ("[1]", "2: must be a JSON object"),
        ('{"txt": "x"}', "2: needs messages, conversations"),
        ('{"prompt": ""}', "2: the field 'prompt' is empty"),
        ('{"prompt": 3}', "2: needs messages, conversations"),
        ('{"messages": []}', "2: 'messages' must be"),
        ('{"messages": [{"role": "user"}]}', "2: message 1 has no content"),
    ],
)
def test_a_malformed_prompt_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(d.UserError, match=message):
        read_prompts(path)


def test_prompts_in_the_usual_shapes(tmp_path):
    path = tmp_path / "p.jsonl"
    logged = [{"role": "user", "content": "d"}, {"role": "assistant", "content": "old answer"}]
    rows = [
        {"prompt": "a"},
        {"question": "b", "answer": "7"},
        {"problem": "c"},
        {"messages": logged},
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    found = read_prompts(path)
    assert [p.messages[-1]["content"] for p in found] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt_ids": [1], "response_ids": []}', "'response_ids' is empty"),
        ('{"prompt_ids": [], "response_ids": [1]}', "'prompt_ids' is empty"),
        ('{"prompt_ids": [1]}', "'response_ids' must be a list"),
        ('{"prompt_ids": [1], "response_ids": [-2]}', "must be a list of token ids"),
        ('{"prompt_ids": [1], "response_ids": ["a"]}', "must be a list of token ids"),
    ],
)
def test_a_malformed_trajectory_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt_ids": [1], "response_ids": [2]}\n' + line + "\n")
    with pytest.raises(d.UserError, match=rf"t\.jsonl:2: .*{message}"):
        d.read_trajectories(path)


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": "1", "prompt_ids": [1], "response_ids": [2]}\n{"id": "2", "pro')
    writer = TrajectoryWriter(path)
    writer.close()
    assert set(writer.done) == {"1"} and path.read_text().count("\n") == 1


def test_a_limit_draws_the_same_rows_in_any_order(tmp_path):
    """Collections are sorted by length, so the first rows would be the shortest prompts."""
    rows = [Trajectory([1] * (3 + i), [2, 3], f"p{i}") for i in range(200)]
    found = []
    for name, order in (("sorted", rows), ("reversed", rows[::-1])):
        path = write_trajectories(tmp_path / name, order, {})
        drawn = read_trajectories(path, limit=40)
        assert [t.id for t in drawn] == [t.id for t in order if t.id in {d.id for d in drawn}]
        found.append({t.id for t in drawn})
        assert abs(sum(len(t.prompt_ids) for t in drawn) / 40 - 102.5) < 25  # of all lengths
    assert found[0] == found[1] and len(found[0]) == 40


def test_trajectories_are_handed_on_as_they_end(target, heldout, monkeypatch):
    """Where ended prompts are replaced by the next ones, a kill loses less than a batch of ended ones."""
    from draft_opd.data import collect as module

    requests = [(t.id, t.prompt_ids) for t in heldout[:12]]
    texts: dict[str, list[int]] = {}
    for group in (1, 3):  # the second as where rounds are captured
        monkeypatch.setattr(module, "GROUP", group)
        monkeypatch.setattr(d.Target, "capturable", group > 1)
        monkeypatch.setattr(module, "speculate", _static if group > 1 else d.speculate)
        seen: list[int] = []

        def emit(rows, seen=seen):
            seen.append(len(rows))
            for t in rows:
                assert texts.setdefault(t.id, t.response_ids) == t.response_ids

        module.decode_trajectories(target, requests, emit, max_new_tokens=24, batch_size=4)
        assert seen == [4, 4, 4]
    assert len(texts) == 12


def _static(target, drafter, prompts, **options):
    from draft_opd.decoding import generate as loop
    from draft_opd.decoding.static import eager

    def path(job, length, rows, pace, clock):
        loop_static(job, length, rows, pace, clock, eager)

    loop_static, loop._decode_static = loop._decode_static, path
    try:
        return d.speculate(target, drafter, prompts, **options)
    finally:
        loop._decode_static = loop_static
