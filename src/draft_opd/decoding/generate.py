"""The decode loop: draft a block, verify it in one target forward, commit, repeat.

Without a drafter the same loop is the target decoding alone, one token a round: the baseline
of every speed-up runs on the same kernels and the same cache.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from torch.distributed.tensor import DTensor

from draft_opd.decoding.captured import workspace
from draft_opd.decoding.draft_length import DraftLengthController, Length, length_and_controller
from draft_opd.decoding.noise import round_noise, row_keys
from draft_opd.decoding.rounds import Round, committed, tau
from draft_opd.decoding.sampling import Sampling
from draft_opd.decoding.static import Run, StaticBatch, decode_rows, padded_rows
from draft_opd.decoding.step import DecodeStep
from draft_opd.decoding.tree import check_widths
from draft_opd.drafters.base import Drafter
from draft_opd.models.target import Target
from draft_opd.models.target_info import check_prompt
from draft_opd.utils.errors import UserError
from draft_opd.utils.machine import synchronized

# Tokens a row from which layers are compiled: a guess, until a GPU has measured what a round gains.
FUSE_FROM = 1 << 14

# Called after every round with the row's index, the tokens committed and the round.
OnRound = Callable[[int, list[int], Round], None]


@dataclass
class Generation:
    """What one prompt became. `token_ids` is the response, its stop token included."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    finish_reason: str = "length"

    @property
    def tau(self) -> float:
        return tau(self.rounds)


OnEnd = Callable[[int, Generation], None]


