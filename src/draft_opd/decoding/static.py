"""Decoding in storage that never moves: the round that a CUDA graph can capture.

Where rows stand, which token they ended with and whether they are alive lives on the device. A round reads
these tensors, writes the caches and a table, and moves the rows on. Its shapes depend on three numbers
alone: rows, slots that attention looks at (a bucket), and drafted tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from draft_opd.decoding.noise import Noise, round_noise
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.step import DecodeStep
from draft_opd.drafters.base import DraftCache, Drafter
from draft_opd.models.kv_cache import PositionCache
from draft_opd.models.target import Target

SMALLEST = 256  # slots of the smallest bucket


def bucket_of(slots: int, capacity: int) -> int:
    """The smallest of 256, 384, 512, 768, 1024, .. that holds so many slots, `capacity` at most.

    >>> [bucket_of(n, 900) for n in (1, 257, 400, 800)]
    [256, 384, 512, 900]
    """
    size = SMALLEST
    while size < slots:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, capacity)


def padded_rows(rows: int, most: int | None = None) -> int:
    """The next power of two, `most` at most: few sizes, so few graphs."""
    size = 1 << max(rows - 1, 0).bit_length()
    return size if most is None else min(size, most)


@dataclass
class StaticBatch:
    """Rows that decode together. A row that is not alive writes its own slots only, and stays.

    rows: the most at a time; capacity: slots a row; longest: tokens drafted a round at most (0 without
    a drafter); fused: rounds run compiled layers, see `FusedLayers`; confidence: see `DecodeStep`.
    """

    target: Target
    drafter: Drafter | None
    sampling: Sampling
    rows: int
    capacity: int
    longest: int
    fused: bool = False
    confidence: float | None = None
    cache: PositionCache | None = None
    context: DraftCache | None = None
    _steps: dict[int, DecodeStep] = field(default_factory=dict)

    def __post_init__(self):
        self.layers = self.drafter.target_layers if self.drafter else ()
        long = {"dtype": torch.long, "device": self.target.device}
        self.anchors, self.last, self.keys = (torch.zeros(self.rows, **long) for _ in range(3))
        self.alive = torch.zeros(self.rows, dtype=torch.bool, device=self.target.device)
        self.table = torch.zeros(self.rows, 2 + self.longest, **long)
        self.noise: Noise | None = None
        if not self.sampling.greedy:
            self.noise = round_noise(self.keys, self.anchors, self.longest)

    def admit(self, rows: Sequence[int], prompts: Sequence[Sequence[int]], keys: Sequence[int]) -> None:
        """Prefills prompts together and puts them into these rows."""
        device, count = self.target.device, len(prompts)
        width = max(1, max(map(len, prompts)) - 1)
        ids = torch.zeros(count, width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt) - 1] = torch.tensor(prompt[:-1], dtype=torch.long)
        ids = ids.to(device)
        cache = self.target.cache(width)
        out = self.target.trajectories(ids, self.layers, cache)
        index = torch.tensor(rows, device=device)
        if self.cache is None:
            self.cache = cache.allocate(self.rows, self.capacity)
        self.cache.copy_rows(cache, index)
        if self.drafter:
            context = self.drafter.build_cache(self.target, ids, out.features)
            if self.context is None:
                self.context = context.allocate(self.rows, self.capacity)
            self.context.copy_rows(context, index)
        self.anchors[index] = torch.tensor([len(p) - 1 for p in prompts], device=device)
        self.last[index] = torch.tensor([p[-1] for p in prompts], device=device)
        self.keys[index] = torch.tensor(keys, device=device)
        self.alive[index] = True

    def release(self, rows: Sequence[int]) -> None:
        """These rows have ended."""
        self.alive[torch.tensor(rows, device=self.alive.device)] = False

    def move(self, source: Sequence[int], rows: Sequence[int]) -> None:
        """Rows `source` go on in the places `rows`, whose own have ended."""
        device = self.target.device
        old, new = torch.tensor(source, device=device), torch.tensor(rows, device=device)
        for state in (self.anchors, self.last, self.keys, self.alive):
            state[new] = state[old]
        self.alive[old] = False
        for cache in (self.cache, self.context):
            if cache is not None:
                cache.move_rows(old, new)

    def draw(self) -> None:
        """The next round's random numbers; outside of what is captured."""
        if self.noise is not None:
            fresh = round_noise(self.keys, self.anchors, self.longest)
            for name in ("draft", "coin", "bonus"):
                getattr(self.noise, name).copy_(getattr(fresh, name))

    def _step(self, rows: int) -> DecodeStep:
        if rows not in self._steps:
            cache, context = (None if x is None else x.first_rows(rows) for x in (self.cache, self.context))
            self._steps[rows] = DecodeStep(
                self.target, self.drafter, cache, context, self.sampling, confidence=self.confidence
            )
        return self._steps[rows]

    def round(self, rows: int, slots: int, count: int) -> None:
        """One round of the first `rows` rows; the result is in `table` [rows, 2 + longest], see
        `DecodeStep`. Reads no value of a tensor and moves no storage."""
        step, anchors, last = self._step(rows), self.anchors[:rows], self.last[:rows]
        step.set_bound(slots, static=True, fused=self.fused)
        noise = None
        if self.noise is not None:
            n = self.noise
            noise = Noise(n.draft[:rows, :count], n.coin[:rows, :count], n.bonus[:rows, : count + 1])
        table = step(anchors, last, count, noise)
        self.table[:rows, : 2 + count].copy_(table)
        alive = self.alive[:rows]
        # Both are written at the end: the caches above have read them.
        last.copy_(torch.where(alive, table[:, 1], last))
        anchors.add_((table[:, 0] + 1) * alive)

    def read(self, rows: int, count: int) -> Callable[[], list[list[int]]]:
        """Begins to copy the table of a round; what is returned waits for it."""
        table = self.table[:rows, : 2 + count]
        if table.device.type != "cuda":
            copied = table.clone()
            return copied.tolist
        host = torch.empty(table.shape, dtype=table.dtype, pin_memory=True)
        host.copy_(table, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(table.device))

        def wait() -> list[list[int]]:
            done.synchronize()
            return host.tolist()

        return wait


