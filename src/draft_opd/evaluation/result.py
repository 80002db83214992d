"""What `eval.json` holds, as types. Whatever reads or shows an evaluation goes through these.

A field that is None (or absent from the file) was not measured: a server counts less than our own
decoding loop does. Intervals are 95 % bootstrap intervals over prompts, (low, high).
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field

Interval = tuple[float, float]


class Result(BaseModel):
    """JSON has the fields that were set, so a file says no more than was measured."""

    def to_json(self) -> dict:
        return self.model_dump(mode="json", exclude_unset=True)


class Lossless(Result):
    """Responses with the target's own text; matched is None where the question has no answer."""

    matched: int | None
    of: int


class Regret(Result):
    """How far tokens of a 16-bit target are from its argmax (logits; see `evaluation/regret.py`)."""

    largest: float
    not_argmax: int
    beyond_bound: int
    of: int


class Group(Result):
    """τ of the rounds of one group: a range of contexts, a turn, thinking or answer."""

    group: str
    rounds: int
    tau: float


class Sides(Result):
    """One figure of the target alone and of speculative decoding."""

    target: float | None
    speculative: float | None


class RoundParts(Result):
    """Milliseconds or seconds by part of a round. captured: rounds that ran whole, as CUDA graphs."""

    draft: float
    verify: float
    rest: float
    captured: float = 0.0
    target_alone: float | None = None


class Memory(Result):
    """Bytes of the weights, and the most that was held while decoding (CUDA only)."""

    target: int
    drafter: int
    peak: int | None


class Spread(Result):
    mean: float
    p50: float | None = None
    p95: float


class ServedRate(Result):
    """One server at one level of concurrency, prefill and network included."""

    requests: int
    tokens: int
    tokens_per_second: float
    mean_in_flight: float
    seconds_per_request: Spread
    milliseconds_to_first_token: Spread


class ServedLevel(Result):
    """A level of concurrency. rounds and tau are the speculative server's own counters."""

    in_flight: int
    speculative: ServedRate
    target: ServedRate | None = None
    rounds: int | None = None
    tau: float | None = None
    speedup: float | None = None


class TaskResult(Result):
    """One way to decode on one task, against the target alone. τ counts the bonus token.

    Only our own loop measures from `tau_interval` on, only a server `tau_from` and `concurrency`.
    """

    task: str
    prompts: int
    responses: int | None = None
    tokens: int
    rounds: int | None
    tau: float | None
    tau_per_response: float | None
    acceptance_by_position: list[float]
    tokens_per_second: Sides
    speedup: float | None
    lossless: Lossless
    tau_interval: Interval | None = None
    acceptance_conditional: list[float] = []
    accepted_histogram: list[int] | None = None
    by_context: list[Group] = []
    speedup_interval: Interval | None = None
    seconds: RoundParts | None = None
    milliseconds_per_round: RoundParts | None = None
    milliseconds_to_first_token: Sides | None = None
    memory_bytes: Memory | None = None
    by_turn: list[Group] = []
    by_part: list[Group] = []
    regret: Regret | None = None
    tau_from: str | None = None
    concurrency: list[ServedLevel] = []


class Mean(Result):
    """Over tasks, each counting once."""

    tau: float | None
    speedup: float | None


def mean_of(tasks: Sequence[TaskResult]) -> Mean:
    """None for a figure that one of the tasks lacks."""

    def mean(values: list[float | None]) -> float | None:
        found = [v for v in values if v is not None]
        return sum(found) / len(found) if len(found) == len(values) else None

    return Mean(tau=mean([t.tau for t in tasks]), speedup=mean([t.speedup for t in tasks]))


class SideResult(Result):
    """One way to decode on all tasks. draft_length: a number or "auto"; confidence: where drafts end."""

    side: str
    drafter: str | None
    draft_length: int | str | None = None
    tree: list[int] | None = None
    confidence: float | None = None
    tasks: list[TaskResult]
    mean: Mean


class Difference(Result):
    """`side` minus `against` (τ) and over it (speed), paired by prompt."""

    task: str
    side: str
    against: str
    tau_difference: float
    tau_interval: Interval | None
    speed_ratio: float
    speed_interval: Interval | None


class Speed(Result):
    speedup: float


class LengthCost(Result):
    """A draft length here: τ by hindsight, milliseconds of a round, predicted speed-up."""

    draft_length: int
    tau: float
    milliseconds: RoundParts
    speedup: float
    measured: Speed | None = None


class OtherHardware(Result):
    """The best draft length at a batch size that a device's data sheet allows; 0: none pays."""

    hardware: str
    gigabytes_per_second: float
    teraflops: float
    batch: int
    best: int
    speedup: float
    by_length: list[float]


class Advice(Result):
    """Which draft length is best for a drafter; best is 0 where the target alone is faster."""

    drafter: str = ""
    best: int
    target_milliseconds: float
    context: int
    responses: int
    lengths: list[LengthCost]
    elsewhere: list[OtherHardware]


class BatchRate(Result):
    """Throughput of one side at one batch size in our own loop, prefill included."""

    batch: int
    requests: int
    side: str
    tokens_per_second: float
    speedup: float
    seconds_per_request: Spread
    tau: float


class EvaluationResult(Result):
    """One evaluation. The first side stands at the top; `sides` has all where there are several."""

    target: str
    drafter: str | None
    temperature: float
    draft_length: int | str | None = None
    tree: list[int] | None = None
    confidence: float | None = None
    dtype: str | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    top_k: int | None = None
    top_p: float | None = None
    draft: str | None = None
    thinking: bool | None = None
    server: str | None = None
    baseline_server: str | None = None
    tasks: list[TaskResult] = Field(min_length=1)
    mean: Mean
    sides: list[SideResult] = []
    comparison: list[Difference] = []
    draft_lengths: list[Advice] = []
    concurrency: list[BatchRate] = []
    machine: dict

    def every_side(self) -> list[SideResult]:
        """All sides, also where there is one only."""
        alone = SideResult(
            side=self.drafter or self.server or "served",
            drafter=self.drafter,
            draft_length=self.draft_length,
            tree=self.tree,
            confidence=self.confidence,
            tasks=self.tasks,
            mean=self.mean,
        )
        return self.sides or [alone]

    def settings(self) -> dict:
        """How it was measured: everything but the figures."""
        figures = {"tasks", "mean", "sides", "comparison", "draft_lengths", "concurrency"}
        return self.model_dump(mode="json", exclude_unset=True, exclude=figures)
