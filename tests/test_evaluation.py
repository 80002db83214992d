"""Tasks, measures and their intervals."""

import copy
import json
import random

import pytest
import torch

import draft_opd as d
from draft_opd.data.prompts import Prompt, read_prompts
from draft_opd.data.tasks import SOURCES, Task, load_tasks
from draft_opd.decoding.sampling import Sampling
from draft_opd.evaluation.measure import sides_of
from draft_opd.evaluation.run import Evaluation
from draft_opd.evaluation.statistics import difference, interval, ratio

FAMILY = "dflash"

ROWS = {  # a row as the hub has it, and the turns it becomes
    "gsm8k": (
        {"question": "Q?", "answer": "4"},
        ["Q?\nPlease reason step by step, and put your final answer within \\boxed{}."],
    ),
    "math500": (
        {"problem": "P?", "answer": "4"},
        ["P?\nPlease reason step by step, and put your final answer within \\boxed{}."],
    ),
    "aime2025": (
        {"problem": "P?", "problem_idx": 1},
        ["P?\nPlease reason step by step, and put your final answer within \\boxed{}."],
    ),
    "mbpp": ({"prompt": "Write f.", "code": "x"}, ["Write f."]),
    "humaneval": (
        {"prompt": "def f():", "task_id": "H/0"},
        [
            "Write a solution to the following problem and make sure that it passes the "
            "tests:\n```python\ndef f():\n```"
        ],
    ),
    "swe-bench-lite": (
        {"problem_statement": "It fails."},
        ["Problem Statement:\nIt fails.\nPlease fix the issue described above."],
    ),
    "mt-bench": ({"prompt": ["One?", "Two?"], "category": "x"}, ["One?", "Two?"]),
}


@pytest.mark.parametrize("name", SOURCES)
def test_rows_become_the_fields_prompts(tmp_path, name):
    row, turns = ROWS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (task,) = load_tasks(f"{name}={path}", None)
    (prompt,) = task.prompts
    assert [prompt.messages[0]["content"], *prompt.later] == turns
    path.write_text(json.dumps({"prompt": "One line."}) + "\n")  # a text, not a list of turns
    assert not load_tasks(f"{name}={path}", None)[0].prompts[0].later
    # Chat traffic under a task's name is taken as it is.
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}) + "\n")
    assert load_tasks(f"{name}={path}", None)[0].prompts[0].messages[0]["content"] == "Hi"


