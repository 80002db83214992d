"""RMS norms as one operator, for inference in float32 on a CPU.

transformers writes the norm as seven operators. torch's own computes the same bits in one call, which a
decoding step of a small model notices: it is mostly the calling of operators.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def forward(self: nn.Module, x: Tensor) -> Tensor:  # under this name a fused module can be pickled
    if torch.is_grad_enabled() or x.dtype != torch.float32:
        return type(self).forward(self, x)
    return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


@torch.no_grad()
def _computes_the_same(norm: nn.Module, weight: Tensor) -> bool:
    x = torch.linspace(-3, 5, 3 * len(weight)).view(3, -1).sin()
    try:
        return torch.equal(norm(x), F.rms_norm(x, weight.shape, weight, norm.variance_epsilon))
    except (AttributeError, TypeError, RuntimeError):
        return False


def fuse_norms(module: nn.Module) -> None:
    """Lets every RMS norm of a module in float32 on a CPU run as one operator, where that gives the same
    bits. Training is as before."""
    for part in module.modules():
        weight = getattr(part, "weight", None)
        plain = isinstance(weight, Tensor) and not isinstance(weight, DTensor) and weight.is_cpu
        if not type(part).__name__.endswith("RMSNorm") or "forward" in vars(part) or not plain:
            continue
        if weight.ndim == 1 and weight.dtype == torch.float32 and _computes_the_same(part, weight):
            part.forward = MethodType(forward, part)


def unfuse_norms(module: nn.Module) -> None:
    """Undoes `fuse_norms`."""
    for part in module.modules():
        own = vars(part).get("forward")
        if getattr(own, "__func__", None) is forward:
            del part.forward
