"""The rounds that a stored text still takes, from each of its positions, and what a token is worth.

Offset k of a block drafted at anchor a survives with probability α(a, k), so that a round accepts n tokens
with P(n | a) = Π_{k<=n} α(a, k) (1 - α(a, n + 1)). Then, with V = 0 at and beyond the last token,

    V(a) = 1 + Σ_n P(n | a) V(a + n + 1)            rounds to go
    v(a + n + 1) += v(a) P(n | a)                   the probability that a round begins there (occupancy)
    ∂V(first) / ∂α(a, k) = v(a) Π_{j<k} α(a, j) (C(a, k) - V(a + k))

where C(a, k) is the expected value once offset k is accepted. With the matrix P of moves from anchor to
anchor, V = (I - P)^-1 1 and v = (I - P^T)^-1 e_first: triangular systems, solved in pieces since P is a band.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 256  # anchors that are solved at once


def stop_probabilities(alpha: Tensor, valid: Tensor) -> Tensor:
    """P(n | a) [..., A, K + 1] in float64, n = 0..K; offsets that are not valid are never accepted."""
    alpha = torch.where(valid, alpha.double(), 0.0)
    survival = F.pad(alpha.cumprod(-1), (1, 0), value=1.0)  # Π_{k<=n}, n = 0..K
    return survival - F.pad(survival[..., 1:], (0, 1))


def _pieces(stops: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Begin, end, and the moves [..., end - begin, end - begin + K + 1] from these anchors to these and to
    the K + 1 behind them."""
    count, moves = stops.shape[-2:]
    move = torch.arange(1, moves + 1, device=stops.device)
    for begin in range(0, count, PIECE):
        end = min(begin + PIECE, count)
        size = end - begin
        where = torch.arange(size, device=stops.device)[:, None] + move
        band = stops.new_zeros(*stops.shape[:-2], size, size + moves)
        part = stops[..., begin:end, :]
        yield begin, end, band.scatter(-1, where.expand(part.shape), part)


def rounds_to_go(alpha: Tensor, valid: Tensor) -> Tensor:
    """V [..., A + K + 1] at A consecutive anchors and, 0, behind them; alpha, valid [..., A, K]."""
    stops, real = stop_probabilities(alpha, valid), valid.any(-1)
    later = stops.new_zeros(*stops.shape[:-2], stops.shape[-1])
    found = [later]
    for begin, end, band in reversed(list(_pieces(stops))):
        size = end - begin
        behind = (band[..., size:] @ later[..., None])[..., 0]
        inner = torch.eye(size, dtype=band.dtype, device=band.device) - band[..., :size]
        right = (1 + behind) * real[..., begin:end]
        solved = torch.linalg.solve_triangular(inner, right[..., None], upper=True, unitriangular=True)
        found.append(solved[..., 0] * real[..., begin:end])
        later = torch.cat([found[-1], later], -1)[..., : stops.shape[-1]]
    return torch.cat(found[::-1], -1)


def occupancy(alpha: Tensor, valid: Tensor) -> Tensor:
    """Probability [..., A] that a round begins at each of A consecutive anchors.

    alpha, valid [..., A, K]; the first anchor begins a round. Offsets past the end of the text are
    not valid.
    """
    stops, found = stop_probabilities(alpha, valid), []
    coming = stops.new_zeros(*stops.shape[:-2], stops.shape[-1])  # at the anchors of the next piece
    coming[..., 0] = 1.0
    for begin, end, band in _pieces(stops):
        size = end - begin
        inner = torch.eye(size, dtype=band.dtype, device=band.device) - band[..., :size]
        right = F.pad(coming, (0, max(0, size - coming.shape[-1])))[..., :size, None]
        solved = torch.linalg.solve_triangular(inner.mT, right, upper=False, unitriangular=True)
        found.append(solved[..., 0])
        coming = F.pad(coming[..., size:], (0, min(size, coming.shape[-1])))
        coming = coming + (band[..., size:].mT @ solved)[..., 0]
    return torch.cat(found, -1) * valid.any(-1)


def advantages(alpha: Tensor, ahead: Tensor) -> Tensor:
    """V(a + k) - C(a, k) [..., K]: the rounds that accepting offset k saves, given that those before it are.

    alpha [..., K]; ahead [..., K + 1]: V at a + 1 .. a + K + 1.
    """
    ahead = ahead.to(alpha)
    kept = ahead[..., -1]  # C(a, K) = V(a + K + 1)
    found = [ahead[..., -2] - kept]
    for k in range(alpha.shape[-1] - 2, -1, -1):
        kept = torch.lerp(ahead[..., k + 1], kept, alpha[..., k + 1])
        found.append(ahead[..., k] - kept)
    return torch.stack(found[::-1], -1)


def survival_before(alpha: Tensor) -> Tensor:
    """Π_{j<k} α_j [..., K]: the probability that offset k is reached."""
    return F.pad(alpha.cumprod(-1)[..., :-1], (1, 0), value=1.0)
