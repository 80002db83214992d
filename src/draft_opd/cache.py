"""Key/value cache addressed by absolute position.

Slot j of a row always holds the token at position j of that row's sequence.
Two things follow. Rolling back rejected tokens costs nothing: whatever lies
behind the committed length is masked and later overwritten. And rows of a batch
that accept different numbers of tokens need no shifting.

This is also the only place that touches transformers' cache interface, whose
details differ between 5.x releases: we use nothing but `update`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Cache


class PositionCache(Cache):
    """Keys and values per layer, [batch, kv_heads, capacity, head_dim].

    Set `positions` ([batch, tokens], the slots the next forward writes) before each
    forward. With `branch=True` the next forward reads the cache without writing to
    it: its own keys are appended behind the first `visible` slots. `keep` writes some
    of them after all.
    """

    def __init__(self, capacity: int = 0):
        super().__init__(layers=[])
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.capacity = capacity
        self.positions: Tensor | None = None
        self.visible = 0
        self.branch = False
        self._start: int | None = None
        self._branched: dict[int, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, keys: list[Tensor], values: list[Tensor]) -> PositionCache:
        """A cache that already holds slots 0.. of every row."""
        cache = cls(keys[0].shape[2] if keys else 0)
        cache.keys, cache.values = keys, values
        return cache

    def prepare(self, positions: Tensor, visible: int, branch: bool = False) -> None:
        """Announces the next forward: slots to write [batch, tokens] and slots to read."""
        self.positions, self.visible, self.branch = positions, visible, branch
        contiguous = positions.shape[0] == 1 or bool((positions == positions[:1]).all())
        self._start = int(positions[0, 0]) if contiguous and not branch else None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
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
                old = store[layer_idx]
                grown = old.new_zeros(*old.shape[:2], self.visible * 3 // 2, old.shape[3])
                grown[:, :, : old.shape[2]] = old
                store[layer_idx] = grown
            if self._start is not None:
                end = self._start + new.shape[2]
                store[layer_idx][:, :, self._start : end] = new
            else:
                rows = torch.arange(new.shape[0], device=new.device)[:, None]
                store[layer_idx][rows, :, self.positions] = new.transpose(1, 2)
        return (
            self.keys[layer_idx][:, :, : self.visible],
            self.values[layer_idx][:, :, : self.visible],
        )

    def keep(self, index: Tensor, positions: Tensor) -> None:
        """Writes tokens `index` [batch, m] of the last branch forward to slots `positions`."""
        branched, self._branched = self._branched, {}
        self.prepare(positions, int(positions.max()) + 1)
        for layer, pair in branched.items():
            where = index[:, None, :, None]
            self.update(*(x.gather(2, where.expand(-1, x.shape[1], -1, x.shape[3])) for x in pair),
                        layer)  # fmt: skip

    def select(self, rows: Tensor) -> None:
        """Keeps only the given batch rows (index tensor)."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if not self.keys else self.visible
