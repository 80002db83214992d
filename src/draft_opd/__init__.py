"""Draft-OPD: speculative-decoding drafters that learn from their own mistakes."""

from importlib import import_module

__version__ = "0.1.0"

# Imported on first use: `draft-opd --help` should not wait for torch.
_HOME = {
    "Drafter": "drafters",
    "Generation": "decoding.generate",
    "Round": "decoding.rounds",
    "Target": "models.target",
    "Trajectory": "data.trajectory",
    "UserError": "utils.errors",
    "acceptance_aware_loss": "losses.divergences",
    "generate": "decoding.generate",
    "hindsight_trace": "hindsight.trace",
    "read_trajectories": "data.trajectory",
    "speculate": "decoding.generate",
    "tau": "decoding.rounds",
    "verify_greedy": "decoding.verification",
    "verify_sampled": "decoding.verification",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'draft_opd' has no attribute '{name}'")
    return getattr(import_module(f"draft_opd.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
