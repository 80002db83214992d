"""Several processes that train one drafter, started by torchrun or `accelerate launch`.

A step's batch is split among them and every loss is normalised over all of it, so any number of
processes trains the same drafter. Each holds the whole drafter (DDP) or a shard of it (FSDP2). Each holds
the whole target, a shard of every layer (FSDP2), or a slice of every matrix (tensor parallel).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from math import ceil
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from draft_opd.models.cpu_linear import unpack
from draft_opd.models.target_info import config_number
from draft_opd.training.config import Parallel
from draft_opd.utils.errors import Failure, UserError

Item = TypeVar("Item")
# What transformers' plans call the layers of tensor parallelism; those that leave a layer whole.
STYLES = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
WHOLE = ("replicate", "replicated_with_grad_allreduce")
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out")


class ParallelContext:
    """The processes of a run; one alone is a group too.

    rank, size: of those that split a batch. is_main_process: whether this one writes the run folder.
    """

    def __init__(self, options: Parallel | None = None, mesh: DeviceMesh | None = None):
        self.options, self.mesh = options or Parallel(), mesh
        self.rank, self.size, self.is_main_process, self.world = 0, 1, True, 1
        self._data = None
        if mesh is not None:
            self._data = mesh.get_group("data")
            self.rank, self.size = mesh.get_local_rank("data"), mesh["data"].size()
            self.is_main_process, self.world = dist.get_rank() == 0, dist.get_world_size()

    # -- splitting and adding up ------------------------------------------------------------

    def shard_rows(self, rows: Sequence[Item]) -> list[Item]:
        """This process's rows of a batch: every size-th."""
        return list(rows[self.rank :: self.size])

    def shard_pieces(self, rows: Sequence[Item], most: int) -> list[list[Item]]:
        """This process's rows in pieces of at most `most`. Every process gets the same number of
        pieces, because sharded models need the same number of forwards everywhere."""
        own = self.shard_rows(rows)
        count = ceil(ceil(len(rows) / self.size) / most)
        return [own[i * len(own) // count : (i + 1) * len(own) // count] for i in range(count)]

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum over the processes that split a batch, without gradient."""
        if self.size == 1:
            return x.detach()
        x = x.detach().clone()
        dist.all_reduce(x, group=self._data)
        return x

    def all_reduce_metrics(self, values: dict[str, float | list[float]]) -> dict:
        """The same of many figures at once, whose keys and shapes are equal everywhere."""
        if self.size == 1:
            return values
        flat = [x for v in values.values() for x in (v if isinstance(v, list) else [v])]
        flat_tensor = torch.tensor(flat, dtype=torch.float64, device=self.mesh.device_type)
        summed = iter(self.all_reduce_sum(flat_tensor).tolist())
        return {
            key: [_like(x, next(summed)) for x in v] if isinstance(v, list) else _like(v, next(summed))
            for key, v in values.items()
        }

    def all_gather(self, value: Any) -> list:
        """Every process's value, by rank."""
        return [value] if self.size == 1 else _gathered(value, self.size, self._data)

    def any_rank(self, flag: bool) -> bool:
        """Whether it is set in any process, those that share a target among them."""
        if self.world == 1:
            return flag
        found = torch.tensor(int(flag), device=self.mesh.device_type)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def all_equal(self, value: Any) -> bool:
        """Whether all processes have the same."""
        return self.world == 1 or all(x == value for x in _gathered(value, self.world))

    def broadcast(self, value: Item) -> Item:
        """The first process's value, in all of them."""
        if self.world == 1:
            return value
        found = [value]
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def main_process_first(self, part: Callable[[], Item]) -> Item:
        """Runs `part` in the main process, then in the others; for parts that create or move files."""
        if self.is_main_process:
            found = part()
        self.barrier()
        return found if self.is_main_process else part()

    def barrier(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    # -- models -----------------------------------------------------------------------------

    @property
    def splits_target(self) -> bool:
        """Whether processes hold parts of the target."""
        o = self.options
        return self.world > 1 and (o.target == "shard" or o.tensor > 1)

    @property
    def shards_drafter(self) -> bool:
        """Whether processes hold parts of the drafter."""
        return self.world > 1 and self.options.drafter == "shard"

    def split_target(self, model: nn.Module, decoder: nn.Module, config: Any) -> None:
        """Leaves this process its part of a target that was loaded whole on the CPU, on its device.

        FSDP2: each decoder layer is gathered when it is used. Tensor parallel: by the model's own
        plan. Embeddings and head stay whole either way. Raises `UserError` where there is no plan
        that we can follow.
        """
        unpack(model)
        if self.options.tensor > 1:
            self._split_matrices(decoder, config)
        else:
            for layer in decoder.layers:
                # Each layer is an FSDP root: it would keep its gathered weights until a backward pass,
                # which a frozen target does not have.
                fully_shard(layer, mesh=self._whole(), reshard_after_forward=True)
        model.to(self.device)

    def _split_matrices(self, decoder: nn.Module, config: Any) -> None:
        plan = getattr(config, "base_model_tp_plan", None) or {}
        kinds = {name: STYLES.get(style) for name, style in plan.items() if style not in WHOLE}
        unknown = sorted({plan[name] for name, kind in kinds.items() if kind is None})
        count, problem = self.options.tensor, None
        for what in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
            size = config_number(config, what)
            if size and size % count:
                problem = f"its {what} is {size}"
        if unknown:
            problem = f"its plan has {', '.join(unknown)}"
        if not kinds:
            problem = "transformers has no plan for it"
        if problem:
            raise UserError(
                f"parallel.tensor: {count} processes cannot share this target ({problem}): set "
                "parallel.target=shard instead"
            )
        made = {name: kind() for name, kind in kinds.items()}
        parallelize_module(decoder, self.mesh["tensor"], made)

    @property
    def device(self) -> torch.device:
        """What this process computes on."""
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def wrap(self, drafter: nn.Module) -> nn.Module:
        """The drafter under DDP or FSDP2. Call `wrapped(part, *inputs)` instead of `part(*inputs)`:
        gradients are averaged over processes, and sharded weights are gathered."""
        called = _Called(drafter)
        if self.world == 1:
            return called
        if self.shards_drafter:
            unpack(drafter)
            return fully_shard(called, mesh=self._whole(), reshard_after_forward=False)
        where = next(drafter.parameters()).device
        return DistributedDataParallel(called, device_ids=[where] if where.type == "cuda" else None)

    @contextmanager
    def no_sync(self, wrapped: nn.Module) -> Iterator[None]:
        """Gradients computed inside stay local; the next backward outside synchronises them."""
        if isinstance(wrapped, DistributedDataParallel):
            with wrapped.no_sync():
                yield
        elif self.world > 1:
            wrapped.set_requires_gradient_sync(False)
            yield
            wrapped.set_requires_gradient_sync(True)
        else:
            yield

    def _whole(self) -> DeviceMesh:
        """One dimension, all processes."""
        return init_device_mesh(self.mesh.device_type, (self.world,))


class _Called(nn.Module):
    """Its forward calls `part`. So the hooks of DDP and FSDP run for any use of the drafter."""

    def __init__(self, drafter: nn.Module):
        super().__init__()
        self.drafter = drafter

    def forward(self, part: Callable, *inputs: Any) -> Any:
        return part(*inputs)


def _gathered(value: Any, size: int, group: dist.ProcessGroup | None = None) -> list:
    found: list = [None] * size
    dist.all_gather_object(found, value, group=group)
    return found


def _like(example: float, value: float) -> float:
    return round(value) if isinstance(example, int) else value


def gather_full_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors gathered, on the CPU; all processes must ask for them."""
    return {
        k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().cpu().contiguous()
        for k, v in tensors.items()
    }


def distribute_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, distributed and placed as `parameter` is."""
    if isinstance(parameter, DTensor) and tensor.shape == parameter.shape:
        moved = tensor.to(parameter.device)
        return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
    return tensor.to(parameter.device)


@contextmanager
def distributed_context(options: Parallel) -> Iterator[ParallelContext]:
    """The group that the launcher started this process in; leaves it at the end.

    Raises `UserError` where the number of processes does not fit `options`.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % options.tensor:
        raise UserError(
            f"parallel.tensor: {options.tensor} does not divide the {world} process"
            f"{'es' * (world > 1)} that were started: use torchrun --nproc-per-node"
        )
    if world == 1:
        yield ParallelContext(options)
        return
    device = "cpu"
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise UserError(
                f"process {local} of this machine has no GPU of its own: it has "
                f"{torch.cuda.device_count()}; start as many processes"
            )
        torch.cuda.set_device(local)
        device = "cuda"
    with translate_comm_errors():
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", timeout=timedelta(seconds=options.timeout)
        )
        shape = (world // options.tensor, options.tensor)
        group = ParallelContext(options, init_device_mesh(device, shape, mesh_dim_names=("data", "tensor")))
    try:
        with translate_comm_errors():
            yield group
            group.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def translate_comm_errors() -> Iterator[None]:
    """A process that waits in vain for another one says so, in a line."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not (isinstance(error, dist.DistError) or any(x in text for x in LOST)):
            raise
        rank = os.environ.get("RANK", "0")
        raise Failure(
            f"process {rank} waits for another one that has ended or does not answer: its own "
            "message says why. Start them again with --resume; all go on from the last checkpoint"
        ) from error


def no_grad_call(wrapped_drafter: nn.Module, group: ParallelContext, part: Callable, *inputs):
    """Without gradient; through the wrapper only where that gathers weights."""
    with torch.no_grad():
        return wrapped_drafter(part, *inputs) if group.shards_drafter else part(*inputs)


def reduce_metric(key: str, values: list):
    """A figure of several forwards as one: counts are added, the rest is averaged."""
    if isinstance(values[0], list):
        return [sum(column) for column in zip(*values, strict=True)]
    return sum(values) if key in ("supervised", "anchors") else sum(values) / len(values)