@dataclass
class Timing:
    """Seconds spent, summed over rounds; `prefill` is the prompts' forward, `first_token` all until
    the first round was done."""

    prefill: float = 0.0
    first_token: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    rest: float = 0.0
    captured: float = 0.0  # rounds as CUDA graphs: draft, verify and rest in one

    @property
    def decode(self) -> float:
        return self.draft + self.verify + self.rest + self.captured

    def __add__(self, other: Timing) -> Timing:
        return Timing(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


@dataclass
class _Job:
    """What is decoded, and where it goes."""

    target: Target
    drafter: Drafter | None
    sampling: Sampling
    results: list[Generation]
    limits: list[int]
    stops: frozenset[int]
    seeds: list[int]
    on_round: OnRound | None
    on_end: OnEnd | None
    confidence: float | None = None

    @property
    def keys(self) -> list[int]:
        return row_keys(self.seeds, [r.prompt_ids for r in self.results])

    def commit(self, index: int, line: list[int]) -> bool:
        """Takes a line of a round's table (see `DecodeStep`); whether that prompt has ended."""
        result = self.results[index]
        anchor = len(result.prompt_ids) + len(result.token_ids) - 1
        room = self.limits[index] - len(result.token_ids)
        drafted = line[2:]
        if self.confidence is not None and -1 in drafted:  # other rows were more sure
            drafted = drafted[: drafted.index(-1)]
        tokens, kept, ended = committed(drafted, line[0], line[1], self.stops, room)
        result.token_ids += tokens
        result.rounds.append(Round(anchor, drafted, kept))
        if self.on_round:
            self.on_round(index, tokens, result.rounds[-1])
        if ended:
            result.finish_reason = ended
            if self.on_end:
                self.on_end(index, result)
        return ended is not None


def pays_to_fuse(prompts: int, rows: int, limit: int) -> bool:
    """Whether so many prompts of `limit` tokens, `rows` at a time, are enough rounds to wait for a
    compiler. By what was asked and not by the clock, so that a text does not depend on the clock."""
    return -(-prompts // rows) * limit >= FUSE_FROM


def _decode_static(
    job: _Job,
    length: int,
    rows: int | None,
    pace: DraftLengthController | None,
    clock: Timing,
    run: Run | None = None,
) -> None:
    """In storage that never moves; rounds are CUDA graphs unless `run` says otherwise."""
    target, prompts = job.target, [r.prompt_ids for r in job.results]
    count = min(rows or len(prompts), len(prompts))
    longest = max(len(p) + n for p, n in zip(prompts, job.limits, strict=True))
    slots = longest + 2 * length + 2  # a row that has ended stands up to a round behind its end
    if run is None:
        fused = pays_to_fuse(len(prompts), count, max(job.limits))
        batch, run = workspace(
            target, job.drafter, job.sampling, padded_rows(count), slots, fused, job.confidence
        )
    else:
        batch = StaticBatch(
            target, job.drafter, job.sampling, count, slots, length, confidence=job.confidence
        )
    if pace:
        pace.keep_few()  # each length is a graph of its own
    began = entered = synchronized(target.device)
    first, capturing = True, getattr(run, "seconds", 0.0)

    def choose() -> int:
        nonlocal entered
        entered = time.perf_counter()
        return pace.choose(length) if pace else length

    def record(drafted: int, accepted: Iterable[int]) -> None:
        nonlocal first, entered, capturing
        now, spent = time.perf_counter(), getattr(run, "seconds", 0.0)
        entered, capturing = entered + spent - capturing, spent  # capturing is no decoding
        clock.captured += now - entered
        if first:
            clock.first_token += now - began
            first = False
        if pace:
            pace.record(drafted, accepted, now - entered)

    decode_rows(batch, prompts, job.keys, job.commit, run=run, choose=choose, record=record, most=count)
    clock.prefill += synchronized(target.device) - began - clock.captured


def _decode_dynamic(
    job: _Job,
    length: int,
    tree: tuple[int, ...] | None,
    pace: DraftLengthController | None,
    clock: Timing,
    timed: bool,
) -> None:
    """With shapes that follow the rows: every round looks just as far as it must."""
    target, drafter, sampling, results = job.target, job.drafter, job.sampling, job.results
    prompts = [r.prompt_ids for r in results]
    device = target.device
    now = (lambda: synchronized(device)) if timed else (lambda: 0.0)

    started = began = now()
    layers = drafter.target_layers if drafter else ()
    active = list(range(len(prompts)))
    capacity = max(map(len, prompts)) + max(job.limits) + length + 1
    cache, context = target.cache(capacity), None
    width = max(len(p) for p in prompts) - 1
    rows = [[*p[:-1]] + [0] * (width + 1 - len(p)) for p in prompts]
    ids = torch.tensor(rows, dtype=torch.long, device=device)
    if width:
        out = target.trajectories(ids, layers, cache)
        features = out.features
    elif drafter:
        features = torch.zeros(
            len(prompts), 0, len(layers) * target.hidden_size, dtype=target.dtype, device=device
        )
    if drafter:
        context = drafter.build_cache(target, ids.view(len(prompts), width), features)
        context.reserve(capacity)
    keys = None if sampling.greedy else torch.tensor(job.keys, device=device)
    generator = torch.Generator(device).manual_seed(job.seeds[0]) if tree else None
    step = DecodeStep(target, drafter, cache, context, sampling, tree, generator, job.confidence, True)
    clock.prefill += now() - began

    while active:
        began, entered = now(), time.perf_counter()
        rows = [results[i] for i in active]
        anchor_list = [len(r.prompt_ids) + len(r.token_ids) - 1 for r in rows]
        anchors = torch.tensor(anchor_list, device=device)
        last = torch.tensor([(r.token_ids or r.prompt_ids)[-1] for r in rows], device=device)
        # Never run past the context; the last rounds draft less.
        furthest = max(anchor_list)
        count = min(length, target.max_positions - 1 - furthest)
        if pace:
            count = pace.choose(count)
        step.set_bound(furthest + count + 1, filled=len(active) == 1 and job.confidence is None)
        drafted_at = began

        def drafted_now():
            nonlocal drafted_at
            drafted_at = now()

        noise = None if keys is None or tree else round_noise(keys, anchors, count)
        table = step(anchors, last, count, noise, drafted_now)
        verified_at = now()
        clock.draft += drafted_at - began
        clock.verify += verified_at - drafted_at
        table = table.tolist()
        if pace:
            pace.record(count, [line[0] for line in table], time.perf_counter() - entered)
        unfinished = []
        for row, line in enumerate(table):
            if not job.commit(active[row], line):
                unfinished.append(row)
        if len(unfinished) < len(rows):
            kept_rows = torch.tensor(unfinished, dtype=torch.long, device=device)
            step.select(kept_rows)
            keys = None if keys is None else keys[kept_rows]
            active = [active[i] for i in unfinished]
        clock.rest += now() - verified_at
        if started is not None:
            clock.first_token += now() - started
            started = None


@torch.inference_mode()
def speculate(
    target: Target,
    drafter: Drafter | None,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    draft_length: int | None = None,
    tree: Sequence[int] | None = None,
    sampling: Sampling | None = None,
    stop_ids: Iterable[int] | None = None,
    seed: int | Sequence[int] = 0,
    pace: DraftLengthController | None = None,
    confidence: float | None = None,
    timing: Timing | None = None,
    on_round: OnRound | None = None,
    on_end: OnEnd | None = None,
    rows: int | None = None,
) -> list[Generation]:
    """Decodes a batch of prompts; every row accepts what it accepts.

    Args:
        drafter: None decodes with the target alone.
        prompts: token ids, one list a row, none empty.
        max_new_tokens: for all rows, or one a row.
        draft_length: tokens proposed a round; at most, and by default, what was trained.
        tree: draft a tree with so many nodes at depths 1, 2, .. instead. A round's `drafted` is
            then the path that was accepted, -1 behind it.
        pace: chooses the draft length of every round, `draft_length` at most; it learns from them.
        confidence: end a draft before its first token whose chance of passing is smaller, as the drafter
            says (DSpark). The text's distribution stays the target's: that chance is told before the token is
            drawn. Where rounds are captured such tokens run all the same, and count nothing.
        sampling: greedy by default.
        stop_ids: tokens that end a row; by default the target's.
        seed: of the random numbers, where the target samples; for all rows, or one a row. A row's text
            depends on its seed, its prompt and its place among equal rows, not on the others.
        timing: filled in when given (this adds a device synchronisation a phase).
        on_end: called with a prompt's index and its generation, as soon as that has ended.
        rows: the most prompts that are decoded at a time where rounds are captured (on a GPU; see
            `Target.capturable`). Ended ones are replaced by the next.

    Raises:
        UserError: an empty prompt, one that leaves no room in the context, a draft length that the
            drafter was not trained for, or a drafter that does not fit.
    """
    sampling = sampling or Sampling()
    stops = frozenset(target.stop_ids if stop_ids is None else stop_ids)
    length = _draft_length(target, drafter, draft_length)
    if drafter and tree is not None:
        if draft_length is not None or pace:
            raise UserError("give a draft length or a tree, not both")
        if target.states:
            raise UserError(
                f"target '{target.name}' has layers of kind {target.states}, whose states follow one "
                "chain of tokens: it has no trees"
            )
        if not drafter.has_trees:
            raise UserError(f"{drafter.family} drafters draft one chain of tokens, so they have no trees")
        tree = check_widths(tree, drafter.draft_length)
        length = len(tree)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty: at least one token is needed")
        check_prompt(prompt, target, str(i))
        if len(prompt) >= target.max_positions:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens, the target's context holds "
                f"{target.max_positions}: shorten it"
            )
    if confidence is not None:
        check_confidence(drafter, confidence, tree is not None or pace is not None)
    results = [Generation(list(p)) for p in prompts]
    asked = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    limits = [min(n, target.max_positions - len(p)) for n, p in zip(asked, prompts, strict=True)]
    if not limits or min(limits) < 1:
        return results
    seeds = [seed] * len(prompts) if isinstance(seed, int) else list(seed)
    job = _Job(target, drafter, sampling, results, limits, stops, seeds, on_round, on_end, confidence)
    clock = timing or Timing()
    if target.capturable and not tree and not is_sharded(drafter):
        _decode_static(job, length, rows, pace, clock)
    else:
        _decode_dynamic(job, length, tree, pace, clock, timing is not None)
    return results


def check_confidence(
    drafter: Drafter | None, confidence: float, other: bool, name: str = "this drafter"
) -> None:
    """Raises `UserError` unless drafts can end by it; other: something else says how long they are."""
    if other:
        raise UserError("give a confidence, a tree or an automatic draft length, not two of them")
    if drafter is None or not drafter.has_confidence:
        raise UserError(
            f"{name} has no confidence head, which a confidence needs (a DSpark drafter can have one)"
        )
    if not 0 < confidence < 1:
        raise UserError(f"confidence {confidence:g}: give a chance above 0 and below 1")


def is_sharded(drafter: Drafter | None) -> bool:
    """Whether its weights come and go (FSDP2), so that no graph can hold their addresses."""
    return drafter is not None and any(isinstance(p.data, DTensor) for p in drafter.parameters())


def _draft_length(target: Target, drafter: Drafter | None, asked: int | None) -> int:
    if drafter is None:
        return 0
    drafter.bind(target)
    return drafter.checked_length(asked)


def generate(
    target: Target,
    drafter: Drafter | None,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    draft_length: Length = None,
    tree: Sequence[int] | None = None,
    confidence: float | None = None,
    seed: int = 0,
    on_round: OnRound | None = None,
) -> Generation:
    """Decodes one prompt speculatively; see `speculate`. The text is the target's own.

    draft_length: None is the trained one. "auto" takes the fastest one by timings (`DraftLengthController`);
    above temperature 0 it may then give another text each time, from the same distribution.

    >>> import draft_opd as d
    >>> target = d.Target.from_pretrained("embedded", device="cpu")
    >>> d.generate(target, None, [1, 2, 3], max_new_tokens=2).finish_reason
    'length'
    """
    length, pace = length_and_controller(draft_length, drafter.draft_length if drafter else 0)
    return speculate(
        target,
        drafter,
        [list(prompt_ids)],
        max_new_tokens=max_new_tokens,
        draft_length=length,
        tree=tree,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p),
        seed=seed,
        pace=pace if drafter else None,
        confidence=confidence,
        on_round=on_round,
    )[0]
