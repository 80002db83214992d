"""The recipe's section `opd.objective`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from draft_opd.utils.config import Section


class Heads(Section):
    """Losses of what some families have beside the logits that they draft from, in both stages."""

    confidence_weight: float = Field(
        1.0, ge=0, description="of the cross-entropy of DSpark's confidence head"
    )
    confidence_target: Literal["auto", "agreement", "overlap"] = Field(
        "auto",
        description="what it learns: agreement of the argmax with the text's token, or overlap Σ min(p, q) "
        "at sampling.temperature (1 where that is 0); auto: the first where drafts are the argmax",
    )
    body_weight: float = Field(
        1.0,
        ge=0,
        description="of the same loss on the body's own logits, where DFlash2 selects among candidates",
    )

    def learns_agreement(self, argmax: bool) -> bool:
        """Whether the confidence learns agreement with the text; argmax: whether drafts are the argmax."""
        return argmax if self.confidence_target == "auto" else self.confidence_target == "agreement"


class Objective(Section):
    """What OPD minimises at the replayed anchors; `objectives.py` has the equations.

    kind: two streams, accepted and rejected offsets, with a divergence each:
      acceptance_aware  KL(p‖q) on accepted, KL(q‖p) on rejected offsets (the paper)
      forward_kl, reverse_kl, total_variation, log_overlap (LK losses)  the same one on both
    the trajectory's tokens y at the replayed anchors:
      cross_entropy     -log q(y), decaying as in SFT
      auf               -log q(y) up to and including the first wrong proposal (Spec-AUF)
      dpace             -log q(y) with D-PACE's weights
      expected_length   -Σ_k Π_{j<=k} q_j(y_j): expected accepted length, surrogate for greedy
      rounds            the gradient of the expected number of rounds that the text takes
      advantage         -log q(y), weighted with the rounds that accepting the token would save
    distributions along the block:
      expected_overlap  -Σ_k Π_{j<=k} Σ_v min(p_j, q_j): expected accepted length when sampling
      chain_tv          the same per block, accepted and first rejected offsets only
    """

    kind: Literal[
        "acceptance_aware",
        "forward_kl",
        "reverse_kl",
        "total_variation",
        "log_overlap",
        "cross_entropy",
        "auf",
        "dpace",
        "expected_length",
        "rounds",
        "advantage",
        "expected_overlap",
        "chain_tv",
    ] = Field("acceptance_aware", description="the loss, see Objectives")
    gamma: float = Field(0.8, gt=0, le=1, description="position decay of the rejected stream")
    accepted_gamma: float = Field(1.0, gt=0, le=1, description="and of the accepted one")
    accepted_weight: float = Field(1.0, ge=0, description="λ of the accepted stream")
    rejected_weight: float = Field(1.0, ge=0, description="λ of the rejected stream")
    normalization: Literal["streams", "tokens"] = Field(
        "streams", description="a mean of each stream (the paper), or one over all tokens"
    )
    supervise_correction: bool = Field(
        False, description="the first rejected offset in the accepted stream too"
    )
    suffix: bool = Field(True, description="supervise offsets behind the first rejected one")
    estimator: Literal["exact", "top_k", "k1", "k2", "k3", "bernoulli"] = Field(
        "exact", description="of the streams' KL: whole vocabulary, top_k, or the drafted token"
    )
    top_k: int = Field(64, ge=1, description="tokens that the estimator top_k looks at")
    dpace_alpha: float = Field(0.5, ge=0, le=1, description="smoothing of D-PACE's and advantage's weights")
    dpace_alpha_end: float | None = Field(
        None, ge=0, le=1, description="where it ends, step by step in a straight line; null: it stays"
    )
    value_sharpness: float = Field(
        1.0, gt=0, description="β: rounds and advantage take q(y)^β for the acceptance of argmax drafts"
    )
    supervision_temperature: float = Field(1.0, gt=0, description="temperature of p in the loss")
    draft_temperature: float = Field(1.0, gt=0, description="temperature of q in the loss")
    trajectory_weight: float = Field(
        0.0, ge=0, description="adds this times the SFT loss over the whole replayed block"
    )

    def at(self, done: float) -> Objective:
        """The same once that share of the steps (0 to 1) is done."""
        if self.dpace_alpha_end is None:
            return self
        alpha = self.dpace_alpha + (self.dpace_alpha_end - self.dpace_alpha) * done
        return self.model_copy(update={"dpace_alpha": alpha})
