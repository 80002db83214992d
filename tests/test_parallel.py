"""Two processes train the drafter that one process trains, for every family."""

import pytest
import torch
from processes import PAPER, UNEVEN, assert_same_run, weights


@pytest.mark.parametrize(
    ("stage", "pairs", "parallel"),
    [
        ("sft", (), ()),
        ("opd", PAPER, ()),
        ("opd", ("opd.objective.kind=dpace", "opd.anchors=occupancy"), ()),
        ("opd", PAPER, ("parallel.drafter=shard", "parallel.target=shard")),
    ],
)
def test_two_processes_are_one(together, tmp_path, stage, pairs, parallel):
    """The same losses, gradients' norms and figures (relative 1e-5), whatever is shared out."""
    one = together(1, stage, tmp_path / "one", *UNEVEN, *pairs)
    two = together(2, stage, tmp_path / "two", *UNEVEN, *pairs, *parallel)
    assert_same_run(one, two)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)
