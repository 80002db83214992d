"""Layers that are compiled once a kind give the tokens of layers that are not."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import draft_opd as d
from draft_opd.decoding.generate import FUSE_FROM, pays_to_fuse
from draft_opd.decoding.noise import row_keys
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.static import StaticBatch
from draft_opd.drafters import dflash, eagle3
from draft_opd.models import layer_walk
from draft_opd.models.cpu_linear import unpack
from draft_opd.models.fused_layers import FusedLayers, kind_of


@pytest.fixture(scope="module")
def plain():
    return d.Target.from_pretrained("embedded", device="cpu", prepacked=False)


@pytest.fixture
def drafter(trained_folder):
    drafter = d.Drafter.from_pretrained(str(trained_folder), device="cpu")
    unpack(drafter)
    return drafter


def fuse(target, drafter, backend):
    """Compiled layers of this backend for both."""
    torch._dynamo.reset()
    target.walk.fused = FusedLayers(target.walk.layers, layer_walk._over_slots, backend)
    if drafter.family == "dflash":
        drafter.fused = FusedLayers(drafter.layers, dflash._over_slots, backend)
    else:
        drafter.fused = FusedLayers([drafter.midlayer], eagle3._with_rotary, backend)


def rounds(target, drafter, prompts, fused, shapes):
    """Tables of rounds of these (rows, slots, drafted tokens)."""
    batch = StaticBatch(target, drafter, Sampling(), len(prompts), 512, 7, fused)
    tables = []
    with torch.inference_mode():
        batch.admit(range(len(prompts)), prompts, row_keys([0] * len(prompts), prompts))
        for shape in shapes:
            batch.round(*shape)
            tables.append(batch.table[: shape[0], : 2 + shape[2]].tolist())
    return tables


def test_a_compilation_a_kind(plain, drafter, heldout):
    """For any bucket, number of rows and draft length; a size of one is a variant of its own."""
    prompts = [t.prompt_ids for t in heldout[:3]]
    shapes = [(3, 256, 7), (3, 384, 7), (2, 384, 7), (3, 384, 4)]
    wanted = rounds(plain, drafter, prompts, False, shapes)
    counter = CompileCounterWithBackend("eager")
    fuse(plain, drafter, counter)
    assert rounds(plain, drafter, prompts, True, shapes) == wanted
    assert len(set(plain.walk.fused.kinds)) == 1 and plain.num_layers == 8
    # One of the target. Of a drafter one, and one more where a first step has no step before it.
    assert counter.frame_count <= (2 if drafter.family == "dflash" else 3)


def test_kinds_differ_by_what_a_layer_computes(plain):
    first, last = plain.walk.layers[0], plain.walk.layers[-1]
    assert kind_of(first) == kind_of(last)
    eps = last.input_layernorm.variance_epsilon
    last.input_layernorm.variance_epsilon = 2 * eps
    try:
        assert kind_of(first) != kind_of(last)
    finally:
        last.input_layernorm.variance_epsilon = eps


def test_short_work_does_not_wait_for_a_compiler():
    assert not pays_to_fuse(prompts=8, rows=8, limit=FUSE_FROM - 1)
    assert pays_to_fuse(prompts=9, rows=8, limit=FUSE_FROM // 2)


@pytest.mark.slow
def test_inductor_makes_kernels_of_the_layers(plain, drafter, heldout):
    prompts, shapes = [t.prompt_ids for t in heldout[:2]], [(2, 384, 7)] * 3
    wanted = rounds(plain, drafter, prompts, False, shapes)
    fuse(plain, drafter, "inductor")
    assert rounds(plain, drafter, prompts, True, shapes) == wanted
