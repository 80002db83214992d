r"""How fast is decoding, against others on the same weights, and what would be possible?

    python benchmarks/decode.py --drafter runs/demo/draft_opd/last --prompts embedded:heldout

One prompt at a time, greedily, all sides in one process and in alternation. A prompt's rate is
tokens over seconds, prefill included (the others do not report it); `fixed_over_this` compares our drafter at
its trained length with each side, prompt by prompt. z-lab's own loop takes part
where its package is installed (`pip install "dflash[local]"`) and the drafter is a DFlash one.

limit: what a single step of the target must read, over what products of one row read a second here,
measured before the sides and after; `limit_over_measured` is for the target alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import limits
import machine
import torch
from transformers import GenerationConfig

from draft_opd.data.prompts import read_prompts
from draft_opd.decoding.draft_length import DraftLengthController
from draft_opd.decoding.generate import Timing, speculate
from draft_opd.drafters import Drafter
from draft_opd.evaluation.draft_length_advice import weights_read
from draft_opd.evaluation.measure import rotated
from draft_opd.models.hub import resolve_path
from draft_opd.models.target import Target
from draft_opd.serving.transformers_assistant import as_assistant
from draft_opd.utils.errors import UserError


def zlab_side(path: str, target: Target, drafter: Drafter, tokens: int):
    """z-lab's `dflash_generate` on the same files, or None."""
    if drafter.family != "dflash":
        return None
    try:
        from dflash.model import DFlashDraftModel, dflash_generate
    except ImportError:
        return None
    theirs = DFlashDraftModel.from_pretrained(path, dtype=target.dtype).eval()
    theirs = theirs.to(target.device)
    stops = sorted(target.stop_ids)

    def run(ids: torch.Tensor) -> list[int]:
        with torch.no_grad():
            return dflash_generate(theirs, plain_model(target), ids, tokens, stops)[0].tolist()

    return run


def transformers_side(target: Target, drafter: Drafter, tokens: int):
    """transformers' own DFlash loop with this drafter, or None."""
    try:
        assistant = as_assistant(drafter)
    except UserError:
        return None
    model, stops = plain_model(target), sorted(target.stop_ids)

    def run(ids: torch.Tensor) -> list[int]:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            assistant_model=assistant,
            speculation_type="dflash",
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=stops,
        )[0].tolist()

    return run


def plain_model(target: Target):
    """The model as transformers loads it, without our packed matrices."""
    if not hasattr(target, "_plain"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            resolve_path(target.name), dtype=target.dtype, attn_implementation="sdpa"
        )
        target._plain = model.eval().to(target.device)
    return target._plain


def decode(target: Target, path: str, prompts: str, limit: int, tokens: int) -> dict:
    """All sides on the first `limit` prompts; `path`: the drafter's folder."""
    drafter = Drafter.from_pretrained(path, device=target.device).to(target.dtype)
    pace, clocks = DraftLengthController(drafter.draft_length), {}

    def ours(name, which, **more):
        def run(ids):
            clock = Timing()
            made = speculate(target, which, ids.tolist(), max_new_tokens=tokens, timing=clock, **more)[0]
            clocks.setdefault(name, []).append((clock, made))
            return [*made.prompt_ids, *made.token_ids]

        return run

    def theirs(**more):
        config = GenerationConfig(
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=sorted(target.stop_ids),
            pad_token_id=0,
            **more,
        )

        def run(ids):
            made = plain_model(target).generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config
            )
            return made[0].tolist()

        return run

    fixed = f"drafter, K = {drafter.draft_length}"
    sides = {
        "target alone": ours("target alone", None),
        fixed: ours("fixed", drafter),
        "drafter, automatic K": ours("automatic", drafter, pace=pace),
        "transformers": theirs(),
        "transformers, prompt look-up": theirs(prompt_lookup_num_tokens=10),
    }
    if zlab := zlab_side(path, target, drafter, tokens):
        sides["z-lab's dflash_generate"] = zlab
    if assisted := transformers_side(target, drafter, tokens):
        sides["transformers, our drafter as its assistant"] = assisted
    rows_of = [torch.tensor([p.ids(target)], device=target.device) for p in read_prompts(prompts, limit)]
    weights = weights_read(target.model, target.head.weight) * target.dtype.itemsize

    def allowed() -> float:
        rate = limits.bandwidth(target.dtype, target.device, max(1, round(weights / 2**20)))
        return weights / rate

    least = [allowed()]
    rates: dict[str, list[float]] = {name: [] for name in sides}
    same = dict.fromkeys(sides, 0)
    for run in sides.values():
        run(rows_of[0])  # warms up
    for found in clocks.values():
        found.clear()
    for i, ids in enumerate(rows_of):
        texts = {}
        for name, run in rotated(list(sides.items()), i):
            began = time.perf_counter()
            texts[name] = run(ids)[ids.shape[1] :]
            if target.device.type == "cuda":
                torch.cuda.synchronize()
            rates[name].append(len(texts[name]) / (time.perf_counter() - began))
        for name, text in texts.items():
            same[name] += text == texts["target alone"]
    least.append(allowed())
    alone = [(c, m) for c, m in clocks["target alone"]]
    step = sum(c.decode for c, _ in alone) / sum(len(m.rounds) for _, m in alone)
    rows = [
        {
            "side": name,
            "tokens_per_second": statistics.median(rates[name]),
            "over_target_alone": machine.ratio(rates[name], rates["target alone"]),
            "fixed_over_this": machine.ratio(rates[fixed], rates[name]),
            "same_text": f"{same[name]}/{len(rows_of)}",
        }
        for name in sides
    ]
    taus = {name: [m.tau for _, m in found] for name, found in clocks.items()}
    return {
        "rows": rows,
        "tau": {name: statistics.mean(found) for name, found in taus.items()},
        "step_milliseconds": 1000 * step,
        "limit_milliseconds": [1000 * x for x in least],
        "limit_over_measured": min(least) / step,
        "weights_megabytes": weights / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="embedded")
    parser.add_argument("--drafter", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--limit", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="decode")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target = Target.from_pretrained(args.target, dtype=args.dtype)
    value = decode(target, args.drafter, args.prompts, args.limit, args.tokens)
    for row in value["rows"]:
        print(json.dumps(row))
    machine.write(args.name, {"arguments": vars(args), **value})


if __name__ == "__main__":
    main()
