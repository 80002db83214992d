"""Decoding with targets whose layers keep a state: GatedDeltaNet, Mamba, KDA, short convolutions.

Such a state has no slots that a rejected token could be masked in, and a padded row leaves a wrong one. So
every row runs by itself over transformers' own cache. Before a block is verified the state is kept; when some
of the block is rejected, the next forward begins from what was kept and runs the accepted tokens again, in
front of the next block: one forward a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# Tokens that are run again in front of a block. Scans work in chunks of 64, so up to there they are free.
REPLAY = 64

# ids [1, m], positions [1, m], cache or None -> outputs [1, m, ..] and the cache.
Run = Callable[[Tensor, Tensor, Any], tuple[tuple[Tensor | None, ...], Any]]


class RowState:
    """One text: transformers' cache of its first `end` tokens, and a copy of it at `base`."""

    def __init__(self) -> None:
        self.cache: Any = None
        self.kept: Any = None  # `snapshot` at `base`; None: nothing has been run
        self.base = self.end = 0
        self.ids: list[int] = []  # all tokens that have been run

    def extend(self, run: Run, ids: Sequence[int], start: int, one_by_one: bool) -> tuple:
        """Outputs of tokens `ids` at positions start.. (at most `end`); what was run behind `start` is
        forgotten. one_by_one: tokens are run singly, for layers that cannot go on with several."""
        if start < self.base:
            raise ValueError(f"position {start} lies before the state that is kept, of {self.base}")
        if start == self.end:
            self._keep()
        else:
            self.cache, self.end = snapshot(self.kept), self.base
        again = self.ids[self.end : start]
        del self.ids[self.end :]
        if len(again) + len(ids) > REPLAY and again:
            self._run(run, again, one_by_one)
            self._keep()
            again = []
        out = self._run(run, [*again, *ids], one_by_one)
        return tuple(None if x is None else x[:, len(again) :] for x in out)

    def _keep(self) -> None:
        self.kept, self.base = snapshot(self.cache), self.end

    def _run(self, run: Run, ids: Sequence[int], one_by_one: bool) -> tuple:
        found = []
        for part in [[i] for i in ids] if one_by_one else [list(ids)]:
            positions = torch.arange(self.end, self.end + len(part))[None]
            out, self.cache = run(torch.tensor([part]), positions, self.cache)
            self.ids += part
            self.end += len(part)
            found.append(out)
        return tuple(None if x[0] is None else torch.cat(x, 1) for x in zip(*found, strict=True))


class StatefulCache:
    """Rows of a batch, each with a state of its own. Has what the decoding loop asks of a cache."""

    def __init__(self) -> None:
        self.rows: list[RowState] = []
        self.static = self.fused = False

    def set_bound(self, slots: int | None, filled: bool = False, static: bool = False, fused: bool = False):
        """Nothing to do: a state has no slots."""

    def select(self, rows: Tensor) -> None:
        """Keeps only the given batch rows (index tensor)."""
        self.rows = [self.rows[i] for i in rows.tolist()]

    def extend(
        self, run: Run, ids: Tensor, positions: Tensor, one_by_one: bool = False
    ) -> tuple[Tensor | None, ...]:
        """ids, positions [batch, m], each row at consecutive positions -> outputs [batch, m, ..]."""
        if not self.rows:
            self.rows = [RowState() for _ in ids]
        starts = positions[:, 0].tolist()
        found = [
            row.extend(run, tokens, start, one_by_one)
            for row, tokens, start in zip(self.rows, ids.tolist(), starts, strict=True)
        ]
        return tuple(None if x[0] is None else torch.cat(x) for x in zip(*found, strict=True))


def snapshot(cache: Any) -> Any:
    """A copy of a cache that later forwards do not change; None of None.

    Keys and values are not copied: transformers makes new tensors when it appends to them. States are
    written in place.
    """
    return None if cache is None else _copied(cache)


def _copied(value: Any, name: str = "") -> Any:
    if isinstance(value, Tensor):
        return value if name in ("keys", "values") else value.clone()
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(x, name) for x in value)
    if isinstance(value, dict):
        return {k: _copied(v, name) for k, v in value.items()}
    if type(value).__module__.startswith("transformers.") and hasattr(value, "__dict__"):
        if hasattr(value, "to_dict"):  # a config
            return value
        twin = object.__new__(type(value))
        twin.__dict__.update({k: _copied(v, k) for k, v in vars(value).items()})
        return twin
    return value


def branch_texts(
    ids: Tensor, own: Tensor, prefix: Tensor, cache: StatefulCache
) -> Iterator[tuple[tuple[int, list[int]], list[int], int]]:
    """Texts whose last tokens are the branches of `Target.branches`: where these stand in `ids`
    (row, columns), the whole text, and where the branch begins in it."""
    for row in range(len(ids)):
        for chain in chains(own[row]):
            end = int(prefix[row, chain[0]])
            yield (row, chain), [*cache.rows[row].ids[:end], *ids[row, chain].tolist()], end


def chains(own: Tensor) -> list[list[int]]:
    """Tokens of one row that form branches: own [m, m] says which of them each token sees. One list a
    branch, in order; tokens of a branch see all of its earlier ones.

    >>> chains(torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]]).bool())
    [[0, 1], [2]]
    """
    seen_by_others = (own & ~torch.eye(len(own), dtype=torch.bool, device=own.device)).any(0)
    return [own[leaf].nonzero()[:, 0].tolist() for leaf in (~seen_by_others).nonzero()[:, 0].tolist()]
