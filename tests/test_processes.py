"""Processes that share matrices or files, stop, die, or are another number than before."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from processes import ADAMW, PAPER, UNEVEN, assert_same_run, metrics
from transformers import AutoConfig, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import draft_opd as d
from draft_opd.models.hub import resolve_path
from draft_opd.serving.vllm_process import free_port
from draft_opd.training.config import load_recipe

FAMILY = "dflash"


@pytest.fixture(scope="module")
def even(tmp_path_factory) -> Path:
    """A target whose matrices two processes can share; the shipped one has 3 key-value heads."""
    torch.manual_seed(0)
    shipped = AutoConfig.from_pretrained(resolve_path("embedded"))
    config = Qwen3Config(
        vocab_size=shipped.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        eos_token_id=shipped.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("even")
    Qwen3ForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve_path("embedded")).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rollout", ["hindsight", "live"])
def test_two_processes_share_a_targets_matrices(together, even, tmp_path, rollout):
    """Tensor parallel: the same run again, decoding included."""
    new = (f"target={even}", "steps=2", "evaluation.every=2", "batch_size=3", *ADAMW)
    together(1, "sft", tmp_path / "sft", *new)
    pairs = (
        *new,
        f"drafter={tmp_path / 'sft' / 'last'}",
        "opd.objective.kind=acceptance_aware",
        "opd.max_anchors=6",
        "data.max_length=90",
        f"opd.rollout={rollout}",
    )
    one = together(1, "opd", tmp_path / "one", *pairs)
    two = together(2, "opd", tmp_path / "two", *pairs, "parallel.tensor=2")
    assert_same_run(one, two)


def test_a_target_that_cannot_be_shared_is_named(together, forked, tmp_path):
    processes, logs = together.begin(2, "sft", tmp_path / "r", "parallel.tensor=2")
    assert [forked.status(p) for p in processes] == [2, 2]
    for log in logs:
        line = log.read_text().splitlines()[-1]
        # What stands in the way differs between releases of transformers.
        reason = r"\(its (num_key_value_heads is 3|plan has \w+)\)"
        message = f"error: parallel.tensor: 2 processes cannot share this target {reason}: "
        assert re.fullmatch(message + "set parallel.target=shard instead", line)


def test_a_run_goes_on_with_another_number_of_processes(together, tmp_path):
    """One, then two in the middle of traces that later steps replay, then one: the same run."""
    pairs = (*UNEVEN, *PAPER, "steps=8", "save_every=1", "opd.trace_every=3", "evaluation.every=4")
    whole = together(1, "opd", tmp_path / "whole", *pairs)
    out = tmp_path / "parts"

    def until(count: int, step: int) -> None:
        """Stops them behind that step."""
        processes, logs = together.begin(count, "opd", out, *pairs)
        while True:
            found = metrics(out) if (out / "metrics.jsonl").exists() else []
            if found and found[-1]["step"] >= step:
                break
            time.sleep(0.01)
        os.kill(processes[-1], signal.SIGTERM)  # one is told; they agree
        for process, log in zip(processes, logs, strict=True):
            assert together.forked.status(process) == 75, log.read_text()

    until(1, 2)
    until(2, 4)
    assert_same_run(whole, together(1, "opd", out, *pairs))


def test_processes_that_share_a_target_stop_together(together, even, tmp_path):
    """One of them is told, and none splits batches with another."""
    pairs = (
        f"target={even}",
        "steps=20",
        "evaluation.every=20",
        "batch_size=3",
        "data.max_length=90",
        "data.heldout_limit=2",
        "parallel.tensor=2",
        *ADAMW,
    )
    whole = together(2, "sft", tmp_path / "whole", *pairs)
    out = tmp_path / "parts"
    processes, logs = together.begin(2, "sft", out, *pairs)
    while not (out / "metrics.jsonl").exists() or len(metrics(out)) < 3:
        time.sleep(0.01)
    os.kill(processes[1], signal.SIGTERM)
    for process, log in zip(processes, logs, strict=True):
        assert together.forked.status(process) == 75, log.read_text()
    assert_same_run(whole, together(2, "sft", out, *pairs))


def test_processes_share_features_on_disk(together, tmp_path):
    """A small set that both have seen all of: they would write the same files."""
    kept = (f"data.features={tmp_path / 'kept'}", "data.cache_features=disk")
    pairs = (*UNEVEN, "data.limit=6", "save_every=1", "steps=6", "opd.objective.kind=dpace")
    one = together(1, "opd", tmp_path / "one", *pairs, "data.cache_features=memory")
    assert_same_run(one, together(2, "opd", tmp_path / "two", *pairs, *kept))
    assert_same_run(one, together(2, "opd", tmp_path / "again", *pairs, *kept))


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from draft_opd.models.target import Target
from draft_opd.training.config import Parallel
from draft_opd.training.distributed import ParallelContext
from draft_opd.training.setup import split_target

kind = "cuda" if torch.cuda.is_available() else "cpu"
backend = "nccl" if kind == "cuda" else "gloo"
dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())
mesh = init_device_mesh(kind, (1, 1), mesh_dim_names=("data", "tensor"))
group = ParallelContext(Parallel(target="shard"), mesh)
whole, target = (
    Target.from_pretrained("embedded", device=device, prepacked=False)
    for device in (group.device, "cpu")
)
split_target(target, group)
ids = torch.arange(3, 40, device=group.device)[None]
parts = list(target.decoder.layers.parameters())
for _ in range(2):
    a, b = (t.trajectories(ids, (1, 2)) for t in (whole, target))
    assert torch.allclose(a.hidden, b.hidden, atol=1e-5) and torch.allclose(a.features, b.features)
    assert parts and all(isinstance(p, DTensor) for p in target.decoder.layers.parameters())
assert target.fingerprint == whole.fingerprint
dist.destroy_process_group()
"""


