"""Other people's packages read what we write: z-lab's dflash and speculators. Slow.

Both live in a virtual environment of their own, `.peers-env`, made once beside the tests' folder.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import draft_opd as d
from draft_opd.models.hub import resolve_path
from draft_opd.serving.export import export

EVERY_FAMILY = True
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("peers")]
ENVIRONMENT = Path(__file__).parent.parent / ".peers-env"


@pytest.fixture(scope="session")
def peers() -> Path:
    """Its Python. speculators' torchvision and torchaudio are not needed for what is used here."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "torch==2.13.0", "dflash[local]==0.1.0"], check=True)
        bare = ["--no-deps", "speculators==0.9.0", "hs-connectors==0.9.0"]
        subprocess.run([*pip, *bare], check=True)
        needs = ["loguru<=0.7.3", "pydantic-settings", "datasets", "openai", "aiohttp", "psutil"]
        subprocess.run([*pip, *needs], check=True)
        (ENVIRONMENT / "ready").touch()
    return python


def run(python: Path, *arguments) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    made = subprocess.run(
        [str(python), *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert made.returncode == 0, made.stderr[-2000:]
    return made.stdout


DFLASH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
from dflash.model import DFlash2DraftModel, DFlashDraftModel, dflash_generate
folder, target, prompts, family = sys.argv[1:]
kind = DFlash2DraftModel if family == "dflash2" else DFlashDraftModel
model = kind.from_pretrained(folder, dtype=torch.float32).eval()
target = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
whole, found = model.compute_logits, []
def compute_logits(hidden, head):
    logits = whole(hidden, head)
    if family == "dflash":
        found[-1]["drafted"].append(logits.argmax(-1)[0].tolist())
    return logits
model.compute_logits = compute_logits
if family == "dflash2":
    propose = model.propose
    def proposed(*inputs):
        made = propose(*inputs)
        found[-1]["drafted"].append(made[0][0].tolist())
        return made
    model.propose = proposed
for ids in json.loads(prompts):
    found.append({"drafted": []})
    with torch.no_grad():
        made = dflash_generate(model, target, torch.tensor([ids]), 320, [2])
    found[-1]["ids"] = made[0, len(ids):].tolist()
print(json.dumps(found))
"""


@pytest.mark.parametrize("family", ["dflash", "dflash2"], indirect=True)
def test_z_labs_package_drafts_the_same_tokens(peers, family, trained, heldout, target, tmp_path):
    """Round by round, token by token, in float32; the same text."""
    trained.save_pretrained(tmp_path / "d")
    script = tmp_path / "script.py"
    script.write_text(DFLASH)
    rows = heldout[:8]
    prompts = json.dumps([t.prompt_ids for t in rows])
    printed = run(peers, script, tmp_path / "d", resolve_path("embedded"), prompts, family)
    found = json.loads(printed.splitlines()[-1])
    compared = 0
    for t, theirs in zip(rows, found, strict=True):
        assert theirs["ids"] == t.response_ids
        # It takes the first token from the prompt's own forward.
        begun = [*t.prompt_ids, t.response_ids[0]]
        ours = d.generate(target, trained, begun, max_new_tokens=319).rounds
        assert [r.drafted for r in ours] == theirs["drafted"]
        compared += sum(len(r.drafted) for r in ours)
    assert compared > 2000


SPECULATORS = """
import sys, torch
from safetensors.torch import load_file
from speculators import SpeculatorModel
folder, name = sys.argv[1:]
model = SpeculatorModel.from_pretrained(folder)
theirs, file = model.state_dict(), load_file(folder + "/model.safetensors")
assert type(model).__name__ == name, type(model)
for key, value in file.items():
    assert torch.equal(theirs[key].float(), value.float()), key
# What it has beside is the target's.
beside = ("verifier_", "embed_tokens", "lm_head")
assert all(k.startswith(beside) for k in theirs.keys() - file.keys())
print(model.config.to_json_string())
"""


def test_speculators_loads_what_we_write(peers, family, trained_folder, tmp_path):
    export("embedded", str(trained_folder), "speculators", tmp_path / "d", dtype="float32")
    script = tmp_path / "script.py"
    script.write_text(SPECULATORS)
    name = {"dspark": "DSparkDraftModel", "dflash2": "DFlash2DraftModel"}
    name |= {"dflash": "DFlashDraftModel", "eagle3": "Eagle3DraftModel"}
    run(peers, script, tmp_path / "d", name[family])


@pytest.mark.parametrize("family", ["dflash", "eagle3"], indirect=True)
def test_speculators_converts_what_we_write(peers, family, trained, tmp_path):
    """Its converter takes our folder, and we take what it makes of it."""
    trained.save_pretrained(tmp_path / "d")
    run(
        peers,
        "-m",
        "speculators",
        "convert",
        tmp_path / "d",
        "--algorithm",
        family,
        "--verifier",
        resolve_path("embedded"),
        "--output-path",
        tmp_path / "out",
    )
    again = d.Drafter.from_pretrained(str(tmp_path / "out"), device="cpu")
    assert again.layout == "speculators"
    ours, theirs = trained.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    if family == "dflash":  # for EAGLE-3 it forgets the tapped layers
        assert again.target_layers == trained.target_layers
        assert again.draft_length == trained.draft_length


# SafeAILab's cnets.py and SpecForge's llama3_eagle.py: every tensor of a one-layer EAGLE-3 file.
PUBLISHED_NAMES = {
    "fc.weight",
    "norm.weight",
    "lm_head.weight",
    "d2t",
    "t2d",
    "midlayer.hidden_norm.weight",
    "midlayer.input_layernorm.weight",
    "midlayer.post_attention_layernorm.weight",
    *(f"midlayer.self_attn.{n}_proj.weight" for n in "qkvo"),
    *(f"midlayer.mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
}


@pytest.mark.parametrize("family", ["eagle3"], indirect=True)
def test_names_are_those_of_safe_ai_lab_and_specforge(family, trained_folder):
    assert set(load_file(trained_folder / "model.safetensors")) == PUBLISHED_NAMES
