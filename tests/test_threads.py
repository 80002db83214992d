"""The number of threads is measured, and left set."""

import time

import torch

from draft_opd.threads import settle_threads


def test_threads_that_do_not_pay_are_not_taken():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        # Work that gets slower with every thread, as spinning threads on a busy machine do.
        assert settle_threads(lambda: time.sleep(0.01 * torch.get_num_threads())) == 1
        assert torch.get_num_threads() == 1
        torch.set_num_threads(4)
        assert settle_threads(lambda: time.sleep(0.08 / torch.get_num_threads())) == 4
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
