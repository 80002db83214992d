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


@pytest.mark.parametrize("family", ["dspark"], indirect=True)
@pytest.mark.parametrize("parallel", [(), ("parallel.drafter=shard",)])
def test_other_heads_are_shared_out_too(together, family, tmp_path, parallel):
    """Muon and shards of a head with one row; a confidence that has no loss, so that its gradient is zero."""
    pairs = (*UNEVEN, "optim.name=muon", *([] if parallel else ["heads.confidence_weight=0"]))
    one = together(1, "sft", tmp_path / "one", *pairs)
    two = together(2, "sft", tmp_path / "two", *pairs, *parallel)
    assert_same_run(one, two)