Run = Callable[[StaticBatch, int, int, int], None]  # batch, rows, slots, drafted tokens


def eager(batch: StaticBatch, rows: int, slots: int, count: int) -> None:
    """A round as it is."""
    batch.round(rows, slots, count)


@dataclass
class _Issued:
    """A round that was handed to the device: which prompts stood in which rows, and its table."""

    count: int
    rows: dict[int, int]  # row -> prompt
    read: Callable[[], list[list[int]]]


@torch.inference_mode()
def decode_rows(
    batch: StaticBatch,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    on_table: Callable[[int, list[int]], bool],
    *,
    run: Run = eager,
    choose: Callable[[], int] | None = None,
    record: Callable[[int, Iterable[int]], None] = lambda *_: None,
    most: int | None = None,
    late: bool = False,
) -> None:
    """Decodes prompts, `most` (default: `batch.rows`) at a time; ended rows are refilled.

    on_table(prompt's index, line of the table): takes a round's result and says whether the prompt has
    ended. choose: tokens drafted in the next round (default: `batch.longest`); record: what came of it.
    Prompts are prefilled in groups: once an eighth of the rows is free, or none is alive. late: a table is
    read while the next round runs. Every prompt then takes one round more, which is thrown away, and
    `capacity` needs room for it.
    """
    batch.alive.zero_()  # should an earlier call have been interrupted
    waiting = list(range(len(prompts)))[::-1]
    prompt_of: list[int | None] = [None] * batch.rows
    reached = [len(p) - 1 for p in prompts]  # the anchor of each prompt
    most = min(most or batch.rows, batch.rows)
    unread: _Issued | None = None
    while True:
        free = [row for row, prompt in enumerate(prompt_of[:most]) if prompt is None]
        if waiting and (len(free) == most or len(free) >= max(1, most // 8)):
            chosen = [waiting.pop() for _ in free[: len(waiting)]]
            rows = free[: len(chosen)]
            batch.admit(rows, [prompts[i] for i in chosen], [keys[i] for i in chosen])
            for row, i in zip(rows, chosen, strict=True):
                prompt_of[row] = i
        issued = _issue(batch, prompt_of, reached, run, choose, not waiting, unread)
        if late:
            issued, unread = unread, issued
        if issued is None:
            if unread is None:
                return
            continue
        table = issued.read()
        unfinished = set(prompt_of)
        running = {row: i for row, i in issued.rows.items() if i in unfinished}
        if running:  # else all had ended: the round is thrown away
            record(issued.count, [table[row][0] for row in running])
        ended = []
        for row, i in running.items():
            reached[i] += table[row][0] + 1
            if on_table(i, table[row]):
                ended.append(prompt_of.index(i))
        for row in ended:
            prompt_of[row] = None
        if ended:
            batch.release(ended)


def _issue(
    batch: StaticBatch,
    prompt_of: list[int | None],
    reached: list[int],
    run: Run,
    choose: Callable[[], int] | None,
    compact: bool,
    unread: _Issued | None,
) -> _Issued | None:
    """Runs the next round of the rows that have a prompt; None where no row has one. unread: the round
    before, as long as nobody knows how far it went."""
    busy = [row for row, prompt in enumerate(prompt_of) if prompt is not None]
    if not busy:
        return None
    rows = padded_rows(len(busy), batch.rows)
    if compact and busy[-1] >= rows:
        _compact(batch, prompt_of, busy, rows)
        busy = [row for row, prompt in enumerate(prompt_of) if prompt is not None]
    rows = padded_rows(busy[-1] + 1, batch.rows)
    count = choose() if choose else batch.longest
    standing = {row: prompt for row in busy if (prompt := prompt_of[row]) is not None}
    furthest = max(reached[i] for i in standing.values()) + (unread.count + 1 if unread else 0)
    batch.draw()
    run(batch, rows, bucket_of(furthest + count + 1, batch.capacity), count)
    return _Issued(count, standing, batch.read(rows, count))


def _compact(batch: StaticBatch, prompt_of: list[int | None], busy: list[int], rows: int) -> None:
    """Moves busy rows to the first places, so that fewer rows need to run."""
    places = [row for row in range(rows) if prompt_of[row] is None]
    moved = [row for row in busy if row >= rows]
    places = places[: len(moved)]
    batch.move(moved, places)
    for old, new in zip(moved, places, strict=True):
        prompt_of[new], prompt_of[old] = prompt_of[old], None
