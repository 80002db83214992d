"""What check-serving concludes from counts. With the engine itself: test_vllm.py."""

import dataclasses
import sys

import pytest
import torch

import draft_opd as d
from draft_opd.cli.main import run
from draft_opd.data.prompts import Prompt
from draft_opd.decoding.generate import speculate
from draft_opd.serving.check_serving import (
    Served,
    agrees,
    compare,
    expected,
    next_round,
    text_is_the_targets,
)
from draft_opd.serving.vllm_process import Acceptance, Engine, EngineFailed


@pytest.fixture(scope="module")
def texts(heldout):
    """As an engine leaves them: cut by a limit, or ended by a stop token."""
    cut = [d.Trajectory(t.prompt_ids, t.response_ids[:40], t.id) for t in heldout[-3:]]
    return [*cut, heldout[20]]


def served(target, texts, counted) -> Served:
    text = target.tokenizer
    prompts = [Prompt(t.id, [{"role": "user", "content": text.decode(t.prompt_ids)}]) for t in texts]
    found = Served(texts, counted, prompts)
    # The prompts are ids already; a template is not under test here.
    found.prompts = [dataclasses.replace(p) for p in prompts]
    for p, t in zip(found.prompts, texts, strict=True):
        object.__setattr__(p, "ids", lambda _, thinking=None, t=t: t.prompt_ids)
    return found


def test_counts_are_those_of_decoding(target, trained, texts):
    """Rounds from the first token on, the last one counted behind the end of the text."""
    ours = expected(target, trained, texts, 15)
    rounds, beyond = 0, [0] * 15
    for t in texts:
        begun = [*t.prompt_ids, t.response_ids[0]]
        made = d.generate(target, trained, begun, max_new_tokens=len(t.response_ids) - 1)
        rounds += len(made.rounds)
        for r in made.rounds[:-1]:
            for k in range(r.accepted):
                beyond[k] += 1
        last = made.rounds[-1].anchor
        accepted = next_round(target, trained, [t.ids[: last + 1]], 15)[0]
        assert accepted >= made.rounds[-1].accepted
        for k in range(accepted):
            beyond[k] += 1
    assert (ours.drafts, ours.by_position) == (rounds, beyond)


def test_what_agrees(target, trained, texts):
    ours = expected(target, trained, texts, 15)
    value = compare(target, trained, served(target, texts, ours), 15, None)
    assert value["equal"] and not value["causes"] and value["served"] == value["ours"]
    # A tenth of what is accepted gone, as a wrong rope base may cost.
    fewer = [n * 9 // 10 for n in ours.by_position]
    worse = Acceptance(ours.drafts, fewer)
    assert not agrees(worse, ours, torch.float32) and not agrees(worse, ours, torch.bfloat16)


FAULTS = {
    "dflash": ["causal", "one higher"],
    "eagle3": ["one lower"],
}


def test_a_fault_is_named_by_its_counts(target, family, trained, texts):
    faults = trained.known_faults(target.num_layers)
    for wanted in FAULTS[family]:
        name = next(n for n in faults if wanted in n)
        counted = expected(target, trained.with_fault(faults[name]), texts, 15)
        value = compare(target, trained, served(target, texts, counted), 15, None)
        assert not value["equal"]
        assert any(wanted in c for c in value["causes"]), (wanted, value["causes"])


def test_other_weights_are_no_known_fault(target, trained, untrained, texts):
    """Whatever drafts nothing right looks alike: no tensor is accused."""
    counted = expected(target, untrained, texts, 15)
    value = compare(target, trained, served(target, texts, counted), 15, None)
    assert len(value["causes"]) == 1
    assert "next to nothing" in value["causes"][0] or "none of the known" in value["causes"][0]


def test_little_is_no_proof(target, trained, texts):
    few = texts[:1]
    ours = expected(target, trained, few, 15)
    few = [dataclasses.replace(few[0], response_ids=few[0].response_ids[:3])]
    ours = expected(target, trained, few, 15)
    value = compare(target, trained, served(target, few, ours), 15, None)
    assert not value["equal"] and "too few" in value["causes"][0]


def test_another_text_is_noticed(target, family, texts):
    wrong = [dataclasses.replace(texts[0], response_ids=[9] * 40), *texts[1:]]
    assert text_is_the_targets(target, wrong) == [False] + [True] * (len(texts) - 1)


def test_sixteen_bit_text_is_judged_by_its_rounding(target, heldout):
    """The target's own bfloat16 text passes as bfloat16, whatever near-ties it met."""
    narrow = d.Target.from_pretrained("embedded", dtype="bfloat16", device="cpu")
    prompts = [t.prompt_ids for t in heldout[:4]]
    made = speculate(narrow, None, prompts, max_new_tokens=60)
    rows = [d.Trajectory(g.prompt_ids, g.token_ids) for g in made]
    assert all(text_is_the_targets(narrow, rows))
    swapped = [dataclasses.replace(r, response_ids=[7, *r.response_ids[1:]]) for r in rows]
    assert not any(text_is_the_targets(narrow, swapped))


@pytest.mark.parametrize("family", ["dflash"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--drafter", "D", "--engine", "sglang"], "only vllm"),
        ([], "--drafter, or --dry-run"),
        (["--drafter", "D", "--served", "/nowhere"], "no drafter folder"),
        (["--drafter", "D", "--url", "http://x", "--served", "D"], "leave --served"),
        (["--drafter", "D", "--url", "http://127.0.0.1:9"], "does not answer"),
        (["--drafter", "D", "--engine-command", "vllm 'serve"], "--engine-command"),
        (["--drafter", "D", "--engine-command", "/no/vllm serve"], "does not run here"),
        (["--drafter", "D", "--draft-length", "16"], "out of range"),
        (["--dry-run", "model.family=x", "--limit", "0"], "--limit 0"),
    ],
)
def test_silly_input_gets_one_line(capsys, family, trained_folder, arguments, message):
    words = [str(trained_folder) if a == "D" else a for a in arguments if "=" not in a]
    assert run(["check-serving", "--target", "embedded", *words]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1] and err[-1].startswith("error: ")


def test_an_engine_that_fails_says_why(tmp_path):
    """Any program that ends at once: its first error is the reason."""
    script = tmp_path / "engine.py"
    script.write_text(
        "print('WARNING ulimit, like OSError: [Errno 24] Too many open files', flush=True)\n"
        "raise ValueError('There is no parameter named [fusion.weight]')\n"
    )
    command = f"{sys.executable} {script}"
    engine = Engine("t", tmp_path, "dflash", 3, tmp_path / "log", command=command)
    with pytest.raises(EngineFailed, match=r"no parameter named \[fusion.weight\]"), engine:
        pass
