"""A wrong path, a missing file, shared prompts: said before torch is loaded, let alone a model."""

import json
import subprocess
import sys

import pytest

# The command line in a process of its own, which must not have loaded torch when it has ended.
ASK = """
import sys
from draft_opd.cli.main import run
status = run(sys.argv[1:])
assert "torch" not in sys.modules and "transformers" not in sys.modules
sys.exit(status)
"""
ROW = {"id": "1", "prompt_ids": [1, 2], "response_ids": [3, 2]}


@pytest.fixture
def files(tmp_path):
    """Names in the commands below -> paths."""
    recipe = {"steps": 1, "target": "embedded", "out": str(tmp_path / "run")}
    made = {
        "none": tmp_path / "none",
        "out": tmp_path / "out",
        "rows": tmp_path / "t.jsonl",
        "prompts": tmp_path / "p.jsonl",
        "recipe": tmp_path / "r.yaml",
    }
    made["rows"].write_text(json.dumps(ROW) + "\n")
    made["prompts"].write_text('{"prompt": "x"}\n')
    recipe["data"] = {"trajectories": str(made["rows"]), "heldout": str(made["rows"])}
    made["recipe"].write_text(json.dumps(recipe))
    return made


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval --target embedded --drafter {none} --tasks embedded", "drafter '{none}'"),
        ("eval --target {none} --drafter {none} --tasks embedded", "drafter '{none}'"),
        ("eval --target embedded --drafter {out} --prompts {none}", "drafter '{out}'"),
        ("generate --target {none} --drafter {none} --prompt x", "drafter '{none}'"),
        ("analyze --target embedded --drafter x --trajectories {none} --out {out}", "'{none}'"),
        ("collect --target embedded --prompts {none} --out {out}", "'{none}' does not exist"),
        ("collect --target {none} --prompts {prompts} --out {out}", "target '{none}'"),
        ("collect --target embedded --prompts {prompts} --drafter {none} --out {out}", "drafter '{none}'"),
        ("export --target embedded --drafter {none} --format vllm --out {out}", "'{none}'"),
        ("check-serving --target embedded --drafter {none}", "drafter '{none}'"),
        ("sft --config {recipe}", "data.heldout shares prompts with data.trajectories"),
        ("sft --config {recipe} target={none}", "target '{none}'"),
        ("sft --config {recipe} data.heldout={none}", "'{none}' does not exist"),
        ("opd --config {recipe} drafter={none}", "drafter '{none}'"),
        ("opd --config {recipe}", "set `drafter`"),
        (
            "online --config {recipe} drafter={none} online.server=http://x online.prompts={prompts}",
            "drafter '{none}'",
        ),
    ],
)
def test_it_is_said_before_torch_is_loaded(files, command, message):
    names = {name: str(path) for name, path in files.items()}
    words = [word.format(**names) for word in command.split()]
    done = subprocess.run([sys.executable, "-c", ASK, *words], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert message.format(**names) in done.stderr.splitlines()[-1]
