"""A round looks at no value of a tensor, so on CUDA nothing waits for the device."""

import copy

import pytest
import torch
from torch import nn

import draft_opd as d
from draft_opd.decoding.noise import round_noise
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.step import DecodeStep
from draft_opd.models.kv_cache import PositionCache


def without_values(module: nn.Module) -> nn.Module:
    """The same module with shapes only: to look at a value raises."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, x in store.items():
                if x is not None:
                    empty = torch.empty(x.shape, dtype=x.dtype, device="meta")
                    store[name] = empty if store is part._buffers else nn.Parameter(empty, False)
    return module


def empty_cache(layers, heads, width, batch, capacity):
    shape = (batch, heads, capacity, width)
    made = [[torch.empty(shape, device="meta") for _ in range(layers)] for _ in range(2)]
    return PositionCache.of(*made)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_round_reads_nothing_from_the_device(trained, family, batch, temperature):
    real, count, capacity = d.Target.from_pretrained("embedded", device="cpu"), 5, 64
    ids = torch.arange(12).view(2, 6)
    out = real.trajectories(ids, trained.target_layers)
    shapes = trained.build_cache(real, ids, out.features)
    drafter = copy.deepcopy(trained)
    with torch.no_grad():
        without_values(real.model)
        without_values(drafter)
        c = real.config
        cache = empty_cache(c.num_hidden_layers, c.num_key_value_heads, c.head_dim, batch, capacity)
        context = PositionCache.of(
            *(
                [torch.empty(batch, x.shape[1], capacity, x.shape[3], device="meta") for x in store]
                for store in (shapes.keys, shapes.values)
            )
        )
        rounds = DecodeStep(real, drafter, cache, context, Sampling(temperature=temperature))
        last = torch.zeros(batch, dtype=torch.long, device="meta")
        rounds.set_bound(36, filled=batch == 1)  # as a decode of one row has it
        before = [*cache.keys, *cache.values, *context.keys, *context.values]
        noise = round_noise(last, last + 30, count) if temperature else None
        table = rounds(last + 30, last, count, noise)
        assert table.shape == (batch, 2 + count)
        # The storage stays where it is, and nothing in it grew.
        after = [*cache.keys, *cache.values, *context.keys, *context.values]
        assert all(a is b for a, b in zip(before, after, strict=True))
        with pytest.raises(RuntimeError, match="meta"):  # so this test can fail
            table.tolist()
        cache.set_bound(None)
        with pytest.raises(RuntimeError, match="meta"):
            rounds(last + 30, last, count, noise)
