"""What the suite costs: CPU seconds a test, and all of it in units of a fixed product.

CPU seconds of every phase of every test, its ended child processes among them, are shown for the
slowest ten. Their sum over the time of a fixed product on the same machine says how large the suite
is, whatever the machine is and whatever else it does.

    python tests/cost.py    the last run against AGREED: a warning above it, status 1 at twice it
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

AGREED = 370_000  # products, of a whole `make test`
KEY = pytest.StashKey[dict]()
SHOWN = 10


def _cpu_seconds() -> float:
    found = os.times()
    return found.user + found.system + found.children_user + found.children_system


def _measured(item, when: str):
    began = _cpu_seconds()
    result = yield
    item.stash.setdefault(KEY, {})[when] = _cpu_seconds() - began
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item):
    return (yield from _measured(item, "setup"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item):
    return (yield from _measured(item, "call"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item):
    return (yield from _measured(item, "teardown"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    report.user_properties = [("cpu", item.stash.get(KEY, {}).get(call.when, 0.0))]
    return report


def calibrate() -> float:
    """Seconds of a product [512, 512] x [512, 512] in float32 on one thread: the shortest of 50."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, best = torch.ones(512, 512), float("inf")
    for _ in range(50):
        began = time.perf_counter()
        x @ x
        best = min(best, time.perf_counter() - began)
    torch.set_num_threads(threads)
    return best


def pytest_terminal_summary(terminalreporter, config):
    rows = [
        (dict(r.user_properties)["cpu"], r.when, r.nodeid)
        for kind in ("passed", "failed", "error", "skipped", "")
        for r in terminalreporter.stats.get(kind, ())
        if hasattr(r, "user_properties")
    ]
    if len(rows) < SHOWN:
        return
    total, product = sum(seconds for seconds, *_ in rows), calibrate()
    terminalreporter.section(f"cost: the {SHOWN} slowest, in CPU seconds")
    for seconds, when, name in sorted(rows, reverse=True)[:SHOWN]:
        terminalreporter.write_line(f"{seconds:8.1f} {when:8} {name}")
    terminalreporter.write_line(
        f"cost: {total:.0f} CPU s, {total / product:.0f} products of {1000 * product:.2f} ms"
    )
    config.cache.set("draft-opd/cost", total / product)
    config.cache.set("draft-opd/cpu", {f"{name} {when}": s for s, when, name in rows})


def main() -> int:
    """What `.ci/run` says of the run before."""
    file = Path(__file__).parent.parent / ".pytest_cache" / "v" / "draft-opd" / "cost"
    cost = json.loads(file.read_text())
    line = f"the suite costs {cost:.0f} products, {AGREED} are agreed"
    if cost >= 2 * AGREED:
        sys.stderr.write(f"error: {line}: make its tests smaller\n")
        return 1
    sys.stderr.write(f"warning: {line}\n" if cost > AGREED else f"{line}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
