"""How far the rounds to go V are from a straight line, and how many of their derivatives have the other sign.

    python benchmarks/value_shape.py --drafter runs/start-10/last --texts-from runs/league/validation

V is linear where every token of a text is worth the same. A derivative ∂V/∂α has the other sign where an
accepted token makes the rest of the text longer: being wrong lands on a better anchor.
"""

from __future__ import annotations

import argparse

import machine
import torch

from draft_opd.data.trajectory import read_trajectories
from draft_opd.decoding.sampling import Sampling
from draft_opd.drafters import Drafter
from draft_opd.losses.rounds_to_go import advantages, occupancy, rounds_to_go, survival_before
from draft_opd.models.target import Target
from draft_opd.training.batches import BatchSource
from draft_opd.training.values import acceptance_everywhere


def shape(alpha: torch.Tensor, valid: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of one text, alpha and valid [A, K]: V's distance from its own line and what a token is worth [A], and
    -∂V(first)/∂α of the valid offsets."""
    count = len(alpha)
    v = rounds_to_go(alpha, valid)
    at = torch.arange(count, dtype=v.dtype)
    line = torch.stack([at, torch.ones_like(at)], 1)
    fitted = line @ torch.linalg.lstsq(line, v[:count, None]).solution
    behind = torch.arange(count)[:, None] + torch.arange(1, alpha.shape[1] + 2)
    alpha = torch.where(valid, alpha.double(), 0.0)
    saved = occupancy(alpha, valid)[:, None] * survival_before(alpha) * advantages(alpha, v[behind])
    return {"apart": v[:count] - fitted[:, 0], "worth": v[:count] - v[1 : count + 1], "saved": saved[valid]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--drafter", required=True, nargs="+")
    parser.add_argument("--texts-from", required=True)
    parser.add_argument("--texts", type=int, default=60)
    parser.add_argument("--name", default="value_shape")
    args = parser.parse_args()
    target = Target.from_pretrained("embedded")
    texts = read_trajectories(args.texts_from, limit=args.texts)
    rows = []
    for folder in args.drafter:
        drafter = Drafter.from_pretrained(folder).requires_grad_(False)
        drafter.bind(target)
        source = BatchSource(target, drafter.target_layers)
        for kind, sharpness in (("hard acceptance", None), ("q(y)", 1.0)):
            found = []
            for text in texts:
                where = (source.batch([text]), drafter.draft_length, Sampling(), sharpness)
                places, alpha = acceptance_everywhere(target, drafter, *where)
                found.append(shape(alpha[0], places.valid[0]))
            whole = {key: torch.cat([f[key] for f in found]) for key in found[0]}
            real = whole["saved"][whole["saved"].abs() > 1e-12]
            rows.append(
                {
                    "drafter": folder,
                    "acceptance": kind,
                    "apart_from_line_sd": whole["apart"].std().item(),
                    "worth_mean": whole["worth"].mean().item(),
                    "worth_sd": whole["worth"].std().item(),
                    "other_sign_share": (real < 0).double().mean().item(),
                    "other_sign_size": (real.clamp_max(0).sum() / real.abs().sum()).abs().item(),
                }
            )
            print({k: round(x, 3) if isinstance(x, float) else x for k, x in rows[-1].items()})
    machine.write(args.name, {"texts": args.texts, "rows": rows})


if __name__ == "__main__":
    main()
