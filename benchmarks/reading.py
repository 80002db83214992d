"""How fast are rows read, and how much memory does that hold?

    python benchmarks/reading.py --rows 1000000

Writes a log of chats, then reads it once in a process of its own for each side: our reader of rows (parse
and bring into one form), `json.loads` alone, and `datasets` in streaming mode where that is installed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = ("ours", "json", "datasets")


def write_log(path: Path, count: int) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    kinds = [
        {"messages": [{"role": "user", "content": "How many are left of 17 after 5 are gone?" * 3}]},
        {"conversations": [{"from": "human", "value": "A row begins with 3, 5, 7."}] * 1},
        {"instruction": "Add the numbers.", "input": "14, 3, 19", "output": "36"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "1 + 2?"}]},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c", "content": "3"},
            ]
        },
    ]
    lines = [json.dumps(k) for k in kinds]
    with path.open("w") as file:
        for i in range(count):
            file.write(lines[i % len(lines)] + "\n")


def read(side: str, path: str) -> None:
    """One pass; prints rows, seconds and the peak of resident memory."""
    if side == "ours":
        from draft_opd.data.conversation import read_row
        from draft_opd.data.row_files import read_rows

        rows = (read_row(row.value) for row in read_rows(path))
    elif side == "json":
        rows = map(json.loads, Path(path).open("rb"))  # noqa: SIM115 - the process ends with it
    else:
        from datasets import load_dataset

        rows = iter(load_dataset("json", data_files=path, split="train", streaming=True))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began, count = time.perf_counter(), 0
    for _ in rows:
        count += 1
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"rows": count, "seconds": seconds, "grown_megabytes": (after - before) / 1024}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        read(args.side, args.path)
        return
    import machine

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        write_log(path, args.rows)
        for side in SIDES:
            words = [sys.executable, __file__, "--side", side, "--path", str(path)]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                print(side, "did not run:", done.stderr.strip().splitlines()[-1])
                continue
            value = json.loads(done.stdout.splitlines()[-1])
            found[side] = {**value, "rows_per_second": value["rows"] / value["seconds"]}
            print(side, found[side])
    machine.write("reading", {"rows": args.rows, "sides": found})


if __name__ == "__main__":
    main()