def test_a_subset_is_the_same_every_time(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(30)))

    def names(**options):
        return [p.messages[0]["content"] for p in load_tasks(f"x={path}", None, **options)[0].prompts]

    assert names(limit=5) == [f"{i}?" for i in range(5)]
    drawn = names(limit=5, shuffle=3)
    assert drawn == names(limit=5, shuffle=3) and drawn != names(limit=5)
    assert set(names(shuffle=3)) == set(names()) and names(shuffle=3)[5:7] == names(
        limit=2, skip=5, shuffle=3
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("gsm", "unknown task 'gsm': there are gsm8k"),
        ("gsm8k", "gsm8k=FILE.jsonl"),
        ("embedded,embedded", "task name 'embedded' is taken"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_named(monkeypatch, names, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(d.UserError, match=message):
        load_tasks(names, None)


def rounds_of(rate: float, count: int, generator: random.Random, length: int = 7):
    """A response whose offsets are accepted with `rate`, one after the other."""
    made = []
    for _ in range(count):
        accepted = 0
        while accepted < length and generator.random() < rate:
            accepted += 1
        made.append(d.Round(0, [0] * length, accepted))
    return made


def test_intervals_cover_what_they_promise():
    """Simulated responses of known acceptance rates that differ between responses."""
    generator, covered, paired, trials = random.Random(0), 0, 0, 200
    rates = [0.3 + 0.5 * generator.random() for _ in range(4000)]

    def expected(rate):
        return sum(rate**k for k in range(8))

    true = sum(expected(r) for r in rates) / len(rates)  # rounds a response are alike
    for trial in range(trials):
        chosen = generator.sample(rates, 40)
        one = [rounds_of(r, 25, generator) for r in chosen]
        other = [rounds_of(r - 0.1, 25, generator) for r in chosen]
        low, high = interval(one, seed=trial, draws=400)
        covered += low <= true <= high
        gap = sum(expected(r) - expected(r - 0.1) for r in rates) / len(rates)
        low, high = difference(one, other, seed=trial, draws=400)
        paired += low <= gap <= high
    # 95 % promised; a binomial with 200 trials stays above 0.89 but for one time in a thousand.
    assert covered / trials > 0.89 and paired / trials > 0.89
    assert covered / trials < 1.0


@pytest.mark.parametrize("count", [2, 3, 5, 8, 20])
def test_few_responses_give_wide_intervals(count):
    """Not two thirds of what they promise, as plain percentiles of few draws do."""
    generator, covered, trials = random.Random(count), 0, 200
    true = sum(0.7**k for k in range(8))
    for trial in range(trials):
        made = [rounds_of(0.7, 25, generator) for _ in range(count)]
        low, high = interval(made, seed=trial, draws=400)
        covered += low <= true <= high
    assert covered / trials > 0.88


def test_intervals_hold_only_possible_values():
    generator = random.Random(0)
    few = [rounds_of(p, 9, generator) for p in (0.1, 0.99)]
    low, high = interval(few)
    longest = max(len(r.drafted) for one in few for r in one)
    assert 1 <= low < high <= longest + 1
    low, high = difference(few, few[::-1])
    assert -longest <= low < high <= longest
    low, high = ratio([(90, 1.0), (20, 2.0)], [(10, 1.0), (30, 1.0)])
    assert 0 < low < 110 / 3 / 20 < high


def test_an_interval_needs_responses():
    generator = random.Random(1)
    assert interval([rounds_of(0.5, 9, generator)]) is None
    alike = [rounds_of(0.5, 9, random.Random(3)) for _ in range(5)]
    low, high = interval(alike)
    assert low == high
    with pytest.raises(ValueError, match="same prompts"):
        difference(alike, alike[1:])


def evaluate(target, drafter, task, **options) -> dict:
    """What `eval` says of one drafter on one task."""
    made = Evaluation(target, sides_of({"x": ("x", drafter)}), [task], **options)
    made.run()
    return made.report().to_json()["tasks"][0]


@pytest.fixture(scope="module")
def measured(target, trained):
    task = Task("t", read_prompts("embedded:heldout", 3))
    return [evaluate(target, trained, task, max_new_tokens=60) for _ in range(2)]


def test_twice_is_the_same_to_the_last_digit(measured):
    timed = {
        "tokens_per_second",
        "speedup",
        "speedup_interval",
        "seconds",
        "milliseconds_per_round",
        "milliseconds_to_first_token",
    }
    one, two = ({k: v for k, v in m.items() if k not in timed} for m in measured)
    assert one == two


def test_an_independent_count_agrees(target, trained, measured):
    """From the target's logits and the drafter's proposals alone: no round of ours is used."""
    tokens = rounds = 0
    by_position, responses = [0] * 15, []
    for prompt in read_prompts("embedded:heldout", 3):
        ids, left, own = prompt.ids(target), 60, [0, 0]
        while left > 0:
            drafted = d.generate(target, trained, ids, max_new_tokens=16).rounds[0].drafted
            with torch.no_grad():
                logits = target.model(input_ids=torch.tensor([ids + drafted])).logits[0]
            said = logits[len(ids) - 1 :].argmax(-1).tolist()
            accepted = 0
            while accepted < 15 and drafted[accepted] == said[accepted]:
                accepted += 1
            new = said[: accepted + 1][:left]
            stops = [i for i, t in enumerate(new) if t in target.stop_ids]
            new = new[: stops[0] + 1] if stops else new
            accepted = min(accepted, len(new))
            for k in range(accepted):
                by_position[k] += 1
            own = [own[0] + accepted + 1, own[1] + 1]
            ids, left = ids + new, 0 if stops else left - len(new)
        tokens, rounds = tokens + own[0], rounds + own[1]
        responses.append(own[0] / own[1])
    value = measured[0]
    assert value["rounds"] == rounds and value["tau"] == tokens / rounds
    assert value["acceptance_by_position"] == [n / rounds for n in by_position]
    assert value["tau_per_response"] == pytest.approx(sum(responses) / 3, abs=1e-12)


def test_parts_of_the_measure_fit_together(measured):
    value = measured[0]
    total = 1.0
    for rate, conditional in zip(
        value["acceptance_by_position"], value["acceptance_conditional"], strict=True
    ):
        total *= conditional
        assert rate == pytest.approx(total)
    assert sum(value["accepted_histogram"]) == value["rounds"]
    for group in ("by_context", "by_part"):
        assert sum(g["rounds"] for g in value[group]) == value["rounds"]
    low, high = value["tau_interval"]
    assert low <= value["tau"] <= high


def test_later_turns_follow_the_targets_answer(target, trained):
    prompt = Prompt("1", [{"role": "user", "content": "Which number is next?"}], ("And then?",))
    value = evaluate(target, trained, Task("two", [prompt]), max_new_tokens=20)
    assert value["prompts"] == 1 and value["responses"] == 2
    assert [g["group"] for g in value["by_turn"]] == ["1", "2"]
    assert value["lossless"] == {"matched": 2, "of": 2}


def test_sixteen_bit_is_judged_by_regret(trained, heldout):
    narrow = d.Target.from_pretrained("embedded", dtype="bfloat16", device="cpu")
    half = copy.deepcopy(trained).to(torch.bfloat16)
    task = Task("t", read_prompts("embedded:heldout", 2))
    value = evaluate(narrow, half, task, max_new_tokens=60, sampling=Sampling())
    assert value["regret"]["beyond_bound"] == 0 and value["regret"]["of"] == value["tokens"]
