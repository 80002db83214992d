"""Prompts of the embedded target's kind that are neither its training nor its held-out ones.

python benchmarks/validation_prompts.py > runs/validation.jsonl
"""

import json

from draft_opd.data.prompts import read_prompts
from draft_opd.embedded.problems import problems

COUNT = 300


def main() -> None:
    known = {
        p.messages[0]["content"] for name in ("train", "heldout") for p in read_prompts(f"embedded:{name}")
    }
    drawn = dict.fromkeys(p.question for p in problems(3 * COUNT, seed=777))
    fresh = [q for q in drawn if q not in known][:COUNT]
    for i, question in enumerate(fresh):
        print(json.dumps({"id": f"v{i}", "prompt": question}))


if __name__ == "__main__":
    main()
