"""Drafters and draft lengths side by side: pairing, draft lengths, throughput, tokens, reports."""

import json

import pytest

import draft_opd as d
from draft_opd.cli.main import run
from draft_opd.data.prompts import Prompt, read_prompts
from draft_opd.data.tasks import Task
from draft_opd.decoding.sampling import Sampling
from draft_opd.evaluation.concurrency import throughput
from draft_opd.evaluation.draft_length_advice import Hardware, roofline, weights_read
from draft_opd.evaluation.drafter_names import names_of
from draft_opd.evaluation.measure import BASELINE, sides_of
from draft_opd.evaluation.run import Evaluation
from draft_opd.evaluation.summary import compare
from draft_opd.evaluation.token_origin import pieces

LONGEST = 16


@pytest.fixture(scope="module")
def evaluation(target, trained, untrained) -> Evaluation:
    """Two drafters at two draft lengths, on two tasks."""
    drafters = {"good": ("x/good", trained), "bad": ("x/bad", untrained)}
    prompts = read_prompts("embedded:heldout", 5)
    made = Evaluation(
        target,
        sides_of(drafters, [3, 15]),
        [Task("a", prompts[:3]), Task("b", prompts[3:])],
        max_new_tokens=LONGEST,
    )
    made.run()
    return made


def test_every_side_answers_the_same_prompts(evaluation):
    report = evaluation.report().to_json()
    assert [s["side"] for s in report["sides"]] == ["good K=3", "good K=15", "bad K=3", "bad K=15"]
    for side in report["sides"]:
        assert [t["lossless"] for t in side["tasks"]] == [{"matched": n, "of": n} for n in (3, 2)]
    assert report["tasks"] == report["sides"][0]["tasks"]
    pairs = {(c["side"], c["against"]) for c in report["comparison"]}
    assert pairs == {("good K=15", "good K=3"), ("bad K=3", "good K=3"), ("bad K=15", "good K=15")}
    assert {c["task"] for c in report["comparison"]} == {"a", "b", "all"}
    for c in report["comparison"]:
        low, high = c["tau_interval"]
        assert low <= c["tau_difference"] <= high
        assert c["speed_interval"][0] <= c["speed_ratio"] <= c["speed_interval"][1]
    worse = next(c for c in report["comparison"] if c["side"] == "bad K=15" and c["task"] == "all")
    assert worse["tau_interval"][1] < 0  # it knows nothing, and five responses show it


def test_a_side_does_not_differ_from_itself(evaluation):
    answers = evaluation.answers["a"]["good K=3"]
    same = compare(answers, answers, task="a", side="good", against="good").to_json()
    assert same["tau_difference"] == 0 and same["tau_interval"] == [0, 0]
    assert same["speed_ratio"] == 1 and same["speed_interval"] == [1, 1]


def test_advice_knows_tau_at_every_length_without_decoding(evaluation, target, trained):
    evaluation.lengths(lengths=[1, 3, 15])
    good, bad = (a.to_json() for a in evaluation.advices)
    answers = [a for task in evaluation.answers.values() for a in task[BASELINE]]
    for row in good["lengths"]:
        rounds = [
            r
            for a in answers
            for r in d.generate(
                target,
                trained,
                a.made.prompt_ids,
                max_new_tokens=LONGEST,
                draft_length=row["draft_length"],
            ).rounds
        ]
        assert row["tau"] == pytest.approx(sum(r.accepted + 1 for r in rounds) / len(rounds))
        cost = sum(row["milliseconds"].values())
        assert row["speedup"] == pytest.approx(row["tau"] * good["target_milliseconds"] / cost)
    measured = {r["draft_length"] for r in good["lengths"] if r["measured"]}
    assert measured == {3, 15}
    best = max(good["lengths"], key=lambda r: r["speedup"])
    assert good["best"] == (best["draft_length"] if best["speedup"] > 1 else 0)
    assert bad["drafter"] == "x/bad"


def test_other_hardware_follows_from_two_numbers(target, trained):
    """Where bandwidth rules, a block costs what a token does; where arithmetic does, its tokens."""
    weights = weights_read(target.model, target.head.weight)
    own = weights_read(trained, trained.head_weights(target)[0])
    table = target.model.get_input_embeddings().weight
    counted = sum(p.numel() for p in target.model.parameters() if p.ndim > 1)
    tied = target.head.weight is table
    assert weights == counted - (0 if tied else table.numel())
    slow_memory = Hardware("m", 1.0, 1e9)
    passes = len(trained.forward_token_counts(15))
    expected = 6.0 / (1 + passes * own / weights)
    assert roofline(slow_memory, target, trained, 15, 6.0, context=0) == pytest.approx(expected)
    slow_arithmetic = Hardware("a", 1e9, 1.0)
    cost = 16 + sum(trained.forward_token_counts(15)) * own / weights
    found = roofline(slow_arithmetic, target, trained, 15, 6.0, context=100, batch=4)
    assert found == pytest.approx(6.0 / cost)


def test_throughput_counts_what_decoding_gives(evaluation, target):
    prompts = [p.ids(target) for p in read_prompts("embedded:heldout", 3)]
    sizes = [1, 3, 6]  # the last one takes each prompt twice
    rates = throughput(target, evaluation.sides[:2], prompts, sizes, max_new_tokens=LONGEST)
    rows = [r.to_json() for r in rates]
    assert [(r["batch"], r["side"]) for r in rows] == [
        (b, s) for b in sizes for s in (BASELINE, "good K=3", "good K=15")
    ]
    taus = {s["side"]: s["tasks"][0]["tau"] for s in evaluation.report().to_json()["sides"]}
    for row in rows:
        assert row["tau"] == pytest.approx(taus.get(row["side"], 1.0))
        assert row["side"] != BASELINE or row["speedup"] == 1.0
        assert 0 < row["seconds_per_request"]["mean"] <= row["seconds_per_request"]["p95"] * 1.001


