"""Matrices in oneDNN's own layout, for products without gradient on a CPU.

torch hands float32 products to MKL, which takes slower code on processors that are not Intel's and
pays its packing anew at every call; a verification is a product of few rows, where that is most of
the time. oneDNN packs a matrix once (`benchmarks/verification.py` measures what it brings). These
are the operators that torch.compile's inductor uses for frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from draft_opd.models.cpu_norm import fuse_norms, unfuse_norms

# A smaller matrix stays in the cache, and a call costs as much as a product of few rows.
LARGE = 1 << 18
LEAST = 1 << 21  # multiplications from which the packed product pays for a smaller matrix
ROWS = 64  # rows from which packing pays even where the packed weight is used once


@cache
def available() -> bool:
    """Whether this torch has the operators, and they compute what they should."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        x, weight = torch.eye(16), torch.arange(256.0).view(16, 16)
        return torch.equal(_product(x, _pack(weight)), weight.t())
    except (AttributeError, RuntimeError):
        return False


@cache
def _takes(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies packed matrices of that type."""
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach())


def _product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def multiplier(weight: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """x [..., in] -> x @ weight.T [..., out] without gradient, for so many rows in all: packs the
    weight [out, in] for the time being where that pays."""
    # Products of 16 bit, and so those under autocast, are oneDNN's anyway.
    wide = weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if weight.is_cpu and wide and rows >= ROWS and available():
        packed = _pack(weight)
        return lambda x: _product(x, packed)
    return lambda x: F.linear(x, weight)


class PrepackedLinear(nn.Linear):
    """Computes as nn.Linear; keeps a packed copy of its weight for each type that it was used in.

    The copy is made when it is first needed, and again when the weight was replaced or changed in
    place (changes through `.data` are not seen, as autograd does not see them).
    """

    _kept: dict[torch.dtype, tuple[Tensor, int, Tensor]]
    _least: int  # numbers in an input that is worth it

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() < self._least or not x.is_cpu:
            return F.linear(x, self.weight, self.bias)
        weight, dtype = self.weight, x.dtype
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return F.linear(x, weight, self.bias)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        elif dtype != weight.dtype:
            return F.linear(x, weight, self.bias)  # which says what is wrong
        if not _takes(dtype):
            return F.linear(x, weight, self.bias)
        bias = None if self.bias is None else self.bias.to(dtype)
        return _product(x.to(dtype), self._packed(dtype), bias)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": {}}  # packed tensors cannot be copied

    def _packed(self, dtype: torch.dtype) -> Tensor:
        weight = self.weight
        version = -1 if weight.is_inference() else weight._version
        kept = self._kept.get(dtype)
        if kept is None or kept[0].data_ptr() != weight.data_ptr() or kept[1] != version:
            # The cache knows a weight by its address. It keeps the weight, so that no other tensor can
            # get the same address.
            kept = self._kept[dtype] = (weight.detach(), version, _pack(weight.to(dtype)))
        return kept[2]


def unpack(module: nn.Module) -> None:
    """Undoes `prepack`: where weights come and go (sharded ones), a kept copy would be stale."""
    for part in module.modules():
        if type(part) is PrepackedLinear:
            part.__class__ = nn.Linear
            del part._kept, part._least
    unfuse_norms(module)


def prepack(module: nn.Module) -> None:
    """Lets every plain nn.Linear of a module on a CPU multiply with packed weights, from its next
    use on, and its RMS norms run as one operator. This takes as much memory again as the matrices do."""
    fuse_norms(module)
    if not available():
        return
    for part in module.modules():
        if type(part) is nn.Linear and part.weight.is_cpu and not isinstance(part.weight, DTensor):
            part.__class__ = PrepackedLinear
            part._kept = {}
            large = part.weight.numel() >= LARGE
            part._least = 1 if large else LEAST // part.out_features
