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
            out = self.target.trajectories(ids, self.layers, cache)
            return Batch(trajectories, ids, out.features, out.hidden, cache, row_ids)
        if cache is not None:
            self.target.trajectories(ids, (), cache)
        features, hidden = (
            torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
            .to(self.target.device)
            .to(self.target.dtype)
            for rows in zip(*map(self._features_of, trajectories), strict=True)
        )
        return Batch(trajectories, ids, features, hidden, cache, row_ids)

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


def batch_at(lengths: Sequence[int], batch_size: int, seed: int, index: int) -> list[int]:
    """The trajectories of the index-th batch since the start of the run."""
    per_epoch = len(batch_order(lengths, batch_size, seed, 0))
    return batch_order(lengths, batch_size, seed, index // per_epoch)[index % per_epoch]


def rows_at(rows: Sequence[Trajectory], batch_size: int, seed: int, index: int) -> list[Trajectory]:
    """The whole batch of the index-th forward since the run began."""
    lengths = [len(t.ids) for t in rows]
    return [rows[i] for i in batch_at(lengths, batch_size, seed, index)]


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