def test_pieces_say_who_wrote_each_token(evaluation, target):
    for side in ("good K=15", "bad K=3"):
        for answer in evaluation.answers["a"][side]:
            made = answer.made
            found = pieces(target.tokenizer, made)
            text = "".join(p["text"] for p in found)
            assert text == target.tokenizer.decode(made.token_ids, skip_special_tokens=True)
            assert len(found) == len(made.token_ids)
            drafted = [p["by"] == "drafted" for p in found]
            assert sum(drafted) == sum(r.accepted for r in made.rounds)
            for number, r in enumerate(made.rounds):
                own = [p for p in found if p["round"] == number]
                told = [p["rejected"] for p in own if "rejected" in p]
                refused = r.drafted[r.accepted :]
                if len(own) > r.accepted and refused:
                    assert told == [target.tokenizer.decode(refused)]


def test_the_raw_rounds_give_the_same_tau(evaluation, tmp_path):
    result = evaluation.report()
    evaluation.save(tmp_path, result)
    report = result.to_json()
    sums: dict = {}
    for line in (tmp_path / "rounds.jsonl").read_text().splitlines():
        row = json.loads(line)
        cell = sums.setdefault((row["side"], row["task"]), [0, 0])
        ids = row["prompt_ids"] + row["token_ids"]
        for anchor, drafted, accepted in row["rounds"]:
            assert drafted[:accepted] == ids[anchor + 1 : anchor + 1 + accepted]
            cell[0] += accepted + 1
            cell[1] += 1
    for side in report["sides"]:
        for task in side["tasks"]:
            tokens, rounds = sums[side["side"], task["task"]]
            assert task["tau"] == tokens / rounds


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/sft/last", "runs/a/opd/last"], ["sft", "opd"]),
        (["one", "two/three"], ["one", "three"]),
        (["a/x", "b/x"], ["a", "b"]),
        (["new=runs/a/last", "runs/b/last"], ["new", "b"]),
        (["org/drafter"], ["drafter"]),
        (["runs/lr=0.1/last", "runs/lr=0.2/last"], ["lr=0.1", "lr=0.2"]),
    ],
)
def test_drafters_are_named_by_what_differs(paths, names):
    assert names_of(paths) == names


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--drafter", "DRAFTER"], "not told apart"),
        (["--draft-length", "0,2"], "--draft-length 0,2"),
        (["--draft-length", "99"], "out of range"),
        (["--advise", "--hardware", "x=1"], "--hardware x=1"),
        (["--hardware", "x=1,2"], "--advise"),
        (["--advise", "--hardware", "x=nan,2"], "--hardware x=nan,2"),
        (["--advise", "--hardware", "x=1,2", "--hardware", "x=2,3"], "there already"),
        (["--out", "README.md"], "cannot create the folder"),
        (["--tasks", "embedded", "--prompts", "README.md"], "README.md:1: not valid JSON"),
        (["--concurrency", "none"], "--concurrency none"),
        (["--server", "http://localhost:1"], "--server"),
    ],
)
def test_bad_options_get_one_line(capsys, trained_folder, more, message):
    words = ["eval", "--target", "embedded", "--drafter", "DRAFTER", "--tasks", "embedded", *more]
    code = run([str(trained_folder) if w == "DRAFTER" else w for w in words])
    error = capsys.readouterr().err
    assert code == 2 and message in error and "Traceback" not in error


def test_above_temperature_zero_texts_are_not_compared(target, trained):
    made = Evaluation(
        target,
        sides_of({"x": ("x", trained)}),
        [Task("t", read_prompts("embedded:heldout", 2))],
        sampling=Sampling(temperature=0.8, top_p=0.9),
        max_new_tokens=20,
    )
    made.run()
    made.lengths(lengths=[2, 15])
    report = made.report().to_json()
    assert report["tasks"][0]["lossless"] == {"matched": None, "of": 0}
    assert (report["temperature"], report["top_p"]) == (0.8, 0.9)
    # The rounds are drawn given the same texts: K drafts bring K + 1 tokens at most.
    short, whole = (row["tau"] for row in report["draft_lengths"][0]["lengths"])
    assert 1 < short <= 3 and 1 < whole <= 1 + trained.draft_length


def test_a_prompt_that_leaves_no_room_is_found_before_decoding(target, trained):
    prompts = [
        *read_prompts("embedded:heldout", 1),
        Prompt("long one", [{"role": "user", "content": "word " * 5000}]),
    ]
    seen = []
    made = Evaluation(
        target,
        sides_of({"x": ("x", trained)}),
        [Task("t", prompts)],
        say=lambda *done: seen.append(done),
    )
    with pytest.raises(d.UserError, match=r"task 't', prompt long one: .* tokens"):
        made.run()
    assert not seen


def test_a_mixture_of_experts_has_no_roofline(target):
    assert not target.is_mixture
    config = type(target.config)(num_experts=4)  # as Qwen3-MoE calls it
    mixture = type("T", (), {"config": config, "is_mixture": d.Target.is_mixture})()
    assert mixture.is_mixture
