"""Randomness as an input: a uniform number for every row, position and role, from a counter.

A row draws the same numbers whether it decodes alone, in a batch, behind another row, or in a captured
graph: they depend on its key and on positions, not on the order of the draws.

A position's numbers are used again where an earlier round was rejected before it. That is sound: what a
round commits up to its first rejection depends only on numbers of positions up to there, and the next
round begins behind it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAFT, COIN, BONUS = 0, 1, 2  # roles
# Constants of splitmix64 (Steele et al. 2014), as signed 64-bit integers.
GOLDEN, FIRST, SECOND = (x - (1 << 64) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def row_keys(seeds: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
    """A 63-bit key for each row, by its seed and its prompt's token ids.

    Equal rows get different keys by their order, so that copies of a prompt draw different texts.
    """
    copies: Counter[tuple] = Counter()
    keys = []
    for seed, prompt in zip(seeds, prompts, strict=True):
        row = (seed, *prompt)
        text = f"{copies[row]}/{','.join(map(str, row))}"
        keys.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1)
        copies[row] += 1
    return keys


def _shift(x: Tensor, bits: int) -> Tensor:
    """x >> bits without its sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def uniforms(keys: Tensor, positions: Tensor, role: int) -> Tensor:
    """keys [N], positions [N, M], both int64 -> [N, M] float64 in [0, 1)."""
    counters = _mixed(keys[:, None] + GOLDEN * (3 * positions + role + 1))
    return _shift(counters, 11).double() * 2.0**-53


@dataclass
class Noise:
    """Uniform numbers of one round: `draft` and `coin` [N, K] for offsets 1..K, `bonus` [N, K + 1]
    for a bonus token behind 0..K accepted ones."""

    draft: Tensor
    coin: Tensor
    bonus: Tensor


def round_noise(keys: Tensor, anchors: Tensor, num_draft_tokens: int) -> Noise:
    """The numbers of a round that begins at `anchors` [N] (its first token has the next position)."""
    positions = anchors[:, None] + torch.arange(1, num_draft_tokens + 2, device=anchors.device)
    drafted = positions[:, :-1]
    return Noise(
        uniforms(keys, drafted, DRAFT), uniforms(keys, drafted, COIN), uniforms(keys, positions, BONUS)
    )


def pick(probs: Tensor, uniform: Tensor) -> Tensor:
    """Token ids [...] from distributions [..., V] by inverse transform: uniform [...] in [0, 1).

    Never one of probability 0. Ties cannot occur: the tokens' intervals do not overlap.
    """
    reached = probs.double().cumsum(-1)
    wanted = uniform.double()[..., None] * reached[..., -1:]
    # The first token whose interval ends behind the number.
    return torch.searchsorted(reached, wanted, right=True)[..., 0].clamp_max(probs.shape[-1] - 1)
