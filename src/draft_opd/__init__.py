"""Draft-OPD: speculative-decoding drafters that learn from their own mistakes."""

from draft_opd.decoding.speculative import Generation, generate, speculate
from draft_opd.decoding.verification import verify_greedy, verify_sampled
from draft_opd.drafters import Drafter
from draft_opd.errors import UserError
from draft_opd.rollout.hindsight import hindsight_trace
from draft_opd.rollout.trace import Round, tau
from draft_opd.rollout.trajectory import Trajectory, read_trajectories
from draft_opd.target import Target
from draft_opd.training.losses import acceptance_aware_loss

__version__ = "0.1.0"

__all__ = [
    "Drafter",
    "Generation",
    "Round",
    "Target",
    "Trajectory",
    "UserError",
    "acceptance_aware_loss",
    "generate",
    "hindsight_trace",
    "read_trajectories",
    "speculate",
    "tau",
    "verify_greedy",
    "verify_sampled",
]
