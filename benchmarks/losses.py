r"""What do loss kernels cost, whole, in chunks, and in chunks with closed gradients?

    python benchmarks/losses.py

Forward and backward to the hidden states (frozen head), 1,024 draft tokens of width 576, by
vocabulary. whole: automatic differentiation over one matrix [tokens, vocabulary]; chunks: the same
over 4M logits at a time; ours: what training runs. Peak memory is resident pages above what was
held before (on CUDA: the allocator's count). limit: three products of the head (logits, the
target's logits where they are needed, gradient) at the matrix rate measured in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import limits
import machine
import torch
from scaling import Peak

from draft_opd.losses.chunked import chunked_score
from draft_opd.losses.divergences import cross_entropy, forward_kl, reverse_kl, total_variation

TOKENS, WIDTH = 1024, 576
SCORES = {f.__name__: f for f in (cross_entropy, forward_kl, reverse_kl, total_variation)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[281, 32_000, 152_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="losses")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    rate = limits.matrix_rate(torch.float32, device)
    rows = []
    for size in args.vocabularies:
        torch.manual_seed(0)
        states = torch.randn(TOKENS, WIDTH, device=device)
        head = torch.randn(size, WIDTH, device=device) / WIDTH**0.5
        labels = torch.randint(size, (TOKENS,), device=device)
        for name, score in SCORES.items():
            compared = score is not cross_entropy

            def direct(hidden, states, labels, score=score, head=head, compared=compared):
                told = states @ head.t() if compared else labels
                return score(hidden @ head.t(), told)

            def whole(hidden, direct=direct, states=states, labels=labels):
                direct(hidden, states, labels).sum().backward()

            def chunks(hidden, direct=direct, states=states, labels=labels, size=size):
                step = max(16, (1 << 22) // size)
                for start in range(0, TOKENS, step):
                    part = slice(start, start + step)
                    direct(hidden[part], states[part], labels[part]).sum().backward()

            def ours(hidden, score=score, states=states, labels=labels, head=head, compared=compared):
                references = {"teacher_hidden": states} if compared else {"labels": labels}
                chunked_score(score, hidden, head, **references).sum().backward()

            sides = {"whole": whole, "chunks": chunks, "ours": ours}
            times: dict[str, list[float]] = {side: [] for side in sides}
            peaks = dict.fromkeys(sides, 0)
            for repeat in range(args.repeats + 1):
                for side in list(sides)[:: 1 if repeat % 2 else -1]:
                    hidden = torch.randn(TOKENS, WIDTH, device=device, requires_grad=True)
                    peak, began = Peak(device), time.perf_counter()
                    sides[side](hidden)
                    if device.type == "cuda":
                        torch.cuda.synchronize()
                    if repeat:
                        times[side].append(time.perf_counter() - began)
                        peaks[side] = max(peaks[side], peak.bytes())
            least = (3 if compared else 2) * 2 * TOKENS * WIDTH * size / rate
            rows.append(
                {
                    "vocabulary": size,
                    "score": name,
                    "milliseconds": {s: 1000 * statistics.median(t) for s, t in times.items()},
                    "whole_over_ours": machine.ratio(times["whole"], times["ours"]),
                    "peak_megabytes": {s: p / 1e6 for s, p in peaks.items()},
                    "limit_milliseconds": 1000 * least,
                    "limit_over_measured": least / statistics.median(times["ours"]),
                }
            )
            print(json.dumps(rows[-1]))
    machine.write(args.name, {"arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
