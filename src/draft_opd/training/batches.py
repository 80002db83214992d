"""Batches of trajectories with what the target says about them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from draft_opd.data.trajectory import Trajectory
from draft_opd.models.kv_cache import PositionCache
from draft_opd.models.rows import pad_rows
from draft_opd.models.target import Target
from draft_opd.training.config import Data
from draft_opd.training.distributed import ParallelContext
from draft_opd.training.feature_store import CachedFeatures, FeatureFolder, Key, about_features


@dataclass
class Batch:
    """ids [batch, L] right-padded; features [batch, L, F]; hidden [batch, L, H] before the LM head.

    `cache` holds the target's keys and values of the trajectories, when asked for. `row_ids`: the
    rows' indices in the batch of all processes. Anchors are drawn by them, so that they do not depend
    on the number of processes.
    """

    trajectories: list[Trajectory]
    ids: Tensor
    features: Tensor
    hidden: Tensor
    cache: PositionCache | None = None
    row_ids: Sequence[int] = ()

    def __post_init__(self):
        self.row_ids = self.row_ids or range(len(self.trajectories))

    @property
    def starts(self) -> Tensor:
        """[batch] index of the first anchor, the last prompt token."""
        return torch.tensor([len(t.prompt_ids) - 1 for t in self.trajectories], device=self.device)

    @property
    def ends(self) -> Tensor:
        """[batch] index of the last token."""
        return torch.tensor([len(t.ids) - 1 for t in self.trajectories], device=self.device)

    @property
    def device(self) -> torch.device:
        return self.ids.device


class BatchSource:
    """Runs the target over trajectories; with a cache, over each only once."""

    def __init__(
        self,
        target: Target,
        layers: Sequence[int],
        feature_cache: dict[Key, CachedFeatures] | FeatureFolder | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        """feature_cache: where features are kept, as `dtype`; on `device`, if not on disk."""
        self.target, self.layers, self.feature_cache, self.dtype = target, tuple(layers), feature_cache, dtype
        self.kept_on = device

    def adopt(self, other: BatchSource) -> None:
        """Shares what `other` keeps in memory, when it is of the same target, layers and type."""
        mine, theirs = (
            (s.target, s.layers, type(s.feature_cache), s.dtype, s.kept_on) for s in (self, other)
        )
        if mine == theirs and isinstance(self.feature_cache, dict):
            self.feature_cache = other.feature_cache

    def batch(
        self,
        trajectories: list[Trajectory],
        with_cache: bool = False,
        remember: bool = True,
        row_ids: Sequence[int] = (),
    ) -> Batch:
        """`with_cache`: the target's keys and values too. Texts that will not come again should
        not be remembered. `row_ids`: see `Batch`."""
        ids = pad_rows([t.ids for t in trajectories], self.target.device)
        cache = self.target.cache(ids.shape[1]) if with_cache else None
        if self.feature_cache is None or not remember:
            features, hidden = self._run(ids, [len(t.ids) for t in trajectories], cache)
            return Batch(trajectories, ids, features, hidden, cache, row_ids)
        if cache is not None:
            self.target.trajectories(ids, (), cache)
        features, hidden = (
            torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
            .to(self.target.device)
            .to(self.target.dtype)
            for rows in zip(*map(self._features_of, trajectories), strict=True)
        )
        return Batch(trajectories, ids, features, hidden, cache, row_ids)

    def _run(self, ids: Tensor, lengths: list[int], cache: PositionCache | None) -> tuple[Tensor, Tensor]:
        """Features and hidden states [batch, L, ..] of padded rows. Rows of very unequal length run in
        several forwards, so that little is computed at padding; what stands there is 0 then."""
        groups = [list(range(len(ids)))]
        if cache is None and not self.target.sharded and not self.target.is_mixture:
            groups = length_groups(lengths, forward_cost(self.target))
        if len(groups) == 1:
            out = self.target.trajectories(ids, self.layers, cache)
            return out.features, out.hidden
        made: list[Tensor] = []
        for rows in groups:
            width, index = max(lengths[i] for i in rows), torch.tensor(rows, device=ids.device)
            out = self.target.trajectories(ids[index, :width], self.layers)
            parts = (out.features, out.hidden)
            made = made or [x.new_zeros(*ids.shape, x.shape[-1]) for x in parts]
            for whole, part in zip(made, parts, strict=True):
                whole[index, :width] = part
        return made[0], made[1]

    def _features_of(self, trajectory: Trajectory) -> CachedFeatures:
        """Features and hidden states of one text, computed the first time it is asked for.

        It runs by itself: in a batch its last bits would depend on the other rows, and a resumed run
        has other rows.
        """
        key = tuple(trajectory.ids)
        if key not in self.feature_cache:
            ids = torch.tensor([key], device=self.target.device)
            out = self.target.trajectories(ids, self.layers)
            self.feature_cache[key] = tuple(
                x[0].to(self.dtype).to(self.kept_on) for x in (out.features, out.hidden)
            )
        return self.feature_cache[key]


def batch_order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of one epoch, a pure function of (seed, epoch): shuffled, then sorted by length
    within pools of 8 batches so that little is padded. An incomplete last batch is dropped."""
    rng = random.Random(f"{seed}/{epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    size = min(batch_size, len(lengths))
    batches = []
    for start in range(0, len(order), 8 * size):
        pool = sorted(order[start : start + 8 * size], key=lambda i: lengths[i])
        batches += [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
    rng.shuffle(batches)
    return batches


def forward_cost(target: Target) -> int:
    """What a forward costs beside its tokens, in tokens: launches and Python. By operations that the device
    could have done meanwhile, 2 a parameter and token; a guess on CUDA (25 ms at 400 TFLOP/s)."""
    operations = 1e13 if target.device.type == "cuda" else 5e8
    parameters = sum(p.numel() for p in target.decoder.parameters())
    return max(1, int(operations / (2 * parameters)))


def length_groups(lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Rows that should run together, padded to the longest of them: the cheapest split of the rows in order
    of length, if every forward costs as much as `cost` tokens more.

    >>> length_groups([100, 10, 12, 90], cost=20)
    [[1, 2], [3, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best, begin = [0.0], [0]  # of the first n rows: the least tokens, and where the last group begins
    for n in range(1, len(order) + 1):
        width = lengths[order[n - 1]]
        tokens = [best[k] + (n - k) * width + cost for k in range(n)]
        begin.append(min(range(n), key=tokens.__getitem__))
        best.append(tokens[begin[-1]])
    groups, end = [], len(order)
    while end:
        groups.append(order[begin[end] : end])
        end = begin[end]
    return groups[::-1]


class EpochBatches:
    """The whole batch of the index-th forward since the run began, by its index."""

    def __init__(self, rows: Sequence[Trajectory], batch_size: int, seed: int):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._lengths = [len(t.ids) for t in rows]
        self._epoch, self._batches = -1, [[0]]  # of the epoch that was asked for last

    def __call__(self, index: int) -> list[Trajectory]:
        per_epoch = len(self.rows) // min(self.batch_size, len(self.rows))
        epoch = index // per_epoch
        if epoch != self._epoch:
            self._batches = batch_order(self._lengths, self.batch_size, self.seed, epoch)
            self._epoch = epoch
        return [self.rows[i] for i in self._batches[index % per_epoch]]


@dataclass
class Sources:
    """Where batches come from. folder: the features on disk, where they are kept there."""

    train: BatchSource
    held_out: BatchSource
    folder: FeatureFolder | None


def open_sources(
    data: Data,
    target: Target,
    layers: Sequence[int],
    out: Path,
    group: ParallelContext,
    after: Sources | None = None,
) -> Sources:
    """The sources of a run that writes into `out`; what `after` keeps in memory serves again."""
    dtype = getattr(torch, data.cache_dtype)
    folder: FeatureFolder | None = None
    if data.cache_features == "disk":
        place = Path(data.features or out / "features")
        about = about_features(target, layers, dtype)
        folder = group.main_process_first(lambda: FeatureFolder(place, about))
    keep = data.cache_features != "none"
    kept_on = target.device if data.cache_features == "device" else "cpu"
    feature_cache = folder if folder is not None else {} if keep else None
    # What τ is measured on is never rounded: its features stay in the target's own type.
    made = Sources(
        BatchSource(target, layers, feature_cache, dtype, kept_on),
        BatchSource(target, layers, {} if keep else None, target.dtype, kept_on),
        folder,
    )
    if after is not None:
        made.train.adopt(after.train)
        made.held_out.adopt(after.held_out)
    return made
