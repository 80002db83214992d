"""The closed forms as Triton kernels: logits are read in their own type and overwritten by gradients.

`closed_form` converts logits to float32 and goes over them several times. Here one program takes a row of
the vocabulary: it sums in float32, then writes the gradient in place. Values and gradients are those of
`closed_form`, up to the order of sums. CUDA only; tests run the kernels in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from draft_opd.losses.divergences import Score, cross_entropy, forward_kl, reverse_kl

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU's torch comes without it
    triton = None

BLOCK = 4096  # columns at a time
# (draft logits [n, V], target logits [n, V] or None, labels [n] or None, draft scale, target scale) ->
# scores [n] float32 and their gradients to the unscaled draft logits [n, V], in the place of these.
Fused = Callable[[Tensor, Tensor | None, Tensor | None, float, float], tuple[Tensor, Tensor]]


@cache
def available(device: torch.device) -> bool:
    """Whether the kernels run on this device."""
    return triton is not None and device.type == "cuda"


if triton is not None:

    @triton.jit
    def _load(base, at, columns: tl.constexpr, scale):
        x = tl.load(base + at, mask=at < columns, other=-float("inf"))
        return x.to(tl.float32) * scale

    @triton.jit
    def _log_norm(base, columns: tl.constexpr, scale, block: tl.constexpr):
        """log Σ exp of a row, in one pass."""
        top, total = -1e30, 0.0
        for start in range(0, columns, block):
            x = _load(base, start + tl.arange(0, block), columns, scale)
            higher = tl.maximum(top, tl.max(x))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher))
            top = higher
        return top + tl.log(total)

    @triton.jit
    def _cross_entropy_kernel(
        draft, labels, scores, columns: tl.constexpr, stride, scale, block: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        base, label = draft + row * stride, tl.load(labels + row)
        # Loaded before the sums, whose barriers keep it before the gradient that overwrites it.
        logit = tl.load(base + label).to(tl.float32) * scale
        norm = _log_norm(base, columns, scale, block)
        tl.store(scores + row, norm - logit)
        for start in range(0, columns, block):
            at = start + tl.arange(0, block)
            q = tl.exp(_load(base, at, columns, scale) - norm)
            slope = (q - (at == label).to(tl.float32)) * scale
            tl.store(base + at, slope.to(draft.dtype.element_ty), mask=at < columns)

    @triton.jit
    def _forward_kl_kernel(
        draft,
        target,
        scores,
        columns: tl.constexpr,
        stride,
        other_stride,
        scale,
        other_scale,
        block: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        base, other = draft + row * stride, target + row * other_stride
        norm = _log_norm(base, columns, scale, block)
        other_norm = _log_norm(other, columns, other_scale, block)
        score = 0.0
        for start in range(0, columns, block):
            at = start + tl.arange(0, block)
            log_q = _load(base, at, columns, scale) - norm
            log_p = _load(other, at, columns, other_scale) - other_norm
            p = tl.exp(log_p)
            score += tl.sum(tl.where(p == 0, 0.0, p * (log_p - log_q)))
            tl.store(base + at, ((tl.exp(log_q) - p) * scale).to(draft.dtype.element_ty), mask=at < columns)
        tl.store(scores + row, score)

    @triton.jit
    def _reverse_kl_kernel(
        draft,
        target,
        scores,
        columns: tl.constexpr,
        stride,
        other_stride,
        scale,
        other_scale,
        block: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        base, other = draft + row * stride, target + row * other_stride
        norm = _log_norm(base, columns, scale, block)
        other_norm = _log_norm(other, columns, other_scale, block)
        score = 0.0
        for start in range(0, columns, block):
            at = start + tl.arange(0, block)
            log_q = _load(base, at, columns, scale) - norm
            log_p = _load(other, at, columns, other_scale) - other_norm
            q = tl.exp(log_q)
            score += tl.sum(tl.where(q == 0, 0.0, q * (log_q - log_p)))
        tl.store(scores + row, score)
        for start in range(0, columns, block):
            at = start + tl.arange(0, block)
            log_q = _load(base, at, columns, scale) - norm
            log_p = _load(other, at, columns, other_scale) - other_norm
            q = tl.exp(log_q)
            slope = tl.where(q == 0, 0.0, q * (log_q - log_p - score)) * scale
            tl.store(base + at, slope.to(draft.dtype.element_ty), mask=at < columns)


def _device_of(draft: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which may be another one."""
    return torch.cuda.device(draft.device) if draft.is_cuda else nullcontext()


def _scores(draft: Tensor) -> Tensor:
    return torch.empty(len(draft), dtype=torch.float32, device=draft.device)


def _cross_entropy(draft, _target, labels, draft_scale, _target_scale):
    scores = _scores(draft)
    columns, stride = draft.shape[1], draft.stride(0)
    with _device_of(draft):
        _cross_entropy_kernel[(len(draft),)](draft, labels, scores, columns, stride, draft_scale, block=BLOCK)
    return scores, draft


def _divergence(kernel: object) -> Fused:
    def run(draft, target, _labels, draft_scale, target_scale):
        scores, strides = _scores(draft), (draft.stride(0), target.stride(0))
        with _device_of(draft):
            kernel[(len(draft),)](
                draft, target, scores, draft.shape[1], *strides, draft_scale, target_scale, block=BLOCK
            )
        return scores, draft

    return run


FUSED: dict[Score, Fused] = {}
if triton is not None:
    FUSED = {
        cross_entropy: _cross_entropy,
        forward_kl: _divergence(_forward_kl_kernel),
        reverse_kl: _divergence(_reverse_kl_kernel),
    }
