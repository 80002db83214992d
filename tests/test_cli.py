"""The command line: what goes in, what comes out, and how bad input is answered."""

import json
import subprocess
import sys

import pytest
import yaml

from draft_opd.cli.main import app, run

FAMILY = "dflash"
COMMANDS = [
    "demo",
    "collect",
    "sft",
    "opd",
    "eval",
    "analyze",
    "generate",
    "export",
    "inspect",
    "ablate",
]


def call(capsys, *arguments) -> tuple[int, str, str]:
    status = run([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def succeed(capsys, *arguments) -> dict:
    """Runs with --json and returns the one object on standard output."""
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


def refused(capsys, *arguments) -> str:
    """The one line on standard error of a command that ends with status 2."""
    status, out, err = call(capsys, *arguments)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and out == "" and "Traceback" not in err
    assert len(lines) == 1 and err.splitlines()[-1] == lines[0]
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(capsys, command):
    status, out, _ = call(capsys, command, "--help")
    assert status == 0 and f"Example: draft-opd {command} " in " ".join(out.split())
    assert "--json" in out


def test_nothing_at_all_gets_the_help(capsys):
    status, out, _ = call(capsys)
    assert status == 0 and "collect" in out and "opd" in out


def test_the_commands_are_those_promised():
    from typer.main import get_command

    assert set(get_command(app).commands) >= set(COMMANDS)


def test_help_does_not_wait_for_torch():
    code = "import sys; from draft_opd.cli.main import run; run(['--help']); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "False"


def test_the_three_commands_of_a_user(capsys, data, trained_folder, tmp_path):
    """sft → opd → eval through the command line, then analyze, export, inspect, generate."""
    shared = [
        f"data.trajectories={data / 'train'}",
        f"data.heldout={data / 'heldout'}",
        "data.heldout_limit=8",
        "batch_size=4",
        "steps=2",
        "evaluation.every=2",
        "opd.trace_every=1",
    ]
    sft = succeed(capsys, "sft", "--config", "embedded", *shared, f"out={tmp_path / 'sft'}")
    opd = succeed(
        capsys,
        "opd",
        "--config",
        "embedded",
        *shared,
        f"out={tmp_path / 'opd'}",
        f"drafter={sft['last']}",
    )
    assert opd["step"] == 2 and opd["tau"] >= 1
    again = succeed(
        capsys,
        "opd",
        "--config",
        "embedded",
        *shared,
        f"out={tmp_path / 'opd'}",
        f"drafter={sft['last']}",
        "--resume",
    )
    assert again["tau"] == opd["tau"]

    pair = ["--target", "embedded", "--drafter", trained_folder]
    report = succeed(
        capsys,
        "eval",
        *pair,
        "--tasks",
        "embedded",
        "--limit",
        "2",
        "--max-new-tokens",
        "16",
        "--out",
        tmp_path / "eval",
    )
    assert report == json.loads((tmp_path / "eval" / "eval.json").read_text())
    task = report["tasks"][0]
    assert task["lossless"] == {"matched": 2, "of": 2} and task["tau"] >= 1
    assert len(task["acceptance_by_position"]) == 15
    assert set(task["tokens_per_second"]) == {"target", "speculative"}
    assert report["mean"]["speedup"] == task["speedup"]

    found = succeed(
        capsys,
        "analyze",
        *pair,
        "--trajectories",
        data / "heldout",
        "--limit",
        "6",
        "--out",
        tmp_path / "analysis",
    )
    assert sum(found["share"].values()) == pytest.approx(1)
    assert found["forward_kl"]["suffix"] > found["forward_kl"]["accepted"] > 0
    assert sum(found["anchors"]["by_tenth"]) == found["rounds"]

    made = succeed(capsys, "export", *pair, "--format", "vllm", "--out", tmp_path / "served")
    assert '"num_speculative_tokens": 15' in made["serve"]
    for path, kind in (
        (tmp_path / "served", "drafter"),
        (tmp_path / "opd", "run"),
        (data / "train", "trajectories"),
        (data / "train" / "trajectories.jsonl", "trajectories"),
        ("embedded", "target"),
    ):
        value = succeed(capsys, "inspect", path)
        assert value["kind"] == kind and value["path"]


def test_inspect_shows_which_tokens_are_supervised(capsys, data):
    value = succeed(capsys, "inspect", data / "heldout", "--sample", "3")
    sample = value["sample"]
    assert sample["prompt"].endswith("<|im_start|>assistant\n")
    assert sample["response"].startswith("<think>") and sample["response"].endswith("<|im_end|>")
    status, out, _ = call(capsys, "inspect", data / "heldout", "--sample", "3")
    assert status == 0 and sample["response"].splitlines()[0] in out


def test_generate_streams_the_targets_text_and_marks_drafted_tokens(capsys, trained_folder):
    arguments = [
        "generate",
        "--target",
        "embedded",
        "--drafter",
        trained_folder,
        "--prompt",
        "Mia has 3 apples and buys 4 more. How many apples are there now?",
        "--max-new-tokens",
        "120",
        "--draft-length",
        "15",
    ]
    value = succeed(capsys, *arguments)
    status, out, err = call(capsys, *arguments)
    assert status == 0 and out.count("⟦") == out.count("⟧") > 0
    plain = out.replace("⟦", "").replace("⟧", "")
    assert plain.strip() == value["text"].strip()
    assert f"{value['tokens']} tokens in {value['rounds']} rounds" in err
    status, out, _ = call(capsys, *arguments, "--mark", "none")
    assert out == plain
    # What is drafted by itself depends on timings; what is said does not.
    assert succeed(capsys, *arguments[:-2])["text"] == value["text"]


def test_generate_reads_standard_input(trained_folder):
    command = [
        sys.executable,
        "-m",
        "draft_opd.cli.main",
        "generate",
        "--target",
        "embedded",
        "--drafter",
        str(trained_folder),
        "--max-new-tokens",
        "8",
        "--json",
    ]
    done = subprocess.run(command, input="Hello", capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["tokens"] == 8


def test_recipes_in_the_repository_are_valid():
    from pathlib import Path

    from draft_opd.training.config import load_recipe

    recipes = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert yaml.safe_load(path.read_text())
        # The online loop collects its own trajectories.
        own = ["data.trajectories=collected"] if path.stem == "online" else []
        for stage in ("sft", "opd"):
            load_recipe(path, own, stage)
