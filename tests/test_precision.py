"""Which type training multiplies in: decided once a run, kept on resuming, no 16 bit unasked."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from processes import weights
from torch.utils._python_dispatch import TorchDispatchMode

from draft_opd.training import precision
from draft_opd.training.config import Recipe, parse_recipe
from draft_opd.training.inputs import as_resolved
from draft_opd.training.muon import Muon, orthogonalize
from draft_opd.training.trainer import Run
from draft_opd.utils import machine
from draft_opd.utils.errors import UserError

CPU = torch.device("cpu")
PRODUCTS = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "addmv",
    "mv",
    "dot",
    "linear",
    "convolution",
    "attention",
    "einsum",
)


class NarrowProducts(TorchDispatchMode):
    """Remembers every operator that multiplies 16-bit matrices."""

    def __init__(self):
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(word in name for word in PRODUCTS):
            given = [*args, *(kwargs or {}).values()]
            if any(isinstance(x, torch.Tensor) and x.dtype.itemsize == 2 for x in given):
                self.found.add(name)
        return function(*args, **(kwargs or {}))


def fake_speed(monkeypatch, ratio: float) -> None:
    """Another machine, by how fast it multiplies bfloat16."""
    monkeypatch.setattr(precision, "speed_over_float32", lambda *_: ratio)
    monkeypatch.setattr(machine, "speed_over_float32", lambda *_: ratio)


def recipe(**more) -> Recipe:
    return parse_recipe(
        {
            "target": "embedded",
            "out": "x",
            "steps": 1,
            "optim": {"name": "muon"},
            "data": {"trajectories": "t", "heldout": "h"},
            **more,
        }
    )


@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 99))
def test_muon_is_torchs(rows, columns, seed):
    """In bfloat16, bit for bit, over three steps with weight decay."""
    torch.manual_seed(seed)
    start, gradients = torch.randn(rows, columns), torch.randn(3, rows, columns)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    steps = [
        Muon([ours], lr=0.1, weight_decay=0.1, dtype=torch.bfloat16),
        torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for gradient in gradients:
        for parameter, optimizer in zip((ours, theirs), steps, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(ours, theirs)


@given(rows=st.integers(2, 32), columns=st.integers(2, 32), seed=st.integers(0, 99))
def test_orthogonalizing_keeps_directions_and_evens_out_sizes(rows, columns, seed):
    """Singular vectors stay; what the iteration does to a singular value is a polynomial of it,
    here in float64 on the values alone."""
    torch.manual_seed(seed)
    matrix = torch.randn(rows, columns)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    value = s / s.norm()
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    expected = u @ torch.diag(value) @ v
    found = orthogonalize(matrix, torch.float32)
    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=0)
    assert torch.equal(matrix, matrix.clone()) and found.dtype == torch.float32


def test_muon_refuses_vectors():
    with pytest.raises(ValueError, match="matrices"):
        Muon([torch.nn.Parameter(torch.ones(3))], lr=1, weight_decay=0, dtype=torch.float32)


def test_the_measured_ratio_is_a_ratio_of_times():
    ratio = machine.speed_over_float32(torch.float64, CPU, 256)
    assert 0.1 < ratio < 1.2  # half as many numbers a register
    assert machine.speed_over_float32(torch.float64, CPU, 256) == ratio  # measured once


@pytest.mark.parametrize(
    "ratio, kind, expected",
    [
        (0.03, "cpu", ("float32", "float32")),
        (1.2, "cpu", ("float32", "float32")),
        (8.0, "cpu", ("bfloat16", "float32")),
        (0.4, "cuda", ("float32", "float32")),
        (10.0, "cuda", ("bfloat16", "bfloat16")),
    ],
)
def test_auto_follows_the_measurement(monkeypatch, ratio, kind, expected):
    fake_speed(monkeypatch, ratio)
    made, told = precision.resolve(recipe(), torch.device(kind), 64)
    assert (made.precision, made.optim.muon_dtype) == expected and told == ratio
    for kind in ("float32", "bfloat16"):
        given = recipe(precision=kind, optim={"muon_dtype": kind})
        assert precision.resolve(given, CPU, 64)[0] == given


def test_a_cpu_that_emulates_a_type_is_named_once(monkeypatch, caplog):
    fake_speed(monkeypatch, 0.03)
    precision.warn_of(recipe(precision="bfloat16", optim={"name": "muon"}), CPU)
    assert [r.getMessage() for r in caplog.records] == [
        "precision: bfloat16: this CPU multiplies bfloat16 at 0.03 times the speed of float32; "
        "float32 is faster here"
    ]
    precision.warn_of(recipe(), CPU)
    machine.warn_if_slow("--dtype float32", torch.float32, CPU)
    fake_speed(monkeypatch, 2.0)
    machine.warn_if_slow("--dtype bfloat16", torch.bfloat16, CPU)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("objective", ["dpace", "acceptance_aware"])
def test_a_float32_step_multiplies_nothing_in_16_bit(target, recipe_for, trained_folder, tmp_path, objective):
    """Target, traces, drafter, losses, Muon; features are remembered in bfloat16 all the same."""
    pairs = (
        "precision=float32",
        f"opd.objective.kind={objective}",
        "batch_size=2",
        f"drafter={trained_folder}",
    )
    for stage in ("sft", "opd"):
        run = Run(stage, recipe_for(stage, tmp_path / stage, *pairs), target=target)
        with NarrowProducts() as seen:
            run.step(0)
        assert run.recipe.optim.name == "muon" and not seen.found
        assert torch.get_float32_matmul_precision() == "highest"
    narrow = recipe_for("sft", tmp_path / "narrow", *pairs, "precision=bfloat16")
    with NarrowProducts() as seen:
        Run("sft", narrow, target=target).step(0)
    assert seen.found  # the check does see them


def train(target, recipe_for, out, *pairs, resume=False):
    Run("sft", recipe_for("sft", out, *pairs), target=target, resume=resume).train()


def test_a_run_goes_on_in_the_types_it_began_with(target, recipe_for, tmp_path, monkeypatch):
    """Begun where bfloat16 is slow, resumed where it is fast: the same bits."""
    auto = ("precision=auto", "save_every=2", "batch_size=2")
    fake_speed(monkeypatch, 0.03)
    whole = tmp_path / "whole"
    train(target, recipe_for, whole, *auto)
    tree = yaml.safe_load((whole / "recipe.yaml").read_text())
    assert (tree["precision"], tree["optim"]["muon_dtype"]) == ("float32", "float32")
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    shutil.rmtree(half / "last")
    shutil.rmtree(half / "best")
    (half / "checkpoints" / "step-00000002").rename(half / "last")
    fake_speed(monkeypatch, 9.0)
    train(target, recipe_for, half, *auto, resume=True)
    one, other = weights(whole), weights(half)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads((half / "run.json").read_text())["bfloat16_speed"] == 0.03
    for changed in ("precision=bfloat16", "optim.muon_dtype=bfloat16"):
        with pytest.raises(UserError, match=r"changed: .*float32 -> bfloat16"):
            train(target, recipe_for, half, *auto, changed, resume=True)


def test_a_run_of_before_the_key_keeps_its_bfloat16(recipe_for, tmp_path):
    """Version 0.1 wrote no muon_dtype, and torch's Muon multiplied in bfloat16."""
    now = recipe_for("sft", tmp_path / "run", "precision=auto")
    before = now.model_dump(mode="json")
    before["precision"] = "float32"
    del before["optim"]["muon_dtype"], before["evaluation"]["patience"]
    resumed = as_resolved(now, before)
    assert resumed.precision == "float32" and resumed.optim.muon_dtype == "bfloat16"
