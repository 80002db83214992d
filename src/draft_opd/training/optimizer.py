"""AdamW; or Muon for the hidden matrices and AdamW for the rest, at the same learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from draft_opd.training.config import Optim
from draft_opd.training.distributed import distribute_like, gather_full_tensors
from draft_opd.training.muon import Muon

TAIL = 0.1  # of the peak, where steps are added at a constant rate


def learning_rate(step: int, steps: int, o: Optim, extended_from: Sequence[int] = ()) -> float:
    """Linear warm-up, then cosine to `final_ratio` of the peak, for step 0..steps-1.

    extended_from: numbers of steps that the run had before it was lengthened, ascending; what was
    added follows `o.extension`.
    """
    bounds = [n for n in extended_from if n < steps]
    if bounds and o.extension != "rescale":
        begin = max((n for n in bounds if n <= step), default=0)
        if begin and o.extension == "constant":
            return o.learning_rate * TAIL
        end = min((n for n in bounds if n > step), default=steps)
        step, steps = step - begin, end - begin
    warm = max(1, round(o.warmup * steps))
    if step < warm:
        return o.learning_rate * (step + 1) / warm
    part = (step - warm) / max(1, steps - warm)
    return o.learning_rate * (o.final_ratio + (1 - o.final_ratio) * (1 + math.cos(math.pi * part)) / 2)


class Optimizer:
    """One optimiser to the loop, whatever it is made of; its state is a flat dict of tensors."""

    def __init__(self, model: nn.Module, options: Optim):
        """`options.muon_dtype` must be resolved (`precision.resolve`) where Muon is used."""
        self._names = {p: n for n, p in model.named_parameters()}
        # Heads and tables are left to AdamW, as Muon's authors do.
        tables = getattr(model, "tables", ("lm_head",))
        matrices = [
            p
            for p, n in self._names.items()
            if options.name == "muon" and p.ndim == 2 and not n.startswith(tables)
        ]
        chosen = {id(p) for p in matrices}
        others = [p for p in self._names if id(p) not in chosen]
        shared = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
        self.members: list[torch.optim.Optimizer] = []
        if others:
            self.members.append(torch.optim.AdamW(others, betas=options.betas, **shared))
        if matrices:
            if options.muon_dtype == "auto":
                raise ValueError("optim.muon_dtype is 'auto': resolve it first")
            dtype = getattr(torch, options.muon_dtype)
            self.members.append(Muon(matrices, dtype=dtype, **shared))

    def set_rate(self, rate: float) -> None:
        for member in self.members:
            for group in member.param_groups:
                group["lr"] = rate

    def step(self) -> None:
        for member in self.members:
            member.step()
        self.forget()

    def forget(self) -> None:
        """Drops gradients."""
        for member in self.members:
            member.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`<what>/<parameter>` -> whole tensor on the CPU, however parameters are sharded."""
        return gather_full_tensors(
            {
                f"{what}/{self._names[parameter]}": value
                for member in self.members
                for parameter, found in member.state.items()
                for what, value in found.items()
            }
        )

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes back what `state` gave; raises KeyError for a parameter that is not ours."""
        owners = {name: parameter for parameter, name in self._names.items()}
        for full, value in tensors.items():
            what, _, name = full.partition("/")
            parameter = owners[name]
            member = next(m for m in self.members if any(parameter is p for p in m.param_groups[0]["params"]))
            # AdamW counts its steps on the CPU.
            member.state[parameter][what] = value if what == "step" else distribute_like(value, parameter)
