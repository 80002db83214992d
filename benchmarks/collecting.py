r"""How many tokens a second does collecting make, by batch size?

    python benchmarks/collecting.py --target embedded --prompts embedded:train

The product's decode loop with the target alone, as `collect` runs it, against transformers'
`generate` on the same left-padded batches; in one process and in alternation. limit: what a step
must read over the bandwidth, or multiply over the matrix rate, whichever is longer, for tokens of
rows that have not ended.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import limits
import machine
import torch
from decode import plain_model
from transformers import GenerationConfig

from draft_opd.data.prompts import read_prompts
from draft_opd.decoding.generate import speculate
from draft_opd.evaluation.draft_length_advice import weights_read
from draft_opd.models.target import Target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--prompts", default="embedded:train")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype")
    parser.add_argument("--name", default="collecting")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = Target.from_pretrained(args.target, dtype=args.dtype)
    weights = weights_read(target.model, target.head.weight)
    size = weights * target.dtype.itemsize
    reading = size / limits.bandwidth(target.dtype, target.device, max(1, round(size / 2**20)))
    rate = limits.matrix_rate(target.dtype, target.device)
    config = GenerationConfig(
        max_new_tokens=args.tokens,
        do_sample=False,
        eos_token_id=sorted(target.stop_ids),
        pad_token_id=0,
    )

    def ours(rows):
        made = speculate(target, None, rows, max_new_tokens=args.tokens)
        return [g.token_ids for g in made]

    def theirs(rows):
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=target.device)
        real = [[0] * (width - len(r)) + [1] * len(r) for r in rows]
        mask = torch.tensor(real, device=target.device)
        made = plain_model(target).generate(ids, attention_mask=mask, generation_config=config)
        found = []
        for row in made[:, width:].tolist():
            ends = [i for i, token in enumerate(row) if token in target.stop_ids]
            found.append(row[: ends[0] + 1] if ends else row)
        return found

    sides = {"ours": ours, "transformers": theirs}
    prompts = [p.ids(target) for p in read_prompts(args.prompts, max(args.batches) * args.repeats)]
    rows = []
    for batch in args.batches:
        rates: dict[str, list[float]] = {side: [] for side in sides}
        least, same, of = [], 0, 0
        for repeat in range(args.repeats + 1):
            chosen = prompts[max(0, repeat - 1) * batch :][:batch]
            texts = {}
            for side in list(sides)[:: 1 if repeat % 2 else -1]:
                began = time.perf_counter()
                texts[side] = sides[side](chosen)
                if target.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - began
                if repeat:
                    rates[side].append(sum(map(len, texts[side])) / seconds)
            if repeat:
                lengths = [len(t) for t in texts["ours"]]
                going = [sum(n > i for n in lengths) for i in range(max(lengths))]
                prefill = sum(map(len, chosen))
                steps = [max(reading, 2 * weights * n / rate) for n in (prefill, *going)]
                least.append(sum(lengths) / sum(steps))
                same += sum(a == b for a, b in zip(*texts.values(), strict=True))
                of += batch
        rows.append(
            {
                "batch": batch,
                "tokens_per_second": {s: statistics.median(r) for s, r in rates.items()},
                "ours_over_transformers": machine.ratio(rates["ours"], rates["transformers"]),
                "measured_over_limit": statistics.median(
                    a / b for a, b in zip(rates["ours"], least, strict=True)
                ),
                "same_text": f"{same}/{of}",
            }
        )
        print(json.dumps(rows[-1]))
    machine.write(args.name, {"arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main()
