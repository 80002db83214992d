"""Makes the trained drafters that the tests use: tests/drafters/FAMILY, a run folder each.

    python scripts/build_test_drafters.py [FAMILY ..]

They are right often enough to accept and wrong often enough to reject. Weights are kept in
bfloat16, and of the run only what a report reads.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from shapes import SHAPES

from draft_opd.data.collect import collect
from draft_opd.data.prompts import read_prompts
from draft_opd.drafters import Drafter
from draft_opd.models.target import Target
from draft_opd.training.config import load_recipe
from draft_opd.training.trainer import Run
from draft_opd.utils.files import write_lines

OUT = Path(__file__).resolve().parent.parent / "tests" / "drafters"
RATES = {"eagle3": 2e-3}  # else 6e-3
STEPS = 600


def main() -> None:
    target = Target.from_pretrained("embedded", device="cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part, limit in (("train", 400), ("heldout", 32)):
            prompts = read_prompts(f"embedded:{part}", limit)
            collect(target, prompts, folder / part, max_new_tokens=320, batch_size=64)
        for family, shape in SHAPES.items():
            if sys.argv[1:] and family not in sys.argv[1:]:
                continue
            pairs = [
                f"data.trajectories={folder / 'train'}",
                f"data.heldout={folder / 'heldout'}",
                f"model.options={shape}",
                f"steps={STEPS}",
                "precision=float32",
                "optim.final_ratio=0",
                f"out={OUT}",
                f"evaluation.every={STEPS // 3}",
                f"optim.learning_rate={RATES.get(family, 6e-3)}",
            ]
            recipe = load_recipe(f"embedded:{family}", pairs, "sft")
            recipe = recipe.model_copy(update={"out": str(folder / family)})
            result = Run("sft", recipe, target=target).train()
            print(f"{family}: τ {result.tau:.2f}")
            place = OUT / family
            shutil.rmtree(place, ignore_errors=True)
            drafter = Drafter.from_pretrained(str(result.last), device="cpu")
            drafter.save_pretrained(place / "last", torch.bfloat16)
            for file in ("recipe.yaml", "run.json", "metrics.jsonl"):
                text = (result.out / file).read_text(encoding="utf-8").replace(name, "")
                write_lines(place / file, text.splitlines())


if __name__ == "__main__":
    main()