def test_a_sharded_target_gives_gathered_layers_back():
    """Else every process would soon hold the whole of it."""
    done = subprocess.run([sys.executable, "-c", SHARDED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_process_that_dies_stops_the_others_with_a_message(together, tmp_path):
    pairs = (*UNEVEN, "steps=500", "evaluation.every=500")
    processes, logs = together.begin(2, "sft", tmp_path / "r", *pairs)
    lines = tmp_path / "r" / "metrics.jsonl"
    while not lines.exists() or '"loss"' not in lines.read_text():
        time.sleep(0.05)
    os.kill(processes[1], signal.SIGKILL)
    began = time.monotonic()
    assert together.forked.status(processes[0]) == 1
    assert time.monotonic() - began < 30
    assert together.forked.status(processes[1]) == -signal.SIGKILL
    line = logs[0].read_text().splitlines()[-1]
    assert line.startswith("error: process 0 waits for another one that has ended")
    assert "--resume" in line and "Traceback" not in logs[0].read_text()


def test_what_cannot_be_split_is_refused(together, tmp_path):
    for pairs, message in (
        (("batch_size=1",), "batch_size: 1 trajectories cannot be shared by 2 processes"),
        (("data.heldout_limit=1",), "data.heldout: 1 trajectories cannot be shared"),
        (("parallel.tensor=3",), "parallel.tensor: 3 does not divide the 2 processes"),
    ):
        processes, logs = together.begin(2, "sft", tmp_path / "r", *pairs)
        assert [together.forked.status(p) for p in processes] == [2, 2]
        assert all(message in log.read_text().splitlines()[-1] for log in logs)
    assert not (tmp_path / "r").exists()
    recipe = ["parallel.target=shard", "data.cache_features=memory"]
    with pytest.raises(d.UserError, match=r"parallel\.target: shard needs data\.cache_features"):
        load_recipe("embedded", recipe, "opd")


def test_torchrun_starts_it(recipe_for, tmp_path):
    """As the documentation says it, through torch's own launcher."""
    recipe = recipe_for(
        "sft",
        tmp_path / "run",
        "steps=2",
        "evaluation.every=2",
        "batch_size=3",
        "data.max_length=90",
        "data.heldout_limit=2",
    )
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(free_port()),
        "-m",
        "draft_opd",
        "sft",
        "--config",
        str(tmp_path / "r.yaml"),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["processes"] == 2
