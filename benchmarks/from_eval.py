"""Keeps what `draft-opd eval --out DIR` or `analyze` found as a result, with machine and commit.

python benchmarks/from_eval.py NAME "COMMAND" DIR [DIR ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import machine

if __name__ == "__main__":
    name, command, *folders = sys.argv[1:]
    found = {}
    for folder in map(Path, folders):
        file = next(f for n in ("eval.json", "analysis.json") if (f := folder / n).exists())
        found[folder.name] = json.loads(file.read_text(encoding="utf-8"))
    machine.write(name, {"command": command, **found})
