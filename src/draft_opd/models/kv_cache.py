"""Key/value cache addressed by absolute position.

Slot j of a row always holds the token at position j of that row's sequence.
Two things follow. Rolling back rejected tokens costs nothing: whatever lies
behind the committed length is masked and later overwritten. And rows of a batch
that accept different numbers of tokens need no shifting.

This is also the only place that touches transformers' cache interface, whose
details differ between 5.x releases: we use nothing but `update`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class PositionCache(Cache):
    """Keys and values per layer, [batch, kv_heads, capacity, head_dim].

    Call `prepare` with `positions` ([batch, tokens], the slots the next forward writes) before each
    forward. With `branch=True` the next forward reads the cache without writing to
    it: its own keys are appended behind the first `visible` slots. `keep` writes some
    of them after all.

    A caller who knows how far the next forwards reach says so with `set_bound`. Then no value of a
    tensor is looked at (on CUDA: nothing waits for the device), and the storage, `reserve`d
    beforehand, stays where it is.
    """

    def __init__(self, capacity: int = 0):
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.capacity = capacity
        self.bound: int | None = None
        self.filled = False
        self.static = self.fused = False
        self.positions: Tensor | None = None
        self.visible = 0
        self.branch = False
        self.unwritten: Any = None  # a drafter's, see `DFlashDrafter.extend_cache`
        self._start: int | None = None
        self._branched: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, keys: list[Tensor], values: list[Tensor]) -> PositionCache:
        """A cache that already holds slots 0.. of every row."""
        cache = cls(keys[0].shape[2] if keys else 0)
        cache.keys, cache.values = keys, values
        return cache

    def set_bound(
        self, slots: int | None, filled: bool = False, static: bool = False, fused: bool = False
    ) -> None:
        """The next forwards look at so many slots at most; None: that is to be found out. `filled`:
        every row's tokens reach exactly that far. `static`: positions are known to the device only, and
        are not compared on any. `fused`: layers may be compiled ones."""
        self.bound, self.filled, self.static, self.fused = slots, filled, static, fused

    def snapshot(self) -> None:
        """What `rollback` needs: nothing, since what lies behind a row's length is never looked at."""

    def rollback(self, state: None, lengths: Tensor) -> None:
        """Forgets what lies at and behind `lengths` [batch]: it will be overwritten."""

    def reach(self, positions: Tensor) -> int:
        """Slots up to and including the last of `positions`, or the bound."""
        return self.bound or (int(positions.max()) + 1 if positions.numel() else 0)

    def prepare(self, positions: Tensor, branch: bool = False, visible: int | None = None) -> None:
        """Announces the next forward: slots to write [batch, tokens], and how many to read
        (default: as far as they reach)."""
        self.positions, self.branch = positions, branch
        self.visible = self.reach(positions) if visible is None else visible
        self._start = None
        if branch:
            return
        # Where all rows write the same slots one copy is enough. Comparing positions on a GPU would wait
        # for it, so they are compared on a CPU only.
        if self.filled and self.bound:
            self._start = self.visible - positions.shape[1]
        elif not self.static and positions.is_cpu and bool((positions == positions[:1]).all()):
            self._start = int(positions[0, 0])

    def reserve(self, capacity: int) -> None:
        """Makes room for so many slots, now and in layers that come later."""
        self.capacity = max(self.capacity, capacity)
        for store in (self.keys, self.values):
            for i, old in enumerate(store):
                store[i] = _grown(old, capacity)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by transformers' attention layers; [batch, kv_heads, tokens, head_dim] each."""
        if layer_idx == len(self.keys):
            shape = list(key_states.shape)
            shape[2] = max(self.capacity, self.visible)
            self.keys.append(key_states.new_zeros(shape))
            shape[3] = value_states.shape[3]
            self.values.append(value_states.new_zeros(shape))
        if self.branch:
            keys, values = self.keys[layer_idx], self.values[layer_idx]
            self._branched[layer_idx] = key_states, value_states
            return (
                torch.cat([keys[:, :, : self.visible], key_states], 2),
                torch.cat([values[:, :, : self.visible], value_states], 2),
            )
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            if store[layer_idx].shape[2] < self.visible:
                self.capacity = max(self.capacity, self.visible * 3 // 2)
                store[layer_idx] = _grown(store[layer_idx], self.capacity)
            if self._start is not None:
                store[layer_idx].narrow(2, self._start, new.shape[2]).copy_(new)
            else:
                rows = torch.arange(new.shape[0], device=new.device)[:, None]
                store[layer_idx][rows, :, self.positions] = new.transpose(1, 2)
        return (
            self.keys[layer_idx].narrow(2, 0, self.visible),
            self.values[layer_idx].narrow(2, 0, self.visible),
        )

    def keep(self, index: Tensor, positions: Tensor) -> None:
        """Writes tokens `index` [batch, m] of the last branch forward to slots `positions`."""
        branched, self._branched = self._branched, {}
        self.prepare(positions)
        for layer, pair in branched.items():
            where = index[:, None, :, None]
            k, v = (x.gather(2, where.expand(-1, x.shape[1], -1, x.shape[3])) for x in pair)
            self.update(k, v, layer)

    def allocate(self, rows: int, capacity: int) -> PositionCache:
        """An empty cache of the same layers for other rows, its storage made at once."""

        def empty(store: list[Tensor]) -> list[Tensor]:
            return [x.new_zeros(rows, x.shape[1], capacity, x.shape[3]) for x in store]

        return PositionCache.of(empty(self.keys), empty(self.values))

    def first_rows(self, rows: int) -> PositionCache:
        """A cache over the storage of the first rows of this one."""
        return PositionCache.of([k[:rows] for k in self.keys], [v[:rows] for v in self.values])

    def copy_rows(self, source: PositionCache, rows: Tensor) -> None:
        """Copies the rows of `source` over `rows` of this one (index tensor)."""
        for mine, theirs in ((self.keys, source.keys), (self.values, source.values)):
            for store, new in zip(mine, theirs, strict=True):
                width = min(new.shape[2], store.shape[2])
                store[rows, :, :width] = new[:, :, :width]

    def move_rows(self, source: Tensor, rows: Tensor) -> None:
        """Copies rows `source` of this cache over `rows` (index tensors)."""
        for store in (*self.keys, *self.values):
            store[rows] = store[source]

    def select(self, rows: Tensor) -> None:
        """Keeps only the given batch rows (index tensor)."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if not self.keys else self.visible


def _grown(old: Tensor, capacity: int) -> Tensor:
    if old.shape[2] >= capacity:
        return old
    grown = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
    grown[:, :, : old.shape[2]] = old
    return grown
