"""Prepacked matrices compute what nn.Linear computes, and follow their weights."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from draft_opd.models.cpu_linear import PrepackedLinear, available, prepack, unpack
from draft_opd.models.cpu_linear import _takes as takes

pytestmark = pytest.mark.skipif(not available(), reason="this torch has no oneDNN")


def pair(inputs, outputs, bias=False, dtype=torch.float32):
    torch.manual_seed(inputs * outputs)
    plain = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    packed = copy.deepcopy(plain)
    prepack(packed)
    assert type(packed) is PrepackedLinear
    packed._least = 1  # whatever its size
    return plain, packed


@settings(deadline=None, max_examples=40)
@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    shape=st.lists(st.integers(1, 5), max_size=3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_same_products(inputs, outputs, bias, shape, dtype):
    dtype = getattr(torch, dtype)
    plain, packed = pair(inputs, outputs, bias, dtype)
    x = torch.randn(*shape, inputs).to(dtype)
    found = packed(x)
    assert (dtype in packed._kept) == takes(dtype) and found.shape == plain(x).shape and found.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(found, plain(x), rtol=bound, atol=bound * inputs)


def test_a_changed_weight_is_packed_again():
    plain, packed = pair(64, 64)
    x = torch.randn(3, 64)
    packed(x)
    for change in (
        lambda m: m.weight.mul_(2),
        lambda m: m.load_state_dict({"weight": torch.ones(64, 64)}),
        lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(64, 64), requires_grad=False)),
    ):
        for module in (plain, packed):
            change(module)
        assert torch.allclose(packed(x), plain(x), atol=1e-4)


def test_an_optimiser_step_is_seen():
    _, packed = pair(64, 64)
    packed.requires_grad_(True)
    x = torch.randn(3, 64)
    with torch.no_grad():
        before = packed(x)
    packed(x).square().sum().backward()  # with gradient: nn.Linear's own product
    torch.optim.AdamW(packed.parameters(), lr=0.1).step()
    with torch.no_grad():
        after = packed(x)
    assert not torch.allclose(before, after)
    assert torch.allclose(after, x @ packed.weight.t(), atol=1e-4)


def test_autocast_and_its_type():
    plain, packed = pair(64, 64)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = packed(x), plain(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(found.float(), expected.float(), atol=0.05)
    assert packed(x).dtype == torch.float32


def test_used_ones_are_copied_and_saved_without_what_was_packed():
    _, packed = pair(64, 64)
    x = torch.randn(3, 64)
    expected = packed(x)
    again = copy.deepcopy(packed)
    assert not again._kept and torch.equal(again(x), expected)
    assert list(packed.state_dict()) == ["weight"]


def test_the_target_and_drafters_use_them(target, trained):
    trained.bind(target)
    wide = target.decoder.layers[0].mlp.down_proj
    assert type(wide) is type(target.head) is PrepackedLinear
    assert any(type(m) is PrepackedLinear for m in trained.modules())
    wide._kept.clear()
    few, many = torch.randn(1, wide.in_features), torch.randn(512, wide.in_features)
    with torch.no_grad():
        wide(few)
        assert not wide._kept  # a small matrix, and too few rows to be worth it
        assert torch.allclose(wide(many), many @ wide.weight.t(), atol=1e-3)
    assert torch.float32 in wide._kept


def test_a_replaced_weight_is_packed_again_wherever_it_lies():
    """The allocator likes to give a new weight the old one's address."""
    _, packed = pair(256, 256)
    x = torch.randn(3, 256)
    for _ in range(10):
        packed.weight = None
        packed.weight = nn.Parameter(torch.randn(256, 256), requires_grad=False)
        assert torch.allclose(packed(x), x @ packed.weight.t(), atol=1e-3)


def test_weights_made_in_inference_mode_and_wrong_types():
    with torch.inference_mode():
        plain, packed = pair(64, 64)
        x = torch.randn(3, 64)
        assert torch.allclose(packed(x), plain(x), atol=1e-4)
    with pytest.raises(RuntimeError):  # as nn.Linear, and as a GPU
        packed(torch.randn(3, 64).bfloat16())


@settings(max_examples=40)
@given(shape=st.lists(st.integers(1, 9), max_size=3), width=st.integers(1, 300), seed=st.integers(0, 99))
def test_norms_give_the_same_bits(shape, width, seed):
    torch.manual_seed(seed)
    norm = Qwen3RMSNorm(width, eps=1e-6).requires_grad_(False)
    norm.weight.normal_()
    twin = copy.deepcopy(norm)
    prepack(twin)
    assert "forward" in vars(twin)
    x = torch.randn(*shape, width) * 10
    with torch.no_grad():
        assert torch.equal(norm(x), twin(x))
        assert torch.equal(norm(x.bfloat16()), twin(x.bfloat16()))
        twin.weight.mul_(2)
        assert torch.equal(copy.deepcopy(twin)(x), 2 * norm(x))  # follows its weight, and so do copies
        assert torch.equal(pickle.loads(pickle.dumps(twin))(x), twin(x))
    unpack(twin)
    assert "forward" not in vars(twin)


def test_a_norm_that_computes_otherwise_stays():
    """Gemma's multiplies with 1 + weight."""
    norm = Gemma3RMSNorm(8, eps=1e-6)
    prepack(norm)
    assert "forward" not in vars(norm)
