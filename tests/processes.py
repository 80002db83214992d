"""Runs in several processes, and what they should be equal to."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

ADAMW = ("optim.name=adamw", "optim.learning_rate=1e-4")
# Batches that two processes cannot share evenly, and two forwards a step.
UNEVEN = (
    "steps=4",
    "evaluation.every=2",
    "batch_size=5",
    "accumulate=2",
    "data.max_length=110",
    "data.heldout_limit=3",
    *ADAMW,
)
PAPER = (
    "opd.objective.kind=acceptance_aware",
    "opd.trace_every=2",
    "data.cache_features=none",
    "opd.max_anchors=6",
)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path) -> dict:
    return load_file(out / "last" / "model.safetensors")


def assert_same_run(one: list[dict], many: list[dict]) -> None:
    assert [m["step"] for m in one] == [m["step"] for m in many]
    for a, b in zip(one, many, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            if isinstance(a[key], float):
                assert b[key] == pytest.approx(a[key], rel=1e-5), (a["step"], key)
            else:
                assert a[key] == b[key], (a["step"], key)
