"""Which draft length is best here: what a round costs at each, and what it brings.

What it brings needs no decoding: the text is the target's own whatever is drafted, so hindsight
gives the rounds that each draft length would have had on it. What it costs is timed in the decode
loop itself. For other hardware the cost is the roofline's: bytes that must be read over the memory
bandwidth, or operations over the matrix rate, whichever takes longer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from draft_opd.data.trajectory import Trajectory
from draft_opd.decoding.draft_length import LENGTHS
from draft_opd.decoding.generate import Generation, Timing, speculate
from draft_opd.decoding.rounds import tau
from draft_opd.decoding.sampling import Sampling
from draft_opd.drafters.base import Drafter
from draft_opd.evaluation.measure import rotated
from draft_opd.evaluation.result import Advice, LengthCost, OtherHardware, RoundParts
from draft_opd.hindsight.trace import traces_by_length
from draft_opd.models.target import Target
from draft_opd.models.target_info import config_number
from draft_opd.utils.errors import UserError

STEPS, REPEATS = 32, 5  # tokens of a timing, the same for every side; timings
TOKENS = 32_768  # most tokens in one forward of the target over texts
TEXTS = 32  # whose rounds are counted
PARTS = ("draft", "verify", "rest", "captured")
WIDTH = 2  # bytes a weight on other hardware: bfloat16


@dataclass(frozen=True)
class Hardware:
    """A device by two numbers of its data sheet: GB/s of memory, dense 16-bit TFLOP/s."""

    name: str
    bandwidth: float
    compute: float

    def seconds(self, weights: float, tokens: float, more_bytes: float = 0.0) -> float:
        """A forward of `tokens` tokens through so many weights, at best."""
        read = (WIDTH * weights + more_bytes) / (1e9 * self.bandwidth)
        return max(read, 2 * weights * tokens / (1e12 * self.compute))


# The makers' data sheets (SXM versions; dense rates).
HARDWARE = (
    Hardware("H100", 3350, 989),
    Hardware("H200", 4800, 989),
    Hardware("A100 80GB", 2039, 312),
    Hardware("RTX 4090", 1008, 165),
)
BATCHES = (1, 8, 32, 128)  # requests at a time elsewhere


def to_hardware(texts: Sequence[str]) -> list[Hardware]:
    """NAME=GB/s,TFLOP/s. Raises `UserError`."""
    found = []
    for text in texts:
        name, _, numbers = text.partition("=")
        try:
            bandwidth, compute = map(float, numbers.split(","))
        except ValueError:
            bandwidth = compute = 0.0
        finite = math.isfinite(bandwidth) and math.isfinite(compute)
        if not name or not finite or min(bandwidth, compute) <= 0:
            raise UserError(f"--hardware {text}: give NAME=GB/s,TFLOP/s, as 'L4=300,121'")
        if name in {h.name for h in found}:
            raise UserError(f"--hardware {text}: '{name}' is there already")
        found.append(Hardware(name, bandwidth, compute))
    return found


def advise(
    target: Target,
    drafter: Drafter,
    made: Sequence[Generation],
    *,
    sampling: Sampling | None = None,
    lengths: Sequence[int] | None = None,
    hardware: Sequence[Hardware] = HARDWARE,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Advice:
    """τ, cost of a round and predicted speed-up for each draft length, and the best one (0: the
    target alone is faster than any).

    made: responses of the target (by any side of a run). With sampling the rounds are drawn given
    the text. `elsewhere` is empty for mixtures of experts: which weights a token reads is unknown.
    """
    sampling = sampling or Sampling()
    longest = drafter.draft_length
    lengths = sorted(set(lengths or [n for n in LENGTHS if 0 < n < longest] + [longest]))
    kind = sampling.as_tuple
    texts = [
        Trajectory(g.prompt_ids, g.token_ids, str(i), g.finish_reason, *kind)
        for i, g in enumerate(made[:TEXTS])
    ]
    traces = traces_by_length(
        target,
        drafter,
        texts,
        lengths,
        sampling=sampling,
        seed=seed,
        batch_size=max(1, min(TEXTS, TOKENS // max(len(t.ids) for t in texts))),
        progress=lambda done: progress and progress(done, len(texts) + 1),
    )
    taus = {n: tau(r for trace in found for r in trace) for n, found in traces.items()}
    alone, costs = round_costs(target, drafter, made, lengths, sampling)
    if progress:
        progress(len(texts) + 1, len(texts) + 1)
    context = round(statistics.mean(len(t.ids) for t in texts))
    rows = [
        LengthCost(
            draft_length=length,
            tau=taus[length],
            milliseconds=RoundParts(**{part: 1000 * cost for part, cost in costs[length].items()}),
            speedup=taus[length] * alone / sum(costs[length].values()),
        )
        for length in lengths
    ]
    elsewhere = []
    for place in () if target.is_mixture else hardware:
        for batch in BATCHES:
            speeds = [roofline(place, target, drafter, n, taus[n], context, batch) for n in lengths]
            elsewhere.append(
                OtherHardware(
                    hardware=place.name,
                    gigabytes_per_second=place.bandwidth,
                    teraflops=place.compute,
                    batch=batch,
                    best=lengths[speeds.index(max(speeds))] if max(speeds) > 1 else 0,
                    speedup=max(speeds),
                    by_length=speeds,
                )
            )
    best = max(rows, key=lambda r: r.speedup)
    return Advice(
        best=best.draft_length if best.speedup > 1 else 0,
        target_milliseconds=1000 * alone,
        context=context,
        responses=len(texts),
        lengths=rows,
        elsewhere=elsewhere,
    )


def round_costs(
    target: Target,
    drafter: Drafter,
    made: Sequence[Generation],
    lengths: Sequence[int],
    sampling: Sampling,
) -> tuple[float, dict[int, dict[str, float]]]:
    """Seconds of a single step of the target, and of a round at each draft length, in the decode
    loop; medians over repeats in alternation, begun in the middle of the longest responses."""
    longest = sorted(made, key=lambda g: -len(g.token_ids))[:REPEATS]
    plans = [(None, None), *((drafter, length) for length in lengths)]
    found: dict[int | None, list[list[float]]] = {length: [] for _, length in plans}
    for repeat in range(-1, REPEATS):  # the first one warms up
        g = longest[repeat % len(longest)]
        ids = [*g.prompt_ids, *g.token_ids[: len(g.token_ids) // 2]]
        for which, length in rotated(plans, repeat):
            clock = Timing()
            result = speculate(
                target,
                which,
                [ids],
                max_new_tokens=STEPS,
                draft_length=length,
                sampling=sampling,
                stop_ids=(),
                timing=clock,
            )[0]
            if repeat >= 0:
                rounds = len(result.rounds)
                found[length].append([getattr(clock, part) / rounds for part in PARTS])
    costs = {
        length: dict(zip(PARTS, map(statistics.median, zip(*rows, strict=True)), strict=True))
        for length, rows in found.items()
    }
    alone = sum(costs.pop(None).values())
    return alone, costs


def roofline(
    hardware: Hardware,
    target: Target,
    drafter: Drafter,
    length: int,
    tau: float,
    context: int,
    batch: int = 1,
) -> float:
    """Upper bound of the speed-up on `hardware`: both sides run at its full rates (roofline).

    Every weight is read once a forward, and the keys and values of `context` tokens a request;
    launches and all that is small are free.
    """
    weights = weights_read(target.model, target.head.weight)
    keys = WIDTH * cached_numbers(target) * context * batch
    single = hardware.seconds(weights, batch, keys)
    verify = hardware.seconds(weights, batch * (length + 1), keys)
    own = weights_read(drafter, drafter.head_weights(target)[0])
    own += drafter.weights_per_token * (length - 1)
    draft = sum(hardware.seconds(own, batch * tokens) for tokens in drafter.forward_token_counts(length))
    return tau * single / (verify + draft)


def weights_read(module: nn.Module, head: Tensor) -> int:
    """Weights that a forward multiplies with: all matrices but embedding tables, and the head."""
    tables = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    matrices = {id(p): p for p in module.parameters() if p.ndim > 1 and id(p) not in tables}
    return sum(p.numel() for p in {**matrices, id(head): head}.values())


def cached_numbers(target: Target) -> int:
    """Keys and values of one token, in the layers that attend; states of other layers do not grow."""
    c = target.config
    heads = config_number(c, "num_key_value_heads") or c.num_attention_heads
    width = config_number(c, "head_dim") or c.hidden_size // c.num_attention_heads
    kinds = getattr(c, "layer_types", None) or ["full_attention"] * target.num_layers
    attending = sum(kind not in ("linear_attention", "conv", "mlp", "moe") for kind in kinds)
    return 2 * attending * heads * width
