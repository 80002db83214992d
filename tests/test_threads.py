"""The number of threads is measured, and left set."""

import os
import subprocess
import sys
import time

import pytest
import torch

from draft_opd.utils.machine import tune_num_threads


def test_threads_that_do_not_pay_are_not_taken():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        # Work that gets slower with every thread, as spinning threads on a busy machine do.
        assert tune_num_threads(lambda: time.sleep(0.01 * torch.get_num_threads())) == 1
        assert torch.get_num_threads() == 1
        torch.set_num_threads(4)
        assert tune_num_threads(lambda: time.sleep(0.08 / torch.get_num_threads())) == 4
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_the_command_line_keeps_threads_from_spinning(given, expected):
    """Before torch is loaded, and only where the user has not said otherwise."""
    program = """if True:
        import os, sys
        import draft_opd.cli.main
        assert "torch" not in sys.modules
        print(os.environ.get("GOMP_SPINCOUNT"))
    """
    clean = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**clean, **given}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr
